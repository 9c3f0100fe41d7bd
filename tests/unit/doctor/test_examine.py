"""All checks pass on sound backbones; what is left out, reported and restored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from doctor_checks import (
    ALL,
    CHECKPOINTING,
    GENERATION,
    GREEDY,
    LAYERS,
    LOADING,
    OF_DECODERS_ONLY,
    OF_GENERATION,
    OWN,
    PACKING,
    ROUTES,
    WINDOW,
    failed,
    make_barely_moved_model,
    passing,
)
from patching import replace_everywhere
from prefixtune.attention.cache import prefilled_cache
from prefixtune.backbone.backbone import Backbone
from prefixtune.doctor.examine import examine
from prefixtune.errors import BackboneError, ConfigError
from zoo import make_model

Make = Callable[..., Any]


# tests/unit/tools/test_models_page.py examines every type.
@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("llama", {WINDOW}),
        ("mistral", set()),
        ("t5", OF_DECODERS_ONLY | {WINDOW}),
        ("bert", OF_DECODERS_ONLY | OF_GENERATION | {WINDOW}),
        ("modernbert", OF_DECODERS_ONLY | OF_GENERATION),
    ],
)
def test_every_kind_passes(name: str, left_out: set[str], tiny_backbone: Make) -> None:
    assert passing(tiny_backbone(name)) == [name for name in ALL if name not in left_out]


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("deepseek_v3", {ROUTES, WINDOW}),  # generation injects
        ("lfm2", {ROUTES, PACKING, WINDOW}),  # rows are padded besides
        ("stablelm", {CHECKPOINTING, WINDOW}),  # the prefix travels beside the call
        ("gemma3n_text", set()),  # layers share a prefix
    ],
)
def test_peculiar_decoders_pass(name: str, left_out: set[str], tiny_tokenizer: Any) -> None:
    backbone = Backbone.from_model(make_model(name, tiny_tokenizer), tiny_tokenizer, name)
    assert passing(backbone) == [n for n in ALL if n not in left_out]


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("t5gemma", {PACKING}),  # windows in encoder and decoder
        ("longt5-local", {PACKING, WINDOW, CHECKPOINTING}),  # the encoder attends through code of its own
    ],
)
def test_peculiar_encoder_decoders_pass(name: str, left_out: set[str], tiny_tokenizer: Any) -> None:
    backbone = Backbone.from_model(make_model(name, tiny_tokenizer), tiny_tokenizer, name)
    assert passing(backbone) == [n for n in ALL if n not in left_out | OF_DECODERS_ONLY]


@pytest.mark.parametrize(
    ("name", "dtype"), [("gpt2", torch.float16), *((name, torch.bfloat16) for name in ("mistral", "bart", "bert"))]
)
def test_half_precision_passes(name: str, dtype: torch.dtype, tiny_models: Make, tiny_tokenizer: Any) -> None:
    checks = examine(Backbone.from_model(tiny_models(name).to(dtype), tiny_tokenizer, name))
    assert [c for c in checks if not c.passed] == []
    assert OWN not in [c.name for c in checks]


def test_other_lengths_and_seeds_pass(tiny_backbone: Make) -> None:
    assert failed(tiny_backbone("llama"), prefix_length=1, seed=1) == {}


def test_small_weights_are_met_with_stronger_prefixes(tiny_models: Make, tiny_tokenizer: Any) -> None:
    model = tiny_models("llama")
    for name, parameter in model.named_parameters():
        if "o_proj" in name:
            parameter.data.mul_(1e-3)
    checks = examine(Backbone.from_model(model, tiny_tokenizer, "weak"))
    assert [c for c in checks if not c.passed] == []
    assert "strength 1)" not in next(c.detail for c in checks if c.name == LAYERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Bart", "Pegasus"])
def test_sound_models_whose_logits_hardly_move_pass(name: str, dtype: torch.dtype, tiny_tokenizer: Any) -> None:
    backbone = Backbone.from_model(make_barely_moved_model(name).to(dtype), tiny_tokenizer, name)
    assert LAYERS in passing(backbone)


def test_nothing_is_left_changed(tiny_backbone: Make) -> None:
    backbone = tiny_backbone("llama")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    first = examine(backbone)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert not backbone.model.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in backbone.model.state_dict().items())
    assert examine(backbone) == first


def test_works_where_gradients_are_off(tiny_backbone: Make) -> None:
    with torch.no_grad():
        assert failed(tiny_backbone("gpt2")) == {}


@pytest.mark.parametrize(("name", "length"), [("gpt2", 0), ("gpt2", 135), ("bart", 159)])
def test_a_length_that_leaves_no_room_is_refused(name: str, length: int, tiny_backbone: Make) -> None:
    with pytest.raises(ConfigError, match="prefix_length"):
        examine(tiny_backbone(name), prefix_length=length)


def test_an_error_is_a_failed_check(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise BackboneError("no cache today.\nmore of it", hint="wait.")

    replace_everywhere(monkeypatch, prefilled_cache, broken)
    faults = failed(tiny_backbone("gpt2"))
    assert faults.keys() == {LOADING, ROUTES, GENERATION, GREEDY}
    assert set(faults.values()) == {"BackboneError: no cache today."}
