"""A real server and OpenAI's own client: every answer in the client's types, every error in its exception classes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai.types import Completion, CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.shared import ErrorObject
from pydantic import BaseModel

from live_server import MODEL, LiveServer, make_model, make_prefix
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data.encoding import encode_prompts
from prefixtune.prefix.text_format import read_text_format
from prefixtune.server.auth import hash_key

FORMAT = {"prompt": " {source} {separator}", "target": " {target} ", "source": "{name}: {food}"}
RULES = {
    "me": f'prefixes = ["mine", "{MODEL}", "broken", "no*"]',
    "busy": "concurrent = 1",
    "rare": "requests_per_minute = 1",
}
USER: Any = [{"role": "user", "content": "Aromi: soup"}]
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
GREEDY: dict[str, Any] = {"model": "mine", "max_tokens": 12, "temperature": 0}
LONG: dict[str, Any] = {"model": "mine", "prompt": "a", "max_tokens": 400, "n": 8, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openai")
    make_model(folder / MODEL)
    (folder / "prefixes").mkdir()
    backbone = load_backbone(folder / MODEL, dtype="float32", device="cpu")
    for seed, name in enumerate(("mine", "yours")):
        path = folder / "prefixes" / f"{name}.safetensors"
        make_prefix(backbone, path, seed, task="records", text_format=FORMAT, license="CC0-1.0")
    (folder / "prefixes" / "broken.safetensors").write_bytes(b"no prefix")
    keys = "".join(f'[keys.{name}]\nhash = "{hash_key(f"pt-{name}")}"\n{rules}\n' for name, rules in RULES.items())
    (folder / "serve.toml").write_text(f"num_slots = 8\nmax_queue = 8\nmax_texts = 64\nmax_body_kib = 64\n{keys}")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LiveServer]:
    server = LiveServer(folder / MODEL, folder / "prefixes", "--config", str(folder / "serve.toml")).wait()
    yield server
    assert server.stop() == 0
    assert not [line for line in server.lines if line["level"] == "error"]


def client(server: LiveServer, key: str = "me", **options: Any) -> openai.OpenAI:
    return openai.OpenAI(**{"base_url": f"{server.url}/v1", "api_key": f"pt-{key}", "max_retries": 0, **options})


def events(text: str) -> list[dict[str, Any]]:
    *parts, last = [part for part in text.split("\n\n") if part]
    assert last == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def parsed(kind: type[BaseModel], value: Any, *, extra: tuple[str, ...] = ()) -> Any:
    """A value as one of the client's types: nothing is missing, of another type, or unknown to it."""
    result = kind.model_validate_json(json.dumps(value), strict=True)
    check_known(result, extra)
    return result


def check_known(value: Any, extra: tuple[str, ...]) -> None:
    if isinstance(value, list):
        for item in value:
            check_known(item, extra)
    elif isinstance(value, BaseModel):
        assert (value.model_extra or {}).keys() <= set(extra)
        for name in type(value).model_fields:
            check_known(getattr(value, name), extra)


# --- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{"n": 2}, {"logprobs": 3}, {"stop": ["e"], "seed": 3}])
def test_completions_are_of_the_clients_types(server: LiveServer, more: dict[str, Any]) -> None:
    body = {**GREEDY, "prompt": ["Aromi: soup", "x"], **more}
    whole = parsed(Completion, server.post("/v1/completions", body, key="pt-me")[1])
    assert [choice.index for choice in whole.choices] == list(range(2 * more.get("n", 1)))
    pieces: dict[int, str] = {}
    *chunks, last = events(server.post("/v1/completions", {**body, **WITH_USAGE}, key="pt-me")[1])
    for event in chunks:
        assert event["usage"] is None
        (choice,) = event["choices"]
        # OpenAI's own pieces have no reason before the last one, against the type.
        piece = parsed(
            Completion, {**event, "choices": [{**choice, "finish_reason": choice["finish_reason"] or "stop"}]}
        )
        assert (piece.id, piece.created, piece.model) == (chunks[0]["id"], chunks[0]["created"], "mine")
        pieces[choice["index"]] = pieces.get(choice["index"], "") + piece.choices[0].text
    assert parsed(Completion, last).usage == whole.usage
    assert last["choices"] == []
    assert [pieces[choice.index] for choice in whole.choices] == [choice.text for choice in whole.choices]


@pytest.mark.parametrize(("prompt", "max_tokens"), [("Aromi: soup", 3), ([5, 6, 7, 8], 0)])
def test_an_echo_has_the_logprobs_of_the_prompt(server: LiveServer, folder: Path, prompt: Any, max_tokens: int) -> None:
    """As lm-eval's `local-completions` asks; the whole equals the model run on all tokens at once."""
    backbone = load_backbone(folder / MODEL, dtype="float32", device="cpu")
    prefix = load_prefix(folder / "prefixes" / "mine.safetensors", backbone)
    texts = [prompt] if isinstance(prompt, str) else prompt
    prompt_ids = (
        encode_prompts(backbone, read_text_format(prefix.header), texts)[0] if isinstance(prompt, str) else prompt
    )
    body = {**GREEDY, "prompt": prompt, "max_tokens": max_tokens, "logprobs": 1, "echo": True, "n": 2}
    with client(server) as openai_client:
        whole = openai_client.completions.create(**body)
        chunks = list(openai_client.completions.create(**body, stream=True))
    for choice in whole.choices:
        logprobs = choice.logprobs
        assert logprobs is not None
        tokens, values, top = logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs
        assert tokens is not None
        assert values is not None
        assert top is not None
        assert len(tokens) == len(values) == len(top) == len(prompt_ids) + max_tokens
        assert tokens[: len(prompt_ids)] == [backbone.tokenizer.decode([token]) for token in prompt_ids]
        assert (values[0], top[0]) == (None, None)
        with torch.no_grad():
            logits = backbone.forward(torch.tensor([prompt_ids]), prefixes=prefix).logits[0]
        expected = logits.log_softmax(-1)[range(len(prompt_ids) - 1), prompt_ids[1:]]
        assert values[1 : len(prompt_ids)] == pytest.approx(expected.tolist(), abs=1e-3)
        assert choice.text.startswith(backbone.tokenizer.decode(prompt_ids))
        assert choice.text == "".join(tokens)
        assert logprobs.text_offset == [len("".join(tokens[:number])) for number in range(len(tokens))]
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(piece.text for piece in mine) == choice.text
        parts = [piece.logprobs for piece in mine if piece.logprobs]
        assert [value for part in parts for value in part.token_logprobs or ()] == pytest.approx(values, abs=1e-6)
        assert [offset for part in parts for offset in part.text_offset or ()] == logprobs.text_offset
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(prompt_ids)
    assert whole.usage.completion_tokens == 2 * max_tokens


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("mine", {}),
        (MODEL, {"n": 3}),
        (MODEL, {"logprobs": True, "top_logprobs": 2}),
        ("mine", {"stop": "e", "seed": 3}),
    ],
)
def test_chats_are_of_the_clients_types(server: LiveServer, model: str, more: dict[str, Any]) -> None:
    body = {**GREEDY, "model": model, "messages": USER, **more}
    whole = parsed(ChatCompletion, server.post("/v1/chat/completions", body, key="pt-me")[1])
    pieces = ["" for _ in whole.choices]
    *chunks, last = events(server.post("/v1/chat/completions", {**body, **WITH_USAGE}, key="pt-me")[1])
    for event in chunks:
        chunk = parsed(ChatCompletionChunk, event)
        assert chunk.usage is None
        (choice,) = chunk.choices
        if not pieces[choice.index]:
            assert choice.delta.role in ("assistant", None)
        pieces[choice.index] += choice.delta.content or ""
    last_chunk = parsed(ChatCompletionChunk, last)
    assert (last_chunk.usage, last_chunk.choices) == (whole.usage, [])
    assert isinstance(whole.usage, CompletionUsage)
    assert pieces == [choice.message.content for choice in whole.choices]


def test_models_and_errors_are_of_the_clients_types(server: LiveServer) -> None:
    extra = ("root", "parent", "max_model_len", "kind", "description", "task", "license", "prefix_length")
    listed = server.get("/v1/models", key="pt-me")[1]
    assert listed["object"] == "list"
    models = [parsed(Model, model, extra=extra) for model in listed["data"]]
    assert {model.id for model in models} == {"mine", MODEL}
    for name in ("mine", MODEL):
        assert parsed(Model, server.get(f"/v1/models/{name}", key="pt-me")[1], extra=extra).id == name
    for body in (b"", b"[]", {"model": "mine"}, {"model": "nobody", "prompt": "a"}, {**LONG, "n": 65}):
        error = parsed(ErrorObject, server.post("/v1/completions", body, key="pt-me")[1]["error"])
        assert error.type == "invalid_request_error"


# --- errors -----------------------------------------------------------------------------------------------------------

ERRORS: list[tuple[str, dict[str, Any], type[openai.APIStatusError], int, str | None, str | None]] = [
    ("me", {**GREEDY, "prompt": ""}, openai.BadRequestError, 400, "prompt", None),
    ("me", {**GREEDY, "prompt": "a", "top_p": 1.5}, openai.BadRequestError, 400, "top_p", None),
    ("me", {**GREEDY, "prompt": "a", "best_of": 2}, openai.BadRequestError, 400, "best_of", "unsupported_field"),
    ("me", {**GREEDY, "prompt": "a" * 600}, openai.BadRequestError, 400, "prompt", "context_length_exceeded"),
    ("nobody", {**GREEDY, "prompt": "a"}, openai.AuthenticationError, 401, None, "invalid_api_key"),
    ("me", {**GREEDY, "prompt": "a", "model": "yours"}, openai.PermissionDeniedError, 403, None, "model_not_allowed"),
    ("rare", {**GREEDY, "prompt": "a", "model": "nobody"}, openai.NotFoundError, 404, None, "model_not_found"),
    ("me", {**GREEDY, "prompt": "a" * 70_000}, openai.APIStatusError, 413, None, "body_too_large"),
    ("rare", {**GREEDY, "prompt": "a"}, openai.RateLimitError, 429, None, "rate_limit_exceeded"),
    ("me", {**GREEDY, "prompt": "a", "model": "broken"}, openai.InternalServerError, 503, None, "model_not_served"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients_exceptions(server: LiveServer, stream: bool) -> None:
    for key, body, kind, status, param, code in ERRORS:
        if key == "rare" and stream:
            continue
        with client(server, key) as caller, pytest.raises(kind) as caught:
            caller.completions.create(**body, stream=stream)
        assert type(caught.value) is kind
        assert (caught.value.status_code, caught.value.param, caught.value.code) == (status, param, code)
        assert parsed(ErrorObject, caught.value.body).message in caught.value.message
        assert caught.value.request_id
    with client(server) as caller, pytest.raises(openai.APIStatusError) as form:
        caller.completions.create(**GREEDY, prompt="a", extra_headers={"Content-Type": "text/plain"})
    assert (form.value.status_code, form.value.code) == (415, "unsupported_media_type")


def test_a_client_that_retries_waits_for_its_turn(server: LiveServer) -> None:
    with client(server, "busy", max_retries=9) as patient, ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: patient.completions.create(**{**LONG, "max_tokens": 60}), range(3)))
    assert [len(answer.choices) for answer in answers] == [8, 8, 8]
