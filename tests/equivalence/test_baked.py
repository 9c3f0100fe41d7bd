"""Baking keeps the prefix and drops the MLP, which is in no file."""

import pytest
import torch

from prefixtune.prefix.encoder import PrefixEncoder


def build(backbone, kind, start=None):
    torch.manual_seed(0)
    return PrefixEncoder(
        kind, backbone.geometry, 5, embedding_size=backbone.hidden_size, bottleneck_size=16, start=start
    )


@pytest.mark.parametrize("kind", ["mlp", "none", "scaled"])
def test_baked_is_the_module(kind, tiny_backbone, random_prefix, random_ids):
    backbone = tiny_backbone("qwen3")
    start = None if kind == "mlp" else random_prefix(backbone, 5)
    module = build(backbone, kind, start)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    live, baked = module(), module.bake()
    assert baked.equal(live)
    assert not any(tensor.requires_grad for tensor in baked.tensors())
    ids = torch.tensor([random_ids(7)])
    assert torch.equal(backbone.forward(ids, prefixes=live).logits, backbone.forward(ids, prefixes=baked).logits)

    kept = baked.detach()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert baked.equal(kept), "a baked prefix must not move with its module"
