"""Create a job: look whether it may be, make its folder, and queue it; or nothing of all that."""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefixtune.distillation.config import SELF
from prefixtune.errors import CheckpointError, RequestError
from prefixtune.jobs.files import StoredFile
from prefixtune.jobs.folder import InputName
from prefixtune.jobs.job import Job, JobState
from prefixtune.jobs.queue import JobQueue
from prefixtune.jobs.request import settle_job
from prefixtune.prefix.folder import path_of
from prefixtune.prefix.geometry import spell_lengths
from prefixtune.prefix.header import job_origin
from prefixtune.prefix.prefix import Prefix, read_artifact
from prefixtune.server.api.endpoint import RequestContext
from prefixtune.server.api.files import find_file
from prefixtune.server.api.training_protocol import FineTuningRequest
from prefixtune.server.responses import ApiError, bad_request, unavailable

__all__ = ["create_job"]


_Links = Mapping[InputName, tuple[Path, str]]
"""What a job's folder links to, or has a copy of; see `DataFolder.make_job`."""
_Lengths = Mapping[str, int] | None
"""The positions by site of the prefix that training goes on from; None: there is none."""
_NAME = re.compile(r"(?!.*\.step-[0-9]+\Z)[A-Za-z0-9_-][A-Za-z0-9._-]{0,111}")
"""Of a result: so that `.step-N` can follow it, and not the name of a checkpoint."""
_OF_EXAMPLES = ("preset", "hold_out", "form")
_OF_DOCUMENTS = ("document", "questions", "num_questions", "answer_length")
_OF_START = ("start", "prefix_length", "init_text", "init_examples")
"""Options that a prefix to go on from has itself."""
_MOST_QUESTIONS = 1000
"""Without an answer, which the model has to write."""
_QUESTIONS = "prefixtune.questions"


def create_job(context: RequestContext, queue: JobQueue, body: FineTuningRequest) -> JobState:
    """Create the job that a request asks for; blocks.

    A request that is sent again with the same header `Idempotency-Key` gets the same job.

    Raises:
        ApiError: Something is wrong with the request, or it asks for too much.
        QueueUnavailableError: The database is away.
    """
    training, key = context.training, context.request.headers.get("idempotency-key", "")
    for index, one in enumerate(body.integrations or ()):
        if one.type not in context.state.config.trackers:
            message = f"jobs of this server may not report to {one.type!r}; its setting 'trackers' allows that."
            raise bad_request(message, f"integrations[{index}].type", "tracker_not_allowed")
    # The same id for the same request with the same key of the same owner.
    asked = f"{context.caller.name}\0{key}\0{body.model_dump_json()}".encode("utf-8", "surrogateescape")
    job_id = f"ftjob-{hashlib.sha256(asked).hexdigest()[:24] if key else secrets.token_hex(12)}"
    # One at a time, so that no two requests take the last place.
    with training.adding:
        if key:
            with contextlib.suppress(RequestError):
                return queue.get(job_id)
        job, links, lengths = _make(context, body, job_id)
        _check_room(context, queue, job)
        _make_folder(context, job, links, lengths)
        # Where the database goes away now, the folder stays: the job may have been queued without an answer. If it was
        # not, workers remove the folder after a day.
        queue.add(job)
    training.wake()
    return JobState(job, "queued")


# --- what the job reads -----------------------------------------------------------------------------------------------


def _start_lengths(context: RequestContext, model: str) -> _Lengths:
    """The positions of the prefix to go on from; None: the bare backbone is named.

    Raises:
        ApiError: There is no such model, or the caller may not have it.
    """
    catalog = context.state.catalog
    if model == catalog.backbone_id:
        return None
    if len(names := catalog.parts(model)) > 1:
        message = f"'model' is {model[:128]!r}, which names {len(names)} prefixes, but training goes on from one."
        raise bad_request(message, "model", hint="name one of them.")
    start = catalog.load(model, context.caller).prefix
    assert start is not None, "only the bare backbone has none"
    _check_start(context, model, start)
    return {str(site): length for site, length in start.lengths.items()}


def _check_start(context: RequestContext, model: str, start: Prefix) -> None:
    """Refuse to go on from a prefix that the caller may use only: after a step, the result would be nearly a copy."""
    if not context.training.is_open:
        context.state.catalog.check_owner(model, job_origin(start.header), context.caller)


def _find_files(context: RequestContext, body: FineTuningRequest) -> dict[str, StoredFile]:
    """The uploaded files that a request names, by field.

    Raises:
        ApiError: 404: there is no such file, or it is somebody else's.
    """
    options = body.options
    if options.get("document", body.training_file) != body.training_file:
        raise bad_request("the document must be the training file.", "prefixtune.document")
    asked = {
        "training_file": body.training_file,
        "validation_file": body.validation_file,
        _QUESTIONS: None if options.get("questions") == SELF else options.get("questions"),
    }
    found = {}
    for param, file_id in asked.items():
        if file_id is not None:
            found[param] = find_file(context, file_id, param)
    return found


def _make(context: RequestContext, body: FineTuningRequest, job_id: str) -> tuple[Job, _Links, _Lengths]:
    """The job, what it reads, and the lengths of the prefix that it goes on from.

    Raises:
        ApiError: Something is wrong with the request.
    """
    state, training = context.state, context.training
    start_lengths, files = _start_lengths(context, body.model), _find_files(context, body)
    data, questions = files["training_file"], files.get(_QUESTIONS)
    is_document = data.purpose == "document"
    form = None if is_document else str(body.options.get("form") or (data.facts.form if data.facts else ""))
    for param, file in files.items():
        _check_file(param, file, "question" if file is questions else form)
    _check_options(body, data, questions, start_lengths, state.catalog.max_length)
    asked = Job(
        id=job_id,
        owner=context.caller.name,
        created=int(time.time()),
        model=body.model,
        name=_result_name(body, job_id),
        kind="document" if is_document else "examples",
        backbone=training.backbone,
        fingerprint=state.backbone.fingerprint,
        training_file=data.id,
        validation_file=body.validation_file or "",
        questions_file=questions.id if questions else "",
        seed=body.seed or 0,
        hyperparameters=body.given_hyperparameters,
        extension=body.options,
        integrations=[one.given() for one in body.integrations or ()],
        suffix=body.suffix or "",
        metadata=body.metadata or {},
    )
    job = settle_job(asked, files, _given_values(asked, form, start_lengths), context.caller.rules.max_steps)
    train: InputName = "document" if is_document else "train"
    read: dict[InputName, str] = {train: "training_file", "dev": "validation_file", "questions": _QUESTIONS}
    links: dict[InputName, tuple[Path, str]] = {
        name: (training.files.path(files[param]), files[param].ending) for name, param in read.items() if param in files
    }
    if start_lengths is not None:
        start = path_of(state.store.folder, body.model)
        links["init_prefix"] = (start, f".{start.name}")
    return job, links, start_lengths


def _given_values(asked: Job, form: str | None, start_lengths: _Lengths) -> dict[str, Any]:
    """What a request says, as the configuration calls it."""
    is_document, names = asked.kind == "document", {"start": "initialization"}
    no_config = ("name", "document", "questions") if is_document else ("name", "preset")
    given = {names.get(name, name): value for name, value in asked.extension.items() if name not in no_config}
    if not is_document:
        given["form"] = form
    if start_lengths is not None:
        length, sites = max(start_lengths.values()), spell_lengths(start_lengths)
        given |= {"initialization": "prefix", "init_prefix": "start", "prefix_length": length, "sites": sites}
    for integration in asked.integrations:
        settings = integration.get(integration["type"]) or {}
        given |= {"report_to": [integration["type"]], "run_name": settings.get("name") or asked.id}
        given["project"] = settings.get("project") or ""
    return given


# --- what can be wrong ------------------------------------------------------------------------------------------------


def _result_name(body: FineTuningRequest, job_id: str) -> str:
    """What the result will be served as.

    Raises:
        ApiError: The name is not allowed.
    """
    name = str(body.options.get("name") or f"{body.suffix or 'ft'}-{job_id[-8:]}")
    if not _NAME.fullmatch(name):
        message = f"{name[:128]!r} is no name: use at most 112 letters, digits, '.', '_' and '-', without '.step-N'."
        raise bad_request(message, "prefixtune.name" if "name" in body.options else "suffix", "invalid_name")
    return name


def _check_file(param: str, file: StoredFile, form: str | None) -> None:
    """Refuse a file that cannot be read in a form; None: as a document.

    Raises:
        ApiError: It is refused.
    """
    code, forms = f"invalid_{param.removeprefix('prefixtune.')}", file.facts.forms if file.facts else []
    if file.status != "processed":
        what = file.status_details.rstrip(".")
        raise bad_request(f"{file.id} cannot be trained on: {what}. Upload a corrected file.", param, code)
    if form == "" and forms:
        raise bad_request(f"'training_file' can be read as {forms}; say which by this option.", "prefixtune.form")
    if form is not None and (form not in forms or file.purpose != "fine-tune"):
        raise bad_request(f"{file.id} ({file.purpose}) holds {forms}, but must hold {form!r}.", param, code)
    # Of a file that several forms fit, neither targets nor labels are known.
    if form and file.facts and file.facts.form and param != _QUESTIONS:
        if not file.facts.targets:
            raise bad_request(f"{file.id} has no targets.", param, code)
        if file.facts.labels == 1 and param == "training_file":
            raise bad_request(f"all examples of {file.id} have the same label.", param, code)


def _check_options(
    body: FineTuningRequest, data: StoredFile, questions: StoredFile | None, start_lengths: _Lengths, max_length: int
) -> None:
    """Refuse options that mean nothing in this job, or do not go together.

    Raises:
        ApiError: One is refused.
    """
    options, facts = body.options, questions.facts if questions else None
    begun = [name for name in _OF_START if name in options and start_lengths is not None]
    length, epochs = options.get("prefix_length", 0), body.given_hyperparameters.get("n_epochs", "auto")
    unanswered, sources = facts.rows - facts.targets if facts else 0, data.facts.examples if data.facts else 0
    elsewhere, kind = (_OF_EXAMPLES, "a document") if data.purpose == "document" else (_OF_DOCUMENTS, "examples")
    supervised = body.method.supervised if body.method else None
    for name, is_wrong, message in (
        ("hyperparameters", body.hyperparameters and supervised and supervised.hyperparameters, "they are there twice"),
        *((name, name in options, f"{name} is not for {kind}") for name in elsewhere),
        ("validation_file", data.purpose == "document" and body.validation_file, "a document is not validated"),
        ("hold_out", body.validation_file and options.get("hold_out"), "hold_out is for jobs without validation_file"),
        *((name, True, f"training goes on from {body.model!r}, which has its own {name}") for name in begun),
        ("init_examples", 0 < sources < options.get("init_examples", 0), f"{data.id} has {sources} sources alone"),
        ("prefix_length", length >= max_length, f"{length} is given, but the model has {max_length} positions"),
        # A command line would read a file.
        ("init_text", str(options.get("init_text")).startswith("@"), "init_text must not begin with '@'"),
        ("max_steps", epochs != "auto" and "max_steps" in options, "both n_epochs and max_steps are given"),
        ("num_questions", questions and "num_questions" in options, "num_questions is for questions that are made"),
        ("questions", unanswered > _MOST_QUESTIONS, f"at most {_MOST_QUESTIONS:,} questions may have no answer"),
    ):
        if is_wrong:
            raise bad_request(f"{message}.", f"prefixtune.{name}" if name in options else name)


def _check_room(context: RequestContext, queue: JobQueue, job: Job) -> None:
    """Refuse a job whose name is taken, or that is one too many.

    Raises:
        ApiError: It is refused.
        PrefixError: The folder of prefixes cannot be read.
    """
    limits, store, unfinished = context.caller.rules, context.state.store, queue.unfinished()
    own = sum(one.job.owner == job.owner for one in unfinished)
    if own >= limits.max_jobs:
        message = f"{own} jobs of this key have not ended, of at most {limits.max_jobs} (max_jobs); cancel one."
        # A place is free when a job has ended, which takes longer than clients wait by themselves.
        raise ApiError(429, message, code="too_many_jobs", headers={"x-should-retry": "false"})
    # After the jobs: the result of one that has just ended is then seen, also if another server's worker made it.
    kept = sum(origin.owner == job.owner and origin.step is None for origin in store.origins().values())
    if kept + own >= limits.max_prefixes:
        message = f"this key keeps {kept} results and has {own} jobs, which is its limit (max_prefixes)."
        raise bad_request(message, code="too_many_prefixes", hint="delete a model that is not needed.")
    is_taken = job.name == context.state.config.model_id or store.file(job.name) is not None
    if is_taken or any(one.job.name == job.name for one in unfinished):
        param = "prefixtune.name" if "name" in job.extension else "suffix"
        raise bad_request(f"the name {job.name!r} is taken.", param, "name_taken", hint="choose another one.")


def _make_folder(context: RequestContext, job: Job, links: _Links, lengths: _Lengths) -> None:
    """Make the job's folder, or take the one that an earlier request with the same key has made.

    Raises:
        ApiError: The prefix to go on from is another one by now.
        PrefixError: A file is gone, or the disk refuses.
    """
    folder = context.training.folder.make_job(job.id, links)
    start = folder.find_input("init_prefix")
    if start is None:
        return
    replaced = unavailable(f"the file of {job.model!r} was replaced or is broken; try again.", "busy", retry_after=5)
    try:
        # All of it: its checksum shows whether somebody wrote to the file while it was copied.
        copy = read_artifact(start)
        _check_start(context, job.model, copy)
        if copy.lengths != lengths:
            raise replaced
    except (ApiError, CheckpointError) as error:
        shutil.rmtree(folder.root, ignore_errors=True)
        raise error if isinstance(error, ApiError) else replaced from None
