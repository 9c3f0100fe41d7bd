"""Find out whether a model is one of those whose steps compiled code computes (`decoder_step`), and its parts.

By transformers' classes, whose layers are known, and by what they ask of the attention when they run.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prefixtune.attention.compute import ScoreRecorder
from prefixtune.attention.forward import forward_with_backend
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.native.norm import RowNorm
from prefixtune.backbone.native.panels import PanelMatrix
from prefixtune.backbone.prepack import Int8Linear, PrepackedLinear
from prefixtune.prefix.geometry import Site

__all__ = ["DecoderLayer", "DecoderLayers", "find_layers", "may_have_layers"]

_CLASSES = {
    f"transformers.models.{name.lower()}.modeling_{name.lower()}": name
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
}
"""Modules of transformers -> how the names of their classes begin."""
_found: weakref.WeakKeyDictionary[Backbone, DecoderLayers] = weakref.WeakKeyDictionary()
"""The parts of backbones that were looked at before."""


@dataclass(frozen=True)
class DecoderLayer:
    """A decoder layer's parts.

    Attributes:
        matrices: Of queries, keys, values, output, gate, up and down, in this order.
        attention_norm: In front of the attention.
        mlp_norm: In front of the gated matrices.
        query_norm: Of each head's queries; None: there is none.
        key_norm: Of each head's keys; None: there is none.
        window: How many positions of the text each one sees; None: all.
    """

    matrices: Sequence[PanelMatrix]
    attention_norm: RowNorm
    mlp_norm: RowNorm
    query_norm: RowNorm | None
    key_norm: RowNorm | None
    window: int | None


@dataclass(frozen=True)
class DecoderLayers:
    """A decoder's parts behind its embeddings.

    Attributes:
        layers: In order.
        norm: Behind the last layer.
        head: Makes logits.
        heads: Of queries.
        kv_heads: Of keys and values.
        head_dim: Of each.
        scale: Multiplies the scores of the attention.
    """

    layers: Sequence[DecoderLayer]
    norm: RowNorm
    head: PanelMatrix
    heads: int
    kv_heads: int
    head_dim: int
    scale: float


def may_have_layers(backbone: Backbone) -> bool:
    """Whether `find_layers` may find the parts of a model, prepacked or not yet."""
    return (
        type(backbone.model).__module__ in _CLASSES
        and backbone.adapter is None
        and backbone.compute_dtype is None
        and backbone.dtype == torch.bfloat16
        and backbone.device.type == "cpu"
        and not any(_is_changed(module) for module in backbone.model.modules())
    )


def find_layers(backbone: Backbone) -> DecoderLayers | None:
    """The parts of a model that a `DecoderStep` computes; None: it is another one.

    Args:
        backbone: Prepacked.
    """
    model: Any = backbone.model
    if not may_have_layers(backbone) or not _is_known(model, _CLASSES[type(model).__module__]):
        return None
    if backbone in _found:
        return _found[backbone]
    recorder, zero = ScoreRecorder(), torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        forward_with_backend(model, backbone.layout, zero, zero, recorder, None)
    decoder = model.model
    indices: list[tuple[Site, int]] = [("decoder", index) for index in range(len(decoder.layers))]
    if recorder.scores.keys() != set(indices) or len(recorder.shapes) != 1:
        return None
    options = [recorder.scores[index] for index in indices]
    heads, kv_heads, head_dim, value_dim = recorder.shapes.pop()
    layers = [_layer(layer, scores.window) for layer, scores in zip(decoder.layers, options, strict=True)]
    found = DecoderLayers(layers, decoder.norm, model.lm_head.panels, heads, kv_heads, head_dim, options[0].scale)
    norms = [norm for each in layers for norm in (each.attention_norm, each.mlp_norm, each.query_norm, each.key_norm)]
    computed = (
        all(scores.fused and scores.position_bias is None for scores in options)
        and len({scores.scale for scores in options}) == 1
        and len({norm.epsilon for norm in [*norms, found.norm] if norm is not None}) == 1
        and value_dim == head_dim
        and head_dim % 2 == 0
    )
    if computed:
        _found[backbone] = found
    return found if computed else None


def _is_known(model: Any, name: str) -> bool:
    """Whether all modules are those that transformers' classes make, prepacked."""
    if type(model).__name__ != f"{name}ForCausalLM":
        return False
    decoder = model.model
    known = (
        type(decoder).__name__ == f"{name}Model"
        and type(decoder.rotary_emb).__name__ == f"{name}RotaryEmbedding"
        and type(decoder.embed_tokens) is nn.Embedding
        and decoder.embed_tokens.weight.dtype == torch.bfloat16
        and type(decoder.norm) is RowNorm
        and model.config.num_hidden_layers == len(decoder.layers)
        and _in_panels(model.lm_head)
    )
    return known and all(_is_known_layer(layer, name) for layer in decoder.layers)


def _is_known_layer(layer: Any, name: str) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [norm for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)) if norm]
    return (
        type(layer).__name__ == f"{name}DecoderLayer"
        and type(attention).__name__ == f"{name}Attention"
        and type(mlp).__name__ == f"{name}MLP"
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and all(type(norm) is RowNorm for norm in norms)
        and all(_in_panels(linear) for linear in _linears(layer))
    )


def _linears(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    ]


def _in_panels(linear: Any) -> bool:
    return type(linear) in (PrepackedLinear, Int8Linear) and linear.panels is not None


def _is_changed(module: nn.Module) -> bool:
    """Whether something else runs when it is called."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _layer(layer: Any, window: int | None) -> DecoderLayer:
    attention = layer.self_attn
    norms = layer.input_layernorm, layer.post_attention_layernorm
    head_norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return DecoderLayer([linear.panels for linear in _linears(layer)], *norms, *head_norms, window)
