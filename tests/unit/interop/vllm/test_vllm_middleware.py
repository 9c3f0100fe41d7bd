"""Requests for a prefix become requests for the backbone, and responses come back as the prefix's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_vllm import FakeVLLM, call
from prefixtune.interop.vllm.chat_template import PLACEHOLDERS_VARIABLE
from prefixtune.interop.vllm.folder import PrefixFolder
from prefixtune.interop.vllm.reference import PrefixReference


def test_a_completion_becomes_one_of_the_backbone(app: FakeVLLM, folder: PrefixFolder):
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 3,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
    choice = {"text": "x", "prompt_token_ids": [9] * 5 + [1, 2], "token_ids": [3]}
    app.reply = {"model": "base", "choices": [choice], "usage": usage, "kv_transfer_params": None}
    body = {"model": "pubs", "prompt": "name", "temperature": 0, "cache_salt": "mine", "add_special_tokens": False}
    status, response = call(app, "/v1/completions", body)
    (body_sent,) = app.bodies
    ids = app.encode("name")
    assert body_sent["model"] == "base"
    assert body_sent["prompt"][5:] == ids
    assert len(set(body_sent["prompt"][:5])) == 1
    tokenizer = app.state.engine_client.get_tokenizer()
    assert body_sent["prompt"][0] in tokenizer.all_special_ids
    assert body_sent["prompt"][0] != tokenizer.eos_token_id
    known = folder.find("pubs")
    assert known is not None
    assert PrefixReference.from_kv_transfer_params(body_sent["kv_transfer_params"], b"drawn") == known.reference
    assert body_sent["cache_salt"] == known.reference.cache_salt(b"drawn", "mine")
    assert body_sent["temperature"] == 0
    assert int(app.headers[0][b"content-length"]) == len(json.dumps(body_sent).encode())
    assert status == 200
    assert response["model"] == "pubs"
    assert response["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 3,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert "kv_transfer_params" not in response
    assert response["choices"] == [{**choice, "prompt_token_ids": [1, 2]}]


@pytest.mark.parametrize(
    "prompt", ["ab", ["ab", "cde"], [5, 6, 7], [[5, 6], [7]]], ids=["text", "texts", "ids", "lists of ids"]
)
def test_every_form_of_prompt(app: FakeVLLM, prompt: Any):
    app.reply = {"model": "base", "choices": [{}], "usage": {"prompt_tokens": 100, "total_tokens": 100}}
    _, response = call(app, "/v1/completions", {"model": "pubs", "prompt": prompt})
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    prompts = app.bodies[0]["prompt"] if several else [app.bodies[0]["prompt"]]
    wanted = prompt if several else [prompt]
    assert [ids[5:] for ids in prompts] == [app.encode(text) if isinstance(text, str) else text for text in wanted]
    assert response["usage"]["prompt_tokens"] == 100 - 5 * len(wanted)


def test_no_more_of_a_prompt_is_tokenized_than_could_fit(app: FakeVLLM):
    app.state.vllm_config.model_config.max_model_len = 64
    call(app, "/v1/completions", {"model": "pubs", "prompt": "word " * 20_000})
    assert 64 < len(app.bodies[0]["prompt"]) < 5_000


def test_a_stream_is_changed_piece_by_piece(app: FakeVLLM):
    def piece(index: int, **more: Any) -> bytes:
        usage = {"prompt_tokens": 9, "completion_tokens": index, "total_tokens": 9 + index}
        return b"data: " + json.dumps({"id": index, "model": "base", "usage": usage, **more}).encode() + b"\n\n"

    sent = piece(1, choices=[{"text": "ä"}]) + b": alive\n\n" + piece(2, choices=[]) + b"data: [DONE]\n\n"
    # Pieces of the network end anywhere.
    app.pieces = [sent[:20], sent[20:21], sent[21:90], sent[90:-3], sent[-3:]]
    _, response = call(app, "/v1/completions", {"model": "pubs", "prompt": ["a", "b"], "stream": True})
    events = response.decode().split("\n\n")
    assert [event for event in events if not event.startswith("data: {")] == [": alive", "data: [DONE]", ""]
    first, last = (json.loads(event[6:]) for event in events if event.startswith("data: {"))
    assert first["model"] == last["model"] == "pubs"
    assert first["choices"] == [{"text": "ä"}]
    # A piece counts its own prompt; the end counts both.
    assert (first["usage"]["prompt_tokens"], last["usage"]["prompt_tokens"]) == (4, -1)


def test_a_chat_gets_placeholders_from_the_template(app: FakeVLLM):
    app.reply = {"model": "base", "choices": [], "usage": None}
    messages = [{"role": "user", "content": "hello"}]
    call(app, "/v1/chat/completions", {"model": "pubs", "messages": messages, "chat_template_kwargs": {"x": 1}})
    (body_sent,) = app.bodies
    assert body_sent["messages"] == messages
    options = body_sent["chat_template_kwargs"]
    assert options["x"] == 1
    assert len(set(app.encode(options[PLACEHOLDERS_VARIABLE]))) == 1
    assert len(app.encode(options[PLACEHOLDERS_VARIABLE])) == 5
    app.state.online_renderer.chat_template = None
    status, response = call(app, "/v1/chat/completions", {"model": "pubs", "messages": messages})
    assert status == 400
    assert "no variable for their placeholders" in response["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"model": "base", "prompt": "a", "cache_salt": "s"},
        {"model": "unknown", "prompt": "a"},
        {"model": 3},
        {"prompt": "a"},
        [1, 2],
        b"{no json",
    ],
)
def test_what_is_not_for_a_prefix_passes_untouched(app: FakeVLLM, body: Any):
    call(app, "/v1/completions", body)
    assert app.bodies == [body]


def test_the_running_model_is_compared_with_the_prefixes(
    app: FakeVLLM, rewrite_header: Callable[..., Path], tmp_path: Path
):
    """By its name where it is of the hub."""
    rewrite_header(tmp_path / "pubs.safetensors", backbone={"name": "me/model", "fingerprint": "x:AAAA"})
    config, body = app.state.vllm_config.model_config, {"model": "pubs", "prompt": "a"}
    config.model = "me/model"
    assert call(app, "/v1/completions", body)[0] == 200
    config.model = "me/another"
    status, response = call(app, "/v1/completions", body)
    assert (status, "'me/another'" in response["error"]["message"]) == (503, True)


def test_models_are_listed_with_the_prefixes(app: FakeVLLM, rewrite_header: Callable[..., Path], tmp_path: Path):
    app.reply = {"object": "list", "data": [{"id": "base"}]}
    _, response = call(app, "/v1/models", method="GET")
    assert [(model["id"], model.get("prefix_length")) for model in response["data"]] == [("base", None), ("pubs", 5)]
    assert response["data"][1]["owned_by"] == "prefixtune"
    # What a job made says so, and its checkpoints are not in the list.
    for name, step in (("result", {}), ("result.step-3", {"step": 3})):
        path = shutil.copyfile(tmp_path / "pubs.safetensors", tmp_path / f"{name}.safetensors")
        rewrite_header(path, job={"id": "ftjob-1", "owner": "local", **step})
    _, response = call(app, "/v1/models", method="GET")
    assert [model["id"] for model in response["data"]] == ["base", "pubs", "result"]
    assert (response["data"][2]["owned_by"], response["data"][2]["job"]) == ("local", "ftjob-1")
    app.reply, app.status = {"error": "Unauthorized"}, 401
    assert call(app, "/v1/models", method="GET") == (401, {"error": "Unauthorized"})


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"echo": True}),
        ("/v1/completions", {"kv_transfer_params": {"a": 1}}),
        ("/v1/completions", {"cache_salt": 3}),
        ("/v1/completions", {"prompt": ""}),
        ("/v1/completions", {"prompt": [True]}),
        ("/v1/chat/completions", {"chat_template_kwargs": {"truncation": True}}),
        ("/v1/chat/completions", {"add_special_tokens": True}),
    ],
)
def test_what_cannot_be_used_with_a_prefix(app: FakeVLLM, path: str, fields: dict[str, Any]):
    status, response = call(app, path, {"model": "pubs", "prompt": "a", **fields})
    assert (status, app.bodies) == (400, [])
    assert next(iter(fields)) in response["error"]["message"]
    # Who may not come in at all learns nothing.
    app.state.args.api_key = ["secret"]
    app.reply, app.status = {"error": "Unauthorized"}, 401
    assert call(app, path, {"model": "pubs", "prompt": "a", **fields}) == (401, {"error": "Unauthorized"})
    assert app.bodies == []


def test_bodies_that_are_refused(app: FakeVLLM):
    app.options["max_body_mib"] = 1
    assert call(app, "/v1/completions", {"model": "pubs", "prompt": "a" * 2**20})[0] == 413
    assert call(app, "/v1/completions", b'{"model": "pubs", "prompt": "\\ud800"}')[0] == 400
    assert app.bodies == []
