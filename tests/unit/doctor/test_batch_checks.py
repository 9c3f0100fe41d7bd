"""Sabotaged batches are caught by the checks that should catch them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from doctor_checks import (
    GRADIENTS,
    GREEDY,
    LAYERS,
    LOADING,
    MIXED,
    OWN,
    PACKING,
    PADDING,
    ROUTES,
    attend_changed_at,
    failed,
    patch_attention,
    see_everything,
)
from patching import replace_everywhere
from prefixtune.attention.forward import forward_with_prefixes
from prefixtune.attention.kernels import packed_attention
from prefixtune.attention.masks import extend_mask
from prefixtune.attention.packing import Group, Packing

Make = Callable[..., Any]


def test_padding_slots_that_are_seen(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    extend = extend_mask

    def blind(mask: Any, visible: Any, prefix_length: int, key: Any, queries: int) -> Any:
        return extend(mask, None, prefix_length, key, queries)

    replace_everywhere(monkeypatch, extend_mask, blind)
    faults = failed(tiny_backbone("llama"))
    assert {MIXED, ROUTES} <= faults.keys()
    assert not {PADDING, LAYERS} & faults.keys()


def test_padded_text_that_is_seen(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = forward_with_prefixes

    def unmasked(model: Any, layout: Any, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return forward(model, layout, input_ids, None, **kwargs)

    replace_everywhere(monkeypatch, forward_with_prefixes, unmasked)
    assert {PADDING, MIXED} <= failed(tiny_backbone("llama")).keys()


def test_targets_that_see_each_other(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(self: Group, window: int | None = None) -> torch.Tensor:
        count = self.stop - self.start
        return torch.ones(count, count, dtype=torch.bool).tril()

    monkeypatch.setattr(Group, "mask", leaky)
    assert failed(tiny_backbone("llama")).keys() == {PACKING}


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize("site", ["encoder", "cross"])
def test_padded_sources_that_are_seen(
    site: str, name: str, tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone(name)
    patch_attention(monkeypatch, attend_changed_at(site, see_everything))
    faults = failed(backbone)
    assert {OWN, PADDING, MIXED, GREEDY} <= faults.keys()
    assert not {LAYERS, GRADIENTS, PACKING} & faults.keys()


def test_packed_targets_that_look_at_another_source(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Packing.sizes

    def turned(self: Packing, site: str) -> Any:
        ours, theirs = sizes(self, site)
        return (ours, theirs[::-1]) if site == "cross" else (ours, theirs)

    monkeypatch.setattr(Packing, "sizes", turned)
    assert failed(tiny_backbone("bart")).keys() == {PACKING}


def test_packed_rows_whose_gradient_is_lost(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = packed_attention

    def cut(packing: Any, site: str, prefix_kv_by_group: Any, *args: Any) -> Any:
        detached = [None if kv is None else (kv[0].detach(), kv[1]) for kv in prefix_kv_by_group]
        return packed(packing, site, detached, *args)

    replace_everywhere(monkeypatch, packed_attention, cut)
    assert failed(tiny_backbone("llama")).keys() == {PACKING}
    assert failed(tiny_backbone("t5")).keys() == {PACKING}


def test_an_encoder_that_sees_padding(tiny_backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("bert")
    patch_attention(monkeypatch, attend_changed_at("encoder", see_everything))
    assert failed(backbone).keys() == {LOADING, OWN, PADDING, MIXED}
