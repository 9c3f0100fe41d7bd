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

from prefixtune.errors import PrefixError, RequestError
from prefixtune.jobs.checkpoints import Checkpoint, checkpoints
from prefixtune.jobs.events import JobEvents
from prefixtune.jobs.folder import is_job_id
from prefixtune.jobs.job import ENDED, Job, JobState
from prefixtune.jobs.publish import published_by, unpublish
from prefixtune.jobs.queue import JobQueue, QueueUnavailableError
from prefixtune.prefix.folder import path_of
from prefixtune.server.api.body import read_json
from prefixtune.server.api.endpoint import RequestContext, TrainingContext
from prefixtune.server.api.job_creation import create_job
from prefixtune.server.api.openapi import api_router, errors, json_body, whole_or_stream
from prefixtune.server.api.paging import PAGE, list_body, page_of, parameter, read_page, unknown_after
from prefixtune.server.api.protocol import parse
from prefixtune.server.api.streaming import DONE, KEEP_ALIVE, event, event_stream
from prefixtune.server.api.training_protocol import FineTuningRequest
from prefixtune.server.api.training_schemas import (
    FineTuningCheckpoints,
    FineTuningEvent,
    FineTuningEvents,
    FineTuningJob,
    FineTuningJobs,
)
from prefixtune.server.api.training_views import checkpoint_view, event_view, job_view
from prefixtune.server.logs import log
from prefixtune.server.responses import ApiError, bad_request, json_response, too_many_requests

__all__ = ["router"]


router = api_router(401, 403, 404, 429, 500, 503)
_JOBS, _JOB = "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/{job_id}"
_ID = {"name": "job_id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
_METADATA = {
    **parameter("metadata", "Only jobs with this metadata, as in `metadata[team]=blue`.", type="object"),
    "style": "deepObject",
}
_STREAM = parameter("stream", "Send events as they come, until the job stands still.", type="boolean")
_POLL_SECONDS, _STATUS_SECONDS, _LAST_SECONDS, _KEEP_ALIVE_SECONDS = 0.3, 1.0, 2.0, 15.0

Action = Literal["cancel", "pause", "resume"]


@router.post(
    _JOBS,
    response_model=FineTuningJob,
    responses=errors(400, 408, 413, 415, 507),
    openapi_extra=json_body(FineTuningRequest, model="smollm2-135m", training_file="file-0123456789abcdef01234567"),
)
async def create_fine_tuning_job(context: TrainingContext) -> Response:
    """Ask for training.

    With a header `Idempotency-Key`, a request that is sent again gets the same job.
    """
    body = await read_json(context, lambda value: parse(FineTuningRequest, value, context.state.limits))
    job = await create_job(context, body, partial(_view, context))
    context.log_fields |= {"job": job["id"], "model": job["model"]}
    return json_response(job)


@router.get(
    _JOBS, response_model=FineTuningJobs, responses=errors(400), openapi_extra={"parameters": [*PAGE, _METADATA]}
)
async def list_fine_tuning_jobs(context: TrainingContext) -> Response:
    """The jobs, the newest first."""
    page, metadata = read_page(context.request), _read_metadata(context)
    owner = None if context.training.sees_all(context.caller) else context.caller.name
    folder = context.training.folder
    # `/v1/models` may leave it out, by the patterns of the key.
    extension = {"backbone": context.state.config.model_id}

    def find(queue: JobQueue) -> dict[str, Any]:
        found: list[JobState] = []
        has_begun = not page.after
        for state in queue.iterate(owner):
            if has_begun and metadata.items() <= state.job.metadata.items():
                found.append(state)
            has_begun = has_begun or state.job.id == page.after
            if len(found) > page.limit:
                break
        if not has_begun:
            raise unknown_after(page)
        positions = _positions(queue, found)
        shown = [job_view(state, folder, positions) for state in found[: page.limit]]
        return {**list_body(shown, has_more=len(found) > page.limit), "prefixtune": extension}

    return json_response(await context.training.ask(find, context.tenant))


@router.get(_JOB, response_model=FineTuningJob, openapi_extra={"parameters": [_ID]})
async def show_fine_tuning_job(context: TrainingContext) -> Response:
    """A job as it stands."""
    return json_response(
        await context.training.ask(lambda queue: _view(context, queue, _get(context, queue)), context.tenant)
    )


@router.post(f"{_JOB}/cancel", response_model=FineTuningJob, responses=errors(400), openapi_extra={"parameters": [_ID]})
async def cancel_fine_tuning_job(context: TrainingContext) -> Response:
    """Stop a job for good."""
    job, view = await _change(context, "cancel", ("queued", "running", "paused"), JobQueue.cancel)
    try:
        # A worker may have published it in the same moment.
        await asyncio.to_thread(unpublish, job, context.training.prefixes)
    except PrefixError as error:
        # Workers remove it later.
        log("unpublish_failed", job=job.id, reason=error.message)
    return json_response(view)


@router.post(f"{_JOB}/pause", response_model=FineTuningJob, responses=errors(400), openapi_extra={"parameters": [_ID]})
async def pause_fine_tuning_job(context: TrainingContext) -> Response:
    """Stop a job so that it can be resumed."""
    _, view = await _change(context, "pause", ("queued", "running"), JobQueue.pause)
    return json_response(view)


@router.post(f"{_JOB}/resume", response_model=FineTuningJob, responses=errors(400), openapi_extra={"parameters": [_ID]})
async def resume_fine_tuning_job(context: TrainingContext) -> Response:
    """Queue a paused job again."""
    _, view = await _change(context, "resume", ("paused",), JobQueue.resume)
    return json_response(view)


@router.get(
    f"{_JOB}/events",
    responses=whole_or_stream(FineTuningEvents, FineTuningEvent) | errors(400),
    openapi_extra={"parameters": [_ID, *PAGE, _STREAM]},
)
async def list_fine_tuning_events(context: TrainingContext) -> Response:
    """What happened to a job, the newest first; as a stream, the oldest first."""
    page = read_page(context.request)
    wants_stream = context.request.query_params.get("stream", "false")
    if wants_stream not in ("true", "false"):
        raise bad_request(f"stream is {wants_stream[:40]!r}, but must be true or false.", "stream")
    state = await _find(context)
    log_of_job = JobEvents(context.training.folder.job(state.job.id))
    if wants_stream == "true":
        if page.after and all(one.id != page.after for one in (await asyncio.to_thread(log_of_job.read)).events):
            raise unknown_after(page)
        streams = context.training.streams
        if not streams.has_room(1, context.tenant):
            raise too_many_requests(f"{streams.used} streams of events are open.", "too_many_streams", 5.0)
        context.exit_stack.enter_context(streams.hold(1, context.tenant))
        return event_stream(context, _stream(context, state.job.id, log_of_job, page.after))
    events = [event_view(one) for one in (await asyncio.to_thread(log_of_job.read)).events]
    return json_response(page_of(events[::-1], page))


@router.get(
    f"{_JOB}/checkpoints",
    response_model=FineTuningCheckpoints,
    responses=errors(400),
    openapi_extra={"parameters": [_ID, *PAGE]},
)
async def list_fine_tuning_checkpoints(context: TrainingContext) -> Response:
    """The prefixes of a job's last evaluations, the newest first; they are served once the job has succeeded.

    Those that are not served any more are left out then.
    """
    page = read_page(context.request, default=10)
    state = await _find(context)
    found = await asyncio.to_thread(_checkpoints, context, state)
    return json_response(page_of([checkpoint_view(state.job, one) for one in reversed(found)], page))


# --- one job ----------------------------------------------------------------------------------------------------------


def _get(context: RequestContext, queue: JobQueue) -> JobState:
    """The job in the path, as far as the caller may see it.

    Raises:
        ApiError: 404.
    """
    job_id = str(context.request.path_params["job_id"])
    context.log_fields["job"] = job_id[:64]
    if is_job_id(job_id):
        try:
            state = queue.get(job_id)
        except RequestError:
            state = None
        if state is not None and context.training.may_see(state.job.owner, context.caller):
            return state
    raise ApiError(404, f"there is no fine-tuning job {job_id[:64]!r}.", code="job_not_found")


async def _find(context: RequestContext) -> JobState:
    return await context.training.ask(partial(_get, context), context.tenant)


async def _change(
    context: RequestContext, action: Action, allowed: Sequence[str], change: Callable[[JobQueue, str], JobState]
) -> tuple[Job, dict[str, Any]]:
    """Cancel, pause or resume the job in the path, and write it down.

    Returns:
        The job, and how it stands then, as clients read it.

    Raises:
        ApiError: There is no such job, it does not stand at one of `allowed`, or its name is taken.
    """
    training, expected = context.training, {"cancel": "cancelled", "pause": "paused"}.get(action)

    def work(queue: JobQueue) -> tuple[Job, dict[str, Any]]:
        before = _get(context, queue)
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
        # Here, as nobody may wait for the response any more.
        training.write_audit(context.caller, f"job.{action}", job=after.job.id, owner=after.job.owner)
        if action == "resume":
            training.wake()
        return after.job, _view(context, queue, after)

    return await training.ask(work, context.tenant, changes=True)


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
            status = (await context.training.ask(lambda queue: queue.statuses([job_id]), context.tenant)).get(
                job_id, "failed"
            )
            looked_at = clock()
            if status not in (*ENDED, "paused"):
                ends_at = math.inf
            elif ends_at == math.inf:
                # A worker notices a while later that a job was stopped, and says at which step.
                ends_at = looked_at + (_LAST_SECONDS if status in ("cancelled", "paused") else 0)
        page = await asyncio.to_thread(log_of_job.read, position)
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
