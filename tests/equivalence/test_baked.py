"""Baking keeps the prefix and drops the MLP, which is in no file."""

import pytest
import torch

from prefixtune.prefix.encoder import PrefixEncoder
from prefixtune.prefix.geometry import LayerShape
from prefixtune.prefix.prefix import save_prefix


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


def test_a_prefix_for_gpt2_medium_takes_two_megabytes(tmp_path):
    module = PrefixEncoder(
        "mlp", {"decoder": (LayerShape(16, 64, 64),) * 24}, 10, embedding_size=1024, bottleneck_size=512
    )
    assert sum(parameter.numel() for parameter in module.parameters()) > 25_000_000
    prefix = module.bake()
    full = save_prefix(tmp_path / "full.safetensors", prefix).stat().st_size
    half = save_prefix(tmp_path / "half.safetensors", prefix, dtype=torch.bfloat16).stat().st_size
    assert 1.96e6 <= full <= 1.98e6
    assert 0.98e6 <= half <= 0.99e6
