"""The application in this process, over a real engine on a tiny model: what is hard to bring about from outside."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import itertools
import json
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from asgi_client import NEVER, Answer, call
from prefixtune.backbone.prefixes import make_header
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import Engine
from prefixtune.engine.request import SequenceOutput, Token
from prefixtune.engine.worker import EngineWorker
from prefixtune.errors import PrefixError
from prefixtune.inference.detokenizer import Detokenizer
from prefixtune.inference.generate import generate
from prefixtune.prefix.artifact import save_prefix
from prefixtune.prefix.prefix import Prefix
from prefixtune.server.api.health import watch_folder
from prefixtune.server.app import make_app
from prefixtune.server.auth import hash_key
from prefixtune.server.limits import Admission, QueueFull
from prefixtune.server.metrics import Metrics
from prefixtune.server.models.store import PrefixStore
from prefixtune.server.settings import KeyConfig, ServeConfig
from prefixtune.server.state import ServerState

Made = tuple[Any, ServerState]
FORMAT = {"prompt": " {source} {separator}", "target": " {target} ", "source": "{name}"}


@pytest.fixture(scope="module")
def backbone(tiny_backbone: Callable[..., Any]) -> Any:
    backbone = tiny_backbone("llama", max_position_embeddings=512)
    with torch.no_grad():
        # The end token is never the likeliest: a text is as long as was asked for.
        backbone.model.lm_head.weight[backbone.eos_id] = 0.0
    return backbone


@pytest.fixture
def make(backbone: Any, tmp_path: Path, random_prefix: Callable[..., Any]) -> Iterator[Callable[..., Made]]:
    made: list[ServerState] = []

    def build(**options: Any) -> Made:
        folder = tmp_path / "prefixes"
        folder.mkdir(exist_ok=True)
        for seed, name in enumerate(("a", "b")):
            header = make_header(backbone, task="records", text_format=FORMAT)
            prefix = Prefix(random_prefix(backbone, 4, seed).layers, header)
            save_prefix(folder / f"{name}.safetensors", prefix)
        config = ServeConfig(**{"backbone": "tiny", "prefixes": str(folder), "num_slots": 4, **options})
        engine = Engine(backbone, EngineConfig(num_slots=4, max_waiting=4 + config.max_queue))
        state = ServerState(config, backbone, PrefixStore(folder, backbone), EngineWorker(engine))
        made.append(state)
        return make_app(state), state

    yield build
    for state in made:
        state.close()


def in_time(state: ServerState) -> float:
    """How many texts run in the engine, after a while."""

    async def wait() -> None:
        while state.worker.num_unfinished:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(wait(), 10))
    return state.admission.texts


def ask(**more: Any) -> dict[str, Any]:
    return {"model": "a", "prompt": "hello", "max_tokens": 5, "temperature": 0, **more}


def test_an_unforeseen_error_is_told_in_the_log_alone(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app, state = make()

    def broken(*_: Any) -> Any:
        raise ValueError("a secret of /srv/models")

    monkeypatch.setattr(state.catalog, "check_access", broken)
    with caplog.at_level(logging.ERROR, "prefixtune.server"):
        answer = asyncio.run(call(app, "POST", "/v1/completions", ask(), headers={"x-request-id": "mine-1"}))
    assert (answer.status, answer.code) == (500, "internal_error")
    assert "secret" not in answer.body.decode()
    assert "mine-1" in answer.json["error"]["message"]
    assert answer.headers["x-request-id"] == "mine-1"
    (record,) = caplog.records
    assert "a secret" in str(record.exc_info)
    assert in_time(state) == 0


def test_a_request_that_fails_fails_alone(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    app, state = make()
    submit = state.worker.submit

    def failing(request: Any, on_output: Any, deadline: Any = None) -> None:
        if request.prefix_name == "b":
            on_output(SequenceOutput(request.id, 0, (), "", "error", "NaN in /srv/models"))
        else:
            submit(request, on_output, deadline)

    monkeypatch.setattr(state.worker, "submit", failing)

    async def both() -> list[Answer]:
        return list(
            await asyncio.gather(
                *(
                    call(app, "POST", "/v1/completions", ask(model=name, stream=s))
                    for name in "ab"
                    for s in (False, True)
                )
            )
        )

    good, good_stream, bad, bad_stream = asyncio.run(both())
    assert good.status == 200
    assert good_stream.body.endswith(b"data: [DONE]\n\n")
    assert (bad.status, bad.code) == (500, "engine_error")
    # The status of a stream was sent: the error is its last event.
    assert bad_stream.status == 200
    last = bad_stream.body.decode().strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_error"
    assert bad_stream.ended
    assert b"/srv" not in bad.body + bad_stream.body


def test_when_the_engine_breaks_its_requests_get_503_and_later_ones_are_served(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, state = make()
    engine = state.worker.engine

    def broken() -> Any:
        raise RuntimeError("out of memory at 0x7f")

    monkeypatch.setattr(engine, "step", broken)
    answer = asyncio.run(call(app, "POST", "/v1/completions", ask()))
    assert (answer.status, answer.code) == (503, "engine_failed")
    assert answer.headers["retry-after"] == "1"
    assert "0x7f" not in answer.body.decode()

    async def until_served() -> Answer:
        while (later := await call(app, "POST", "/v1/completions", ask())).status == 503:
            await asyncio.sleep(0.01)
        return later

    assert asyncio.run(until_served()).status == 200
    assert state.worker.engine is not engine


def test_a_deadline_is_told_as_such(make: Callable[..., Made]) -> None:
    app, state = make(deadline=0.1)
    answer = asyncio.run(call(app, "POST", "/v1/completions", ask(max_tokens=450, n=4)))
    assert (answer.status, answer.code) == (504, "deadline_exceeded")
    # OpenAI's client would try twice more by itself.
    assert answer.headers["x-should-retry"] == "false"
    assert in_time(state) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slots(make: Callable[..., Made], stream: bool) -> None:
    app, state = make()

    async def leave() -> Answer:
        gone = asyncio.Event()
        running = asyncio.ensure_future(
            call(app, "POST", "/v1/completions", ask(max_tokens=500, n=4, stream=stream), gone=gone)
        )
        while not state.worker.snapshot().running:
            await asyncio.sleep(0.005)
        gone.set()
        return await running

    answer = asyncio.run(leave())
    assert not answer.ended
    assert in_time(state) == 0
    told = state.metrics.render().decode()
    assert 'prefixtune_texts_total{finished="gone",prefix="a"} 4.0' in told
    assert 'prefixtune_requests_total{route="/v1/completions",status="499"} 1.0' in told


def test_a_client_that_vanished_before_the_first_byte_holds_nothing(make: Callable[..., Made]) -> None:
    app, state = make()

    async def leave() -> None:
        gone = asyncio.Event()
        gone.set()
        await call(app, "POST", "/v1/completions", ask(max_tokens=500, stream=True), gone=gone)

    asyncio.run(leave())
    assert in_time(state) == 0


def test_a_client_that_does_not_read_is_given_up(make: Callable[..., Made]) -> None:
    app, state = make(client_timeout=0.1)

    async def never() -> None:
        await asyncio.sleep(60)

    answer = asyncio.run(call(app, "POST", "/v1/completions", ask(max_tokens=500, stream=True), slow=never))
    assert not answer.ended
    assert in_time(state) == 0


def test_a_silent_stream_says_that_it_is_alive(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    app, state = make()
    monkeypatch.setattr("prefixtune.server.api.generation.KEEP_ALIVE_SECONDS", 0.05)
    later: list[Any] = []
    monkeypatch.setattr(state.worker, "submit", lambda request, on_output, deadline: later.append((request, on_output)))

    async def wait() -> Answer:
        running = asyncio.ensure_future(call(app, "POST", "/v1/chat/completions", body))
        while not later:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        request, tell = later[0]
        tell(SequenceOutput(request.id, 0, (), "done", "stop"))
        return await running

    body = ask(stream=True)
    del body["prompt"]
    body["messages"] = [{"role": "user", "content": "hi"}]
    state.backbone.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    try:
        answer = asyncio.run(wait())
    finally:
        state.backbone.tokenizer.chat_template = None
    assert answer.body.count(b": waiting\n\n") >= 2
    assert answer.body.endswith(b"data: [DONE]\n\n")


def test_the_queue_is_bounded(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    app, state = make(max_queue=2)
    monkeypatch.setattr(state.worker, "submit", lambda *_, **__: None)

    async def fill() -> tuple[Answer, Answer]:
        gone = asyncio.Event()
        running = [asyncio.ensure_future(call(app, "POST", "/v1/completions", ask(n=3), gone=gone)) for _ in range(2)]
        while state.admission.texts < 6:
            await asyncio.sleep(0.005)
        refused = await call(app, "POST", "/v1/completions", ask())
        health = await call(app, "GET", "/healthz")
        gone.set()
        await asyncio.gather(*running)
        return refused, health

    refused, health = asyncio.run(fill())
    assert (refused.status, refused.code) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1
    assert health.status == 200
    assert state.admission.texts == 0


def test_while_draining_only_running_requests_go_on(make: Callable[..., Made]) -> None:
    app, state = make()

    async def drain() -> tuple[Answer, Answer, Answer, Answer, bool]:
        running = asyncio.ensure_future(call(app, "POST", "/v1/completions", ask(max_tokens=100)))
        while not state.admission.texts:
            await asyncio.sleep(0.005)
        draining = asyncio.ensure_future(state.drain(20))
        await asyncio.sleep(0)
        refused = await call(app, "POST", "/v1/completions", ask())
        alive, ready = await call(app, "GET", "/healthz"), await call(app, "GET", "/readyz")
        return await running, refused, alive, ready, await draining

    done, refused, alive, ready, in_time = asyncio.run(drain())
    assert (done.status, done.json["usage"]["completion_tokens"]) == (200, 100)
    assert (refused.status, refused.code) == (503, "draining")
    assert "retry-after" in refused.headers
    assert (alive.status, ready.status, in_time) == (200, 503, True)


def test_without_keys_only_this_machines_names_are_answered(make: Callable[..., Made]) -> None:
    app, _ = make()
    for host in ("localhost", "localhost:8000", "127.0.0.1", "127.0.0.1:80", "[::1]:8000", "LOCALHOST:1"):
        assert asyncio.run(call(app, "GET", "/v1/models", headers={"host": host})).status == 200
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example:80", ""):
        assert asyncio.run(call(app, "GET", "/v1/models", headers={"host": host})).code == "host_not_allowed"


def test_a_form_of_another_site_is_refused_by_its_content_type(make: Callable[..., Made]) -> None:
    app, _ = make()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = asyncio.run(call(app, "POST", "/v1/completions", ask(), headers={"content-type": kind}))
        assert (answer.status, answer.code) == (415, "unsupported_media_type")
    kind = "application/json; charset=utf-8"
    assert asyncio.run(call(app, "POST", "/v1/completions", ask(), headers={"content-type": kind})).status == 200


def test_pages_of_other_origins_read_nothing_unless_they_are_named(make: Callable[..., Made]) -> None:
    headers = {"origin": "https://a.example"}
    answer = asyncio.run(call(make()[0], "GET", "/v1/models", headers=headers))
    assert "access-control-allow-origin" not in answer.headers
    app, _ = make(cors_origins=("https://a.example",))
    answer = asyncio.run(call(app, "GET", "/v1/models", headers=headers))
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    answer = asyncio.run(call(app, "GET", "/v1/models", headers={"origin": "https://b.example"}))
    assert "access-control-allow-origin" not in answer.headers


def test_what_runs_is_told_without_the_names_of_others(make: Callable[..., Made]) -> None:
    keys = {name: KeyConfig(hash_key(f"pt-{name}"), (name,)) for name in "ab"}
    app, state = make(keys=keys)

    async def look() -> list[Answer]:
        gone = asyncio.Event()
        running = [
            asyncio.ensure_future(
                call(app, "POST", "/v1/completions", ask(model=name, max_tokens=500), headers=bearer(name), gone=gone)
            )
            for name in "ab"
        ]
        while len(state.worker.snapshot().running) < 2:
            await asyncio.sleep(0.005)
        seen = [await call(app, "GET", "/v1/status", headers=bearer(name)) for name in "ab"]
        gone.set()
        await asyncio.gather(*running)
        return seen

    for name, answer in zip("ab", asyncio.run(look()), strict=True):
        assert sorted(str(text["model"]) for text in answer.json["running"]) == sorted(["None", name])


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer pt-{name}"}


def test_lengths_are_those_that_fit(make: Callable[..., Made]) -> None:
    app, state = make(default_max_tokens=300, max_tokens=511, max_prompt_tokens=400, raw_completions=True)
    # 512 positions, 4 of them the prefix's; the last new token takes none.
    prompt = "x" * 400

    def outcome(**more: Any) -> Answer:
        return asyncio.run(call(app, "POST", "/v1/completions", ask(prompt=prompt, **more)))

    assert outcome(max_tokens=109).json["usage"] == {
        "prompt_tokens": 400,
        "completion_tokens": 109,
        "total_tokens": 509,
    }
    assert outcome(max_tokens=None).json["usage"]["completion_tokens"] == 109
    assert outcome(model="tiny", max_tokens=113).json["usage"]["completion_tokens"] == 113
    for more in ({"max_tokens": 110}, {"model": "tiny", "max_tokens": 114}, {"max_tokens": None, "min_tokens": 110}):
        assert (outcome(**more).status, outcome(**more).code) == (400, "context_length_exceeded")
    too_long = asyncio.run(call(app, "POST", "/v1/completions", ask(prompt="x" * 401)))
    assert too_long.code == "context_length_exceeded"
    assert in_time(state) == 0


def test_token_ids_that_the_model_does_not_have(make: Callable[..., Made]) -> None:
    app, _ = make()
    for prompt in ([10**9], [-1], [[5], [10**30]]):
        answer = asyncio.run(call(app, "POST", "/v1/completions", ask(prompt=prompt)))
        assert (answer.status, answer.json["error"]["type"]) == (400, "invalid_request_error")


def test_figures_of_prefixes_are_bounded(make: Callable[..., Made]) -> None:
    _, state = make()
    metrics = Metrics(state.worker, state.store, num_slots=1, max_prefixes=2, draining=lambda: False)
    for number in range(1000):
        metrics.text_done(f"tenant-{number}", "stop", 1)
    lines = [line for line in metrics.render().decode().splitlines() if line.startswith("prefixtune_new_tokens_total")]
    assert sorted(lines) == [
        'prefixtune_new_tokens_total{prefix="other"} 998.0',
        'prefixtune_new_tokens_total{prefix="tenant-0"} 1.0',
        'prefixtune_new_tokens_total{prefix="tenant-1"} 1.0',
    ]


@pytest.mark.parametrize("wanted", [False, True])
def test_prompts_and_outputs_are_logged_only_where_that_is_wanted(
    make: Callable[..., Made], caplog: pytest.LogCaptureFixture, wanted: bool
) -> None:
    app, _ = make(log_prompts=wanted)
    with caplog.at_level(logging.DEBUG, "prefixtune.server"):
        output = asyncio.run(call(app, "POST", "/v1/tasks/a", {"name": "a secret", "max_tokens": 20})).json["output"]
    (record,) = caplog.records
    assert ("a secret" in str(record.__dict__)) is wanted
    assert (output in str(record.__dict__["fields"].get("outputs"))) is wanted


@pytest.mark.parametrize(("stop", "wanted"), [([], " \n one  two \n"), (["two"], " \n one  "), (["one"], " \n ")])
def test_white_space_around_a_text_is_told_but_for_targets(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch, stop: list[str], wanted: str
) -> None:
    app, state = make()
    raw, raw_services = make(raw_completions=True)

    def submit(request: Any, on_output: Any, deadline: Any = None) -> None:
        text = Detokenizer(state.backbone.decode, request.sampling.stop, verbatim=request.verbatim)
        for token in state.backbone.encode(" \n one  two \n"):
            piece = text.add(token)
            on_output(SequenceOutput(request.id, 0, (Token(token),), piece, "stop" if text.stopped else None))
            if text.stopped:
                return
        on_output(SequenceOutput(request.id, 0, (), text.finish(), "stop"))

    for made in (state, raw_services):
        monkeypatch.setattr(made.worker, "submit", submit)
    monkeypatch.setattr(state.backbone.tokenizer, "chat_template", "{{ messages[0]['content'] }}")

    def talk(model: str) -> dict[str, Any]:
        return {"model": model, "messages": [{"role": "user", "content": "hi"}], "stop": stop}

    def events(app: Any, path: str, body: dict[str, Any]) -> list[Any]:
        told = asyncio.run(call(app, "POST", path, {**body, "stream": True})).body.decode()
        return [json.loads(part[6:]) for part in told.split("\n\n")[:-2]]

    def completed(app: Any, **more: Any) -> tuple[str, str]:
        body = ask(stop=stop, **more)
        whole = asyncio.run(call(app, "POST", "/v1/completions", body)).json["choices"][0]["text"]
        return whole, "".join(each["choices"][0]["text"] for each in events(app, "/v1/completions", body))

    def chatted(app: Any, model: str) -> tuple[str, str]:
        answer = asyncio.run(call(app, "POST", "/v1/chat/completions", talk(model)))
        deltas = [each["choices"][0]["delta"] for each in events(app, "/v1/chat/completions", talk(model))]
        said = answer.json["choices"][0]["message"]["content"]
        return said, "".join(delta.get("content", "") for delta in deltas)

    # What goes as it is: the bare backbone, token ids, and all completions where the server is asked for that.
    assert set(completed(app, model="tiny")) == set(completed(raw)) == {wanted}
    assert set(completed(app, prompt=[5, 6])) == set(chatted(app, "tiny")) == {wanted}
    # A prefix's output is what is compared with references.
    assert set(completed(app)) == set(chatted(app, "a")) == set(chatted(raw, "a")) == {wanted.strip()}
    task = {"name": "x", "stop": stop}
    output = asyncio.run(call(app, "POST", "/v1/tasks/a", task)).json["output"]
    assert output == wanted.strip() == "".join(each.get("delta", "") for each in events(app, "/v1/tasks/a", task))


@pytest.mark.parametrize("where", ["receive", "close", "make", "copy"])
@pytest.mark.parametrize(
    ("number", "refusal"),
    [
        (errno.ENOSPC, (507, "no_space")), (errno.EDQUOT, (507, "no_space")), (errno.EROFS, (507, "storage_failed")),
        (errno.EACCES, (507, "storage_failed")), (errno.EIO, (507, "storage_failed")), (errno.EMFILE, (503, "busy")),
    ],
)  # fmt: skip
def test_an_upload_to_a_disk_that_takes_nothing_changes_nothing(
    make: Callable[..., Made],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    where: str,
    number: int,
    refusal: tuple[int, str],
) -> None:
    app, state = make(keys={"boss": KeyConfig(hash_key("pt-boss"), admin=True)})
    folder = tmp_path / "prefixes"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    first = asyncio.run(call(app, "POST", "/v1/completions", ask(), headers=bearer("boss"))).json["choices"]
    raised: list[str] = []

    def fail(*_: Any, **__: Any) -> Any:
        raised.append(where)
        raise OSError(number, os.strerror(number), str(folder / "a.safetensors"))

    class FullFile(io.BytesIO):
        def write(self, data: Any) -> int:
            return fail() if where == "receive" else len(data)

        def __exit__(self, *_: Any) -> None:
            fail()

    if where == "make":
        monkeypatch.setattr("prefixtune.utils.files.tempfile.mkdtemp", fail)
    elif where == "copy":
        monkeypatch.setattr("prefixtune.server.models.store.shutil.copyfile", fail)
    else:
        monkeypatch.setattr("prefixtune.server.api.admin.open", lambda *_: FullFile(), raising=False)
    for name in ("a", "fresh"):
        body = before["b.safetensors"]
        answer = asyncio.run(call(app, "PUT", f"/admin/prefixes/{name}", body, headers=bearer("boss")))
        assert (answer.status, answer.code, answer.json["error"]["type"]) == (*refusal, "server_error")
        assert set(answer.json["error"]) == {"message", "type", "param", "code"}
        assert str(folder) not in answer.body.decode()
    assert len(raised) >= 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    again = asyncio.run(call(app, "POST", "/v1/completions", ask(), headers=bearer("boss")))
    assert again.json["choices"] == first
    assert state.store.names() == ["a", "b"]
    assert state.store.refused == {}


def test_the_document_tells_of_every_route_and_of_no_other(make: Callable[..., Made]) -> None:
    for playground in (True, False):
        app, _ = make(playground=playground)
        document = asyncio.run(call(app, "GET", "/openapi.json")).json
        told = {path: {method.upper() for method in methods} for path, methods in document["paths"].items()}
        routes = {route.endpoint.route: set(route.endpoint.methods) - {"HEAD"} for route in app.app.routes}
        assert told == routes
        assert ("/" in told) is playground
    keys = {"me": KeyConfig(hash_key("pt-me"), ()), "boss": KeyConfig(hash_key("pt-boss"), admin=True)}
    app, _ = make(keys=keys)
    # Whoever has a key may read it, as the list of models.
    assert asyncio.run(call(app, "GET", "/openapi.json")).code == "invalid_api_key"
    document = asyncio.run(call(app, "GET", "/openapi.json", headers=bearer("me"))).json
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            answer = asyncio.run(call(app, method.upper(), path.replace("{name}", "a")))
            assert (answer.status == 401) is bool(operation.get("security")), path
            weak = asyncio.run(call(app, method.upper(), path.replace("{name}", "a"), headers=bearer("me")))
            if "right" in operation.get("description", ""):
                assert weak.code in ("admin_key_needed", "metrics_not_allowed")


def test_long_texts_of_one_caller_do_not_hold_up_anothers(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, state = make(keys={name: KeyConfig(hash_key(f"pt-{name}")) for name in ("heavy", "light")})
    encode, seen = type(state.backbone).encode_sources, list[str]()

    def slowly(self: Any, texts: list[str]) -> Any:
        seen.extend(name for text in texts for name in ("heavy", "light") if name in text)
        time.sleep(0.05)
        return encode(self, texts)

    monkeypatch.setattr(type(state.backbone), "encode_sources", slowly)

    async def both() -> tuple[Answer, int, list[Answer]]:
        heavy = [
            asyncio.ensure_future(call(app, "POST", "/v1/completions", ask(prompt="heavy"), headers=bearer("heavy")))
            for _ in range(20)
        ]
        while not seen:
            await asyncio.sleep(0.001)
        light = await call(app, "POST", "/v1/completions", ask(prompt="light"), headers=bearer("light"))
        before = seen.count("heavy")
        return light, before, list(await asyncio.gather(*heavy))

    light, before, heavy = asyncio.run(both())
    assert (light.status, {answer.status for answer in heavy}) == (200, {200})
    # Of the twenty, the one that was worked on, and those that came while the light one's text was written.
    assert seen.index("light") <= 2
    assert before < 20


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_likeliest_tokens_are_put_into_words_beside_the_event_loop(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    app, state = make()

    def slowly(token: int) -> str:
        time.sleep(0.002)
        return str(token)

    monkeypatch.setattr("prefixtune.server.api.choices.token_decoder", lambda _: slowly)
    monkeypatch.setattr(state.backbone.tokenizer, "chat_template", "{{ messages[0]['content'] }}")
    body = ask(model="tiny", max_tokens=20)
    if "chat" in path:
        body = {**body, "messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 20}
        del body["prompt"]
    else:
        body["logprobs"] = 20

    async def both() -> tuple[Answer, list[float]]:
        waits = []
        running = asyncio.ensure_future(call(app, "POST", path, body))
        while not running.done():
            begun = time.monotonic()
            await call(app, "GET", "/healthz")
            waits.append(time.monotonic() - begun)
            await asyncio.sleep(0.001)
        return await running, waits

    answer, waits = asyncio.run(both())
    assert answer.status == 200
    # In one go it would take 0.002 s times 20 * 20, at least.
    assert max(waits) < 0.5


def test_a_caller_who_leaves_while_others_texts_are_worked_on_leaves_nothing(make: Callable[..., Made]) -> None:
    app, state = make()

    async def leave() -> Answer:
        gone = asyncio.Event()
        async with state.tokenizer_lock.hold("somebody"):
            waiting = asyncio.ensure_future(call(app, "POST", "/v1/completions", ask(), gone=gone))
            while not state.pending_bytes.used:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.01)
            gone.set()
            left = await waiting
        # Whoever comes next has its turn.
        assert (await call(app, "POST", "/v1/completions", ask())).status == 200
        return left

    assert asyncio.run(leave()).status == 0
    assert state.pending_bytes.used == 0


def test_a_text_whose_turn_does_not_come_is_given_up(make: Callable[..., Made]) -> None:
    app, state = make(deadline=0.1)

    async def wait() -> Answer:
        async with state.tokenizer_lock.hold("somebody"):
            return await call(app, "POST", "/v1/completions", ask())

    assert asyncio.run(wait()).code == "deadline_exceeded"


def test_all_texts_of_a_request_share_its_time(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    app, state = make(deadline=1.0)
    encode = type(state.backbone).encode_sources
    given: list[float] = []

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.25)
        return encode(*arguments)

    def submit(request: Any, on_output: Any, deadline: float) -> None:
        given.append(deadline)
        on_output(SequenceOutput(request.id, 0, (), "", "length"))

    monkeypatch.setattr(type(state.backbone), "encode_sources", slowly)
    monkeypatch.setattr(state.worker, "submit", submit)
    few = asyncio.run(call(app, "POST", "/v1/completions", ask(model="tiny", prompt=["x", "y"])))
    assert few.status == 200
    # What the texts took is not the engine's any more.
    assert len(given) == 2
    assert all(seconds <= 0.5 for seconds in given)
    many = asyncio.run(call(app, "POST", "/v1/completions", ask(model="tiny", prompt=["x"] * 8)))
    assert (many.status, many.code) == (504, "deadline_exceeded")
    assert len(given) == 2


def test_a_body_of_unknown_length_is_counted_as_long_as_it_is_once_it_is_there(make: Callable[..., Made]) -> None:
    app, state = make(max_pending_mib=1, max_body_kib=512)

    async def several() -> list[Answer]:
        # All wait for the same turn, with their bodies in memory.
        async with state.tokenizer_lock.hold("somebody"):
            running = []
            for _ in range(3):
                running.append(asyncio.ensure_future(call(app, "POST", "/v1/completions", ask())))
                await asyncio.sleep(0.05)
            held = state.pending_bytes.used
        assert held == 3 * len(json.dumps(ask()).encode())
        return list(await asyncio.gather(*running))

    assert [answer.status for answer in asyncio.run(several())] == [200, 200, 200]
    assert state.pending_bytes.used == 0


def test_bodies_are_admitted_by_their_bytes_and_fairly(make: Callable[..., Made]) -> None:
    keys = {name: KeyConfig(hash_key(f"pt-{name}")) for name in ("heavy", "light")}
    app, state = make(keys=keys, max_pending_mib=1)
    large, small = ({"content-length": str(kib * 1024)} for kib in (1000, 100))

    async def fill() -> list[Answer]:
        # Nothing of the body arrives, but so much is announced.
        held = asyncio.ensure_future(call(app, "POST", "/v1/completions", NEVER, headers=bearer("heavy") | large))
        while not state.pending_bytes.used:
            await asyncio.sleep(0.001)
        answers = [
            await call(app, "POST", "/v1/completions", ask(), headers=bearer(name) | small)
            for name in ("heavy", "light")
        ]
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)
        return answers

    heavy, light = asyncio.run(fill())
    assert (heavy.status, heavy.code, light.status) == (429, "queue_full", 200)
    assert int(heavy.headers["retry-after"]) >= 1
    assert state.pending_bytes.used == 0


def test_requests_at_once_are_counted_by_the_address_that_a_named_proxy_tells(make: Callable[..., Made]) -> None:
    keys = {"me": KeyConfig(hash_key("pt-me"))}
    app, _ = make(keys=keys, proxies=("10.0.0.1",), max_connections_per_address=2)

    async def several() -> list[Answer]:
        def one(client: str) -> Awaitable[Answer]:
            headers = {"x-forwarded-for": "192.0.2.7", **bearer("me")}
            return call(app, "POST", "/v1/completions", ask(), headers=headers, client=client)

        # Three at once of one address behind the proxy: one too many. What others write themselves does not count.
        return list(await asyncio.gather(*(one("10.0.0.1") for _ in range(3)), *(one("10.0.0.2") for _ in range(3))))

    answers = asyncio.run(several())
    assert sorted(answer.status for answer in answers[:3]) == [200, 200, 429]
    assert next(answer.code for answer in answers if answer.status == 429) == "address_limit_exceeded"
    assert {answer.status for answer in answers[3:]} == {200}


@pytest.mark.parametrize("name", ["X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Forwarded", "Via"])
def test_without_keys_no_proxy_is_answered(make: Callable[..., Made], name: str) -> None:
    app, _ = make()
    headers = {"host": "localhost", name.lower(): "127.0.0.1"}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/metrics")):
        assert asyncio.run(call(app, method, path, ask(), headers=headers)).code == "key_needed"
    keyed, _ = make(keys={"me": KeyConfig(hash_key("pt-me"))})
    assert asyncio.run(call(keyed, "GET", "/v1/models", headers=headers | bearer("me"))).status == 200


def test_a_link_to_itself_is_one_bad_file_and_the_watch_goes_on(make: Callable[..., Made], tmp_path: Path) -> None:
    _, state = make(reload_seconds=0.02)
    folder = tmp_path / "prefixes"

    async def watch() -> None:
        looking = asyncio.ensure_future(watch_folder(state))
        (folder / "loop.safetensors").symlink_to("loop.safetensors")
        async with asyncio.timeout(10):
            while "loop" not in state.store.refused:
                await asyncio.sleep(0.01)
            (folder / "c.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
            while "c" not in state.store:
                await asyncio.sleep(0.01)
        assert not looking.done()
        looking.cancel()

    asyncio.run(watch())
    assert state.store.names() == ["a", "b", "c"]
    assert list(state.store.refused) == ["loop"]


@pytest.mark.parametrize("error", [RuntimeError("/srv/x"), PrefixError("/srv/x"), RecursionError(), MemoryError()])
def test_a_watch_that_fails_for_any_reason_goes_on_with_pauses_and_health_tells_of_it(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    app, state = make(reload_seconds=0.01)
    reload, times = state.store.reload, list[float]()

    def failing() -> None:
        times.append(time.monotonic())
        if len(times) <= 4:
            raise error
        reload()

    monkeypatch.setattr(state.store, "reload", failing)

    async def watch() -> list[Any]:
        looking, told = asyncio.ensure_future(watch_folder(state)), []
        async with asyncio.timeout(10):
            while len(times) < 4:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)
            told.append([(await call(app, "GET", path)) for path in ("/healthz", "/readyz")])
            while len(times) < 7:
                await asyncio.sleep(0.001)
            told.append([(await call(app, "GET", path)) for path in ("/healthz", "/readyz")])
        looking.cancel()
        return told

    with caplog.at_level(logging.WARNING, "prefixtune.server"):
        bad, good = asyncio.run(watch())
    # What is in memory is served on.
    assert [(answer.status, answer.json) for answer in bad] == [(200, {"status": "ok", "folder": "cannot be read"})] * 2
    assert [(answer.status, answer.json) for answer in good] == [(200, {"status": "ok", "folder": "ok"})] * 2
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(pause > 0.018 * 2**number for number, pause in enumerate(pauses[:4])), "each is twice the one before"
    assert [record.getMessage() for record in caplog.records] == ["reload_failed"] * 4


def test_the_first_signal_drains_and_the_second_ends_it(make: Callable[..., Made]) -> None:
    from prefixtune.server.launch import _Server

    _, state = make(drain_seconds=1000.0)
    server = _Server(state, 10)

    async def signals() -> list[tuple[bool, bool, bool]]:
        seen = []
        server.loop = asyncio.get_running_loop()
        with state.admission.admit(1):
            for _ in range(2):
                server.handle_exit(signal.SIGTERM, None)
                await asyncio.sleep(0.01)
                seen.append((state.draining, server.should_exit, server.force_exit))
        assert server.stopping is not None
        await server.stopping
        return seen

    assert asyncio.run(signals()) == [(True, False, False), (True, True, True)]


def test_a_queue_that_one_tenant_has_filled_is_open_to_the_others() -> None:
    admission = Admission(num_slots=2, max_queue=8)

    def enter(tenant: str, texts: int = 1) -> bool:
        try:
            stack.enter_context(admission.admit(texts, tenant))
        except QueueFull:
            return False
        return True

    with contextlib.ExitStack() as stack:
        assert [enter("heavy") for _ in range(11)] == [True] * 10 + [False]
        # Half of the queue is another one's, and a third each where there are three.
        assert [enter("light") for _ in range(6)] == [True] * 5 + [False]
        assert [enter("late") for _ in range(4)] == [True] * 3 + [False]
        assert not enter("heavy")
        assert not enter("new", texts=4)
        assert admission.texts == 18
    assert admission.texts == 0
    with contextlib.ExitStack() as stack:
        assert enter("light", texts=10)


# --- texts for prefixes -----------------------------------------------------------------------------------------------


def test_dropped_messages_are_reported(make: Callable[..., Made], caplog: pytest.LogCaptureFixture) -> None:
    app, _ = make(earlier_messages="drop")
    talk = {"model": "a", "max_tokens": 6, "temperature": 0}
    last = {"role": "user", "content": "hello"}
    alone = asyncio.run(call(app, "POST", "/v1/chat/completions", {**talk, "messages": [last]}))
    assert "x-prefixtune-dropped-messages" not in alone.headers
    before = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "more"}]
    for stream in (False, True):
        with caplog.at_level(logging.DEBUG, "prefixtune.server"):
            body = {**talk, "messages": [*before, last], "stream": stream}
            answer = asyncio.run(call(app, "POST", "/v1/chat/completions", body))
        assert answer.headers["x-prefixtune-dropped-messages"] == "2"
        assert caplog.records[-1].__dict__["fields"]["dropped_messages"] == 2
        if not stream:
            assert answer.json["choices"][0]["message"] == alone.json["choices"][0]["message"]


def test_long_sources_are_treated_as_in_training(
    make: Callable[..., Made], backbone: Any, random_prefix: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    app, state = make()
    form = {**FORMAT, "max_length": 60, "on_too_long": "cut", "longest_target": 20}
    header = make_header(backbone, task="records", text_format=form)
    prefix = Prefix(random_prefix(backbone, 4, 5).layers, header)
    save_prefix(state.store.folder / "cuts.safetensors", prefix)
    state.store.reload()
    source = "abcdefghij" * 9
    cut: list[Any] = []
    (wanted,) = generate(backbone, [source], prefix, max_new_tokens=12, on_cut=cut.append)
    assert cut == [[0]]
    shared: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
    completion = {"model": "cuts", "prompt": source, **shared}
    with caplog.at_level(logging.DEBUG, "prefixtune.server"):
        answer = asyncio.run(call(app, "POST", "/v1/completions", completion))
    assert answer.json["choices"][0]["text"] == wanted
    # 93 tokens with the text around it, of which 40 may stay.
    assert answer.headers["x-prefixtune-cut-tokens"] == "53"
    assert caplog.records[-1].__dict__["fields"]["cut_tokens"] == 53
    assert answer.json["usage"]["prompt_tokens"] == 40
    talk = {"model": "cuts", "messages": [{"role": "user", "content": source}], **shared}
    chat = asyncio.run(call(app, "POST", "/v1/chat/completions", talk))
    task = asyncio.run(call(app, "POST", "/v1/tasks/cuts", {"source": source, **shared}))
    assert chat.json["choices"][0]["message"]["content"] == task.json["output"] == wanted
    assert chat.headers["x-prefixtune-cut-tokens"] == task.headers["x-prefixtune-cut-tokens"] == "53"
    # Others refuse, and so does this one where the server is asked to.
    strict, _ = make(on_too_long="error")
    refused = asyncio.run(call(strict, "POST", "/v1/completions", completion))
    assert (refused.status, refused.code) == (400, "context_length_exceeded")
    assert "max_length 60" in refused.json["error"]["message"]
    longer = asyncio.run(call(app, "POST", "/v1/completions", ask(prompt="x" * 600)))
    assert (longer.status, longer.code) == (400, "context_length_exceeded")


@pytest.mark.parametrize("target", [" {target} ", "<<{target}>>"])
def test_offsets_of_tokens_count_within_the_target(
    make: Callable[..., Made],
    backbone: Any,
    random_prefix: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
) -> None:
    app, state = make()
    header = make_header(backbone, task="records", text_format={**FORMAT, "target": target})
    save_prefix(state.store.folder / "p.safetensors", Prefix(random_prefix(backbone, 4, 5).layers, header))
    state.store.reload()
    wanted = "Aromi is  it."
    ids = backbone.encode_sources(["  " + target.replace("{target}", wanted) + "  "])[0]
    pieces = [backbone.tokenizer.decode([token]) for token in ids]

    def write(request: Any, on_output: Any, deadline: Any = None) -> None:
        # As the engine does, which leaves out the white space around a text.
        text = Detokenizer(backbone.decode, verbatim=request.verbatim)
        for token in ids:
            on_output(SequenceOutput(request.id, 0, (Token(token, -1.0),), text.add(token)))
        on_output(SequenceOutput(request.id, 0, (), text.finish(), "length"))

    monkeypatch.setattr(state.worker, "submit", write)
    begin = "".join(pieces).index(wanted)
    starts = [len("".join(pieces[:number])) - begin for number in range(len(pieces))]
    offsets = [min(max(start, 0), len(wanted)) for start in starts]
    whole = asyncio.run(call(app, "POST", "/v1/completions", ask(model="p", logprobs=0))).json["choices"][0]
    assert whole["text"] == wanted
    assert whole["logprobs"]["tokens"] == pieces
    assert whole["logprobs"]["text_offset"] == offsets
    streamed = asyncio.run(call(app, "POST", "/v1/completions", ask(model="p", logprobs=0, stream=True)))
    events = [json.loads(event[6:]) for event in streamed.body.decode().split("\n\n") if event.startswith("data: {")]
    choices = [event["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == wanted
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    assert [token for part in parts for token in part["tokens"]] == pieces
    assert [offset for part in parts for offset in part["text_offset"]] == offsets


def test_a_header_whose_format_cannot_be_used_is_not_served(
    make: Callable[..., Made], rewrite_header: Callable[..., Path]
) -> None:
    app, state = make()
    path = state.store.folder / "bad.safetensors"
    path.write_bytes((state.store.folder / "a.safetensors").read_bytes())
    rewrite_header(path, text_format={"prompt": "{source}" * 1500, "target": "{target}"})
    state.store.reload()
    answer = asyncio.run(call(app, "POST", "/v1/completions", ask(model="bad")))
    assert (answer.status, answer.code) == (503, "model_not_served")
    assert "1,500 times" in state.store.refused["bad"]
