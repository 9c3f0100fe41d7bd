"""What a job is, where it stands, and what it leaves."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from prefixtune.errors import RequestError
from prefixtune.prefix.folder import check_name

JobStatus = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
"""As OpenAI's fine-tuning jobs name them."""
UNFINISHED: tuple[JobStatus, ...] = ("queued", "running", "paused")
ENDED: tuple[JobStatus, ...] = ("succeeded", "failed", "cancelled")


def new_job_id() -> str:
    """An id that nobody can guess."""
    return f"ftjob-{secrets.token_hex(12)}"


class _Stored(BaseModel):
    """What the database holds as JSON."""

    # A newer version may have stored more: whoever lists goes on without it, and `PROTOCOL` keeps such a job from
    # workers that would train by a part of it.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Job(_Stored):
    """What somebody asked for. It never changes once it is queued.

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
    config: dict[str, Any] = Field(default_factory=dict)
    training_file: str = ""
    validation_file: str = ""
    questions_file: str = ""
    seed: int = 0
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    extension: dict[str, Any] = Field(default_factory=dict)
    integrations: list[dict[str, Any]] = Field(default_factory=list)
    suffix: str = ""
    metadata: dict[str, str] = Field(default_factory=dict)


class JobResult(_Stored):
    """What a job that succeeded left.

    Attributes:
        name: The prefix is served under this name.
        trained_tokens: Tokens of all steps, as they were counted for the loss.
        steps: Optimizer steps.
        result_files: Ids of files of the owner: the metrics as CSV.
        best_loss: Lowest loss on the validation file, in nats per token; None without one.
    """

    name: str
    trained_tokens: int
    steps: int
    result_files: list[str] = Field(default_factory=list)
    best_loss: float | None = None


class JobError(_Stored):
    """Why a job failed.

    Attributes:
        code: One word, such as `invalid_training_file`.
        message: What its owner may read: it names no path.
        param: The field of the request that it is about; None: none.
    """

    code: str
    message: str
    param: str | None = None


class JobPausedError(Exception):
    """A job cannot go on now, by no fault of its own: it is paused, and what it has trained is kept.

    The message is the reason, as its owner may read it: a part of a sentence.
    """


@dataclass(frozen=True)
class JobState:
    """A job as it stands.

    Attributes:
        job: What was asked for.
        status: Where it stands.
        finished: When it ended, in seconds since 1970; None: not yet.
        result: If it succeeded.
        error: If it failed.
        worker: Who trains it now; empty: nobody.
    """

    job: Job
    status: JobStatus
    finished: int | None = None
    result: JobResult | None = None
    error: JobError | None = None
    worker: str = ""


# --- names of results and their checkpoints ---

_MAX_LENGTH = 112
"""Longest name of a result, so that `.step-N` can follow it."""
_CHECKPOINT = re.compile(r"\.step-[0-9]+\Z")


def checkpoint_name(name: str, step: int) -> str:
    """What a checkpoint of a result is served as.

    >>> checkpoint_name("support", 40)
    'support.step-40'
    """
    return f"{name}.step-{step}"


def check_result_name(name: str) -> None:
    """Refuse names that no result can have.

    Raises:
        RequestError: It is no name of a prefix, too long, or that of a checkpoint.
    """
    check_name(name)
    if len(name) > _MAX_LENGTH:
        raise RequestError(
            f"the name {name[:32]!r}... has {len(name)} characters.", hint=f"use at most {_MAX_LENGTH} characters."
        )
    if _CHECKPOINT.search(name):
        raise RequestError(
            f"{name!r} is a name for a checkpoint.", hint="use a name that does not end with '.step-' and a number."
        )
