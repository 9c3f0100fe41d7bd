"""Sabotaged attention is caught by the checks that should catch it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from doctor_checks import (
    CHECKPOINTING,
    EVALUATION,
    GRADIENTS,
    GREEDY,
    LAYERS,
    MIXED,
    OWN,
    PACKING,
    PADDING,
    REGISTRY,
    ROUTES,
    attend_changed_at,
    drop_prefix,
    failed,
    make_barely_moved_model,
    passing,
    patch_attention,
    see_everything,
)
from patching import replace_everywhere
from prefixtune.attention.forward import gradient_checkpointing
from prefixtune.attention.injection import Injection, batch_prefixes, current_injection
from prefixtune.attention.registry import ATTENTION, attend
from prefixtune.backbone.backbone import Backbone
from prefixtune.doctor.examine import Check, examine

Make = Callable[..., Any]


@pytest.mark.parametrize(("site", "number"), [("encoder", 2), ("decoder", 0), ("cross", 1)])
def test_one_dead_layer_of_a_model_whose_logits_hardly_move(
    site: str, number: int, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def patched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        injection = kwargs.get("prefix_injection") or current_injection.get()
        if injection is not None and injection.layers and injection.layer_of[module] == (site, number):
            kwargs["prefix_injection"] = Injection({})
        return attend(module, *args, **kwargs)

    backbone = Backbone.from_model(make_barely_moved_model("Bart"), tiny_tokenizer, "bart")
    patch_attention(monkeypatch, patched)
    faults = failed(backbone)
    assert faults[LAYERS].endswith(f"too little in layers {site} {number}")
    assert GRADIENTS in faults


def test_another_attention_function(tiny_backbone: Make) -> None:
    backbone = tiny_backbone("llama")
    backbone.model.set_attn_implementation("sdpa")
    reported: list[Check] = []
    checks = examine(backbone, on_check=reported.append)
    assert [(c.name, c.passed) for c in checks] == [(REGISTRY, False)]
    assert checks == reported
    assert checks[0].detail.startswith("BackboneError: no layer attends")


def test_one_layer_with_another_attention_function(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("llama")
    layer = backbone.model.model.layers[1]
    monkeypatch.setattr(layer.self_attn, "forward", lambda hidden_states, **_: (torch.zeros_like(hidden_states), None))
    assert "not every layer" in failed(backbone)[REGISTRY]


def test_a_prefix_that_is_cut_from_the_graph(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = batch_prefixes

    def detached(*args: Any) -> Any:
        made = stack(*args)
        # The last slot's keys of every layer get no gradient; the values all do.
        layers = {
            site: [(torch.cat([k[:, :, :-1], k[:, :, -1:].detach()], dim=2), v) for k, v in pairs]
            for site, pairs in made.layers.items()
        }
        return Injection(made.layer_of, layers, made.prefix_mask)

    replace_everywhere(monkeypatch, batch_prefixes, detached)
    faults = failed(tiny_backbone("gpt2"))
    assert faults.keys() == {GRADIENTS}
    # Three layers, the last key slot of each of the two prefixes.
    assert "66 of 72" in faults[GRADIENTS]


def test_attention_that_sees_the_future(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def patched(
        module: nn.Module, query: Any, key: Any, value: Any, mask: Any, *, prefix_injection: Any = None, **kwargs: Any
    ) -> Any:
        if prefix_injection is not None and prefix_injection.layers and prefix_injection.packing is None:
            mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
        return attend(module, query, key, value, mask, prefix_injection=prefix_injection, **kwargs)

    backbone = tiny_backbone("llama")
    patch_attention(monkeypatch, patched)
    assert {PADDING, ROUTES, GREEDY} <= failed(backbone).keys()


def test_dropout_left_on(tiny_backbone: Make) -> None:
    backbone = tiny_backbone("gpt2")
    backbone.model.transformer.h[1].mlp.dropout.p = 0.1
    assert failed(backbone).keys() == {EVALUATION}


def test_a_backbone_in_training_mode(tiny_backbone: Make) -> None:
    backbone = tiny_backbone("gpt2")
    backbone.model.train()
    assert "are in training mode" in failed(backbone)[EVALUATION]
    assert backbone.model.training


def test_checkpointing_that_drops_the_prefix(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointing = gradient_checkpointing
    backbone = tiny_backbone("llama")

    @contextlib.contextmanager
    def dropping(model: Any) -> Iterator[None]:
        def bare(module: nn.Module, *args: Any, prefix_injection: Any = None, **kwargs: Any) -> Any:
            return attend(module, *args, **kwargs)

        with checkpointing(model), pytest.MonkeyPatch.context() as inner:
            patch_attention(inner, bare)
            yield

    replace_everywhere(monkeypatch, gradient_checkpointing, dropping)
    assert CHECKPOINTING in failed(backbone)


def test_a_weight_that_is_to_be_trained_is_left_alone(tiny_backbone: Make) -> None:
    backbone = tiny_backbone("llama")
    weight = backbone.model.model.norm.weight.requires_grad_()
    assert passing(backbone)
    assert weight.grad is None


@pytest.mark.parametrize("site", ["encoder", "decoder", "cross"])
def test_a_dead_site(site: str, tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("t5")
    count = len(backbone.geometry[site])
    patch_attention(monkeypatch, attend_changed_at(site, drop_prefix))
    faults = failed(backbone)
    assert {LAYERS, GRADIENTS} <= faults.keys()
    assert faults[LAYERS].endswith(f"too little in layers {', '.join(f'{site} {n}' for n in range(count))}")


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_decoder_that_sees_the_future(name: str, tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone(name)
    patch_attention(monkeypatch, attend_changed_at("decoder", see_everything))
    assert {OWN, PADDING, MIXED, PACKING, GREEDY} <= failed(backbone).keys()


def test_a_relative_bias_that_is_shifted(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pad = nn.functional.pad

    def shifted(tensor: torch.Tensor, sizes: tuple[int, ...], *args: Any, **options: Any) -> torch.Tensor:
        return pad(tensor, sizes[::-1] if len(sizes) == 2 else sizes, *args, **options)

    backbone = tiny_backbone("t5")
    monkeypatch.setattr(torch.nn.functional, "pad", shifted)
    faults = failed(backbone)
    assert {MIXED, GREEDY} <= faults.keys()
    assert not {OWN, LAYERS, GRADIENTS} & faults.keys()


def test_attention_that_is_not_the_models_own(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(arguments: dict[str, Any]) -> None:
        arguments["query"] = arguments["query"] * 1.1

    backbone = tiny_backbone("bert")
    patch_attention(monkeypatch, attend_changed_at("encoder", change))
    assert failed(backbone).keys() == {OWN}
    assert backbone.model.config._attn_implementation == ATTENTION
