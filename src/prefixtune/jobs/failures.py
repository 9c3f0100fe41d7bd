"""Why a job failed or was paused, as its owner may read it: without any path of the machine."""

from __future__ import annotations

import errno
from pathlib import Path

from prefixtune.errors import (
    BackboneError,
    CheckpointError,
    ConfigError,
    DataError,
    PrefixError,
    TrainingError,
    causes,
    is_out_of_memory,
)
from prefixtune.jobs.executor import JobFailedError
from prefixtune.jobs.folder import JobFolder
from prefixtune.jobs.job import JobError
from prefixtune.prefix.folder import FolderBusyError

__all__ = ["describe_failure", "describe_obstacle", "is_foreseen", "is_temporary", "may_be_mended"]


_CODES: tuple[tuple[type[PrefixError], str, str | None], ...] = (
    (DataError, "invalid_training_file", "training_file"),
    (ConfigError, "invalid_hyperparameters", None),
    (BackboneError, "unsupported_model", "model"),
    (CheckpointError, "invalid_state", None),
)
_LONGEST = 1000
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_GONE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""What does not pass by itself, in a folder that is there."""
_MENDABLE = ("name_taken", "prefix_too_large")


def is_foreseen(error: BaseException) -> bool:
    """Whether the message says all; of another error the worker's log needs the traceback."""
    return isinstance(error, PrefixError | JobFailedError) or is_out_of_memory(error) or _is_out_of_space(error)


def is_temporary(error: BaseException, folder: JobFolder) -> bool:
    """Whether a file could not be written, or a folder not be used, for a reason that may pass, such as a full disk.

    A file of the job that is gone is gone for good, unless all jobs are, as where a disk is not mounted now.
    """
    if isinstance(error, JobFailedError | DataError | ConfigError | BackboneError):
        return False
    return any(not _is_gone(one, folder) for one in _refusals(error))


def _refusals(error: BaseException) -> list[BaseException]:
    """What the disk, or others who change a folder, refused."""
    return [one for one in causes(error) if isinstance(one, FolderBusyError | OSError)]


def _is_gone(error: BaseException, folder: JobFolder) -> bool:
    if not isinstance(error, _GONE) or not folder.root.parent.is_dir():
        return False
    return not isinstance(error.filename, str) or Path(error.filename).is_relative_to(folder.root)


def may_be_mended(error: BaseException) -> bool:
    """Whether a result that cannot be published is to be kept: its name or size is in the way, or a mistake of ours."""
    if isinstance(error, JobFailedError):
        return error.error.code in _MENDABLE
    return not isinstance(error, PrefixError)


def describe_obstacle(error: BaseException) -> str:
    """Why the service has paused a job, as a part of a sentence."""
    if isinstance(error, JobFailedError):
        return error.error.message.removesuffix(".")
    if _is_out_of_space(error):
        return "the disk of the training service is full"
    if _refusals(error):
        return "a file or folder of the training service cannot be used now"
    return "the new model could not be stored, for a reason that the service's log has"


def describe_failure(error: BaseException, folder: JobFolder) -> JobError:
    """What a job's owner is told of the error that ended it."""
    if isinstance(error, JobFailedError):
        return error.error
    if is_out_of_memory(error):
        message = "a training step needs more memory than there is; choose a smaller batch_size or shorter examples."
        return JobError(code="out_of_memory", message=message, param="hyperparameters.batch_size")
    if isinstance(error, TrainingError):
        # The rest is about the folder of the run.
        reason = error.message.partition(";")[0].removesuffix(".")
        message = f"{reason}; try a lower learning_rate_multiplier."
        return JobError(code="training_failed", message=message, param="hyperparameters.learning_rate_multiplier")
    for kind, code, param in _CODES:
        if isinstance(error, kind):
            return JobError(code=code, message=_without_paths(_with_hint(error), folder), param=param)
    message = "the training failed for a reason that was not foreseen; the service's log has it."
    return JobError(code="internal_error", message=message)


def _with_hint(error: PrefixError) -> str:
    return f"{error.message} {error.hint[:1].upper()}{error.hint[1:]}".rstrip()


def _without_paths(message: str, folder: JobFolder) -> str:
    """A message with the names of a job's files in place of their paths."""
    for prefix in (f"{folder.inputs}/", f"{folder.root}/", f"{folder.root.parent}/"):
        message = message.replace(prefix, "")
    return message[:_LONGEST]


def _is_out_of_space(error: BaseException) -> bool:
    return any(isinstance(one, OSError) and one.errno in _NO_SPACE for one in causes(error))
