"""Jobs, their events and checkpoints, and lists in pages, as OpenAI's clients read them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import Query

from prefixtune.jobs.folder import DataFolder, JobEvent, Progress
from prefixtune.jobs.job import Job, JobState, metrics_file_id
from prefixtune.jobs.publish import Checkpoint
from prefixtune.server.responses import ApiError, bad_request

After = Annotated[str, Query(description="The id of the last item of the page before.")]
Limit = Annotated[int, Query(ge=1, le=100, description="Most items.")]

_LATE_SECONDS = 30.0
"""An estimate this far in the past was wrong."""


def job_view(state: JobState, folder: DataFolder, positions: Mapping[str, int]) -> dict[str, Any]:
    """A job; reads how far it is, so not for the event loop.

    Args:
        state: How it stands.
        folder: Where its progress is.
        positions: Id of a job that waits -> how many come before it.
    """
    job, error = state.job, state.error
    progress = folder.job(job.id).progress() if state.status != "queued" else None
    ended = progress if state.status == "succeeded" else None
    return {
        "object": "fine_tuning.job",
        **job.model_dump(include={"id", "model", "seed", "integrations", "metadata"}),
        "created_at": job.created,
        "finished_at": state.finished,
        "status": state.status,
        "fine_tuned_model": job.name if state.status == "succeeded" else None,
        "error": error.model_dump() if error else None,
        "training_file": job.training_file,
        "validation_file": job.validation_file or None,
        "result_files": [metrics_file_id(job.id)] if state.status == "succeeded" else [],
        "trained_tokens": ended.trained_tokens if ended else None,
        "estimated_finish": _estimated_finish(progress) if state.status == "running" else None,
        "hyperparameters": job.hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": job.hyperparameters}},
        "organization_id": job.owner,
        "user_provided_suffix": job.suffix or None,
        "prefixtune": {
            "name": job.name,
            "kind": job.kind,
            "options": job.extension,
            "position": positions.get(job.id),
            "progress": progress.model_dump() if progress else None,
            "best_loss": ended.best_loss if ended else None,
        },
    }


def _estimated_finish(progress: Progress | None) -> int | None:
    """When a job that runs will be done, in seconds since 1970; None: it is not known."""
    if progress is None or progress.seconds_left is None:
        return None
    finish = math.ceil(progress.updated + progress.seconds_left)
    # Of a worker that was killed, or that prepares another job.
    return finish if finish > time.time() - _LATE_SECONDS else None


def event_view(event: JobEvent) -> dict[str, Any]:
    """Something that happened to a job."""
    facts = {"created_at": event.created, "type": "metrics" if event.data else "message"}
    return {"object": "fine_tuning.job.event", **facts, **event.model_dump(exclude={"created"})}


def checkpoint_view(job: Job, checkpoint: Checkpoint) -> dict[str, Any]:
    """The prefix of one evaluation."""
    return {
        "id": f"{job.id.replace('ftjob', 'ftckpt')}-{checkpoint.step}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created,
        "fine_tuning_job_id": job.id,
        "fine_tuned_model_checkpoint": checkpoint.path.stem,
        "step_number": checkpoint.step,
        "metrics": {"step": checkpoint.step, **checkpoint.metrics},
    }


# --- lists in pages ---------------------------------------------------------------------------------------------------


def page_of(items: Sequence[dict[str, Any]], after: str, limit: int) -> dict[str, Any]:
    """The page of a whole list, which is in the wanted order.

    Raises:
        ApiError: 400: `after` names none of the items.
    """
    start = 0
    if after:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise unknown_after(after)
        start = ids.index(after) + 1
    return list_body(items[start : start + limit], has_more=len(items) > start + limit)


def unknown_after(after: str) -> ApiError:
    """400: `after` names no item of the list."""
    return bad_request(f"after is {after[:80]!r}, which is not in this list.", "after")


def list_body(items: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """A page as clients read it."""
    ids = [item["id"] for item in items] or [None]
    return {"object": "list", "data": list(items), "first_id": ids[0], "last_id": ids[-1], "has_more": has_more}
