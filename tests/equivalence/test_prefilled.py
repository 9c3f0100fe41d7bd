"""The injected route against a cache that holds the prefix."""

import pytest
import torch

from oracles import behind_cache, cache_of, outputs_of
from prefixtune.errors import BackboneError, ConfigError


def eager_logits(model, ids, prefix):
    """An oracle: transformers' own eager attention over a cache filled here, with every mask and position written out.

    Gradients reach the prefix through the cache.
    """
    count, place = prefix.prefix_length, torch.arange(len(ids))
    hidden = place[:, None] < place[None, :]
    window = getattr(model.config, "sliding_window", None)
    if window is not None:
        hidden |= place[:, None] - place[None, :] >= window
    mask = torch.zeros(1, 1, len(ids), count + len(ids))
    mask[..., count:].masked_fill_(hidden, torch.finfo(torch.float32).min)
    return behind_cache(model, cache_of(prefix), torch.tensor([ids]), count, attention_mask=mask).logits[0]


@pytest.mark.parametrize("length", [1, 6])
def test_injected_is_prefilled(length, family, backbone, tiny_models, random_prefix, random_ids, assert_same):
    oracle = tiny_models(family).requires_grad_(False)
    oracle.set_attn_implementation("eager")
    prefix, ids = random_prefix(backbone, length), random_ids(11)
    expected = eager_logits(oracle, ids, prefix)
    logits = backbone.forward(torch.tensor([ids]), prefixes=prefix).logits[0]
    assert_same(logits, expected)

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weights).sum(), prefix.tensors())
    assert_same(torch.autograd.grad((logits * weights).sum(), prefix.tensors()), wanted)


def test_one_prefix_serves_every_row(backbone, random_prefix, random_ids, assert_same):
    """In rows of one length, without a mask."""
    prefix, texts = random_prefix(backbone, 4), [random_ids(6, seed) for seed in (1, 2)]
    together = backbone.forward(torch.tensor(texts), prefixes=prefix).logits
    assert_same(together, torch.stack([outputs_of(backbone, text, (), prefix) for text in texts]))


def test_a_misfit_is_refused(tiny_backbone, random_prefix, random_ids):
    backbone, other = tiny_backbone("llama"), tiny_backbone("gpt2")
    ids = torch.tensor([random_ids(6), random_ids(6, 1)])
    with pytest.raises(BackboneError, match=r"3 layers x 4 KV heads x 8.*3 layers x 2 KV heads x 8"):
        backbone.forward(ids, prefixes=random_prefix(other, 4))
    with pytest.raises(ConfigError, match="3 prefixes for 2 rows"):
        backbone.forward(ids, prefixes=[None, None, None])
