"""`prefixtune jobs`: trainings on a server, asked for and followed by OpenAI's interface."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from prefixtune.cli.api_client import ApiClient, check_url
from prefixtune.cli.common import print_event, print_json
from prefixtune.cli.options import OutputOptions, command, json_option, positional
from prefixtune.cli.training_client import FileView, JobView, TrainingClient
from prefixtune.cli.training_display import Follower, facts_of, one_line, status_of, time_of
from prefixtune.errors import ConfigError, RequestError, check_all
from prefixtune.utils.config import TextList, option_group
from prefixtune.utils.console import Console, safe_text
from prefixtune.utils.folders import expand_home

__all__ = ["jobs"]

_KEY, _OTHER_KEY, _OTHER_URL = "PREFIXTUNE_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"
_FOLLOW_SECONDS, _ASK_SECONDS = 120.0, 10.0
"""How long a server that is away is waited for."""
_FILE_ID = re.compile(r"file-[A-Za-z0-9]+")

_server, _training = option_group("server"), option_group("create")


class JobsOptions(OutputOptions):
    """The options of `prefixtune jobs`."""

    action: Literal["list", "create", "show", "follow", "cancel", "pause", "resume", "upload", "files", "delete"] = (
        positional("list", description="what to do, as listed above")
    )
    what: str = positional("", description="the id of a job, a file, or a name")
    limit: int = Field(20, ge=1, le=1000, description="list, files: how many, the newest first")
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
    epochs: str = _training("auto", description="times that each example is seen")
    batch_size: str = _training("auto", description="examples per step")
    learning_rate_multiplier: str = _training("auto", description="times the usual learning rate")
    seed: int | None = _training(None, ge=0, description="of the order of the data (default: the server chooses)")
    option: TextList = _training(
        (), description="NAME=VALUE, a further field of the request's object `prefixtune`, as in prefix_length=20"
    )


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
    if options.action not in ("list", "files") and not options.what:
        raise ConfigError(f"`prefixtune jobs {options.action}` needs {_NEEDS[options.action]}.", hint=_EXAMPLES)
    if options.action in ("list", "files") and options.what:
        raise ConfigError(
            f"unexpected argument {options.what!r}.", hint=f"`prefixtune jobs show {shlex.quote(options.what)}`?"
        )
    if options.action == "create":
        _check_create(options)
    console = Console(quiet=options.quiet)
    api = ApiClient(
        options.url,
        _key(options),
        patience=_FOLLOW_SECONDS if options.follow or options.action == "follow" else _ASK_SECONDS,
        on_wait=lambda reason: console.info(f"waiting for the server: {reason}"),
    )
    try:
        return _Command(options, console, TrainingClient(api)).run()
    finally:
        api.close()


_NEEDS = {
    **dict.fromkeys(("show", "follow", "cancel", "pause", "resume"), "the id of a job"),
    **dict.fromkeys(("create", "upload"), "a file"),
    "delete": "the name of a result, or the id of a file",
}
_EXAMPLES = "`prefixtune jobs` lists the jobs, and `prefixtune jobs --help` shows examples."


def _key(options: JobsOptions) -> str:
    """The key for this server: a key for another one is not sent."""
    if key := options.key or os.environ.get(_KEY, ""):
        return key
    other = os.environ.get(_OTHER_URL, "")
    if other and check_url(other) == check_url(options.url):
        return os.environ.get(_OTHER_KEY, "")
    return ""


class _Command:
    """Does what the words say, and prints it."""

    def __init__(self, options: JobsOptions, console: Console, client: TrainingClient) -> None:
        self._options, self._console, self._client = options, console, client

    def run(self) -> int:
        """The exit code."""
        what = self._options.what
        match self._options.action:
            case "list":
                return self._list()
            case "files":
                return self._list_files()
            case "upload":
                return self._show_file(self._upload(what, "document" if self._options.document else "fine-tune"))
            case "create":
                return self._follow_or_show(self._create())
            case "show":
                return self._show(self._client.job(what))
            case "follow":
                return self._follow(what)
            case "delete":
                return self._delete(what)
            case "resume":
                return self._follow_or_show(self._client.change(what, "resume"))
            case "cancel" | "pause" as action:
                return self._show(self._client.change(what, action))

    # --- asking -------------------------------------------------------------------------------------------------------

    def _upload(self, path: str, purpose: str) -> FileView:
        self._console.info(f"uploading {path} ...")
        return self._client.upload(expand_home(path), purpose)

    def _file_id(self, file: str, purpose: str) -> str:
        """The id of a file that is there already, or of one that is uploaded now.

        Raises:
            RequestError: The server finds that it cannot be trained on.
        """
        if _is_id(file):
            return file
        uploaded = self._upload(file, purpose)
        file_id = safe_text(uploaded.id)
        if uploaded.status == "error":
            raise RequestError(
                f"{file} cannot be trained on: {one_line(uploaded.status_details or '')}",
                hint=f"correct it; `{_command(self._options, 'delete', file_id)}` removes what was uploaded.",
            )
        # A job that is refused need not upload it again.
        self._console.info(f"uploaded as {file_id}, which can be given instead of the file")
        return file_id

    def _create(self) -> JobView:
        options = self._options
        extension, hyperparameters = _extension(options), _hyperparameters(options)
        model = options.model or self._client.bare_model()
        request: dict[str, Any] = {"model": model}
        request["training_file"] = self._file_id(options.what, "document" if options.document else "fine-tune")
        if options.validation:
            request["validation_file"] = self._file_id(options.validation, "fine-tune")
        if options.questions:
            own = options.questions == "self"
            extension["questions"] = "self" if own else self._file_id(options.questions, "fine-tune")
        if options.seed is not None:
            request["seed"] = options.seed
        if hyperparameters:
            request["method"] = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
        if extension:
            request["prefixtune"] = extension
        return self._client.create(request)

    def _follow_or_show(self, job: JobView) -> int:
        if not self._options.follow:
            return self._show(job)
        self._console.info(f"{safe_text(job.id)}: {safe_text(job.status)}")
        return self._follow(job.id)

    def _follow(self, job_id: str) -> int:
        try:
            if self._options.as_json:
                job = self._client.follow(job_id, lambda event: print_event(event.model_dump(mode="json")))
                print_event(job.model_dump(mode="json"))
                return 0 if job.status == "succeeded" else 1
            with contextlib.ExitStack() as stack:
                job = self._client.follow(job_id, Follower(self._console, stack).show)
        except KeyboardInterrupt:
            again = _command(self._options, "follow", job_id)
            raise KeyboardInterrupt(f"the job goes on; `{again}` follows it again.") from None
        return self._outcome(job)

    def _outcome(self, job: JobView) -> int:
        """Say how a job stands that was followed; returns the exit code."""
        if job.status == "succeeded":
            print(safe_text(job.name))
            return 0
        reason = f": {one_line(job.error.message)}" if job.error and job.error.message else ""
        hint = f"`{_command(self._options, 'resume', job.id)} --follow` goes on." if job.status == "paused" else ""
        self._console.error(f"{safe_text(job.id)} is {safe_text(job.status)}{reason}", hint)
        return 1

    def _delete(self, what: str) -> int:
        is_file = _FILE_ID.fullmatch(what) is not None
        if is_file:
            self._client.delete_file(what)
        else:
            self._client.delete_model(what)
        if self._options.as_json:
            print_json({"id": what, "deleted": True})
        else:
            self._console.info(f"{what} is deleted")
        return 0

    # --- showing ------------------------------------------------------------------------------------------------------

    def _list(self) -> int:
        found = self._client.jobs(self._options.limit)
        if self._options.as_json:
            print_json({"jobs": [job.model_dump(mode="json") for job in found]})
            return 0
        rows = [[job.id, status_of(job), job.name, job.model, time_of(job.created_at)] for job in found]
        self._console.table("", ["job", "status", "name", "model", "created"], rows, result=True)
        return 0

    def _list_files(self) -> int:
        found = self._client.files(self._options.limit)
        if self._options.as_json:
            print_json({"files": [file.model_dump(mode="json") for file in found]})
            return 0
        rows: list[list[str | int | None]] = [
            [file.id, file.filename, file.purpose, file.bytes, time_of(file.created_at)] for file in found
        ]
        self._console.table("", ["file", "name", "purpose", "bytes", "created"], rows, result=True)
        return 0

    def _show(self, job: JobView) -> int:
        if self._options.as_json:
            print_json(job.model_dump(mode="json"))
            return 0
        for name, text in facts_of(job):
            print(f"{name:<9} {text}")
        return 0

    def _show_file(self, file: FileView) -> int:
        if self._options.as_json:
            print_json(file.model_dump(mode="json"))
        else:
            print(safe_text(file.id))
            if file.status == "error":
                self._console.error(f"it cannot be trained on: {one_line(file.status_details or '')}")
        return 1 if file.status == "error" else 0


def _is_id(file: str) -> bool:
    """Whether it names an uploaded file, and not one here."""
    return _FILE_ID.fullmatch(file) is not None and not Path(file).exists()


def _check_create(options: JobsOptions) -> None:
    """Refuse a job, before the server is asked and anything is uploaded; all faults at once.

    Raises:
        ConfigError: A value is wrong, or a file is missing.
    """
    files = (options.what, options.validation, "" if options.questions == "self" else options.questions)
    check_all(
        [
            partial(check_url, options.url),
            partial(_extension, options),
            partial(_hyperparameters, options),
            *(partial(_check_file, file) for file in files if file),
        ]
    )


def _check_file(file: str) -> None:
    if not _is_id(file) and not expand_home(file).is_file():
        raise ConfigError(f"there is no file {file[:200]!r}.", hint="check the path.")


def _extension(options: JobsOptions) -> dict[str, Any]:
    """The request's object `prefixtune`."""
    fields: dict[str, Any] = {"name": options.name} if options.name else {}

    def read(text: str) -> None:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[a-z_]{1,64}", name):
            raise ConfigError(
                f"--option is {text[:80]!r}, but must be NAME=VALUE.", hint="as in --option prefix_length=20."
            )
        try:
            fields[name] = json.loads(value, parse_constant=_no_number)
        except (ValueError, RecursionError):
            fields[name] = value

    check_all([partial(read, text) for text in options.option])
    return fields


def _no_number(text: str) -> None:
    """NaN and the infinities, which Python reads and JSON has not: they stay texts, which the server refuses."""
    raise ValueError(text)


def _hyperparameters(options: JobsOptions) -> dict[str, float | int]:
    """Those that are not `auto`."""
    wanted: dict[str, tuple[str, Callable[[str], float | int]]] = {
        "n_epochs": (options.epochs, int),
        "batch_size": (options.batch_size, int),
        "learning_rate_multiplier": (options.learning_rate_multiplier, float),
    }
    found = {}

    def read(name: str, text: str, kind: Callable[[str], float | int]) -> None:
        try:
            found[name] = kind(text)
            if not math.isfinite(found[name]):
                raise ValueError
        except (ValueError, OverflowError):
            flag = "--epochs" if name == "n_epochs" else f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is {text[:80]!r}, but must be a number or auto.") from None

    check_all([partial(read, name, text, kind) for name, (text, kind) in wanted.items() if text != "auto"])
    return found


def _command(options: JobsOptions, action: str, what: str) -> str:
    """The words that do something with a job or a file on the same server."""
    url = f" --url {shlex.quote(options.url)}" if options.url != JobsOptions.default("url") else ""
    return f"prefixtune jobs {action} {shlex.quote(what)}{url}"
