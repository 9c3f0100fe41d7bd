"""The injected route against attention written by hand: K = [P_key; K], V = [P_val; V], text positions from P on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

P, T = 5, 9


def attention(query: Tensor, key: Tensor, value: Tensor, front: tuple[Tensor, Tensor]) -> Tensor:
    """Causal attention of (H, T, D) heads, the prefix visible to every token; returns (T, H * D)."""
    key, value = torch.cat([front[0], key], dim=1), torch.cat([front[1], value], dim=1)
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, dim=0), value.repeat_interleave(group, dim=0)
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    steps = torch.arange(query.shape[1])
    scores[:, :, P:] = scores[:, :, P:].masked_fill(steps[:, None] < steps[None, :], float("-inf"))
    return (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)


def heads(flat: Tensor, size: int) -> Tensor:
    """(T, H * D) -> (H, T, D)."""
    return flat.unflatten(1, (-1, size)).transpose(0, 1)


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding of (H, T, D), positions from P on."""
    half = x.shape[-1] // 2
    angle = torch.arange(P, P + x.shape[1])[:, None] * 10000.0 ** -(torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def llama(w: dict[str, Tensor], ids: Tensor, prefix: Any) -> Tensor:
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    x = w["model.embed_tokens.weight"][ids]
    for number, front in enumerate(prefix.layers["decoder"]):

        def linear(y: Tensor, name: str, number: int = number) -> Tensor:
            return y @ w[f"model.layers.{number}.{name}.weight"].T

        y = norm(x, w[f"model.layers.{number}.input_layernorm.weight"])
        query, key, value = (heads(linear(y, f"self_attn.{part}_proj"), 8) for part in "qkv")
        x = x + linear(attention(rotate(query), rotate(key), value, front), "self_attn.o_proj")
        y = norm(x, w[f"model.layers.{number}.post_attention_layernorm.weight"])
        x = x + linear(F.silu(linear(y, "mlp.gate_proj")) * linear(y, "mlp.up_proj"), "mlp.down_proj")
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def gpt2(w: dict[str, Tensor], ids: Tensor, prefix: Any) -> Tensor:
    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"transformer.{name}.weight"] + w[f"transformer.{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"transformer.{name}.weight"] + w[f"transformer.{name}.bias"]

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][P : P + len(ids)]
    for number, front in enumerate(prefix.layers["decoder"]):
        fused = linear(norm(x, f"h.{number}.ln_1"), f"h.{number}.attn.c_attn")
        query, key, value = (heads(part, 8) for part in fused.chunk(3, dim=-1))
        x = x + linear(attention(query, key, value, front), f"h.{number}.attn.c_proj")
        y = F.gelu(linear(norm(x, f"h.{number}.ln_2"), f"h.{number}.mlp.c_fc"), approximate="tanh")
        x = x + linear(y, f"h.{number}.mlp.c_proj")
    return norm(x, "ln_f") @ w["lm_head.weight"].T


@pytest.mark.parametrize(("family", "by_hand"), [("llama", llama), ("gpt2", gpt2)])
def test_the_attached_prefix_is_the_papers_attention(
    family: str,
    by_hand: Callable[..., Tensor],
    tiny_backbone: Any,
    random_prefix: Any,
    random_ids: Any,
    assert_same: Any,
):
    backbone = tiny_backbone(family)
    prefix = random_prefix(backbone, P)
    ids = torch.tensor(random_ids(T))
    expected = by_hand(backbone.model.state_dict(), ids, prefix)
    logits = backbone.forward(ids[None], prefixes=prefix).logits[0]
    assert_same(logits, expected)

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weights).sum(), prefix.tensors())
    assert_same(torch.autograd.grad((logits * weights).sum(), prefix.tensors()), wanted)
