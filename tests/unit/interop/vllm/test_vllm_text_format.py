"""Texts get the format that a prefix was trained with, and only targets come back."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fake_vllm import FakeVLLM, call, request
from prefixtune.errors import CheckpointError
from prefixtune.interop.vllm.chat_template import PLACEHOLDERS_VARIABLE
from prefixtune.interop.vllm.folder import PrefixFolder
from prefixtune.interop.vllm.model import geometry_of
from prefixtune.interop.vllm.settings import Settings


def prompts_of(app: FakeVLLM) -> list[list[int]]:
    """What the model was prompt last, placeholders left out."""
    prompt = app.bodies[-1]["prompt"]
    return [ids[5:] for ids in (prompt if isinstance(prompt[0], list) else [prompt])]


def test_a_text_gets_the_prefixs_own_format(format_app: FakeVLLM):
    call(format_app, "/v1/completions", {"model": "qa", "prompt": ["name", "x"]})
    assert prompts_of(format_app) == [format_app.encode("Q: name<s>"), format_app.encode("Q: x<s>")]
    call(format_app, "/v1/completions", {"model": "qa", "prompt": [5, 6, 7]})
    assert prompts_of(format_app) == [[5, 6, 7]]
    call(format_app, "/v1/chat/completions", {"model": "qa", "messages": [{"role": "user", "content": "name"}]})
    options = format_app.bodies[-1]["chat_template_kwargs"]
    from jinja2 import Template

    text = Template(format_app.state.online_renderer.chat_template).render(messages=[{"content": "no"}], **options)
    assert format_app.encode(text)[5:] == format_app.encode("Q: name<s>")
    with pytest.raises(CheckpointError, match="1,500 times"):
        PrefixFolder(
            Settings.from_vllm(format_app.state.vllm_config),
            geometry_of(format_app.state.vllm_config.model_config),
            "tiny",
        ).find("hostile")
    assert call(format_app, "/v1/completions", {"model": "hostile", "prompt": "a"})[0] == 503


@pytest.mark.parametrize(("scheme", "status"), [("first", 400), ("always", 200), ("never", 200)])
def test_a_chat_whose_tokens_would_differ_is_refused(format_app: FakeVLLM, scheme: str, status: int):
    # As SentencePiece's: "first" marks the start of a text, but not what follows a special token.
    pieces = ["<unk>", "<s>", "</s>", "\u2581", *"Q:name", "\u2581Q", "\u2581name"]
    model = Tokenizer(models.Unigram([(piece, -float(10 - len(piece))) for piece in pieces], unk_id=0))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    format_app.state.engine_client.get_tokenizer = lambda: tokenizer
    call(format_app, "/v1/completions", {"model": "qa", "prompt": "name"})
    assert prompts_of(format_app) == [format_app.encode("Q: name<s>")]
    body = {"model": "qa", "messages": [{"role": "user", "content": "name"}]}
    assert call(format_app, "/v1/chat/completions", body)[0] == status


def test_raw_completions(format_app: FakeVLLM):
    format_app.options["raw_completions"] = True
    format_app.reply = {"model": "base", "choices": [{"text": " a "}]}
    _, response = call(format_app, "/v1/completions", {"model": "qa", "prompt": "name"})
    assert prompts_of(format_app) == [format_app.encode("name")]
    assert response["choices"] == [{"text": " a "}]


@pytest.mark.parametrize(("name", "written"), [("qa", "  Aromi is  it. "), ("framed", "<< Aromi is  it. >>")])
def test_only_the_target_comes_back(format_app: FakeVLLM, name: str, written: str):
    wanted, messages = "Aromi is  it.", [{"role": "user", "content": "name"}]
    format_app.reply = {"model": "base", "choices": [{"index": 0, "text": written, "finish_reason": "stop"}]}
    _, response = call(format_app, "/v1/completions", {"model": name, "prompt": "name"})
    assert response["choices"][0]["text"] == wanted
    format_app.reply["choices"] = [{"index": 0, "message": {"content": written}, "finish_reason": "stop"}]
    _, response = call(format_app, "/v1/chat/completions", {"model": name, "messages": messages})
    assert response["choices"][0]["message"]["content"] == wanted

    def make_events(choice: Callable[[str], Any], ends_alone: bool) -> list[bytes]:
        parts = [written[at : at + 3] for at in range(0, len(written), 3)]
        last = len(parts) - 1
        choices = [
            {"index": n % 2, **choice(part), "finish_reason": "stop" if at == last and not ends_alone else None}
            for at, part in enumerate(parts)
            for n in (0, 1)
        ]
        if ends_alone:
            choices += [{"index": n, "delta": {}, "finish_reason": "stop"} for n in (0, 1)]
        return [b"data: " + json.dumps({"model": "base", "choices": [choice]}).encode() + b"\n\n" for choice in choices]

    for path, choice, ends_alone in (
        ("/v1/completions", lambda part: {"text": part}, False),
        ("/v1/chat/completions", lambda part: {"delta": {"content": part}}, True),
    ):
        format_app.pieces = [*make_events(choice, ends_alone), b"data: [DONE]\n\n"]
        body = {"model": name, "prompt": "name", "messages": messages, "stream": True, "n": 2}
        _, stream = call(format_app, path, body)
        events = [json.loads(event[6:]) for event in stream.decode().split("\n\n") if event.startswith("data: {")]
        for index in (0, 1):
            choices = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
            texts = [choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices]
            assert "".join(texts) == wanted


@pytest.mark.parametrize(("name", "head", "tail"), [("qa", "  ", " "), ("framed", "<< ", " >>")])
def test_offsets_of_tokens_count_within_the_target(format_app: FakeVLLM, name: str, head: str, tail: str):
    tokens = [*head, "Aro", "mi", " ", "is", " ", " ", "it", ".", *tail]
    raw, logprobs = [len("".join(tokens[:count])) for count in range(len(tokens))], [-1.0] * len(tokens)
    wanted, written = "Aromi is  it.", "".join(tokens)
    offsets = [min(max(offset - len(head), 0), len(wanted)) for offset in raw]
    raw_logprobs = {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": [None] * len(tokens),
        "text_offset": raw,
    }
    choice = {"index": 0, "text": written, "logprobs": raw_logprobs, "finish_reason": "stop"}
    format_app.reply = {"model": "base", "choices": [choice]}
    _, response = call(format_app, "/v1/completions", {"model": name, "prompt": "name", "logprobs": 0})
    assert response["choices"][0]["text"] == wanted
    assert response["choices"][0]["logprobs"] == {**raw_logprobs, "text_offset": offsets}
    pieces = []
    for at in range(0, len(tokens), 2):
        part = {key: values[at : at + 2] for key, values in raw_logprobs.items()}
        finished = "stop" if at + 2 >= len(tokens) else None
        choice = {"index": 0, "text": "".join(part["tokens"]), "logprobs": part, "finish_reason": finished}
        pieces.append(b"data: " + json.dumps({"model": "base", "choices": [choice]}).encode() + b"\n\n")
    format_app.pieces = [*pieces, b"data: [DONE]\n\n"]
    _, stream = call(format_app, "/v1/completions", {"model": name, "prompt": "name", "logprobs": 0, "stream": True})
    events = [json.loads(event[6:]) for event in stream.decode().split("\n\n") if event.startswith("data: {")]
    choices = [event["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == wanted
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    assert [token for part in parts for token in part["tokens"]] == tokens
    assert [offset for part in parts for offset in part["text_offset"]] == offsets


def test_messages_that_a_prefix_cannot_read(format_app: FakeVLLM):
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "name"}]
    assert call(format_app, "/v1/chat/completions", {"model": "qa", "messages": messages})[0] == 400
    assert format_app.bodies == []
    for wrong in ([], [{"role": "assistant", "content": "a"}], [{"role": "user", "content": ""}], "a", [3]):
        assert call(format_app, "/v1/chat/completions", {"model": "qa", "messages": wrong})[0] == 400
    format_app.options["earlier_messages"] = "drop"
    headers = request(format_app, "/v1/chat/completions", {"model": "qa", "messages": messages}).headers
    assert headers[b"x-prefixtune-dropped-messages"] == b"1"
    # A template from before has no place for the format.
    format_app.state.online_renderer.chat_template = "{{ " + PLACEHOLDERS_VARIABLE + " }}"
    status, response = call(format_app, "/v1/chat/completions", {"model": "qa", "messages": messages[1:]})
    assert (status, response["error"]["param"]) == (400, "messages")


def test_what_only_the_models_template_can_follow(format_app: FakeVLLM):
    body = {"model": "qa", "messages": [{"role": "user", "content": "name"}]}
    for field, neutral, wrong in (("tools", [], [{"type": "function"}]), ("add_generation_prompt", True, False)):
        format_app.bodies.clear()
        status, response = call(format_app, "/v1/chat/completions", {**body, field: wrong})
        assert (status, format_app.bodies) == (400, [])
        assert response["error"]["param"] == field
        assert call(format_app, "/v1/chat/completions", {**body, field: neutral})[0] == 200
        # A prefix without a text format leaves the template to the model.
        assert call(format_app, "/v1/chat/completions", {**body, "model": "pubs", field: wrong})[0] == 200
        assert format_app.bodies[-1][field] == wrong


def test_long_texts_are_treated_as_in_training(format_app: FakeVLLM):
    format_app.state.vllm_config.model_config.max_model_len = 512
    source = "abcdefghij" * 9
    headers = request(format_app, "/v1/completions", {"model": "qa", "prompt": source, "max_tokens": 9}).headers
    assert headers[b"x-prefixtune-cut-tokens"] == b"54"
    whole = format_app.encode(f"Q: {source}<s>")
    assert prompts_of(format_app) == [[*whole[:39], whole[-1]]]
    # As long as one that training left whole.
    headers = request(format_app, "/v1/completions", {"model": "whole", "prompt": source, "max_tokens": 9}).headers
    assert b"x-prefixtune-cut-tokens" not in headers
    assert prompts_of(format_app) == [whole]
    # A cut would leave nothing of the source.
    body = {"model": "wordy", "prompt": source, "max_tokens": 9}
    assert call(format_app, "/v1/completions", body)[0] == 400
    format_app.bodies.clear()
    for path, model in (("/v1/completions", "framed"), ("/v1/chat/completions", "qa")):
        body = {"model": model, "prompt": source, "messages": [{"role": "user", "content": source}]}
        assert call(format_app, path, body)[0] == 400
    assert format_app.bodies == []
