"""`/v1/fine_tuning/jobs`: ask for training, look how it goes, stop it. OpenAI's interface.

Each key sees its own jobs; an admin key, and everybody where there are no keys, sees all.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Any, Literal

from fastapi import Response
from fastapi.concurrency import run_in_threadpool

from prefixtune.errors import RequestError
from prefixtune.jobs.checkpoints import Checkpoint, checkpoints
from prefixtune.jobs.events import JobEvents
from prefixtune.jobs.folder import is_job_id
from prefixtune.jobs.job import ENDED, Job, JobState
from prefixtune.jobs.publish import published_by
from prefixtune.jobs.queue import JobQueue, QueueUnavailableError
from prefixtune.prefix.folder import path_of
from prefixtune.server.api.endpoint import RequestContext, TrainingContext, key_router
from prefixtune.server.api.job_creation import create_job
from prefixtune.server.api.paging import After, Limit, list_body, page_of, unknown_after
from prefixtune.server.api.streaming import DONE, KEEP_ALIVE, event, event_stream
from prefixtune.server.api.training_protocol import FineTuningRequest
from prefixtune.server.api.training_views import checkpoint_view, event_view, job_view
from prefixtune.server.responses import ApiError, bad_request

__all__ = ["router"]


router = key_router()
_JOBS, _JOB = "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/{job_id}"
_POLL_SECONDS, _STATUS_SECONDS, _LAST_SECONDS, _KEEP_ALIVE_SECONDS = 0.3, 1.0, 2.0, 15.0

Action = Literal["cancel", "pause", "resume"]


@router.post(_JOBS)
async def create_fine_tuning_job(body: FineTuningRequest, context: TrainingContext) -> dict[str, Any]:
    """Ask for training.

    With a header `Idempotency-Key`, a request that is sent again gets the same job.
    """
    body.check(context.state.limits)
    job = await create_job(context, body, partial(_view, context))
    context.log_fields |= {"job": job["id"], "model": job["model"]}
    return job


@router.get(_JOBS)
async def list_fine_tuning_jobs(context: TrainingContext, after: After = "", limit: Limit = 20) -> dict[str, Any]:
    """The jobs, the newest first.

    With `metadata[team]=blue` in the query, only those with this metadata.
    """
    metadata = _read_metadata(context)
    owner = None if context.training.sees_all(context.caller) else context.caller.name
    folder = context.training.folder
    # `/v1/models` may leave it out, by the patterns of the key.
    extension = {"backbone": context.state.config.model_id}

    def find(queue: JobQueue) -> dict[str, Any]:
        found: list[JobState] = []
        has_begun = not after
        for state in queue.iterate(owner):
            if has_begun and metadata.items() <= state.job.metadata.items():
                found.append(state)
            has_begun = has_begun or state.job.id == after
            if len(found) > limit:
                break
        if not has_begun:
            raise unknown_after(after)
        positions = _positions(queue, found)
        shown = [job_view(state, folder, positions) for state in found[:limit]]
        return {**list_body(shown, has_more=len(found) > limit), "prefixtune": extension}

    return await context.training.ask(find)


@router.get(_JOB)
async def show_fine_tuning_job(job_id: str, context: TrainingContext) -> dict[str, Any]:
    """A job as it stands."""
    return await context.training.ask(lambda queue: _view(context, queue, _get(context, queue, job_id)))


@router.post(f"{_JOB}/cancel")
async def cancel_fine_tuning_job(job_id: str, context: TrainingContext) -> dict[str, Any]:
    """Stop a job for good."""
    # What a worker has published in the same moment is removed by one.
    return (await _change(context, job_id, "cancel", ("queued", "running", "paused"), JobQueue.cancel))[1]


@router.post(f"{_JOB}/pause")
async def pause_fine_tuning_job(job_id: str, context: TrainingContext) -> dict[str, Any]:
    """Stop a job so that it can be resumed."""
    return (await _change(context, job_id, "pause", ("queued", "running"), JobQueue.pause))[1]


@router.post(f"{_JOB}/resume")
async def resume_fine_tuning_job(job_id: str, context: TrainingContext) -> dict[str, Any]:
    """Queue a paused job again."""
    return (await _change(context, job_id, "resume", ("paused",), JobQueue.resume))[1]


@router.get(f"{_JOB}/events", response_model=None)
async def list_fine_tuning_events(
    job_id: str, context: TrainingContext, after: After = "", limit: Limit = 20, stream: bool = False
) -> dict[str, Any] | Response:
    """What happened to a job, the newest first; as a stream, the oldest first."""
    state = await _find(context, job_id)
    log_of_job = JobEvents(context.training.folder.job(state.job.id))
    events = (await run_in_threadpool(log_of_job.read)).events
    if not stream:
        return page_of([event_view(one) for one in events[::-1]], after, limit)
    if after and all(one.id != after for one in events):
        raise unknown_after(after)
    context.exit_stack.enter_context(context.training.streams.admit())
    return event_stream(context, _stream(context, state.job.id, log_of_job, after))


@router.get(f"{_JOB}/checkpoints")
async def list_fine_tuning_checkpoints(
    job_id: str, context: TrainingContext, after: After = "", limit: Limit = 10
) -> dict[str, Any]:
    """The prefixes of a job's last evaluations, the newest first; they are served once the job has succeeded.

    Those that are not served any more are left out then.
    """
    state = await _find(context, job_id)
    found = await run_in_threadpool(_checkpoints, context, state)
    return page_of([checkpoint_view(state.job, one) for one in reversed(found)], after, limit)


# --- one job ----------------------------------------------------------------------------------------------------------


def _get(context: RequestContext, queue: JobQueue, job_id: str) -> JobState:
    """A job, as far as the caller may see it.

    Raises:
        ApiError: 404.
    """
    context.log_fields["job"] = job_id[:64]
    if is_job_id(job_id):
        try:
            state = queue.get(job_id)
        except RequestError:
            state = None
        if state is not None and context.training.may_see(state.job.owner, context.caller):
            return state
    raise ApiError(404, f"there is no fine-tuning job {job_id[:64]!r}.", code="job_not_found")


async def _find(context: RequestContext, job_id: str) -> JobState:
    return await context.training.ask(lambda queue: _get(context, queue, job_id))


async def _change(
    context: RequestContext,
    job_id: str,
    action: Action,
    allowed: Sequence[str],
    change: Callable[[JobQueue, str], JobState],
) -> tuple[Job, dict[str, Any]]:
    """Cancel, pause or resume a job.

    Returns:
        The job, and how it stands then, as clients read it.

    Raises:
        ApiError: There is no such job, it does not stand at one of `allowed`, or its name is taken.
    """
    training, expected = context.training, {"cancel": "cancelled", "pause": "paused"}.get(action)

    def work(queue: JobQueue) -> tuple[Job, dict[str, Any]]:
        before = _get(context, queue, job_id)
        if before.status not in allowed:
            raise _wrong_state(action, before, allowed)
        try:
            after = change(queue, before.job.id)
        except RequestError as error:
            # A server that never saw it paused has given its name to another job.
            raise bad_request(error.message, code="name_taken") from None
        if expected is not None and after.status != expected:
            # It ended in the same moment.
            raise _wrong_state(action, after, allowed)
        if action == "resume":
            training.wake()
        return after.job, _view(context, queue, after)

    return await training.ask(work, changes=True)


def _checkpoints(context: RequestContext, state: JobState) -> list[Checkpoint]:
    """A job's checkpoints; once it has succeeded, those whose names are still served as its own."""
    job, training = state.job, context.training
    found = checkpoints(job, training.folder.job(job.id).run)
    if state.status != "succeeded":
        return found
    return [one for one in found if published_by(path_of(training.prefixes, one.name)) == job.id]


def _wrong_state(action: Action, state: JobState, allowed: Sequence[str]) -> ApiError:
    code = "job_ended" if state.status in ENDED else f"job_{state.status}"
    message = (
        f"{state.job.id} is {state.status}; only a job that is {' or '.join(allowed)} can be {_PARTICIPLE[action]}."
    )
    return bad_request(message, code=code)


_PARTICIPLE = {"cancel": "cancelled", "pause": "paused", "resume": "resumed"}


def _view(context: RequestContext, queue: JobQueue, state: JobState) -> dict[str, Any]:
    """A job as clients read it; without its position if the database has just gone away."""
    positions: dict[str, int] = {}
    with contextlib.suppress(QueueUnavailableError):
        positions = _positions(queue, [state])
    return job_view(state, context.training.folder, positions)


def _positions(queue: JobQueue, states: Sequence[JobState]) -> dict[str, int]:
    """How many jobs come before those that wait."""
    if all(state.status != "queued" for state in states):
        return {}
    waiting = [job.id for job in queue.unfinished() if job.status == "queued"]
    return {job_id: number for number, job_id in enumerate(waiting)}


def _read_metadata(context: RequestContext) -> dict[str, str]:
    """What `metadata[KEY]=VALUE` in the query asks for."""
    items = context.request.query_params.multi_items()
    return {
        name[len("metadata[") : -1]: value for name, value in items if name.startswith("metadata[") and name[-1] == "]"
    }


# --- events as they come ----------------------------------------------------------------------------------------------


async def _stream(context: RequestContext, job_id: str, log_of_job: JobEvents, after: str) -> AsyncGenerator[bytes]:
    """The events of a job after one of them, until the job stands still or the request's time is over."""
    clock = asyncio.get_running_loop().time
    position, is_known, ends_at = 0, not after, math.inf
    looked_at = sent_at = -_STATUS_SECONDS
    while context.remaining > 0 and not context.state.draining:
        if clock() - looked_at >= _STATUS_SECONDS:
            # Before its events are read, so that none is left out.
            statuses = await context.training.ask(lambda queue: queue.statuses([job_id]))
            status = statuses.get(job_id, "failed")
            looked_at = clock()
            if status not in (*ENDED, "paused"):
                ends_at = math.inf
            elif ends_at == math.inf:
                # A worker notices a while later that a job was stopped, and says at which step.
                ends_at = looked_at + (_LAST_SECONDS if status in ("cancelled", "paused") else 0)
        page = await run_in_threadpool(log_of_job.read, position)
        position = page.position
        for one in page.events:
            if is_known:
                sent_at = clock()
                yield event(event_view(one))
            is_known = is_known or one.id == after
        if clock() >= ends_at:
            yield DONE
            return
        if clock() - sent_at >= _KEEP_ALIVE_SECONDS:
            sent_at = clock()
            yield KEEP_ALIVE
        await asyncio.sleep(_POLL_SECONDS)
