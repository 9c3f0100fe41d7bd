"""A real server, called as people call it: OpenAI's own client, many connections at once."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from live_server import MODEL, LiveServer, generate_alone, make_model, make_prefix
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data import TASKS
from prefixtune.data.benchmarks import linearize_e2e
from prefixtune.inference.generate import generate
from prefixtune.prefix.text_format import read_text_format

FORMAT = {"prompt": " {source} {separator}", "target": " {target} "}
MR = "name[The Vaults], eatType[pub], area[riverside]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    make_model(folder / MODEL)
    return folder


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Any:
    return load_backbone(folder / MODEL, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def server(folder: Path, backbone: Any) -> Iterator[LiveServer]:
    prefixes = folder / "prefixes"
    prefixes.mkdir()
    for seed, (name, task, source) in enumerate(
        (("pubs", "e2e", ""), ("other-pubs", "e2e", ""), ("facts", "webnlg", ""), ("mine", "records", "{name}: {food}"))
    ):
        make_prefix(
            backbone,
            prefixes / f"{name}.safetensors",
            seed,
            length=3 + seed,
            task=task,
            text_format={**FORMAT, "source": source},
        )
    make_prefix(
        backbone,
        prefixes / "worded.safetensors",
        9,
        task="records",
        description="answers in a frame",
        text_format={"prompt": "{source}{separator}", "target": "<<{target}>>", "source": "text"},
    )
    # Of one whose file stores no text format, prompts and chats go as they do to the bare backbone.
    make_prefix(backbone, prefixes / "plain.safetensors", 8)
    (prefixes / "broken.safetensors").write_bytes(b"nothing of the kind")
    server = LiveServer(folder / MODEL, prefixes, "--max-body-kib", "64").wait()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def target(backbone: Any, folder: Path, source: str, name: str, length: int) -> str:
    """What `prefixtune generate` gives for a source, greedily."""
    prefix = load_prefix(folder / "prefixes" / f"{name}.safetensors", backbone)
    defaults = {name: TASKS[prefix.header["task"]].decoding.get(name) for name in ("min_new_tokens", "ban_newlines")}
    options = {name: value for name, value in defaults.items() if value is not None}
    (written,) = generate(backbone, [source], prefix, max_new_tokens=length, **options)
    return written


# --- OpenAI's client --------------------------------------------------------------------------------------------------


def test_a_completion_is_the_text_of_the_engine_alone(client: openai.OpenAI, backbone: Any, folder: Path) -> None:
    prompt = "Two trains to Oldbridge"
    for name in ("plain", MODEL, "pubs", "facts"):
        answer = client.completions.create(model=name, prompt=prompt, max_tokens=20, temperature=0)
        if name in ("pubs", "facts"):
            expected, read = target(backbone, folder, prompt, name, 20), len(f" {prompt} ") + 1
        else:
            prefix = None if name == MODEL else name
            expected, read = (
                generate_alone(backbone, folder / "prefixes", backbone.encode(prompt), prefix, max_new_tokens=20),
                len(prompt),
            )
        assert answer.choices[0].text == expected
        assert answer.choices[0].finish_reason == "length"
        # The prefix's positions are not counted.
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == read
        assert answer.usage.completion_tokens == 20
    ids = client.completions.create(model="pubs", prompt=backbone.encode(prompt), max_tokens=20, temperature=0)
    assert ids.choices[0].text == generate_alone(
        backbone, folder / "prefixes", backbone.encode(prompt), "pubs", max_new_tokens=20
    )
    texts = client.completions.create(model="pubs", prompt=[prompt, "x"], max_tokens=20, temperature=0, n=2)
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    assert texts.choices[0].text == texts.choices[1].text == target(backbone, folder, prompt, "pubs", 20)
    assert texts.choices[2].text == target(backbone, folder, "x", "pubs", 20)


def test_the_same_source_gives_the_same_text_everywhere(
    client: openai.OpenAI, server: LiveServer, backbone: Any, folder: Path
) -> None:
    source = "Aromi: soup"
    for name in ("pubs", "facts", "mine", "worded"):
        expected = target(backbone, folder, source, name, 24)
        options: dict[str, Any] = {"model": name, "max_tokens": 24, "temperature": 0}
        messages: Any = [{"role": "user", "content": source}]
        assert server.post(f"/v1/tasks/{name}", {"source": source, "max_tokens": 24})[1]["output"] == expected
        assert client.completions.create(prompt=source, **options).choices[0].text == expected
        assert client.chat.completions.create(messages=messages, **options).choices[0].message.content == expected
        pieces = client.completions.create(prompt=source, stream=True, **options)
        assert "".join(piece.choices[0].text for piece in pieces) == expected
        chunks = client.chat.completions.create(messages=messages, stream=True, **options)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_a_chat_uses_the_backbones_template(client: openai.OpenAI, backbone: Any, folder: Path) -> None:
    messages: Any = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "Hello!"}]
    options: dict[str, Any] = {"model": "plain", "messages": messages, "max_tokens": 30, "temperature": 0}
    whole = client.chat.completions.create(**options)
    prompt = "[system]be kind</s>[user]Hello!</s>[assistant]"
    text = generate_alone(backbone, folder / "prefixes", backbone.encode(prompt), "plain", max_new_tokens=30)
    assert whole.choices[0].message.content == text
    assert whole.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="the assistant cannot begin"):
        client.chat.completions.create(**{**options, "messages": [{"role": "assistant", "content": "x"}]})


def test_a_stream_that_the_client_closes_stops_the_engine(server: LiveServer, client: openai.OpenAI) -> None:
    stream = client.completions.create(model="pubs", prompt="a", max_tokens=500, n=8, stream=True, temperature=0)
    next(iter(stream))
    assert len(server.get("/v1/status")[1]["running"]) == 8
    stream.close()
    server.until(lambda: not server.get("/v1/status")[1]["running"], 5)


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_a_tasks_output_is_that_of_generate(server: LiveServer, backbone: Any, folder: Path) -> None:
    prefix = load_prefix(folder / "prefixes" / "pubs.safetensors", backbone)
    greedy = {"max_new_tokens": 60, "min_new_tokens": 5, "ban_newlines": True}
    (expected,) = generate(backbone, [linearize_e2e(MR)], prefix, **greedy)
    status, answer, _ = server.post("/v1/tasks/pubs", {"mr": MR, "max_tokens": 60})
    assert status == 200
    assert answer["output"] == expected
    assert answer["source"] == "name : The Vaults | Type : pub | area : riverside"
    assert answer["usage"]["completion_tokens"] == 60
    assert server.post("/v1/tasks/pubs", {"source": answer["source"], "max_tokens": 60})[1]["output"] == expected
    # The task's own length by default.
    assert server.post("/v1/tasks/pubs", {"mr": MR})[1]["usage"]["completion_tokens"] == 100
    # The bare backbone on the very same text.
    (bare,) = generate(backbone, [linearize_e2e(MR)], None, text_format=read_text_format(prefix.header), **greedy)
    other = server.post(f"/v1/tasks/{MODEL}", {"mr": MR, "format_of": "pubs", "max_tokens": 60})[1]
    assert other["output"] == bare != expected


def test_tasks_stream_and_take_records_and_triples(server: LiveServer, backbone: Any, folder: Path) -> None:
    body = {"name": "Aromi", "food": "soup", "max_tokens": 30}
    whole = server.post("/v1/tasks/mine", body)[1]
    assert whole["source"] == "Aromi: soup"
    events = [json.loads(part[6:]) for part in events_of(server.post("/v1/tasks/mine", {**body, "stream": True})[1])]
    assert "".join(event.get("delta", "") for event in events) == whole["output"]
    assert events[-1]["output"] == whole["output"]
    assert events[-1]["usage"] == whole["usage"]
    triples = {"triples": [["Aarhus", "country", "Denmark"]]}
    assert server.post("/v1/tasks/facts", triples)[1]["source"] == " | Aarhus : country : Denmark"
    # Words around the target are taken off the whole output: a stream gives it at once.
    prefix = load_prefix(folder / "prefixes" / "worded.safetensors", backbone)
    (expected,) = generate(backbone, ["a text"], prefix, max_new_tokens=20)
    streamed = events_of(server.post("/v1/tasks/worded", {"text": "a text", "max_tokens": 20, "stream": True})[1])
    assert [json.loads(part[6:])["output"] for part in streamed] == [expected]


def events_of(text: str) -> list[str]:
    parts = [part for part in text.split("\n\n") if part]
    assert parts[-1] == "data: [DONE]"
    return parts[:-1]


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_responses_have_security_headers_and_a_request_id(server: LiveServer) -> None:
    for path in ("/v1/models", "/", "/nothing", "/healthz"):
        headers = {name.lower(): value for name, value in server.get(path)[2].items()}
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-request-id"]
        assert "server" not in headers
        assert "access-control-allow-origin" not in headers


def test_a_hundred_connections_at_once_get_their_own_responses(server: LiveServer, backbone: Any, folder: Path) -> None:
    names = ("pubs", "other-pubs", "facts", "mine", MODEL)
    expected = {
        (name, letter): generate_alone(
            backbone, folder / "prefixes", backbone.encode(letter * 3), None, max_new_tokens=8
        )
        if name == MODEL
        else target(backbone, folder, letter * 3, name, 8)
        for name in names
        for letter in "abcd"
    }
    barrier = threading.Barrier(100)

    def complete_one(index: int) -> tuple[tuple[str, str], int, Any]:
        name, letter = names[index % 5], "abcd"[index // 5 % 4]
        barrier.wait()
        body = {"model": name, "prompt": letter * 3, "max_tokens": 8, "temperature": 0}
        status, answer, _ = server.post("/v1/completions", body)
        return (name, letter), status, answer

    with ThreadPoolExecutor(100) as pool:
        outcomes = list(pool.map(complete_one, range(100)))
    assert {status for _, status, _ in outcomes} == {200}
    assert all(answer["choices"][0]["text"] == expected[key] for key, _, answer in outcomes)
    assert server.get("/v1/status")[1]["running"] == []


def test_metrics_can_be_read_by_prometheus(server: LiveServer) -> None:
    # The first request reads the prefix, the next ones find it; and somebody asks for what is not there.
    server.post("/v1/completions", {"model": "facts", "prompt": "abc", "max_tokens": 2, "temperature": 0})
    assert server.get("/nowhere")[0] == 404
    before = server.metric("prefixtune_new_tokens_total", prefix="facts")
    texts = server.metric("prefixtune_texts_total", prefix="facts", finished="length")
    server.post("/v1/completions", {"model": "facts", "prompt": "abc", "max_tokens": 11, "n": 2, "temperature": 0})
    assert server.metric("prefixtune_new_tokens_total", prefix="facts") == before + 22
    assert server.metric("prefixtune_texts_total", prefix="facts", finished="length") == texts + 2
    assert server.metric("prefixtune_slots") == 32
    assert server.metric("prefixtune_refused_prefixes") == 1
    assert server.metric("prefixtune_prefix_cache_hits_total") > 0
    assert server.metric("prefixtune_first_token_seconds_count") > 0
    assert server.metric("prefixtune_step_texts_total") > server.metric("prefixtune_steps_total") > 0
    assert server.metric("prefixtune_requests_total", route="unknown") >= 1


def test_the_log_is_json_and_holds_no_prompts(server: LiveServer) -> None:
    server.post("/v1/completions", {"model": "pubs", "prompt": "a most secret word", "max_tokens": 3})

    def completions() -> list[Any]:
        return [line for line in server.lines if line["event"] == "request" and line["path"] == "/v1/completions"]

    server.until(lambda: completions() and completions()[-1]["prompt_tokens"] == len(" a most secret word ") + 1)
    logged = completions()
    assert {"id", "key", "model", "status", "seconds", "prompt_tokens", "completion_tokens"} <= set(logged[-1])
    assert "secret" not in json.dumps(server.lines)
    assert not [line for line in server.lines if line["level"] == "error"]
    assert "broken is not served" in "".join(server.errors)
