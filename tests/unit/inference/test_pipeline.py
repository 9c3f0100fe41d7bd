"""Transformers' pipelines with a prefix: the same texts and labels as the functions."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, Pipeline, TextIteratorStreamer

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import make_header
from prefixtune.errors import ConfigError, PrefixError, RequestError
from prefixtune.inference.classify import classify
from prefixtune.inference.generate import generate
from prefixtune.inference.model import Model, load
from prefixtune.prefix.prefix import Head, Prefix
from prefixtune.prefix.text_format import TextFormat

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"
TEXTS = ["some text", "a longer text", "x"]
TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "who"},
]
FORM = TextFormat("Q: {source} {separator}", " {target}").to_dict()
GREEDY = {"do_sample": False, "max_new_tokens": 6, "return_full_text": False}


@pytest.fixture(scope="module")
def backbone(tiny_models: Callable[..., Any], tiny_tokenizer: Any) -> Backbone:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return Backbone.from_model(tiny_models("qwen2"), tokenizer, "tiny-qwen2")


@pytest.fixture
def make_model(random_prefix: Callable[..., Any]) -> Callable[..., Model]:
    def make(backbone: Backbone, length: int = 3, **facts: Any) -> Model:
        prefix = random_prefix(backbone, length, scale=3.0).detach()
        return Model(backbone, Prefix(prefix.layers, make_header(backbone, **facts)))

    return make


def written(pipe: Pipeline, texts: Any, **options: Any) -> list[str]:
    return [rows[0]["generated_text"].strip() for rows in pipe(texts, **options)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gpt_neox"])
@pytest.mark.parametrize("facts", [{}, {"text_format": FORM}], ids=["default", "own format"])
def test_the_texts_are_those_of_generate(
    family: str, facts: Any, tiny_backbone: Callable[..., Any], make_model: Callable[..., Model]
) -> None:
    model = make_model(tiny_backbone(family), **facts)
    pipe = model.pipeline("text-generation")
    expected = model.generate(TEXTS, max_new_tokens=6)
    assert expected != generate(model.backbone, TEXTS, max_new_tokens=6), "the prefix must show"
    assert written(pipe, TEXTS, **GREEDY) == expected
    assert written(pipe, TEXTS, batch_size=3, **GREEDY) == expected
    assert pipe(TEXTS[0], **{**GREEDY, "return_full_text": True})[0]["generated_text"].startswith(TEXTS[0])
    bare = Model(model.backbone).pipeline(**GREEDY)
    assert written(bare, TEXTS) == generate(model.backbone, TEXTS, max_new_tokens=6)


def test_options_of_transformers(backbone: Backbone, make_model: Callable[..., Model]) -> None:
    model = make_model(backbone)
    pipe = model.pipeline(**GREEDY)
    assert written(pipe, TEXTS, num_beams=3, batch_size=2) == model.generate(TEXTS, max_new_tokens=6, num_beams=3)
    penalized = model.generate(TEXTS, max_new_tokens=6, repetition_penalty=3.0)
    assert penalized != model.generate(TEXTS, max_new_tokens=6)
    assert written(pipe, TEXTS, batch_size=3, repetition_penalty=3.0) == penalized
    config = GenerationConfig(max_new_tokens=4, do_sample=False)
    assert written(pipe, TEXTS, generation_config=config) == model.generate(TEXTS, max_new_tokens=4)
    torch.manual_seed(0)
    several = pipe("some text", do_sample=True, num_return_sequences=5, temperature=1.5)
    assert len({row["generated_text"] for row in several}) > 1
    (ids,) = pipe("some text", return_full_text=None, return_tensors=True)
    prompt = len(model._prompt("some text", 6)[0])
    assert len(ids["generated_token_ids"]) <= prompt + 6, "the prefix takes no place among the ids"
    total = pipe("some text", max_length=prompt + 2, max_new_tokens=None)[0]["generated_text"].strip()
    assert total == model.generate("some text", max_new_tokens=2)


def test_lengths_are_bounded_by_the_positions(
    tiny_backbone: Callable[..., Any], make_model: Callable[..., Model]
) -> None:
    backbone = tiny_backbone("gpt2")
    model, most = make_model(backbone, 3), backbone.max_positions
    pipe = model.pipeline(do_sample=False, return_full_text=None, return_tensors=True)
    with pytest.warns(UserWarning, match="Unfeasible length"):
        (ids,) = pipe("some text", max_length=400, max_new_tokens=None, min_new_tokens=390)
    assert len(ids["generated_token_ids"]) == most - 3
    # The pipeline's own 256 tokens are fewer here, where a source is cut as well.
    cuts = make_model(backbone, 3, text_format={**FORM, "on_too_long": "cut"})
    pipe = cuts.pipeline(do_sample=False, return_full_text=None, return_tensors=True)
    for text in ("w" * 20, "w" * 300):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (ids,) = pipe(text, min_new_tokens=70)
            prompt = cuts._prompt(text, 256, at_most=True)[0]
        assert len(ids["generated_token_ids"]) - len(prompt) >= 70
    with pytest.raises(RequestError, match="positions"):
        model.pipeline()("w" * 20, max_new_tokens=256)


def test_without_a_cache_the_prefix_would_be_read_as_text(
    backbone: Backbone, make_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(backbone)
    for options in ({"use_cache": False}, {"generation_config": GenerationConfig(use_cache=False)}):
        with pytest.raises(ConfigError, match="use_cache is False"):
            model.pipeline(**GREEDY)("some text", **options)
    assert written(model.pipeline(**GREEDY), TEXTS[:1], use_cache=True) == model.generate(TEXTS[:1], max_new_tokens=6)
    # The bare model needs none, and a checkpoint's own setting is nobody's wish.
    bare = load(backbone)
    assert written(bare.pipeline(**GREEDY), TEXTS[:1], use_cache=False) == bare.generate(TEXTS[:1], max_new_tokens=6)
    monkeypatch.setattr(backbone.model.generation_config, "use_cache", False)
    assert written(model.pipeline(**GREEDY), TEXTS[:1]) == model.generate(TEXTS[:1], max_new_tokens=6)


def test_logits_that_are_not_finite_are_said_to_be(backbone: Backbone, make_model: Callable[..., Model]) -> None:
    model = make_model(backbone)
    model.prefix.layers["decoder"][0][1][:] = torch.inf
    for options in ({}, {"do_sample": True}, {"num_beams": 2}):
        with pytest.raises(PrefixError, match="logits are not finite"):
            model.pipeline(**GREEDY)("some text", **options)


def test_a_streamer_does_not_see_the_prefix(backbone: Backbone, make_model: Callable[..., Model]) -> None:
    model = make_model(backbone)
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=False)
    model.pipeline(**GREEDY)("some text", streamer=streamer)
    shown = "".join(streamer)
    assert shown.startswith(model.tokenizer.decode(model._prompt("some text", 6)[0]))
    assert shown.rstrip().removesuffix(backbone.end).rstrip().endswith(model.generate("some text", max_new_tokens=6))


def test_conversations(backbone: Backbone, make_model: Callable[..., Model]) -> None:
    model = make_model(backbone)
    pipe = model.pipeline(**GREEDY)
    expected = model.chat(TALK, max_new_tokens=6)
    assert pipe(TALK)[0]["generated_text"].strip() == expected
    full = pipe(TALK, return_full_text=True)[0]["generated_text"]
    assert full[:3] == TALK
    assert full[3]["content"].strip() == expected
    single = make_model(backbone, text_format=FORM)
    with pytest.warns(UserWarning, match="last message only"):
        assert single.pipeline(**GREEDY)(TALK)[0]["generated_text"].strip() == single.generate("who", max_new_tokens=6)


def test_the_backbone_and_its_tokenizer_stay_as_they_are(
    backbone: Backbone, make_model: Callable[..., Model], caplog: pytest.LogCaptureFixture
) -> None:
    before = (backbone.tokenizer.padding_side, dict(vars(backbone.model)), backbone.model.config.to_dict())
    model = make_model(backbone)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        model.pipeline(**GREEDY)("some text")
        Model(backbone).pipeline("text-classification", labels=["yes", "no"])("some text")
    assert caplog.records == []
    assert (backbone.tokenizer.padding_side, dict(vars(backbone.model)), backbone.model.config.to_dict()) == before
    assert "generate" not in vars(backbone.model)


def test_labels_by_words_and_by_a_head(
    backbone: Backbone, random_prefix: Callable[..., Any], make_model: Callable[..., Model]
) -> None:
    labels = {"kind": "classification", "by": "words", "names": ["yes", "no", "maybe"], "words": ["a", "b", "c"]}
    by_words = make_model(backbone, labels=labels)
    torch.manual_seed(0)
    head = Head(torch.randn(3, backbone.hidden_size), torch.zeros(3))
    layers = random_prefix(backbone, 3).detach().layers
    by_head = Model(backbone, Prefix(layers, make_header(backbone, labels={**labels, "by": "head"}), head))
    for model in (by_words, by_head):
        expected = model.classify(TEXTS)
        pipe = model.pipeline("text-classification")
        for options in ({}, {"batch_size": 2}):
            found = pipe(TEXTS, top_k=None, **options)
            for rows, prediction in zip(found, expected, strict=True):
                assert rows[0]["label"] == prediction.label
                scores = {row["label"]: row["score"] for row in rows}
                assert scores == pytest.approx(prediction.probabilities, abs=1e-6)
        assert pipe(TEXTS[0])[0]["label"] == expected[0].label
    bare = Model(backbone).pipeline("text-classification", labels=["yes", "no"])
    assert bare(TEXTS[0])[0]["label"] == classify(backbone, TEXTS, labels=["yes", "no"])[0].label


def test_what_there_is_not(
    backbone: Backbone, tiny_backbone: Callable[..., Any], make_model: Callable[..., Model]
) -> None:
    model = make_model(backbone)
    for task, hint in (
        ("summarization", "model.generate"),
        ("text2text-generation", "model.generate"),
        ("token-classification", "tag"),
        ("fill-mask", "text-generation"),
        ("text-generaton", "did you mean"),
    ):
        with pytest.raises(ConfigError, match=f"no pipeline '{task}'") as raised:
            model.pipeline(task)
        assert hint in raised.value.hint
    labels = {"kind": "classification", "by": "words", "names": ["yes", "no"], "words": ["a", "b"]}
    with pytest.raises(ConfigError, match="writes no text"):
        make_model(backbone, labels=labels).pipeline()
    with pytest.raises(ConfigError, match="for tagging"):
        make_model(backbone, labels={**labels, "kind": "tagging"}).pipeline("text-classification")
    with pytest.raises(ConfigError, match="no labels"):
        model.pipeline("text-classification")
    with pytest.raises(ConfigError, match="kind encoder-decoder"):
        Model(tiny_backbone("bart")).pipeline()
    with pytest.raises(ConfigError, match="an infix"):
        make_model(backbone, placement="infix").pipeline()
    with pytest.raises(ConfigError, match="the model is loaded"):
        model.pipeline(device="cpu")
    pipe = model.pipeline(**GREEDY)
    for option in ({"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ConfigError, match="cannot be used in a pipeline"):
            pipe("some text", **option)
    with pytest.raises(RequestError, match="positions"):
        pipe("long " * 2000)
    with pytest.raises(ConfigError, match="truncation"):
        Model(backbone).pipeline("text-classification", labels=["yes", "no"])("text", truncation=True)
