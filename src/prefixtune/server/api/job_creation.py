"""Create a job: look whether it may be, make its folder, and queue it; or nothing of all that."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi.concurrency import run_in_threadpool

from prefixtune.distillation.config import SELF
from prefixtune.errors import CheckpointError, ConfigError, PrefixError, RequestError
from prefixtune.jobs.files import StoredFile, UnknownFileError
from prefixtune.jobs.folder import InputName, JobFolder
from prefixtune.jobs.job import Job, JobState, new_job_id
from prefixtune.jobs.queue import JobQueue
from prefixtune.jobs.request import JobRefusedError, JobRequest, make_job
from prefixtune.prefix.folder import path_of
from prefixtune.prefix.prefix import read_artifact
from prefixtune.server.api.endpoint import RequestContext
from prefixtune.server.api.training_protocol import FineTuningRequest
from prefixtune.server.responses import ApiError, bad_request, forbidden, storage_error, unavailable
from prefixtune.training.trackers import check_installed

__all__ = ["create_job"]


_MAX_KEY_LENGTH = 255
_Links = Mapping[InputName, tuple[Path, str]]
"""What a job's folder links to, or has a copy of; see `DataFolder.make_job`."""


async def create_job(
    context: RequestContext, body: FineTuningRequest, view: Callable[[JobQueue, JobState], dict[str, Any]]
) -> dict[str, Any]:
    """Create the job that a request asks for.

    A request that is sent again with the same header `Idempotency-Key` gets the same job.

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
    job_id = _job_id(context.caller.name, key, body) if key else new_job_id()

    def find(queue: JobQueue) -> dict[str, Any] | None:
        try:
            return view(queue, queue.get(job_id))
        except RequestError:
            return None

    if key and (found := await training.ask(find)) is not None:
        return found
    _check_trackers(context, body)
    job, links = await run_in_threadpool(_make, context, body, job_id)

    def add(queue: JobQueue) -> dict[str, Any]:
        # One at a time, so that no two requests take the last place.
        with training.adding:
            if key and (found := find(queue)) is not None:
                return found
            _check_room(context, queue, job)
            _make_folder(context, job, links)
            # Where the database goes away now, the folder stays: the job may have been queued without an answer.
            queue.add(job)
        # Here, as nobody may wait for the response any more.
        training.wake()
        context.state.metrics.jobs_created.inc()
        return view(queue, JobState(job, "queued"))

    # With a key, a request that is sent again gets the same job.
    return await training.ask(add, changes=not key)


def _job_id(owner: str, key: str, body: FineTuningRequest) -> str:
    """The same id for the same request with the same key of the same owner."""
    digest = hashlib.sha256(f"{owner}\0{key}\0{body.model_dump_json()}".encode("utf-8", "surrogateescape"))
    return f"ftjob-{digest.hexdigest()[:24]}"


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


def _find_files(context: RequestContext, body: FineTuningRequest) -> dict[str, StoredFile]:
    """The uploaded files that a request names, by field.

    Raises:
        ApiError: 404: there is no such file, or it is somebody else's.
    """
    training, options = context.training, body.options
    asked = {
        "training_file": body.training_file,
        "validation_file": body.validation_file,
        "prefixtune.document": options.get("document"),
        "prefixtune.questions": None if options.get("questions") == SELF else options.get("questions"),
    }
    found = {}
    for param, file_id in asked.items():
        if file_id is not None:
            try:
                found[param] = training.files.get(training.whose(context.caller), file_id)
            except UnknownFileError:
                raise _no_file(param, file_id) from None
    return found


def _no_file(param: str, file_id: str) -> ApiError:
    return ApiError(404, f"there is no file {file_id[:128]!r}.", param=param, code="file_not_found")


def _make(context: RequestContext, body: FineTuningRequest, job_id: str) -> tuple[Job, _Links]:
    """The job, and what it reads.

    Raises:
        ApiError: Something is wrong with the request.
    """
    state, training = context.state, context.training
    start_lengths, files = _start_lengths(context, body.model), _find_files(context, body)
    if (length := body.options.get("prefix_length", 0)) >= state.catalog.max_length:
        message = f"prefixtune.prefix_length is {length}, but the model has {state.catalog.max_length} positions."
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
        backbone=training.backbone,
        fingerprint=state.backbone.fingerprint,
        seed=body.seed or 0,
        suffix=body.suffix or "",
        metadata=body.metadata or {},
    )
    owner, max_steps = context.caller.name, context.caller.rules.max_steps
    try:
        job = make_job(request, job_id=job_id, owner=owner, created=int(time.time()), max_steps=max_steps)
    except JobRefusedError as error:
        raise bad_request(error.message, error.param, error.code) from None
    ids: dict[InputName, str] = {
        "document" if job.kind == "document" else "train": job.training_file,
        "dev": job.validation_file,
        "questions": job.questions_file,
    }
    known = {file.id: file for file in files.values()}
    links: dict[InputName, tuple[Path, str]] = {
        name: (training.files.path(known[file_id].owner, file_id), known[file_id].ending)
        for name, file_id in ids.items()
        if file_id
    }
    if start_lengths is not None:
        start = path_of(training.prefixes, body.model)
        links["start"] = (start, f".{start.name}")
    return job, links


def _check_room(context: RequestContext, queue: JobQueue, job: Job) -> None:
    """Refuse a job whose name is taken, or that is one too many.

    Raises:
        ApiError: It is refused.
        PrefixError: The folder of prefixes cannot be read.
    """
    limits, store, unfinished = context.caller.rules, context.state.store, queue.unfinished()
    own = sum(one.owner == job.owner for one in unfinished)
    if own >= limits.max_jobs:
        message = (
            f"{own} jobs of this key wait, run or are paused, of at most {limits.max_jobs} (max_jobs); "
            "cancel one, or wait until one ends."
        )
        # A place is free when a job has ended, which takes longer than clients wait by themselves.
        raise ApiError(429, message, code="too_many_jobs", headers={"x-should-retry": "false"})
    # After the jobs: the result of one that has just ended is then seen, also if another server's worker made it.
    kept = sum(origin.owner == job.owner and origin.step is None for origin in store.origins().values())
    if kept + own >= limits.max_prefixes:
        message = f"this key keeps {kept} results and has {own} jobs, which is its limit (max_prefixes)."
        raise bad_request(message, code="too_many_prefixes", hint="delete a model that is not needed.")
    is_taken = job.name == context.state.config.model_id or job.name in store
    if is_taken or any(one.name == job.name for one in unfinished):
        param = "prefixtune.name" if "name" in job.extension else "suffix"
        raise bad_request(f"the name {job.name!r} is taken.", param, "name_taken", hint="choose another one.")


def _make_folder(context: RequestContext, job: Job, links: _Links) -> None:
    """Make the job's folder, or take the one that an earlier request with the same key has made.

    Raises:
        ApiError: A file is gone, the disk refuses, or the prefix to go on from was replaced by somebody else's.
    """
    try:
        folder = context.training.folder.make_job(job.id, links)
    except PrefixError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise _no_file("training_file", job.training_file) from None
        raise storage_error(error, "the data folder") from None
    try:
        _check_copy(context, job, folder)
    except ApiError:
        shutil.rmtree(folder.root, ignore_errors=True)
        raise


def _check_copy(context: RequestContext, job: Job, folder: JobFolder) -> None:
    """Read the folder's prefix, which may be of another file than the header that was known, or of two.

    Raises:
        ApiError: The caller may not have it, or it is broken or was replaced.
    """
    start = folder.find_input("start")
    if start is None:
        return
    replaced = unavailable(f"the file of {job.model!r} was replaced or is broken; try again.", "busy", retry_after=5)
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
