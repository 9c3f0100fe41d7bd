"""`/v1/fine_tuning/jobs`: ask for training, look how it goes, stop it. OpenAI's interface.

Each key sees its own jobs; an admin key, and everybody where there are no keys, sees all.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from fastapi.concurrency import run_in_threadpool

from prefixtune.errors import RequestError
from prefixtune.jobs.folder import JOB_ID
from prefixtune.jobs.job import ENDED, JobState
from prefixtune.jobs.publish import checkpoints
from prefixtune.jobs.queue import JobQueue, QueueUnavailableError
from prefixtune.server.api.endpoint import RequestContext, TrainingContext, key_router
from prefixtune.server.api.job_creation import create_job
from prefixtune.server.api.training_protocol import FineTuningRequest
from prefixtune.server.api.training_views import (
    After,
    Limit,
    checkpoint_view,
    event_view,
    job_view,
    list_body,
    page_of,
    unknown_after,
)
from prefixtune.server.responses import ApiError, bad_request

router = key_router()
_JOBS, _JOB = "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/{job_id}"
_AT_ONCE = 100
"""Jobs of a list that are read in one turn."""
_ACTIONS: dict[str, tuple[tuple[str, ...], str, Callable[[JobQueue, str], JobState]]] = {
    "cancel": (("queued", "running", "paused"), "cancelled", JobQueue.cancel),
    "pause": (("queued", "running"), "paused", JobQueue.pause),
    "resume": (("paused",), "queued", JobQueue.resume),
}
"""What may be done with a job -> where it must stand, where it stands then, and how."""


@router.post(_JOBS)
async def create_fine_tuning_job(body: FineTuningRequest, context: TrainingContext) -> dict[str, Any]:
    """Ask for training.

    With a header `Idempotency-Key`, a request that is sent again gets the same job.
    """
    # With a key, a request that is sent again gets the same job.
    changes = not context.request.headers.get("idempotency-key")
    create = partial(create_job, context, body=body)
    job = await context.training.ask(lambda queue: _view(context, queue, create(queue)), changes=changes)
    context.log_fields |= {"job": job["id"], "model": job["model"]}
    return job


@router.get(_JOBS)
async def list_fine_tuning_jobs(context: TrainingContext, after: After = "", limit: Limit = 20) -> dict[str, Any]:
    """The jobs, the newest first.

    With `metadata[team]=blue` in the query, only those with this metadata; with `metadata=null`, those without any.
    """
    training, query = context.training, context.request.query_params.multi_items()
    whose, found, last = training.whose(context.caller), list[JobState](), after
    metadata = {name[9:-1]: value for name, value in query if name.startswith("metadata[") and name[-1] == "]"}
    without = ("metadata", "null") in query
    # `/v1/models` may leave it out, by the patterns of the key.
    extension = {"backbone": context.state.config.model_id}

    # Others have their turns between two pages: a rare metadata may be far behind.
    while len(found) <= limit:
        try:
            page = await training.ask(partial(_page, owner=whose, after=last))
        except RequestError:
            raise unknown_after(after) from None
        if not page:
            break
        last = page[-1].job.id
        kept = (state for state in page if not (without and state.job.metadata))
        found += [state for state in kept if metadata.items() <= state.job.metadata.items()]

    def show(queue: JobQueue) -> list[dict[str, Any]]:
        positions = _positions(queue, found[:limit])
        return [job_view(state, training.folder, positions) for state in found[:limit]]

    return {**list_body(await training.ask(show), has_more=len(found) > limit), "prefixtune": extension}


@router.get(_JOB)
async def show_fine_tuning_job(job_id: str, context: TrainingContext) -> dict[str, Any]:
    """A job as it stands."""
    return await context.training.ask(lambda queue: _view(context, queue, _get(context, queue, job_id)))


@router.post(f"{_JOB}/{{action}}")
async def change_fine_tuning_job(
    job_id: str, action: Literal["cancel", "pause", "resume"], context: TrainingContext
) -> dict[str, Any]:
    """Stop a job for good, or so that it can be resumed; or queue a paused one again."""
    allowed, done, change = _ACTIONS[action]

    def work(queue: JobQueue) -> dict[str, Any]:
        state = _get(context, queue, job_id)
        if is_allowed := state.status in allowed:
            # What a worker has published in the same moment is removed by one.
            state = change(queue, state.job.id)
            # Else it ended in the same moment.
            is_allowed = state.status == done or action == "resume"
        if not is_allowed:
            message = f"{state.job.id} is {state.status}; only one that is {' or '.join(allowed)} takes {action!r}."
            raise bad_request(message, code="job_ended" if state.status in ENDED else f"job_{state.status}")
        if action == "resume":
            context.training.wake()
        return _view(context, queue, state)

    return await context.training.ask(work, changes=True)


@router.get(f"{_JOB}/events")
async def list_fine_tuning_events(
    job_id: str, context: TrainingContext, after: After = "", limit: Limit = 20
) -> dict[str, Any]:
    """What happened to a job, the newest first."""
    state = await context.training.ask(lambda queue: _get(context, queue, job_id))
    events = await run_in_threadpool(context.training.folder.job(state.job.id).events)
    return page_of([event_view(one) for one in events[::-1]], after, limit)


@router.get(f"{_JOB}/checkpoints")
async def list_fine_tuning_checkpoints(
    job_id: str, context: TrainingContext, after: After = "", limit: Limit = 10
) -> dict[str, Any]:
    """The prefixes of a job's last evaluations, the newest first; they are served once the job has succeeded.

    Those that are not served any more are left out then.
    """
    state = await context.training.ask(lambda queue: _get(context, queue, job_id))
    own, served = context.training.folder.job(state.job.id).checkpoints, context.state.store.folder
    found = await run_in_threadpool(checkpoints, state.job, served if state.status == "succeeded" else own)
    return page_of([checkpoint_view(state.job, one) for one in reversed(found)], after, limit)


# --- one job ----------------------------------------------------------------------------------------------------------


def _get(context: RequestContext, queue: JobQueue, job_id: str) -> JobState:
    """A job, as far as the caller may see it.

    Raises:
        ApiError: 404.
    """
    context.log_fields["job"] = job_id[:64]
    with contextlib.suppress(RequestError):
        state = queue.get(job_id) if JOB_ID.fullmatch(job_id) else None
        if state is not None and context.training.whose(context.caller) in (None, state.job.owner):
            return state
    raise ApiError(404, f"there is no fine-tuning job {job_id[:64]!r}.", code="job_not_found")


def _view(context: RequestContext, queue: JobQueue, state: JobState) -> dict[str, Any]:
    """A job as clients read it."""
    return job_view(state, context.training.folder, _positions(queue, [state]))


def _page(queue: JobQueue, owner: str | None, after: str) -> list[JobState]:
    """Some jobs, the newest first."""
    return list(itertools.islice(queue.iterate(owner, after), _AT_ONCE))


def _positions(queue: JobQueue, states: Sequence[JobState]) -> dict[str, int]:
    """How many jobs come before those that wait; of none if the database has just gone away."""
    with contextlib.suppress(QueueUnavailableError):
        # Each backbone has workers of its own.
        waiting = map(queue.waiting, {state.job.backbone for state in states if state.status == "queued"})
        return {job_id: place for ids in waiting for place, job_id in enumerate(ids)}
    return {}
