"""Sabotaged decoding is caught by the checks that should catch it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from doctor_checks import (
    GENERATION,
    GRADIENTS,
    GREEDY,
    LAYERS,
    LOADING,
    MIXED,
    PADDING,
    ROUTES,
    WINDOW,
    attend_changed_at,
    drop_prefix,
    failed,
    passing,
    patch_attention,
)
from patching import replace_everywhere
from prefixtune.attention.cache import prefilled_cache
from prefixtune.attention.masks import cached_prefix_slots, extend_mask
from prefixtune.backbone.backbone import Backbone
from prefixtune.doctor.examine import examine
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.decoding import to_generation_config
from prefixtune.inference.generate import generate_ids

Make = Callable[..., Any]


@pytest.mark.parametrize("token", [7, 0])
def test_a_first_token_that_is_forced(token: int, tiny_models: Make, tiny_tokenizer: Any, random_ids: Make) -> None:
    model = tiny_models("bart")
    model.generation_config.forced_bos_token_id = token
    backbone = Backbone.from_model(model, tiny_tokenizer, "tiny-bart")
    assert GREEDY in passing(backbone)
    ((first,),) = generate_ids(backbone, [random_ids(5, 0)], [None], config=GenerateConfig(max_new_tokens=1))
    assert first == token


def test_a_window_in_some_layers_only(tiny_backbone: Make) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    backbone = tiny_backbone("qwen3", use_sliding_window=True, sliding_window=4, layer_types=kinds)
    checks = {c.name: c for c in examine((backbone.model, backbone.tokenizer))}
    assert all(c.passed for c in checks.values())
    assert "window 4: 21 of 21 slots" in checks[WINDOW].detail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_with_another_rows_prefix(
    dtype: torch.dtype, tiny_models: Make, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefilled = prefilled_cache

    def wrong(*args: Any, **options: Any) -> Any:
        cache, visible = prefilled(*args, **options)
        for layer in cache.layers:
            if layer.is_initialized and layer.values.shape[0] > 1:
                layer.values[-1] = layer.values[0]
        return cache, visible

    replace_everywhere(monkeypatch, prefilled_cache, wrong)
    faults = failed(Backbone.from_model(tiny_models("llama").to(dtype), tiny_tokenizer, "llama"))
    assert {ROUTES, GREEDY} <= faults.keys()
    assert not {LAYERS, GRADIENTS, MIXED, PADDING} & faults.keys()


def test_generation_that_ignores_the_prefix(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:

    def bare(backbone: Any, prompts: Any, prefixes: Any, **options: Any) -> Any:
        return generate_ids(backbone, prompts, [None] * len(prompts), **options)

    monkeypatch.setattr("prefixtune.doctor.cached.generate_ids", bare)
    faults = failed(tiny_backbone("gpt2"))
    assert faults.keys() == {GENERATION, GREEDY}
    assert "by 0.0e+00" in faults[GENERATION]
    assert "0 of 3 outputs differ" in faults[GENERATION]


def test_a_cache_that_is_lost_between_steps(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:

    make = to_generation_config

    def uncached(*args: Any) -> Any:
        config = make(*args)
        config.use_cache = False
        return config

    replace_everywhere(monkeypatch, to_generation_config, uncached)
    backbone = tiny_backbone("llama")
    assert {GREEDY} <= failed(backbone).keys()


def test_a_window_that_hides_the_prefix_in_the_cache(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_everywhere(monkeypatch, cached_prefix_slots, lambda count: contextlib.nullcontext())
    assert WINDOW in failed(tiny_backbone("mistral"))
    assert failed(tiny_backbone("llama")) == {}


def test_a_window_that_hides_the_prefix_injected(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    extend = extend_mask

    def windowed(mask: Any, visible: Any, prefix_length: int, key: Any, queries: int) -> Any:
        whole = extend(mask, visible, prefix_length, key, queries)
        columns = torch.arange(key.shape[2])[None, :]
        rows = torch.arange(queries)[:, None] + prefix_length
        return whole & (rows - columns < 4)

    replace_everywhere(monkeypatch, extend_mask, windowed)
    faults = failed(tiny_backbone("mistral"))
    assert "0 of 21 slots seen" in faults[WINDOW]


def test_a_site_that_is_dead_in_generation_only(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(arguments: dict[str, Any]) -> None:
        if "prefix_injection" not in arguments:
            drop_prefix(arguments)

    backbone = tiny_backbone("bart")
    patch_attention(monkeypatch, attend_changed_at("cross", change))
    assert failed(backbone).keys() == {LOADING, GREEDY}
