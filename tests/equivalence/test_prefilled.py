"""The injected route against a cache that holds the prefix, and a batch against each of its rows alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prefixtune.attention.injection import prefilled_cache
from prefixtune.attention.layout import cache_argument
from prefixtune.attention.masks import cached_prefix_slots
from prefixtune.errors import BackboneError, ConfigError


def eager_logits(model: Any, ids: list[int], prefix: Any) -> Tensor:
    """An oracle: transformers' own eager attention over a cache filled here, with every mask and position written out.

    Gradients reach the prefix through the cache.
    """
    from transformers import DynamicCache

    cache, count = DynamicCache(), prefix.prefix_length
    for number, (key, value) in enumerate(prefix.layers["decoder"]):
        cache.update(key[None], value[None], number)
    place = torch.arange(len(ids))
    hidden = place[:, None] < place[None, :]
    window = getattr(model.config, "sliding_window", None)
    if window is not None:
        hidden |= place[:, None] - place[None, :] >= window
    mask = torch.zeros(1, 1, len(ids), count + len(ids))
    mask[..., count:].masked_fill_(hidden, torch.finfo(torch.float32).min)
    return model(
        input_ids=torch.tensor([ids]),
        attention_mask=mask,
        position_ids=place[None] + count,
        **{cache_argument(model): cache},
    ).logits[0]


@pytest.mark.parametrize("length", [1, 6])
def test_injected_is_prefilled(
    length: int, family: str, backbone: Any, tiny_models: Any, random_prefix: Any, random_ids: Any, assert_same: Any
):
    oracle = tiny_models(family).requires_grad_(False)
    oracle.set_attn_implementation("eager")
    prefix, ids = random_prefix(backbone, length), random_ids(11)
    expected = eager_logits(oracle, ids, prefix)
    logits = backbone.forward(torch.tensor([ids]), prefixes=prefix).logits[0]
    assert_same(logits, expected)

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weights).sum(), prefix.tensors())
    assert_same(torch.autograd.grad((logits * weights).sum(), prefix.tensors()), wanted)


def padded(texts: list[list[int]], side: str, pad: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, texts))
    ids, mask = torch.full((len(texts), width), pad), torch.zeros(len(texts), width, dtype=torch.long)
    for number, text in enumerate(texts):
        span = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[number, span], mask[number, span] = torch.tensor(text), 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_of_mixed_prefixes_is_each_row_alone(
    side: str, backbone: Any, random_prefix: Any, random_ids: Any, assert_same: Any
):
    prefixes = [random_prefix(backbone, 6, seed=1), random_prefix(backbone, 2, seed=2), None]
    prefixes.append(prefixes[1])
    texts = [random_ids(count, seed=count) for count in (9, 5, 12, 1)]
    ids, mask = padded(texts, side, backbone.pad_id)
    logits = backbone.forward(ids, mask, prefixes=prefixes).logits
    alone = [
        backbone.forward(torch.tensor([text]), prefixes=prefix).logits[0]
        for text, prefix in zip(texts, prefixes, strict=True)
    ]
    together = [row[real.bool()] for row, real in zip(logits, mask, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert_same(one, other)

    leaves = prefixes[0].tensors() + prefixes[1].tensors()
    wanted = torch.autograd.grad(sum(part.square().sum() for part in alone), leaves)
    assert_same(torch.autograd.grad(sum(part.square().sum() for part in together), leaves), wanted)


def test_what_is_in_the_padding_does_not_matter(backbone: Any, random_prefix: Any, random_ids: Any):
    prefix = random_prefix(backbone, 4)
    ids, mask = padded([random_ids(3, 1), random_ids(8, 2)], "left", backbone.pad_id)
    other = ids.clone()
    other[0, :5] = torch.tensor(random_ids(5, 3))
    with torch.no_grad():
        one = backbone.forward(ids, mask, prefixes=prefix).logits
        two = backbone.forward(other, mask, prefixes=prefix).logits
    assert torch.equal(one[mask.bool()], two[mask.bool()])


def test_our_prefilled_cache_is_the_injected_route(
    backbone: Any, random_prefix: Any, random_ids: Any, assert_same: Any
):
    prefixes = [random_prefix(backbone, 5, 1), random_prefix(backbone, 3, 2), None]
    ids, mask = padded([random_ids(count, count) for count in (9, 7, 4)], "left", backbone.pad_id)
    cache, slots = prefilled_cache(backbone.model, backbone.layout, prefixes)
    assert slots.sum(1).tolist() == [5, 3, 0]
    with cached_prefix_slots(slots.shape[1]):
        logits = backbone.model(
            input_ids=ids,
            attention_mask=torch.cat([slots.long(), mask], dim=1),
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0) + slots.sum(-1, keepdim=True),
            **{cache_argument(backbone.model): cache},
        ).logits
    expected = backbone.forward(ids, mask, prefixes=prefixes).logits
    assert_same(logits[mask.bool()], expected[mask.bool()])


def test_without_a_prefix_it_is_the_bare_model(
    family: str, backbone: Any, tiny_models: Any, random_ids: Any, assert_same: Any
):
    bare = tiny_models(family).requires_grad_(False)
    ids = torch.tensor([random_ids(9)])
    expected = bare(input_ids=ids).logits
    assert_same(backbone.forward(ids).logits, expected)
    assert_same(backbone.forward(ids, prefixes=[None]).logits, expected)
    # The model stays an ordinary one for anybody who calls it directly.
    assert_same(backbone.model(input_ids=ids).logits, expected)


def test_one_prefix_serves_every_row(backbone: Any, random_prefix: Any, random_ids: Any, assert_same: Any):
    prefix = random_prefix(backbone, 4)
    ids = torch.tensor([random_ids(6, 1), random_ids(6, 2)])
    assert_same(backbone.forward(ids, prefixes=prefix).logits, backbone.forward(ids, prefixes=[prefix, prefix]).logits)


def test_a_misfit_is_refused(tiny_backbone: Any, random_prefix: Any, random_ids: Any):
    backbone, other = tiny_backbone("llama"), tiny_backbone("gpt2")
    ids = torch.tensor([random_ids(6), random_ids(6, 1)])
    with pytest.raises(BackboneError, match=r"3 layers x 4 KV heads x 8.*3 layers x 2 KV heads x 8"):
        backbone.forward(ids, prefixes=random_prefix(other, 4))
    with pytest.raises(ConfigError, match="3 prefixes for 2 rows"):
        backbone.forward(ids, prefixes=[None, None, None])
