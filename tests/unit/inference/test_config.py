"""Decoding options: what is refused, and what the model's own settings may not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from patching import replace_everywhere
from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import ConfigError, RequestError
from prefixtune.inference.classify import classify
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate, generate_ids
from prefixtune.inference.streaming import stream
from prefixtune.prefix.prefix import Prefix


def test_the_models_own_generation_settings_do_not_leak(
    tiny_models: Callable[..., Any], tiny_tokenizer: Any, tiny_backbone: Callable[..., Any]
) -> None:
    model = tiny_models("llama")
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.no_repeat_ngram_size = 2
    poisoned = Backbone.from_model(model, tiny_tokenizer, "poisoned")
    plain = tiny_backbone("llama")
    texts = ["some text", "more"]
    assert generate(poisoned, texts, max_new_tokens=12) == generate(plain, texts, max_new_tokens=12)


def test_one_string_is_not_a_list_of_texts(tiny_backbone: Callable[..., Any]) -> None:
    with pytest.raises(RequestError, match=r"write \[text\]"):
        generate(tiny_backbone("llama"), "some text")


def test_one_stop_string_is_one() -> None:
    assert GenerateConfig(stop="END").stop == ("END",)


def test_all_faults_at_once_and_did_you_mean() -> None:
    with pytest.raises(ConfigError, match=r"max_new_tokens.*top_p"):
        GenerateConfig(max_new_tokens=0, top_p=2.0)
    with pytest.raises(ConfigError, match="did you mean 'num_beams'"):
        GenerateConfig(num_beam=3)
    with pytest.raises(ConfigError, match="exclude each other"):
        GenerateConfig(num_beams=2, temperature=1.0)


def test_penalties_that_would_overflow_are_refused() -> None:
    for penalty in (1e-300, 0.0, 11.0):
        with pytest.raises(ConfigError, match="repetition_penalty"):
            GenerateConfig(repetition_penalty=penalty)


@pytest.mark.parametrize("kind", ["llama", "gptj"])
def test_a_tiny_temperature_takes_the_likeliest_tokens(tiny_backbone: Callable[..., Any], kind: str) -> None:
    backbone = tiny_backbone(kind)
    greedy = generate(backbone, ["some text"], max_new_tokens=8)
    assert generate(backbone, ["some text"], max_new_tokens=8, temperature=1e-39, seed=1) == greedy


def test_words_around_the_target_are_taken_off(
    tiny_backbone: Callable[..., Any], random_prefix: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone("llama")
    header = {"text_format": {"prompt": "{source}{separator}", "target": "Answer: {target} ."}}
    prefix = Prefix(random_prefix(backbone, 3).layers, header).detach()
    written = backbone.encode("Answer: yes .")
    replace_everywhere(monkeypatch, generate_ids, lambda *_, **__: [written])
    assert generate(backbone, ["x"], prefix) == ["yes"]
    assert "".join(stream(backbone, "x", prefix)) == "yes"


def test_options_of_classification_are_checked(tiny_backbone: Callable[..., Any]) -> None:
    backbone = tiny_backbone("llama")
    for option in ({"batch_size": 0}, {"batchsize": 1}, {"config": {"on_too_long": "cot"}}):
        with pytest.raises(ConfigError, match=r"batch_?size|on_too_long"):
            classify(backbone, ["a"], labels=["x", "y"], **option)
    alone, several = (
        classify(backbone, ["a", "bc"], labels=["x", "y"], config=GenerateConfig(batch_size=size)) for size in (1, 2)
    )
    assert [prediction.label for prediction in alone] == [prediction.label for prediction in several]
