"""`prefixtune jobs`: trainings on a server, asked for and followed by OpenAI's interface."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from prefixtune.cli.options import Conflicts, OutputOptions, command, option
from prefixtune.cli.show import Table, outline, print_event
from prefixtune.errors import ConfigError, RequestError
from prefixtune.utils.config import TextList
from prefixtune.utils.console import safe_text
from prefixtune.utils.folders import expand_home

_KEY, _OTHER_KEY, _OTHER_URL = "PREFIXTUNE_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"
_FOLLOW_SECONDS, _ASK_SECONDS = 120.0, 5.0
"""How long a server that is away is waited for."""
_PAUSE, _CONNECT_SECONDS, _ANSWER_SECONDS = 1.0, 10.0, 600.0
_AWAY = (502, 503, 504)
_ENDED = ("succeeded", "failed", "cancelled", "paused")
_JOBS, _PAGE = "/fine_tuning/jobs", 100
_LOSSES = {"train_loss": "loss", "valid_loss": "validation_loss"}
_HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate_multiplier")
_FILE_ID = re.compile(r"file-[0-9a-f]{24}")


class JobsOptions(OutputOptions):
    """The options of `prefixtune jobs`."""

    action: Literal["list", "create", "show", "follow", "cancel", "pause", "resume", "upload", "files", "delete"] = (
        option("list", "what to do, as listed above", positional=True)
    )
    what: str = option("", "the id of a job, a file, or a name", positional=True)
    limit: int = option(20, "list, files: how many, the newest first", ge=1, le=100)
    follow: bool = option(False, "create, resume: then show the training until it ends")

    url: str = option("http://127.0.0.1:8000/v1", "the server's interface", group="server")
    key: str = option(
        "",
        f"API key, which other users of this machine can see (default: the variable {_KEY}, or OpenAI's)",
        group="server",
    )

    model: str = option("", "what to train: the bare model, or an earlier result (default: bare)", group="create")
    name: str = option("", "what the result is served as (default: the server makes one)", group="create")
    validation: str = option("", "file, or id of one, to choose the best steps by", group="create")
    document: bool = option(False, "the file is a document, to make a memory of", group="create")
    questions: str = option("", "of a document: file, or id of one, with questions; or self", group="create")
    option: TextList = option(
        (),
        f"NAME=VALUE, once for each: seed, {', '.join(_HYPERPARAMETERS)}, or a field of the request's object "
        "`prefixtune`, as in prefix_length=20",
        group="create",
    )

    def conflicts(self) -> Conflicts:
        """Most actions are done to something."""
        if (self.action in ("list", "files")) == bool(self.what):
            yield ("what",), f"{self.action} {'takes no' if self.what else 'needs a'} file, name or id"
        if wrong := [text for text in self.option if not re.match(r"[a-z_]+=", text)]:
            yield ("option",), f"--option is {wrong[0][:80]!r}, but must be NAME=VALUE"
        given = [name for name in ("model", "name", "validation", "questions", "option") if self.has(name)]
        if given and self.action != "create":
            yield tuple(given), f"{' and '.join(map(self.flag, given))}: for create, not for {self.action}"


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
        prefixtune jobs create more.jsonl --model support --name support-2 --option n_epochs=2
    """
    with contextlib.closing(_Client(options)) as client:
        return _run(client, options)


def _run(client: _Client, options: JobsOptions) -> int:
    """Do what the words say, and print it; returns the exit code."""
    what = options.what
    match options.action:
        case "list":
            found = client.list(_JOBS, limit=options.limit)
            rows = [[job["id"], _status(job), _name(job), str(job.get("model")), _time(job)] for job in found]
            options.show({"jobs": found}, Table("", ["job", "status", "name", "model", "created"], rows))
        case "files":
            found = client.list("/files", limit=options.limit)
            columns = ["id", "filename", "purpose", "bytes"]
            rows = [[*(str(one.get(name)) for name in columns), _time(one)] for one in found]
            options.show({"files": found}, Table("", ["file", "name", *columns[2:], "created"], rows))
        case "upload":
            file = client.upload(what, _purpose(options))
            options.show(file, safe_text(str(file["id"])))
            if file.get("status") == "error":
                options.console.error(f"it cannot be trained on: {_line(file.get('status_details'))}")
                return 1
        case "delete":
            client.ask("DELETE", f"{'/files' if _FILE_ID.fullmatch(what) else '/models'}/{quote(what, safe='')}")
            options.show({"id": what, "deleted": True}, f"{what} is deleted")
        case "follow":
            return _follow(client, options, what)
        case action:
            if action == "create":
                job = _create(client, options)
            else:
                job = client.job(what, "" if action == "show" else action)
            if options.follow:
                return _follow(client, options, job["id"])
            facts = {"job": job["id"], "status": _status(job), "name": _name(job), "model": job.get("model")}
            facts |= {"created": _time(job), "error": _line((job.get("error") or {}).get("message"))}
            options.show(job, *outline({name: value for name, value in facts.items() if value}))
    return 0


def _create(client: _Client, options: JobsOptions) -> dict[str, Any]:
    """Upload what is not on the server, and ask for a training; again if need be: by its key it is made once.

    Raises:
        RequestError: The server refuses, or finds that a file cannot be trained on.
    """

    def file_id(file: str, purpose: str) -> str:
        if _FILE_ID.fullmatch(file) and not Path(file).exists():
            return file
        uploaded = client.upload(file, purpose)
        if uploaded.get("status") == "error":
            raise RequestError(f"{file} cannot be trained on: {_line(uploaded.get('status_details'))}")
        # A job that is refused need not upload it again.
        options.console.info(f"uploaded as {uploaded['id']}, which can be given instead of the file")
        return str(uploaded["id"])

    request: dict[str, Any] = {"model": options.model or client.bare_model()}
    request["training_file"] = file_id(options.what, _purpose(options))
    if options.validation:
        request["validation_file"] = file_id(options.validation, "fine-tune")
    extension: dict[str, Any] = {"name": options.name} if options.name else {}
    for text in options.option:
        name, _, value = text.partition("=")
        extension[name] = value
        with contextlib.suppress(ValueError, RecursionError):
            extension[name] = json.loads(value, parse_constant=str)
    if options.questions:
        is_made = options.questions == "self"
        extension["questions"] = "self" if is_made else file_id(options.questions, "fine-tune")
    if "seed" in extension:
        request["seed"] = extension.pop("seed")
    if given := {name: extension.pop(name) for name in _HYPERPARAMETERS if name in extension}:
        request["method"] = {"type": "supervised", "supervised": {"hyperparameters": given}}
    if extension:
        request["prefixtune"] = extension
    return client.ask("POST", _JOBS, json=request, headers={"Idempotency-Key": secrets.token_hex(16)})


def _follow(client: _Client, options: JobsOptions, job_id: str) -> int:
    """Show the events of a job until it ends; returns the exit code."""
    console = options.console
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
    succeeded = job["status"] == "succeeded"
    if options.as_json:
        print_event(job)
    elif succeeded:
        print(safe_text(_name(job)))
    else:
        console.error(f"{job['id']} is {job['status']}: {_line((job.get('error') or {}).get('message'))}")
    return 0 if succeeded else 1


class _Client:
    """What a server can be asked to train. Files, jobs and events are as the server says them.

    A key is sent to this server alone: redirects are not followed. Every method raises a `RequestError` where the
    server is away, refuses, or answers in another shape.
    """

    def __init__(self, options: JobsOptions) -> None:
        import httpx2

        if not re.match(r"https?://(\[[\da-fA-F:.]+\]|[^@/?#:\[\]]+)(:\d{1,5})?(/[^?#]*)?$", options.url):
            raise ConfigError("--url must be an address of http or https, without a key.", hint="http://here/v1, say.")
        # A key for another server is not sent.
        is_other = os.environ.get(_OTHER_URL, "").rstrip("/") == options.url.rstrip("/")
        key = options.key or os.environ.get(_KEY, "") or (os.environ.get(_OTHER_KEY, "") if is_other else "")
        self.url, self._console = options.url.rstrip("/"), options.console
        self._patience = _FOLLOW_SECONDS if options.follow or options.action == "follow" else _ASK_SECONDS
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {key}".encode()} if key else {},
            timeout=httpx2.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
            # Proxies of the environment are for other machines.
            trust_env=httpx2.URL(options.url).host not in ("localhost", "127.0.0.1", "::1"),
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def bare_model(self) -> str:
        """The name of the model without a prefix."""
        bare = [str(model["id"]) for model in self.list("/models") if model.get("parent") is None]
        if len(bare) != 1:
            raise RequestError(
                f"{self.url} does not say which of its models is the bare one.", hint="name it with --model."
            )
        return bare[0]

    def upload(self, file: str, purpose: str) -> dict[str, Any]:
        """Upload a file."""
        self._console.info(f"uploading {file} ...")
        with expand_home(file).open("rb") as stream:
            return self.ask("POST", "/files", data={"purpose": purpose}, files={"file": stream})

    def list(self, path: str, **parameters: str | int) -> list[dict[str, Any]]:
        """A page of `/files`, `/models`, jobs or events, the newest first."""
        found = self.ask("GET", path, params=parameters).get("data")
        if not isinstance(found, list) or not all(isinstance(one, dict) and "id" in one for one in found):
            raise self._foreign()
        return found

    def job(self, job_id: str, action: str = "") -> dict[str, Any]:
        """One job; with `cancel`, `pause` or `resume`, how it stands after that."""
        path = f"{_JOBS}/{quote(job_id, safe='')}"
        job = self.ask("POST", f"{path}/{action}") if action else self.ask("GET", path)
        if not isinstance(job.get("status"), str):
            raise self._foreign()
        return job

    def follow(self, job_id: str, on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Call `on_event` with each event, from the first on, until the job stands still; returns how it stands."""
        known, path = set[str](), f"{_JOBS}/{quote(job_id, safe='')}/events"
        while True:
            job = self.job(job_id)
            new: list[dict[str, Any]] = []
            page = self.list(path, limit=_PAGE)
            while fresh := [event for event in page if event["id"] not in known]:
                new += fresh
                known |= {event["id"] for event in fresh}
                page = self.list(path, limit=_PAGE, after=page[-1]["id"]) if len(page) == _PAGE else []
            for event in reversed(new):
                on_event(event)
            if job["status"] in _ENDED:
                return job
            time.sleep(_PAUSE)

    def ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """The object of an answer; a question, or what has a key, is asked again while the server is away."""
        import httpx2

        end = time.monotonic() + self._patience
        while True:
            try:
                response = self._client.request(method, self.url + path, **options)
                status, answer = response.status_code, response.json()
                if response.is_success and isinstance(answer, dict):
                    return answer
                message = str(answer["error"]["message"])
            except httpx2.HTTPError as error:
                status, message = 0, f"{self.url} cannot be reached: {error}."
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise self._foreign() from error
            may_ask_again = (method == "GET" or "headers" in options) and (not status or status in _AWAY)
            if not may_ask_again or time.monotonic() > end:
                hint = "does --url name a server of `prefixtune serve`?" if not status else ""
                hint = f"give a key with --key, or in the variable {_KEY}." if status == 401 else hint
                raise RequestError(message, hint=hint)
            time.sleep(_PAUSE)

    def _foreign(self) -> RequestError:
        return RequestError(
            f"{self.url} answers in a shape that OpenAI's interface does not have.",
            hint="does --url name a server of `prefixtune serve`, with /v1 at its end?",
        )


def _purpose(options: JobsOptions) -> str:
    return "document" if options.document else "fine-tune"


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
