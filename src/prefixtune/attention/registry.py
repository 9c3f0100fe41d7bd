"""This project's attention function, in transformers' registry."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from prefixtune.attention.injection import AttentionCall, attention_observer, current_injection, traced_calls
from prefixtune.attention.kernels import AttentionKernel, ScoreOptions, plain_attention
from prefixtune.attention.masks import make_additive_mask, make_mask
from prefixtune.attention.packed import packed_attention
from prefixtune.errors import BackboneError

ATTENTION = "prefixtune"
"""The name of the attention function in transformers' registry."""

ATTENTIONS: dict[AttentionKernel, str] = {"sdpa": ATTENTION, "eager": f"{ATTENTION}_eager", "flex": f"{ATTENTION}_flex"}
"""What computes the attention, once the prefix is in front -> its name in the registry."""


def register() -> None:
    """Add this project's attention function and mask to transformers' registries, if they are not there yet."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for kernel, name in ATTENTIONS.items():
        if name not in AttentionInterface():
            AttentionInterface.register(name, attend if name == ATTENTION else functools.partial(attend, kernel=kernel))
            AttentionMaskInterface.register(name, make_additive_mask if kernel == "eager" else make_mask)


def attend(
    module: nn.Module,
    query: Float[Tensor, "B Hq T Dk"],
    key: Float[Tensor, "Bk H S Dk"],
    value: Float[Tensor, "Bk H S Dv"],
    attention_mask: Tensor | None,
    *,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    kernel: AttentionKernel = "sdpa",
    **kwargs: Any,
) -> tuple[Float[Tensor, "B T Hq Dv"], None]:
    """Attention with the row's prefix in front: K = [P_key; K], V = [P_val; V] (Li & Liang 2021, eq. 3).

    Registered in transformers; every attention layer calls it. Without an injection it is plain attention. A relative
    position bias (T5) is zero at the prefix; a soft cap (Gemma 2) and sinks (`s_aux`, gpt-oss) apply to the prefix as
    to the text.
    """
    injection = current_injection.get()
    if query.dtype != value.dtype:
        # Under autocast, rotary embeddings leave queries and keys in float32.
        query, key = query.to(value.dtype), key.to(value.dtype)
    causal = kwargs.get("is_causal")
    scores = ScoreOptions(
        kwargs.get("scaling") or query.shape[-1] ** -0.5,
        position_bias,
        softcap,
        s_aux,
        kernel,
        _window(module, kwargs),
        getattr(module, "is_causal", True) if causal is None else causal,
        kwargs,
    )
    calls = traced_calls.get()
    if calls is not None:
        arguments = {"position_bias": position_bias, "softcap": softcap, "s_aux": s_aux, **kwargs}
        calls.append(AttentionCall(module, key, value, attention_mask, arguments))
    if attention_mask is None and scores.causal and 1 < query.shape[2] < key.shape[2]:
        raise BackboneError(
            f"{type(module).__name__} got {key.shape[2]} keys for {query.shape[2]} positions, without a mask: a static "
            "cache, which this attention function does not take.",
            hint="leave out cache_implementation.",
        )
    if injection is None:
        return plain_attention(module, query, key, value, attention_mask, scores), None
    if injection.backend is not None:  # the engine keeps all keys and values
        return injection.backend.attend(injection.layer_of[module], query, key, value, scores), None
    observer = attention_observer.get()
    if injection.packing is not None:  # training: one row, many groups
        site, index = layer = injection.layer_of[module]
        observe = None if observer is None else functools.partial(observer, layer)
        prefixes = [layers[site][index] if site in layers else None for layers in injection.layers_by_prefix]
        return packed_attention(injection.packing, site, prefixes, query, key, value, scores, observe), None
    prefixed = injection.prepend(module, query, key, value, attention_mask, scores)
    if observer is not None and module in injection.layer_of:
        observer(injection.layer_of[module], prefixed[0].shape[2] - key.shape[2], query, *prefixed, 0)
    return plain_attention(module, query, *prefixed), None


def _window(module: nn.Module, arguments: Mapping[str, Any]) -> int | None:
    """How many of the nearest positions a layer sees; None: all.

    Some models have it in their mask alone, in whose place packed rows and the engine put their own.
    """
    if "sliding_window" in arguments:
        window: int | None = arguments["sliding_window"]
        return window
    named = module.config if type(module).__name__ == "PhimoeAttention" else module
    return getattr(named, "sliding_window", None) or None
