"""Why a job failed or was paused, as its owner may read it: without any path of the machine."""

from __future__ import annotations

import errno

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
from prefixtune.jobs.executor import JobFailedError, JobPausedError
from prefixtune.jobs.folder import JobFolder
from prefixtune.jobs.job import JobError
from prefixtune.prefix.folder import FolderBusyError

__all__ = ["describe_failure", "is_foreseen", "pause_reason"]


_CODES: tuple[tuple[type[PrefixError], str, str | None], ...] = (
    (DataError, "invalid_training_file", "training_file"),
    (ConfigError, "invalid_hyperparameters", None),
    (BackboneError, "unsupported_model", "model"),
    (CheckpointError, "invalid_state", None),
)
_LONGEST = 1000
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def is_foreseen(error: BaseException) -> bool:
    """Whether the message says all; of another error the worker's log needs the traceback."""
    return isinstance(error, PrefixError | JobFailedError | JobPausedError | OSError) or is_out_of_memory(error)


def pause_reason(error: BaseException) -> str:
    """Why a job is paused by an error, as a part of a sentence: what the disk refuses may pass; empty: it fails."""
    if isinstance(error, JobPausedError):
        return str(error)
    refused = [one for one in causes(error) if isinstance(one, FolderBusyError | OSError)]
    if not refused or isinstance(error, JobFailedError | DataError | ConfigError | BackboneError):
        return ""
    if any(isinstance(one, OSError) and one.errno in _NO_SPACE for one in refused):
        return "the disk of the training service is full"
    return "a file or folder of the training service cannot be used now"


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
            message = f"{error.message} {error.hint[:1].upper()}{error.hint[1:]}".rstrip()
            for prefix in (f"{folder.inputs}/", f"{folder.root}/", f"{folder.root.parent}/"):
                message = message.replace(prefix, "")
            return JobError(code=code, message=message[:_LONGEST], param=param)
    message = "the training failed for a reason that was not foreseen; the service's log has it."
    return JobError(code="internal_error", message=message)
