"""What a job is, where it stands, and why it fails or waits."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from prefixtune import errors
from prefixtune.utils.locks import FolderBusyError

JobStatus = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
"""As OpenAI's fine-tuning jobs name them."""
ENDED: tuple[JobStatus, ...] = ("succeeded", "failed", "cancelled")


class Job(BaseModel, frozen=True):
    """What somebody asked for, as the database holds it. It never changes once it is queued.

    A newer version may have stored more: whoever lists goes on without it, and `PROTOCOL` keeps such a job from workers
    that would train by a part of it.

    Attributes:
        id: `ftjob-...`.
        owner: The name of the key that asked; `local` where the server has no keys.
        created: When, in seconds since 1970.
        model: As asked for: the backbone's name, or the prefix that training goes on from.
        name: What the result will be served as.
        kind: Whether it trains on examples or distills a document.
        backbone: Which workers may train it: those of this backbone (`backbone.identity`).
        fingerprint: Of the server's weights, which the worker's must equal; empty: the server has none.
        config: Fields of `TrainConfig` (or, of a document, `DistillConfig`) that differ from their defaults, without
            paths: checked when the job was made, and all that the worker trains by.
        training_file: Id of the uploaded file; of a document, the document's.
        validation_file: Id of the file to choose the best prefix by; empty: none.
        questions_file: Id of a document's questions; empty: the model makes them.
        seed: Of the start and the order of the data.
        hyperparameters: `n_epochs`, `batch_size` and `learning_rate_multiplier`, as numbers.
        extension: The request's object `prefixtune`, as asked for.
        integrations: The request's tracker, as asked for, or none.
        suffix: As asked for; empty: none.
        metadata: As asked for.
    """

    id: str
    owner: str
    created: int
    model: str
    name: str = ""
    kind: Literal["examples", "document"] = "examples"
    backbone: str = ""
    fingerprint: str = ""
    config: dict[str, Any] = {}
    training_file: str = ""
    validation_file: str = ""
    questions_file: str = ""
    seed: int = 0
    hyperparameters: dict[str, Any] = {}
    extension: dict[str, Any] = {}
    integrations: list[dict[str, Any]] = []
    suffix: str = ""
    metadata: dict[str, str] = {}


class JobError(BaseModel, frozen=True):
    """Why a job failed, as the database holds it.

    Attributes:
        code: One word, such as `invalid_training_file`.
        message: What its owner may read: it names no path.
        param: The field of the request that it is about; None: none.
    """

    code: str
    message: str
    param: str | None = None


class RefusedError(errors.RequestError):
    """A request for training is wrong.

    Attributes:
        param: The field at fault.
        code: For programs; None: there is none.
    """

    def __init__(self, param: str, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


@dataclass(frozen=True)
class JobState:
    """A job as it stands.

    Attributes:
        job: What was asked for.
        status: Where it stands.
        finished: When it ended, in seconds since 1970; None: not yet.
        error: If it failed.
        worker: Who trains it now; empty: nobody.
    """

    job: Job
    status: JobStatus
    finished: int | None = None
    error: JobError | None = None
    worker: str = ""


def metrics_file_id(job_id: str) -> str:
    """The id of the file with the metrics of a job that succeeded.

    >>> metrics_file_id("ftjob-0123456789abcdef01234567")
    'file-0123456789abcdef01234567'
    """
    return job_id.replace("ftjob", "file")


def checkpoint_name(name: str, step: int | str) -> str:
    """What a checkpoint of a result is served as.

    >>> checkpoint_name("support", 40)
    'support.step-40'
    """
    return f"{name}.step-{step}"


# --- why a job fails or waits -----------------------------------------------------------------------------------------

_CODES: tuple[tuple[type[errors.PrefixError], str, str | None], ...] = (
    (errors.DataError, "invalid_training_file", "training_file"),
    (errors.ConfigError, "invalid_hyperparameters", None),
    (errors.BackboneError, "unsupported_model", "model"),
    (errors.CheckpointError, "invalid_state", None),
    (errors.TrainingError, "training_failed", "hyperparameters.learning_rate_multiplier"),
)
_FOLDERS = re.compile(r"(?<![\w.])/(?:[^/'\"]+/)*")
"""Before the name of a file."""


def pause_reason(error: Exception) -> str:
    """Why a job is paused by an error, as a sentence: what the disk refuses may pass; empty: it fails."""
    if isinstance(error, FolderBusyError):
        return error.message
    refused = [one.errno for one in errors.causes(error) if isinstance(one, OSError)]
    if not refused or isinstance(error, errors.DataError | errors.ConfigError | errors.BackboneError):
        return ""
    if {errno.ENOSPC, errno.EDQUOT} & set(refused):
        return "the disk of the training service is full."
    return "a file or folder of the training service cannot be used now."


def failure_of(error: Exception) -> JobError:
    """What a job's owner is told of the error that ended it: without any path of the machine."""
    if errors.is_out_of_memory(error):
        message = "a training step needs more memory than there is; choose a smaller batch_size or shorter examples."
        return JobError(code="out_of_memory", message=message, param="hyperparameters.batch_size")
    for kind, code, param in _CODES:
        if isinstance(error, kind):
            if isinstance(error, errors.DataError) and error.of_development:
                code, param = "invalid_validation_file", "validation_file"
            # A hint may name an option of a command line, which is not the reader's.
            message = _FOLDERS.sub("", error.message if "--" in error.hint else str(error))
            return JobError(code=code, message=message[:1000], param=param)
    message = "the training failed for a reason that was not foreseen; the service's log has it."
    return JobError(code="internal_error", message=message)
