"""`prefixtune jobs`: trainings on a server, asked for and followed by OpenAI's interface."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from prefixtune.cli.jobs_client import JOBS, JobsClient
from prefixtune.cli.options import OutputOptions, command, json_option, positional
from prefixtune.cli.show import print_event, print_json
from prefixtune.errors import RequestError
from prefixtune.utils.config import TextList, option_group
from prefixtune.utils.console import Console, safe_text
from prefixtune.utils.folders import expand_home

__all__ = ["jobs"]

_KEY, _OTHER_KEY, _OTHER_URL = "PREFIXTUNE_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"
_FOLLOW_SECONDS, _ASK_SECONDS = 120.0, 5.0
"""How long a server that is away is waited for."""
_LOSSES = {"train_loss": "loss", "valid_loss": "validation_loss"}
_FILE_ID = re.compile(r"file-[A-Za-z0-9]+")

_server, _training = option_group("server"), option_group("create")


class JobsOptions(OutputOptions):
    """The options of `prefixtune jobs`."""

    action: Literal["list", "create", "show", "follow", "cancel", "pause", "resume", "upload", "files", "delete"] = (
        positional("list", description="what to do, as listed above")
    )
    what: str = positional("", description="the id of a job, a file, or a name")
    limit: int = Field(20, ge=1, le=100, description="list, files: how many, the newest first")
    follow: bool = Field(False, description="create, resume: then show the training until it ends")
    as_json: bool = json_option("the server's objects, and of a training that is followed its events as lines,")

    url: str = _server("http://127.0.0.1:8000/v1", description="the server's interface")
    key: str = _server(
        "",
        description="API key, which other users of this machine can see in the list of processes (default: the "
        f"variable {_KEY}; or {_OTHER_KEY}, if {_OTHER_URL} names this server)",
    )

    model: str = _training("", description="what to train: the bare model, or an earlier result (default: bare)")
    name: str = _training("", description="what the result is served as (default: the server makes one)")
    validation: str = _training("", description="file, or id of one, to choose the best steps by")
    document: bool = _training(False, description="the file is a document, to make a memory of")
    questions: str = _training("", description="of a document: file, or id of one, with questions; or self")
    epochs: int | None = _training(None, description="times that each example is seen (default: the server's choice)")
    batch_size: int | None = _training(None, description="examples per step (default: the server's choice)")
    learning_rate_multiplier: float | None = _training(None, description="times the usual learning rate")
    seed: int | None = _training(None, ge=0, description="of the order of the data (default: the server chooses)")
    option: TextList = _training(
        (), description="NAME=VALUE, a further field of the request's object `prefixtune`, as in prefix_length=20"
    )

    @field_validator("option")
    @classmethod
    def _check_option(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            if not re.match(r"[a-z_]+=", text):
                raise ValueError(f"is {text[:80]!r}, but must be NAME=VALUE")
        return texts

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Most actions are done to something."""
        if (self.action in ("list", "files")) == bool(self.what):
            yield ("what",), f"{self.action} {'takes no' if self.what else 'needs a'} file, name or id"


@command
def jobs(options: JobsOptions) -> int:
    """Train on a server: upload data, start a job, follow it, and see what became of it.

    Speaks OpenAI's interface for fine-tuning, as `prefixtune serve` has it. A result is served under its own name as
    soon as the job has succeeded. `follow` exits with 1 if the job did not succeed, and Ctrl-C leaves the job running.

    What it can do:
        prefixtune jobs                   # list the jobs
        prefixtune jobs create FILE       # start one, with a file or the id of one
        prefixtune jobs show ID           # how it stands; follow: until it ends
        prefixtune jobs pause ID          # resume, cancel
        prefixtune jobs upload FILE       # without a job; files lists them
        prefixtune jobs delete NAME       # a result, or by its id an uploaded file

    For example:
        prefixtune jobs create chats.jsonl --name support --follow
        prefixtune jobs create manual.txt --document --questions self --name manual
        prefixtune jobs create more.jsonl --model support --name support-2
    """
    follows = options.follow or options.action == "follow"
    client = JobsClient(options.url, _key(options), _FOLLOW_SECONDS if follows else _ASK_SECONDS)
    with contextlib.closing(client):
        return _run(client, options)


def _run(client: JobsClient, options: JobsOptions) -> int:
    """Do what the words say, and print it; returns the exit code."""
    console, what = Console(quiet=options.quiet), options.what
    match options.action:
        case "list":
            found = client.list(JOBS, limit=options.limit)
            rows = [[job["id"], _status(job), _name(job), job.get("model"), _time(job)] for job in found]
            return _show_list(console, options, "jobs", found, ["job", "status", "name", "model", "created"], rows)
        case "files":
            found = client.list("/files", limit=options.limit)
            columns = ["file", "name", "purpose", "bytes", "created"]
            rows = [[*(one.get(name) for name in ("id", "filename", "purpose", "bytes")), _time(one)] for one in found]
            return _show_list(console, options, "files", found, columns, rows)
        case "upload":
            file = _upload(console, client, what, _purpose(options))
            print_json(file) if options.as_json else print(safe_text(str(file["id"])))
            if is_wrong := file.get("status") == "error":
                console.error(f"it cannot be trained on: {_line(file.get('status_details'))}")
            return int(is_wrong)
        case "delete":
            client.delete("/files" if _FILE_ID.fullmatch(what) else "/models", what)
            print_json({"id": what, "deleted": True}) if options.as_json else console.info(f"{what} is deleted")
            return 0
        case "follow":
            return _follow(console, client, options, what)
        case "create":
            job = _create(console, client, options)
        case "cancel" | "pause" | "resume" as action:
            job = client.job(what, action)
        case _:
            job = client.job(what)
    if options.follow:
        return _follow(console, client, options, job["id"])
    if options.as_json:
        print_json(job)
    else:
        facts = {"job": job["id"], "status": _status(job), "name": _name(job), "model": job.get("model")}
        facts |= {"created": _time(job), "error": _line((job.get("error") or {}).get("message"))}
        shown = [[name, str(value)] for name, value in facts.items() if value]
        console.table("", ["", ""], shown, result=True)
    return 0


def _key(options: JobsOptions) -> str:
    """The key for this server: a key for another one is not sent."""
    is_other = os.environ.get(_OTHER_URL, "").rstrip("/") == options.url.rstrip("/")
    return options.key or os.environ.get(_KEY, "") or (os.environ.get(_OTHER_KEY, "") if is_other else "")


def _purpose(options: JobsOptions) -> str:
    return "document" if options.document else "fine-tune"


def _upload(console: Console, client: JobsClient, file: str, purpose: str) -> dict[str, Any]:
    console.info(f"uploading {file} ...")
    return client.upload(expand_home(file), purpose)


def _create(console: Console, client: JobsClient, options: JobsOptions) -> dict[str, Any]:
    """Upload what is not on the server, and ask for a training.

    Raises:
        RequestError: The server refuses, or finds that a file cannot be trained on.
    """

    def file_id(file: str, purpose: str) -> str:
        if _FILE_ID.fullmatch(file) and not Path(file).exists():
            return file
        uploaded = _upload(console, client, file, purpose)
        if uploaded.get("status") == "error":
            raise RequestError(f"{file} cannot be trained on: {_line(uploaded.get('status_details'))}")
        # A job that is refused need not upload it again.
        console.info(f"uploaded as {uploaded['id']}, which can be given instead of the file")
        return str(uploaded["id"])

    request: dict[str, Any] = {"model": options.model or client.bare_model()}
    request["training_file"] = file_id(options.what, _purpose(options))
    if options.validation:
        request["validation_file"] = file_id(options.validation, "fine-tune")
    extension: dict[str, Any] = {"name": options.name} if options.name else {}
    for text in options.option:
        name, _, value = text.partition("=")
        try:
            extension[name] = json.loads(value, parse_constant=str)
        except (ValueError, RecursionError):
            extension[name] = value
    if options.questions:
        own = options.questions == "self"
        extension["questions"] = "self" if own else file_id(options.questions, "fine-tune")
    hyperparameters = {
        "n_epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate_multiplier": options.learning_rate_multiplier,
    }
    given = {name: value for name, value in hyperparameters.items() if value is not None}
    optional = {
        "seed": options.seed,
        "method": {"type": "supervised", "supervised": {"hyperparameters": given}} if given else None,
        "prefixtune": extension or None,
    }
    return client.create({**request, **{name: value for name, value in optional.items() if value is not None}})


def _follow(console: Console, client: JobsClient, options: JobsOptions, job_id: str) -> int:
    """Show the events of a job until it ends; returns the exit code."""
    with contextlib.ExitStack() as stack:
        on_step: Callable[..., None] | None = None

        def show(event: dict[str, Any]) -> None:
            nonlocal on_step
            data = event.get("data") or {}
            if options.as_json:
                print_event(event)
            elif isinstance(data.get("step"), int):
                if on_step is None:
                    on_step = stack.enter_context(console.progress("training", data.get("total_steps"))).update
                on_step(data["step"], **{_LOSSES[name]: data[name] for name in _LOSSES.keys() & data.keys()})
            else:
                say = console.error if event.get("level") == "error" else console.info
                say(_line(event.get("message")))

        job = client.follow(job_id, show)
    status = job["status"]
    if options.as_json:
        print_event(job)
    elif status == "succeeded":
        print(safe_text(_name(job)))
    else:
        hint = "`prefixtune jobs resume ID --follow` goes on." if status == "paused" else ""
        console.error(f"{job['id']} is {status}: {_line((job.get('error') or {}).get('message'))}", hint)
    return 0 if status == "succeeded" else 1


def _show_list(
    console: Console,
    options: JobsOptions,
    name: str,
    found: Sequence[dict[str, Any]],
    columns: list[str],
    rows: Sequence[Sequence[object]],
) -> int:
    if options.as_json:
        print_json({name: found})
    else:
        console.table("", columns, [[str(cell) for cell in row] for row in rows], result=True)
    return 0


def _name(job: dict[str, Any]) -> str:
    """What the result is, or will be, served as; empty: the server does not say."""
    return str(job.get("fine_tuned_model") or (job.get("prefixtune") or {}).get("name") or "")


def _status(job: dict[str, Any]) -> str:
    """Where a job stands, and how far it is."""
    progress = (job.get("prefixtune") or {}).get("progress") or {}
    step, total = progress.get("step"), progress.get("total_steps")
    if job.get("status") == "running" and isinstance(step, int) and isinstance(total, int) and total > 0:
        return f"running, {100 * step // total} %"
    return str(job.get("status"))


def _line(text: object) -> str:
    """A text from a server as one line, cut."""
    return " ".join(safe_text(str(text or "")[:2_000]).split())


def _time(thing: dict[str, Any]) -> str:
    """When something was made, as it is here."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(int(thing.get("created_at") or 0)))
