"""Gradient checkpointing changes no number, baking keeps the prefix and drops the MLP, and a file keeps every bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prefixtune.attention.forward import gradient_checkpointing
from prefixtune.backbone.loss import batch_loss
from prefixtune.backbone.prefixes import load_prefix, make_header
from prefixtune.data.batching import pack
from prefixtune.data.encoding import TokenizedExample
from prefixtune.prefix.encoder import PrefixEncoder
from prefixtune.prefix.geometry import LayerShape
from prefixtune.prefix.prefix import Prefix, save_prefix


def build(backbone: Any, kind: str, start: Any = None) -> PrefixEncoder:
    torch.manual_seed(0)
    return PrefixEncoder(
        kind, backbone.geometry, 5, embedding_size=backbone.hidden_size, bottleneck_size=16, start=start
    )


@pytest.mark.parametrize("packed", [True, False])
def test_checkpointing_changes_no_number(packed: bool, backbone: Any, random_prefix: Any, random_ids: Any):
    prefix = random_prefix(backbone, 5)
    example = TokenizedExample(tuple(random_ids(8, 1)), (tuple(random_ids(4, 2)), tuple(random_ids(6, 3))))
    ids = torch.tensor([random_ids(9, 4), random_ids(9, 5)])
    layer_calls: list[int] = []
    first_layer = next(iter(backbone.layout.layer_of))
    # Found once, by calls of its own.
    assert backbone.linear_head is not None
    first_layer.register_forward_pre_hook(lambda *_: layer_calls.append(1))

    def loss_and_gradients() -> tuple[torch.Tensor, list[torch.Tensor]]:
        if packed:
            loss = batch_loss(backbone, prefix, pack([example])).sum()
        else:
            loss = backbone.forward(ids, prefixes=[prefix, None]).logits.logsumexp(-1).sum()
        return loss, torch.autograd.grad(loss, prefix.tensors())

    loss, gradients = loss_and_gradients()
    assert len(layer_calls) == 1
    with gradient_checkpointing(backbone.model):
        again, recomputed = loss_and_gradients()
        assert len(layer_calls) == 3, "the layer must run twice: forward, and again in the backward pass"
    assert torch.equal(again, loss)
    assert all(torch.equal(one, other) for one, other in zip(recomputed, gradients, strict=True))

    assert not any(module.training for module in backbone.model.modules())
    _, after = loss_and_gradients()
    assert len(layer_calls) == 4, "checkpointing must end with its block"
    assert all(torch.equal(one, other) for one, other in zip(after, gradients, strict=True))


@pytest.mark.parametrize("kind", ["mlp", "none", "scaled"])
def test_baked_is_the_module(kind: str, tiny_backbone: Any, random_prefix: Any, random_ids: Any):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_is_loaded_bit_for_bit(
    dtype: torch.dtype, tmp_path: Path, backbone: Any, random_prefix: Any, random_ids: Any
):
    made = random_prefix(backbone, 5).detach()
    prefix = Prefix(made.layers, make_header(backbone, task="toy", license="CC0: as you like, é"))
    path = save_prefix(tmp_path / "deep" / "p.safetensors", prefix, dtype=dtype)
    loaded = load_prefix(path, backbone)
    assert loaded.equal(prefix.to(dtype))
    assert loaded.header.items() >= prefix.header.items()
    ids = torch.tensor([random_ids(7)])
    one, other = (backbone.forward(ids, prefixes=p).logits for p in (loaded, prefix.to(dtype)))
    assert torch.equal(one, other)
    assert [entry.name for entry in path.parent.iterdir()] == ["p.safetensors"]


def test_a_prefix_for_gpt2_medium_takes_two_megabytes(tmp_path: Path):
    module = PrefixEncoder(
        "mlp", {"decoder": (LayerShape(16, 64, 64),) * 24}, 10, embedding_size=1024, bottleneck_size=512
    )
    assert sum(parameter.numel() for parameter in module.parameters()) > 25_000_000
    prefix = module.bake()
    full = save_prefix(tmp_path / "full.safetensors", prefix).stat().st_size
    half = save_prefix(tmp_path / "half.safetensors", prefix, dtype=torch.bfloat16).stat().st_size
    assert 1.96e6 <= full <= 1.98e6
    assert 0.98e6 <= half <= 0.99e6
