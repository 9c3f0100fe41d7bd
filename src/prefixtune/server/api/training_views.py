"""Jobs, their events and their checkpoints as OpenAI's clients read them."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from typing import Any

from prefixtune.jobs.checkpoints import Checkpoint
from prefixtune.jobs.events import JobEvent, JobEvents, Progress
from prefixtune.jobs.folder import DataFolder
from prefixtune.jobs.job import Job, JobState
from prefixtune.jobs.request import resolved_hyperparameters

__all__ = ["checkpoint_view", "event_view", "job_view"]


_LATE_SECONDS = 30.0
"""What was to be done so long ago and is not was estimated wrongly."""


def job_view(state: JobState, folder: DataFolder, positions: Mapping[str, int]) -> dict[str, Any]:
    """A job; reads how far it is, so not for the event loop.

    Args:
        state: How it stands.
        folder: Where its progress is.
        positions: Id of a job that waits -> how many come before it.
    """
    job, result, error = state.job, state.result, state.error
    progress = JobEvents(folder.job(job.id)).progress() if state.status != "queued" else None
    hyperparameters = resolved_hyperparameters(job)
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created,
        "finished_at": state.finished,
        "status": state.status,
        "model": job.model,
        "fine_tuned_model": result.name if result else None,
        "error": error.model_dump() if error else None,
        "training_file": _asked_training_file(job),
        "validation_file": job.validation_file or None,
        "result_files": list(result.result_files) if result else [],
        "trained_tokens": result.trained_tokens if result else None,
        "estimated_finish": _estimated_finish(progress) if state.status == "running" else None,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "seed": job.seed,
        "integrations": job.integrations,
        "metadata": job.metadata,
        "organization_id": job.owner,
        "user_provided_suffix": job.suffix or None,
        "prefixtune": {
            "name": job.name,
            "kind": job.kind,
            "options": job.extension,
            "position": positions.get(job.id),
            "progress": _progress_view(progress) if progress else None,
            "best_loss": result.best_loss if result else None,
        },
    }


def _asked_training_file(job: Job) -> str:
    """What the request called the training file: of a document, perhaps the questions about it."""
    if "document" in job.extension and "questions" not in job.extension and job.questions_file:
        return job.questions_file
    return job.training_file


def _estimated_finish(progress: Progress | None) -> int | None:
    """When a job that runs will be done, in seconds since 1970; None: it is not known."""
    if progress is None or progress.seconds_left is None:
        return None
    finish = math.ceil(progress.updated + progress.seconds_left)
    # Of a worker that was killed, or that prepares another job.
    return finish if finish > time.time() - _LATE_SECONDS else None


def _progress_view(progress: Progress) -> dict[str, Any]:
    return progress.model_dump(include={"step", "total_steps", "loss", "seconds_left", "updated", "trained_tokens"})


def event_view(event: JobEvent) -> dict[str, Any]:
    """Something that happened to a job."""
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.created,
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data,
    }


def checkpoint_view(job: Job, checkpoint: Checkpoint) -> dict[str, Any]:
    """The prefix of one evaluation."""
    return {
        "id": f"ftckpt-{hashlib.sha256(f'{job.id}/{checkpoint.step}'.encode()).hexdigest()[:24]}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created,
        "fine_tuning_job_id": job.id,
        "fine_tuned_model_checkpoint": checkpoint.name,
        "step_number": checkpoint.step,
        "metrics": {"step": checkpoint.step, **checkpoint.metrics},
    }
