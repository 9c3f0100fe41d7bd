"""Create a job: look whether it may be, make its folder, and queue it; or nothing of all that."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi.concurrency import run_in_threadpool

from prefixtune.distillation.config import SELF
from prefixtune.errors import CheckpointError, ConfigError, PrefixError, RequestError
from prefixtune.jobs.folder import JobFolder
from prefixtune.jobs.inputs import InputName, find_input, has_inputs, make_job_folder, remove_job_folder
from prefixtune.jobs.job import Job, JobState, new_job_id
from prefixtune.jobs.queue import JobQueue
from prefixtune.jobs.request import JobRefusedError, JobRequest, make_job
from prefixtune.jobs.stored_file import StoredFile, UnknownFileError
from prefixtune.prefix.folder import path_of
from prefixtune.prefix.prefix import read_artifact
from prefixtune.server.api.endpoint import RequestContext
from prefixtune.server.api.training_protocol import FineTuningRequest
from prefixtune.server.responses import ApiError, bad_request, forbidden, storage_error, unavailable
from prefixtune.training.trackers import check_installed

if TYPE_CHECKING:
    from prefixtune.server.training import Training

__all__ = ["create_job"]


_MAX_KEY_LENGTH = 255


@dataclass(frozen=True)
class _Inputs:
    """The files of a request, and the prefix that training goes on from."""

    files: Mapping[str, StoredFile]
    start: Path | None = None


async def create_job(
    context: RequestContext, body: FineTuningRequest, view: Callable[[JobQueue, JobState], dict[str, Any]]
) -> dict[str, Any]:
    """Create the job that a request asks for.

    A request with the header `Idempotency-Key` of an earlier one gets the job of that one.

    Args:
        context: Of the request.
        body: It.
        view: A job as clients read it. Once the job is there, this must not fail: they would create it again.

    Returns:
        The view of the job.

    Raises:
        ApiError: Something is wrong with the request, it asks for too much, or the database is away.
    """
    training, key = context.training, context.request.headers.get("idempotency-key", "")
    if len(key) > _MAX_KEY_LENGTH:
        raise bad_request(f"the header Idempotency-Key has more than {_MAX_KEY_LENGTH} characters.")
    job_id = _job_id(context.caller.name, key) if key else new_job_id()

    def find(queue: JobQueue) -> dict[str, Any] | None:
        earlier = _find(queue, job_id)
        return None if earlier is None else view(queue, earlier)

    if key and (found := await training.ask(find)) is not None:
        return found
    _check_trackers(context, body)
    job, inputs = await run_in_threadpool(_make, context, body, job_id)

    def add(queue: JobQueue) -> dict[str, Any]:
        # One at a time, so that no two requests take the last place.
        with training.adding:
            if key and (found := find(queue)) is not None:
                return found
            _check_room(context, queue, job)
            _add(context, queue, job, inputs)
        # Here, as nobody may wait for the response any more.
        training.wake()
        context.state.metrics.jobs_created.inc()
        return view(queue, JobState(job, "queued"))

    # With a key, a request that is sent again gets the same job.
    return await training.ask(add, changes=not key)


def _job_id(owner: str, key: str) -> str:
    """The same id for the same key of the same owner."""
    digest = hashlib.sha256(f"{owner}\0{key}".encode("utf-8", "surrogateescape"))
    return f"ftjob-{digest.hexdigest()[:24]}"


def _find(queue: JobQueue, job_id: str) -> JobState | None:
    try:
        return queue.get(job_id)
    except RequestError:
        return None


def _check_trackers(context: RequestContext, body: FineTuningRequest) -> None:
    """Refuse trackers that the server's owner does not allow, whose accounts they are, or that are not installed.

    Raises:
        ApiError: 400.
    """
    asked = {f"integrations[{index}].type": one.type for index, one in enumerate(body.integrations or ())}
    for param, name in asked.items():
        if name not in context.state.config.trackers:
            message = f"jobs of this server may not report to {name!r}; its setting 'trackers' allows that."
            raise bad_request(message, param, "tracker_not_allowed")
    for param, name in asked.items():
        try:
            check_installed([name])
        except ConfigError:
            raise bad_request(f"{name!r} is not installed on this server.", param, "tracker_not_installed") from None


# --- what the job reads -----------------------------------------------------------------------------------------------


def _start_lengths(context: RequestContext, model: str) -> dict[str, int] | None:
    """The positions by site of the prefix to go on from; None: the bare backbone is named.

    Raises:
        ApiError: There is no such model, or the caller may not have it.
    """
    catalog = context.state.catalog
    if model == context.state.config.model_id:
        return None
    names = catalog.parts(model)
    if len(names) > 1:
        message = f"'model' is {model[:128]!r}, which names {len(names)} prefixes, but training goes on from one."
        raise bad_request(message, "model", hint="name one of them.")
    header = catalog.load_header(model, context.caller)
    _check_start(context, model, header)
    lengths = header.get("prefix_length")
    if not isinstance(lengths, dict) or not all(type(length) is int and length > 0 for length in lengths.values()):
        raise bad_request(f"training cannot go on from {model!r}: its file does not say how long it is.", "model")
    return lengths


def _check_start(context: RequestContext, model: str, header: Mapping[str, Any]) -> None:
    """Refuse to go on from a prefix that the caller may use only: after a step, the result would be nearly a copy.

    Raises:
        ApiError: 403.
    """
    if not context.state.catalog.may_copy(header, context.caller):
        message = f"the key {context.caller.name!r} may use {model[:128]!r}, but only its owner may train from it."
        raise forbidden(message, "not_the_owner")


def _find_inputs(context: RequestContext, body: FineTuningRequest, *, has_start: bool) -> _Inputs:
    """The uploaded files that a request names.

    Raises:
        ApiError: 404: there is no such file, or it is somebody else's.
    """
    options, files = body.options, {}
    asked = {
        "training_file": body.training_file,
        "validation_file": body.validation_file,
        "prefixtune.document": options.get("document"),
        "prefixtune.questions": None if options.get("questions") == SELF else options.get("questions"),
    }
    for param, file_id in asked.items():
        if file_id is None:
            continue
        owner = None if context.training.sees_all(context.caller) else context.caller.name
        try:
            files[param] = context.training.files.get(owner, file_id)
        except UnknownFileError:
            raise _no_file(param, file_id) from None
    start = path_of(context.training.prefixes, body.model) if has_start else None
    return _Inputs(files, start)


def _no_file(param: str, file_id: str) -> ApiError:
    return ApiError(404, f"there is no file {file_id[:128]!r}.", param=param, code="file_not_found")


# --- the job ----------------------------------------------------------------------------------------------------------


def _make(context: RequestContext, body: FineTuningRequest, job_id: str) -> tuple[Job, _Inputs]:
    """The job, and what it reads.

    Raises:
        ApiError: Something is wrong with the request.
    """
    start_lengths = _start_lengths(context, body.model)
    inputs = _find_inputs(context, body, has_start=start_lengths is not None)
    files, most = inputs.files, context.state.catalog.max_length
    if (length := body.options.get("prefix_length", 0)) >= most:
        message = f"prefixtune.prefix_length is {length}, but the model has {most} positions for prefix and text."
        raise bad_request(message, "prefixtune.prefix_length")
    request = JobRequest(
        model=body.model,
        training_file=files["training_file"],
        validation_file=files.get("validation_file"),
        document=files.get("prefixtune.document"),
        questions=files.get("prefixtune.questions"),
        hyperparameters=body.given_hyperparameters,
        options=body.options,
        integrations=[one.given() for one in body.integrations or ()],
        start_lengths=start_lengths,
        backbone=context.training.backbone,
        fingerprint=context.state.backbone.fingerprint,
        seed=body.seed or 0,
        suffix=body.suffix or "",
        metadata=body.metadata or {},
    )
    max_steps = context.caller.rules.max_steps
    try:
        job = make_job(request, job_id=job_id, owner=context.caller.name, created=int(time.time()), max_steps=max_steps)
    except JobRefusedError as error:
        raise bad_request(error.message, error.param, error.code) from None
    return job, inputs


def _check_room(context: RequestContext, queue: JobQueue, job: Job) -> None:
    """Refuse a job whose name is taken, or that is one too many.

    Raises:
        ApiError: It is refused.
        PrefixError: The folder of prefixes cannot be read.
    """
    limits, store, unfinished = context.caller.rules, context.state.store, queue.unfinished()
    own = [one for one in unfinished if one.owner == job.owner and one.id != job.id]
    if len(own) >= limits.max_jobs:
        message = (
            f"{len(own)} jobs of this key wait, run or are paused, of at most {limits.max_jobs} (max_jobs); "
            "cancel one, or wait until one ends."
        )
        # A place is free when a job has ended, which takes longer than clients wait by themselves.
        raise ApiError(429, message, code="too_many_jobs", headers={"x-should-retry": "false"})
    # After the jobs: the result of one that has just ended is then seen, also if another server's worker made it.
    origins = store.origins().values()
    kept = sum(origin.owner == job.owner and origin.step is None for origin in origins)
    if kept + len(own) >= limits.max_prefixes:
        message = f"this key keeps {kept} results and has {len(own)} jobs, which is its limit (max_prefixes)."
        raise bad_request(message, code="too_many_prefixes", hint="delete a model that is not needed.")
    is_taken = job.name == context.state.config.model_id or job.name in store
    if is_taken or any(one.name == job.name and one.id != job.id for one in unfinished):
        raise _name_taken(job)


def _name_taken(job: Job) -> ApiError:
    param = "prefixtune.name" if "name" in job.extension else "suffix"
    return bad_request(f"the name {job.name!r} is taken.", param, "name_taken", hint="choose another one.")


def _add(context: RequestContext, queue: JobQueue, job: Job, inputs: _Inputs) -> None:
    """Make the job's folder, and queue it.

    Raises:
        ApiError: Its files or its name are gone.
        QueueUnavailableError: The database is away.
    """
    training = context.training
    try:
        _make_folder(context, job, _links(training, job, inputs))
    except (FileNotFoundError, UnknownFileError):
        raise _no_file("training_file", job.training_file) from None
    except PrefixError as error:
        raise storage_error(error, "the data folder") from None
    # Where the database goes away now, the folder stays: the job may have been queued without an answer.
    try:
        queue.add(job)
    except RequestError:
        # With a key, another server may have queued the same job.
        if not context.request.headers.get("idempotency-key"):
            remove_job_folder(training.folder, job.id)
        raise _name_taken(job) from None


def _make_folder(context: RequestContext, job: Job, links: Mapping[InputName, tuple[Path, str]]) -> None:
    """Make the job's folder, or take the one that an earlier request with the same key has made.

    Raises:
        ApiError: That one asked for another job; or the prefix to go on from was replaced by somebody else's.
        FileNotFoundError: A file is gone.
        PrefixError: The folder cannot be written.
    """
    data = context.training.folder
    try:
        make_job_folder(data, job.id, links, check=partial(_check_copy, context, job))
    except FileExistsError:
        folder = data.job(job.id)
        _check_copy(context, job, folder)
        if not has_inputs(folder, links):
            message = "the header Idempotency-Key is that of an earlier request, which asked for another job."
            raise bad_request(message, code="idempotency_key_reused", hint="use a new key.") from None


def _check_copy(context: RequestContext, job: Job, folder: JobFolder) -> None:
    """Read the folder's prefix, which may be of another file than the header that was known, or of two.

    Raises:
        ApiError: The caller may not have it, or it is broken or was replaced.
    """
    start = find_input(folder, "start")
    if start is None:
        return
    replaced = unavailable(
        f"the file of {job.model!r} was replaced or is broken; try again later.", "busy", retry_after=5
    )
    try:
        # All of it: its checksum shows whether somebody wrote to the file while it was copied.
        header = read_artifact(start).header
    except CheckpointError as error:
        context.log_fields["storage_error"] = error.message
        raise replaced from None
    _check_start(context, job.model, header)
    asked = dict(site.split("=") for site in str(job.config["sites"]).split(","))
    if asked != {site: str(length) for site, length in header["prefix_length"].items()}:
        # Of another length than the file that the job was made for: training would fail.
        raise replaced


def _links(training: Training, job: Job, inputs: _Inputs) -> dict[InputName, tuple[Path, str]]:
    """What the job's folder links to, or has a copy of.

    Raises:
        UnknownFileError: A file was deleted meanwhile.
    """
    is_document = job.kind == "document"
    ids: dict[InputName, str] = {
        "document" if is_document else "train": job.training_file,
        "dev": job.validation_file,
        "questions": job.questions_file,
    }
    stored = {file.id: file for file in inputs.files.values()}
    found = {name: stored[file_id] for name, file_id in ids.items() if file_id}
    links = {name: (training.files.path(file.owner, file.id), file.ending) for name, file in found.items()}
    # With its name: a later request with the same key may ask for another one.
    return links | ({"start": (inputs.start, f".{inputs.start.name}")} if inputs.start is not None else {})
