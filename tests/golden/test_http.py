"""The contract of the HTTP interface: for each route good and bad calls, with the status and the kind of the error.

Of an error the type, the code and the top-level field of `param` are compared; codes that no client needs are null. Of
a good answer the keys are compared, where they are fixed.
"""

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from asgi_client import bearer, send
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import make_header
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import TorchEngine
from prefixtune.prefix.prefix import save_prefix
from prefixtune.server.app import make_app
from prefixtune.server.auth import hash_key
from prefixtune.server.prefixes import PrefixFolder
from prefixtune.server.settings import KeyConfig, ServeConfig
from prefixtune.server.state import ServerState
from random_prefixes import random_prefix
from zoo import make_model, make_tokenizer

GOLDEN = Path(__file__).with_name("http.json")
CODES = {
    *("invalid_api_key", "model_not_found", "model_not_allowed", "not_the_owner", "context_length_exceeded"),
    *("unknown_field", "unsupported_field", "queue_full", "rate_limit_exceeded", "concurrency_limit_exceeded"),
    *("draining", "file_not_found", "job_not_found", "name_taken", "too_many_jobs", "training_off"),
}
"""What clients tell errors apart by."""
FORMAT = {"prompt": " {source} {separator}", "target": " {target} ", "source": "{name}"}
ROWS = "".join(json.dumps({"prompt": f"question {n}", "completion": f"answer {n}"}) + "\n" for n in range(20))
USER = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=0123456789"}
Call = tuple[str, str, Any] | tuple[str, str, Any, dict[str, str]]


def part(name, content, more=""):
    """A part of a form."""
    return f'--0123456789\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n{content}\r\n'.encode()


def form(content=ROWS, filename="rows.jsonl", **fields):
    """A form with a file."""
    parts = [part(name, text) for name, text in fields.items()]
    return b"".join([*parts, part("file", content, f'; filename="{filename}"'), b"--0123456789--\r\n"])


def texts(path, **body):
    """What both of OpenAI's requests for texts answer alike."""

    def post(**more):
        return "POST", path, {**body, **more}

    return {
        "good": post(),
        "stream": post(stream=True),
        "joined": post(model="a+b"),
        "joined by list": post(model="tiny", prefixes=["a", "b"]),
        "null is no field": post(max_tokens=None, stop=None, seed=None),
        "neutral fields": post(tools=[], tool_choice="none", user="me", metadata={"a": "b"}, store=True),
        "wrong type": post(max_tokens=[5]),
        "wrong temperature": post(temperature="hot"),
        "out of range": post(temperature=3),
        "too many tokens": post(max_tokens=65),
        "too many texts": post(n=5),
        "too few tokens": post(max_tokens=2, min_tokens=3),
        "unknown field": post(max_tokns=5),
        "not supported": post(tools=[{"type": "function", "function": {"name": "f"}}]),
        "unknown model": post(model="nobody"),
        "unknown part": post(model="a+nobody"),
        "the same twice": post(model="a+a"),
        "too many joined": post(model="a+b+c"),
        "no model": ("POST", path, {name: value for name, value in body.items() if name != "model"}),
        "model of another type": post(model=3),
        "wrong stop": post(stop=[1]),
        "too many stops": post(stop=["x"] * 17),
        "stream options alone": post(stream_options={"include_usage": True}),
        "wrong format": post(response_format={"type": "yaml"}),
        "wrong bias": post(logit_bias={"x": 1}),
        "unknown option": post(stream=True, stream_options={"include": True}),
        "bad json": ("POST", path, b"{"),
        "no object": ("POST", path, [1]),
        "no body": ("POST", path, None),
        "not utf-8": ("POST", path, b'{"model": "\xff"}'),
        "deep json": ("POST", path, b"[" * 60_000),
        "too large": ("POST", path, b" " * (64 * 1024 + 1)),
        "content type": ("POST", path, {**body}, {"content-type": "text/plain"}),
        "method": ("GET", path, None),
        "another host": ("POST", path, {**body}, {"host": "evil.example"}),
        "a proxy": ("POST", path, {**body}, {"x-forwarded-for": "192.0.2.1"}),
    }  # fmt: skip


COMPLETIONS = {
    **texts("/v1/completions", model="a", prompt="hi", max_tokens=2),
    "ids": ("POST", "/v1/completions", {"model": "a", "prompt": [1, 2], "max_tokens": 2}),
    "echo": ("POST", "/v1/completions", {"model": "a", "prompt": "hi", "max_tokens": 0, "echo": True, "logprobs": 1}),
    "no prompt": ("POST", "/v1/completions", {"model": "a"}),
    "empty prompt": ("POST", "/v1/completions", {"model": "a", "prompt": ""}),
    "mixed prompt": ("POST", "/v1/completions", {"model": "a", "prompt": ["a", [1]]}),
    "ids out of range": ("POST", "/v1/completions", {"model": "a", "prompt": [-1]}),
    "too long": ("POST", "/v1/completions", {"model": "a", "prompt": [5] * 600}),
    "too many logprobs": ("POST", "/v1/completions", {"model": "a", "prompt": "hi", "logprobs": 21}),
}
CHAT = "/v1/chat/completions"
CHATS = {
    **texts(CHAT, model="a", messages=USER, max_tokens=2),
    "parts": ("POST", CHAT, {"model": "a", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}),
    "newer length": ("POST", CHAT, {"model": "a", "messages": USER, "max_completion_tokens": 2}),
    "no messages": ("POST", CHAT, {"model": "a", "messages": []}),
    "unknown role": ("POST", CHAT, {"model": "a", "messages": [{"role": "bot", "content": "x"}]}),
    "no content": ("POST", CHAT, {"model": "a", "messages": [{"role": "user"}]}),
    "an image": ("POST", CHAT, {"model": "a", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    "a tool call": ("POST", CHAT, {"model": "a", "messages": [{**USER[0], "tool_calls": [{"id": "x"}]}]}),
    "assistant last": ("POST", CHAT, {"model": "a", "messages": [{"role": "assistant", "content": "x"}]}),
    "earlier messages": ("POST", CHAT, {"model": "a", "messages": [*USER, *USER]}),
    "no template": ("POST", CHAT, {"model": "tiny", "messages": USER}),
    "top logprobs alone": ("POST", CHAT, {"model": "a", "messages": USER, "top_logprobs": 2}),
    "logprobs as a number": ("POST", CHAT, {"model": "a", "messages": USER, "logprobs": 3}),
}
TASK = "/v1/tasks/a"
TASKS = {
    "describe": ("GET", TASK, None),
    "describe the backbone": ("GET", "/v1/tasks/tiny", None),
    "describe joined": ("GET", "/v1/tasks/a+b", None),
    "describe unknown": ("GET", "/v1/tasks/nobody", None),
    "good": ("POST", TASK, {"name": "x", "max_tokens": 2}),
    "fields": ("POST", TASK, {"fields": {"name": "x"}, "max_tokens": 2}),
    "source": ("POST", TASK, {"source": "x", "max_tokens": 2}),
    "stream": ("POST", TASK, {"source": "x", "max_tokens": 2, "stream": True}),
    "format of": ("POST", "/v1/tasks/tiny", {"format_of": "a", "name": "x", "max_tokens": 2}),
    "format of with a prefix": ("POST", TASK, {"format_of": "b", "name": "x"}),
    "no field": ("POST", TASK, {"max_tokens": 2}),
    "both": ("POST", TASK, {"source": "x", "name": "y"}),
    "unknown field": ("POST", TASK, {"name": "x", "nme": "y"}),
    "unknown within": ("POST", TASK, {"fields": {"nme": "y"}}),
    "outside and within": ("POST", TASK, {"name": "x", "fields": {"name": "y"}}),
    "fields as a list": ("POST", TASK, {"fields": [1]}),
    "out of range": ("POST", TASK, {"name": "x", "top_p": 2}),
    "wrong type": ("POST", TASK, {"name": "x", "max_tokens": "many"}),
    "unknown name": ("POST", "/v1/tasks/nobody", {"source": "x"}),
    "bad json": ("POST", TASK, b"nonsense"),
    "content type": ("POST", TASK, {"source": "x"}, {"content-type": "text/plain"}),
    "method": ("PUT", TASK, {"source": "x"}),
}
CLASSIFY = {
    "good": ("POST", "/classify", {"model": "tiny", "input": ["x", "y"], "labels": ["a", "b"]}),
    "one text": ("POST", "/classify", {"model": "tiny", "input": "x", "labels": ["a", "b"]}),
    "no labels": ("POST", "/classify", {"model": "tiny", "input": "x"}),
    "one label": ("POST", "/classify", {"model": "tiny", "input": "x", "labels": ["a"]}),
    "a label twice": ("POST", "/classify", {"model": "tiny", "input": "x", "labels": ["a", "a"]}),
    "a generator": ("POST", "/classify", {"model": "a", "input": "x"}),
    "too many texts": ("POST", "/classify", {"model": "tiny", "input": ["x"] * 5, "labels": ["a", "b"]}),
    "empty": ("POST", "/classify", {"model": "tiny", "input": [], "labels": ["a", "b"]}),
    "words": ("POST", "/classify", {"model": "tiny", "input": [["x", "y"]], "labels": ["a", "b"]}),
    "wrong type": ("POST", "/classify", {"model": "tiny", "input": 3, "labels": ["a", "b"]}),
    "unknown field": ("POST", "/classify", {"model": "tiny", "input": "x", "lables": ["a"]}),
    "unknown model": ("POST", "/classify", {"model": "nobody", "input": "x"}),
    "too long": ("POST", "/classify", {"model": "tiny", "input": "x" * 600, "labels": ["a", "b"]}),
    "bad json": ("POST", "/classify", b"[1,"),
    "method": ("GET", "/classify", None),
}
MODELS = {
    "list": ("GET", "/v1/models", None),
    "one": ("GET", "/v1/models/a", None),
    "backbone": ("GET", "/v1/models/tiny", None),
    "joined": ("GET", "/v1/models/a+b", None),
    "unknown": ("GET", "/v1/models/nobody", None),
    "joined with the backbone": ("GET", "/v1/models/a+tiny", None),
    "an empty part": ("GET", "/v1/models/a+", None),
    "head": ("HEAD", "/v1/models", None),
    "file of nobody's job": ("GET", "/v1/models/a/file", None),
    "file of an unknown one": ("GET", "/v1/models/nobody/file", None),
    "delete the backbone": ("DELETE", "/v1/models/tiny", None),
    "delete an unknown one": ("DELETE", "/v1/models/nobody", None),
    "delete what no job made": ("DELETE", "/v1/models/b", None),
    "method": ("PATCH", "/v1/models/a", None),
    "unknown path": ("GET", "/v1/nothing", None),
    "embeddings": ("POST", "/v1/embeddings", {"model": "a", "input": "x"}),
    "no prefix of a path": ("GET", "/models", None),
}
OTHERS = {
    "healthz": ("GET", "/healthz", None),
    "readyz": ("GET", "/readyz", None),
    "health of another method": ("POST", "/healthz", None),
    "metrics": ("GET", "/metrics", None),
    "status": ("GET", "/v1/status", None),
    "interface": ("GET", "/openapi.json", None),
    "playground": ("GET", "/", None),
    "train page": ("GET", "/train", None),
    "docs page": ("GET", "/docs", None),
    "status of another host": ("GET", "/v1/status", None, {"host": "evil.example"}),
    "metrics by a proxy": ("GET", "/metrics", None, {"forwarded": "for=192.0.2.1"}),
}
FILES = {
    "good": ("POST", "/v1/files", form(purpose="fine-tune"), FORM),
    "document": ("POST", "/v1/files", form("It is.", "text.txt", purpose="document"), FORM),
    "wrong rows are kept": ("POST", "/v1/files", form("{}\n", purpose="fine-tune"), FORM),
    "no purpose": ("POST", "/v1/files", form(), FORM),
    "wrong purpose": ("POST", "/v1/files", form(purpose="vision"), FORM),
    "no file": ("POST", "/v1/files", part("purpose", "fine-tune") + b"--0123456789--\r\n", FORM),
    "file without a name": (
        "POST", "/v1/files", part("purpose", "fine-tune") + part("file", ROWS) + b"--0123456789--\r\n", FORM,
    ),
    "empty": ("POST", "/v1/files", form("", purpose="fine-tune"), FORM),
    "too large": ("POST", "/v1/files", form(ROWS * 1200, purpose="fine-tune"), FORM),
    "not a form": ("POST", "/v1/files", {"purpose": "fine-tune"}),
    "another site": ("POST", "/v1/files", form(purpose="fine-tune"), {**FORM, "origin": "https://evil.example"}),
    "list": ("GET", "/v1/files", None),
    "list in order": ("GET", "/v1/files?limit=1&order=asc&purpose=document", None),
    "wrong limit": ("GET", "/v1/files?limit=many", None),
    "limit out of range": ("GET", "/v1/files?limit=0", None),
    "wrong order": ("GET", "/v1/files?order=up", None),
    "unknown after": ("GET", "/v1/files?after=file-nothing", None),
    "one": ("GET", "/v1/files/{file}", None),
    "content": ("GET", "/v1/files/{file}/content", None),
    "preview": ("GET", "/v1/files/{file}/preview", None),
    "preview of a document": ("GET", "/v1/files/{document}/preview", None),
    "unknown": ("GET", "/v1/files/file-nothing", None),
    "unknown content": ("GET", "/v1/files/file-nothing/content", None),
    "unknown preview": ("GET", "/v1/files/file-nothing/preview", None),
    "delete unknown": ("DELETE", "/v1/files/file-nothing", None),
    "delete by another site": ("DELETE", "/v1/files/{spare}", None, {"origin": "https://evil.example"}),
    "delete": ("DELETE", "/v1/files/{spare}", None),
    "deleted": ("GET", "/v1/files/{spare}", None),
    "method": ("PUT", "/v1/files", None),
}  # fmt: skip
JOB, JOBS_PATH = "/v1/fine_tuning/jobs/{job}", "/v1/fine_tuning/jobs"


def job(**fields):
    return "POST", JOBS_PATH, {"model": "tiny", "training_file": "{file}", **fields}


JOBS = {
    "good": job(suffix="x", seed=3, metadata={"team": "blue"}, prefixtune={"prefix_length": 2, "name": "named"}),
    "method": job(method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}),
    "from a prefix": job(model="a"),
    "document": job(training_file="{document}", prefixtune={"document": "{document}", "num_questions": 5}),
    "name taken": job(prefixtune={"name": "named"}),
    "name of the backbone": job(prefixtune={"name": "tiny"}),
    "unknown model": job(model="nobody"),
    "joined model": job(model="a+b"),
    "unknown file": job(training_file="file-nothing"),
    "unknown validation file": job(validation_file="file-nothing"),
    "file that is wrong": job(training_file="{wrong}"),
    "no file": ("POST", JOBS_PATH, {"model": "tiny"}),
    "unknown field": job(suffx="x"),
    "unknown option": job(prefixtune={"prefix_lenth": 2}),
    "out of range": job(hyperparameters={"n_epochs": 0}),
    "wrong type": job(hyperparameters={"batch_size": "big"}),
    "wrong suffix": job(suffix="../x"),
    "wrong seed": job(seed=-1),
    "too much metadata": job(metadata={str(n): "x" for n in range(17)}),
    "dpo": job(method={"type": "dpo"}),
    "too long a prefix": job(prefixtune={"prefix_length": 600}),
    "too many steps": job(prefixtune={"max_steps": 5001}),
    "steps and epochs": job(hyperparameters={"n_epochs": 2}, prefixtune={"max_steps": 3}),
    "tracker": job(integrations=[{"type": "wandb", "wandb": {"project": "x"}}]),
    "bad json": ("POST", JOBS_PATH, b"{"),
    "content type": ("POST", JOBS_PATH, {"model": "tiny"}, {"content-type": "text/plain"}),
    "another site": (*job(), {"origin": "https://evil.example"}),
    "list": ("GET", f"{JOBS_PATH}?limit=2&metadata[team]=blue", None),
    "wrong limit": ("GET", f"{JOBS_PATH}?limit=-1", None),
    "unknown after": ("GET", f"{JOBS_PATH}?after=ftjob-nothing", None),
    "one": ("GET", JOB, None),
    "unknown": ("GET", f"{JOBS_PATH}/ftjob-nothing", None),
    "events": ("GET", f"{JOB}/events", None),
    "wrong limit of events": ("GET", f"{JOB}/events?limit=1000", None),
    "unknown event": ("GET", f"{JOB}/events?after=nothing", None),
    "events of an unknown one": ("GET", f"{JOBS_PATH}/ftjob-nothing/events", None),
    "checkpoints": ("GET", f"{JOB}/checkpoints", None),
    "checkpoints of an unknown one": ("GET", f"{JOBS_PATH}/ftjob-nothing/checkpoints", None),
    "wrong limit of checkpoints": ("GET", f"{JOB}/checkpoints?limit=x", None),
    "resume what is not paused": ("POST", f"{JOB}/resume", None),
    "pause": ("POST", f"{JOB}/pause", None),
    "pause what is paused": ("POST", f"{JOB}/pause", None),
    "resume": ("POST", f"{JOB}/resume", None),
    "cancel by another site": ("POST", f"{JOB}/cancel", None, {"origin": "https://evil.example"}),
    "cancel": ("POST", f"{JOB}/cancel", None),
    "cancel what is cancelled": ("POST", f"{JOB}/cancel", None),
    "resume what is cancelled": ("POST", f"{JOB}/resume", None),
    "cancel an unknown one": ("POST", f"{JOBS_PATH}/ftjob-nothing/cancel", None),
    "pause an unknown one": ("POST", f"{JOBS_PATH}/ftjob-nothing/pause", None),
    "resume an unknown one": ("POST", f"{JOBS_PATH}/ftjob-nothing/resume", None),
}
ANN, BEN, BOSS, GUEST = bearer("ann"), bearer("ben"), bearer("boss"), bearer("guest")
KEYS = {
    "no key": ("GET", "/v1/models", None),
    "wrong key": ("GET", "/v1/models", None, bearer("nobody")),
    "another scheme": ("GET", "/v1/models", None, {"authorization": "Basic pt-ann"}),
    "key": ("GET", "/v1/models", None, ANN),
    "key at another host": ("GET", "/v1/models", None, {**ANN, "host": "api.example"}),
    "key behind a proxy": ("GET", "/v1/models", None, {**ANN, "x-forwarded-for": "192.0.2.1"}),
    "no key for texts": ("POST", "/v1/completions", {"model": "a", "prompt": "x"}),
    "another's model": ("POST", "/v1/completions", {"model": "b", "prompt": "x"}, {**JSON, **ANN}),
    "another's model in a join": ("POST", CHAT, {"model": "a+b", "messages": USER}, {**JSON, **ANN}),
    "own model": ("POST", "/v1/completions", {"model": "a", "prompt": "x", "max_tokens": 2}, {**JSON, **ANN}),
    "another's task": ("GET", "/v1/tasks/b", None, ANN),
    "unknown model": ("GET", "/v1/models/nobody", None, GUEST),
    "another's file": ("GET", "/v1/models/a/file", None, ANN),
    "an admin's copy": ("GET", "/v1/models/a/file", None, BOSS),
    "delete another's": ("DELETE", "/v1/models/a", None, ANN),
    "metrics without the right": ("GET", "/metrics", None, ANN),
    "metrics": ("GET", "/metrics", None, BOSS),
    "metrics without a key": ("GET", "/metrics", None),
    "health without a key": ("GET", "/healthz", None),
    "status without a key": ("GET", "/v1/status", None),
    "status": ("GET", "/v1/status", None, ANN),
    "interface without a key": ("GET", "/openapi.json", None),
    "page without a key": ("GET", "/", None),
    "rate": ("POST", "/v1/completions", {"model": "a", "prompt": "x", "max_tokens": 1}, {**JSON, **bearer("slow")}),
    "rate exceeded": ("POST", "/v1/completions", {"model": "a", "prompt": "x"}, {**JSON, **bearer("slow")}),
    "upload without the right": ("POST", "/v1/files", form(purpose="fine-tune"), {**FORM, **GUEST}),
    "upload without a key": ("POST", "/v1/files", form(purpose="fine-tune"), FORM),
    "upload": ("POST", "/v1/files", form(purpose="fine-tune"), {**FORM, **ANN}),
    "too many files": ("POST", "/v1/files", form(purpose="fine-tune"), {**FORM, **ANN}),
    "another's upload": ("GET", "/v1/files/{ann}", None, GUEST),
    "another's upload deleted": ("DELETE", "/v1/files/{ann}", None, BEN),
    "an admin sees it": ("GET", "/v1/files/{ann}", None, BOSS),
    "job": ("POST", JOBS_PATH, {"model": "tiny", "training_file": "{ann}"}, {**JSON, **ANN}),
    "too many jobs": ("POST", JOBS_PATH, {"model": "tiny", "training_file": "{ann}"}, {**JSON, **ANN}),
    "job with another's file": ("POST", JOBS_PATH, {"model": "tiny", "training_file": "{ann}"}, {**JSON, **BEN}),
    "job from another's prefix": ("POST", JOBS_PATH, {"model": "a", "training_file": "{ann}"}, {**JSON, **ANN}),
    "job without the right": ("POST", JOBS_PATH, {"model": "tiny", "training_file": "x"}, {**JSON, **GUEST}),
    "another's job": ("GET", "/v1/fine_tuning/jobs/{anns}", None, BEN),
    "another's job cancelled": ("POST", "/v1/fine_tuning/jobs/{anns}/cancel", None, BEN),
    "guest lists jobs": ("GET", JOBS_PATH, None, GUEST),
    "guest cancels": ("POST", "/v1/fine_tuning/jobs/{anns}/cancel", None, GUEST),
    "own job": ("GET", "/v1/fine_tuning/jobs/{anns}", None, ANN),
    "an admin cancels it": ("POST", "/v1/fine_tuning/jobs/{anns}/cancel", None, BOSS),
}  # fmt: skip
OFF = {
    "files": ("GET", "/v1/files", None),
    "jobs": ("GET", JOBS_PATH, None),
    "upload": ("POST", "/v1/files", form(purpose="fine-tune"), FORM),
    "train page": ("GET", "/train", None),
    "models": ("GET", "/v1/models", None),
}
DRAINING = {
    "texts": ("POST", "/v1/completions", {"model": "a", "prompt": "x"}),
    "models": ("GET", "/v1/models", None),
    "healthz": ("GET", "/healthz", None),
    "readyz": ("GET", "/readyz", None),
    "upload": ("POST", "/v1/files", form(purpose="fine-tune"), FORM),
}
RULES = {
    "ann": {"prefixes": ("a",), "max_files": 1, "max_jobs": 1},
    "ben": {},
    "boss": {"admin": True},
    "guest": {"train": False},
    "slow": {"requests_per_minute": 1},
}


class Servers:
    """Applications over one tiny model, in folders of their own; closed together."""

    def __init__(self, folder):
        self.folder, self.states = folder, list[ServerState]()
        tokenizer = make_tokenizer()
        self.backbone = Backbone.from_model(
            make_model("llama", tokenizer, max_position_embeddings=512), tokenizer, "tiny"
        )
        with torch.no_grad():
            # The end token is never the likeliest: every text is as long as requested.
            self.backbone.model.get_output_embeddings().weight[self.backbone.eos_id] = 0.0

    def make(self, name, **options):
        """An application with the prefixes `a`, `b` and `c`."""
        folder = self.folder / name / "prefixes"
        folder.mkdir(parents=True)
        for seed, prefix_name in enumerate("abc"):
            header = make_header(self.backbone, task="records", text_format=FORMAT)
            save_prefix(folder / f"{prefix_name}.safetensors", random_prefix(self.backbone, 4, seed, header=header))
        config = ServeConfig(
            backbone="tiny",
            prefixes=str(folder),
            data_folder=str(self.folder / name / "data"),
            num_slots=4,
            **{"max_tokens": 64, "default_max_tokens": 4, "max_texts": 4, "max_joined_prefixes": 2, "max_body_kib": 64,
               "max_file_mib": 1, **options},
        )  # fmt: skip
        engine = TorchEngine(self.backbone, EngineConfig(num_slots=4))
        state = ServerState(config, self.backbone, PrefixFolder(folder, self.backbone), engine)
        self.states.append(state)
        return make_app(state), state

    def close(self):
        """Stop all engines."""
        for state in self.states:
            state.close()


def answer(path, response):
    """What is compared of a response."""
    try:
        body = json.loads(response.body)
    except ValueError:
        body = None
    if response.status < 400 or "error" not in body:
        is_fixed = isinstance(body, dict) and not path.endswith(("/preview", "/healthz", "/readyz"))
        return [response.status, " ".join(sorted(body)) if is_fixed else ""]
    error = body["error"]
    field = None if error["param"] is None else error["param"].partition(".")[0].partition("[")[0]
    return [response.status, error["type"], field, error["code"] if error["code"] in CODES else None]


def fill(value, ids):
    """A value with ids in the places of their names."""
    if isinstance(value, str):
        for name, known in ids.items():
            value = value.replace(f"{{{name}}}", known)
        return value
    if isinstance(value, dict):
        return {key: fill(one, ids) for key, one in value.items()}
    return [fill(one, ids) for one in value] if isinstance(value, list) else value


def run(app, calls, names=None):
    """The answers of calls, one after the other; `names` says how the id in a call's answer is called from then on."""
    found = {}
    ids = {}

    async def send_all():
        for name, (method, path, body, *headers) in calls.items():
            response = await send(app, method, fill(path, ids), fill(body, ids), headers=headers[0] if headers else {})
            found[name] = answer(path, response)
            for id_name, call in (names or {}).items():
                if call == name:
                    ids[id_name] = response.json["id"]

    asyncio.run(send_all())
    return found


def compute():
    found = {}

    def note(part, answers):
        found.update({f"{part}: {name}": value for name, value in answers.items()})

    with tempfile.TemporaryDirectory() as folder:
        servers = Servers(Path(folder))
        try:
            app, state = servers.make("open")
            parts = {"completions": COMPLETIONS, "chat": CHATS, "tasks": TASKS, "classify": CLASSIFY, "models": MODELS}
            for part, calls in parts.items():
                note(part, run(app, calls))
            note("others", run(app, OTHERS))
            files = {"file": "good", "document": "document", "spare": "wrong rows are kept"}
            note("files", run(app, FILES, files))
            uploads = {name: FILES[name] for name in ("good", "document", "wrong rows are kept")}
            made = {f"upload {name}": call for name, call in uploads.items()}
            names = {"file": "upload good", "document": "upload document", "wrong": "upload wrong rows are kept"}
            note("jobs", run(app, {**made, **JOBS}, {**names, "job": "good"}))
            state.draining = True
            note("draining", run(app, DRAINING))
            keys = {name: KeyConfig(hash=hash_key(f"pt-{name}"), **rules) for name, rules in RULES.items()}
            app, _ = servers.make("keys", keys=keys)
            note("keys", run(app, KEYS, {"ann": "upload", "anns": "job"}))
            app, _ = servers.make("off", train_workers=0)
            note("off", run(app, OFF))
        finally:
            servers.close()
    return found


def test_half_a_surrogate_pair_is_refused(tmp_path):
    servers = Servers(tmp_path)
    try:
        app, _ = servers.make("open")
        for path, body in (
            ("/v1/completions", r'{"model": "a", "prompt": "\ud800"}'),
            (CHAT, r'{"model": "a", "messages": [{"role": "user", "content": "\ud800"}]}'),
            (TASK, r'{"source": "\ud800"}'),
            (TASK, r'{"name": "\ud800"}'),
        ):
            assert asyncio.run(send(app, "POST", path, body.encode())).status == 400, body
    finally:
        servers.close()


def test_the_answers_of_all_routes():
    found, golden = compute(), json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert found == golden
