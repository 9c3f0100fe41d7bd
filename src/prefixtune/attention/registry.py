"""Registry."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from prefixtune.attention.injection import AttentionCall, Injection, current_injection, recorded_calls, to_rows
from prefixtune.attention.kernels import (
    ScoreOptions,
    call_flex_attention,
    eager_attention,
    packed_attention,
    supports_flex,
)

__all__ = ["ATTENTION", "ATTENTIONS", "register", "visible_slots"]


ATTENTION = "prefixtune"
"""The name of the attention function in transformers' registry."""

ATTENTIONS = {"sdpa": ATTENTION, "eager": f"{ATTENTION}_eager", "flex": f"{ATTENTION}_flex"}
"""What computes the attention, behind the prefix -> its name in the registry."""
num_visible_slots: contextvars.ContextVar[int] = contextvars.ContextVar("slots", default=0)


# --- the attention function and its mask -----------------------------------------------------------------------------


def register() -> None:
    """Add this project's attention function and mask to transformers' registries; once, when first needed."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for kernel, name in ATTENTIONS.items():
        if name not in AttentionInterface():
            AttentionInterface.register(name, attend if name == ATTENTION else functools.partial(attend, kernel=kernel))
            AttentionMaskInterface.register(name, make_mask if name == ATTENTION else make_added_mask)


def make_mask(*args: Any, attention_mask: Tensor | None = None, local_size: int | None = None, **kwargs: Any) -> Any:
    """The mask of scaled-dot-product attention; in a window or chunk, cached prefix slots stay visible."""
    from transformers.masking_utils import sdpa_mask

    slots = num_visible_slots.get()
    if not slots or local_size is None:
        return sdpa_mask(*args, attention_mask=attention_mask, local_size=local_size, **kwargs)
    mask = sdpa_mask(
        *args, attention_mask=attention_mask, local_size=local_size, **{**kwargs, "allow_is_causal_skip": False}
    ).clone()
    mask[..., :slots] = True if attention_mask is None else attention_mask[:, None, None, :slots].bool()
    return mask


def make_added_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """`make_mask` to be added to scores: 0 where visible, very low elsewhere; left out only where all is visible."""
    seen = make_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    if seen is None:
        return None
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def attend(
    module: nn.Module,
    query: Float[Tensor, "B Hq T Dk"],
    key: Float[Tensor, "Bk H S Dk"],
    value: Float[Tensor, "Bk H S Dv"],
    attention_mask: Tensor | None,
    *,
    prefix_injection: Injection | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    kernel: str = "sdpa",
    **kwargs: Any,
) -> tuple[Float[Tensor, "B T Hq Dv"], None]:
    """Attention with the row's prefix in front: K = [P_key; K], V = [P_val; V] (Li & Liang 2021, eq. 3).

    Registered in transformers; called by every attention layer. Without an injection it is plain
    scaled-dot-product attention. A relative position bias (T5) is zero at the prefix; a soft cap (Gemma 2) and sinks
    (`s_aux`, gpt-oss) hold for the prefix as for the text.

    `kernel` computes it: `sdpa` (torch's fused functions, flash among them where the mask allows), `eager` (spelled
    out) or `flex` (torch's flex_attention; what it lacks is spelled out: sinks, and on the CPU gradients).
    """
    injection = prefix_injection if prefix_injection is not None else current_injection.get()
    if query.dtype != value.dtype:
        # Under autocast, rotary embeddings leave queries and keys in float32.
        query, key = query.to(value.dtype), key.to(value.dtype)
    watched = recorded_calls.get()
    if watched is not None:
        own = {"position_bias": position_bias, "softcap": softcap, "s_aux": s_aux, **kwargs}
        extras = frozenset(name for name, given in own.items() if not isinstance(given, bool | str | None))
        carried, weighs = prefix_injection is not None, _weighs(attention_mask)
        watched.append(AttentionCall(module, carried, query.shape[2], key, value, extras, weighs))
    front = None
    if injection is not None:
        if injection.recorded is not None:
            injection.recorded.append((module, key, value))
        front = injection.prefix_kv(module)
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        special = ScoreOptions(scale, position_bias, softcap, s_aux, kernel != "sdpa")
        window = kwargs.get("sliding_window")
        if injection.serving is not None:
            return injection.serving.attend(injection.layer_of[module], query, key, value, special, window), None
        if injection.packing is not None:
            site, fronts = injection.layer_of[module][0], injection.prefix_kv_by_group(module, injection.packing)
            biases = injection.packing.bias(
                site,
                [0 if each is None else each[0].shape[2] for each in fronts],
                window,
                query.dtype,
                query.device,
                infix=injection.infix,
            )
            return packed_attention(injection.packing, site, fronts, query, key, value, special, biases), None
    by_hand = kernel != "sdpa" or softcap is not None or s_aux is not None
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is None and causal and query.shape[2] > 1 and (front is not None or by_hand):
        attention_mask = query.new_ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
        attention_mask = attention_mask.tril(key.shape[2] - query.shape[2])
    if front is not None and injection is not None:
        length, rows = front[0].shape[2], query.shape[0]
        visible = injection.visible.get(injection.layer_of[module][0])
        key = torch.cat([to_rows(front[0], rows).to(key), key], dim=2)
        value = torch.cat([to_rows(front[1], rows).to(value), value], dim=2)
        if visible is not None:
            visible = to_rows(visible, rows).to(key.device)
        attention_mask = extend_mask(attention_mask, visible, length, key, query.shape[2])
        if position_bias is not None:
            position_bias = nn.functional.pad(position_bias, (length, 0))
    if by_hand:
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        special = ScoreOptions(scale, position_bias, softcap, s_aux)
        spelled_out = (
            call_flex_attention if kernel == "flex" and supports_flex(query, key, value, special) else eager_attention
        )
        return spelled_out(query, key, value, attention_mask, special).transpose(1, 2).contiguous(), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, position_bias=position_bias, **kwargs)
    return out, None


def _weighs(mask: Tensor | None) -> bool:
    """Whether a mask holds other numbers than 0 and those that hide."""
    if mask is None or not mask.is_floating_point():
        return False
    return bool(((mask != 0) & (mask > 0.5 * torch.finfo(mask.dtype).min)).any())


def extend_mask(
    mask: Tensor | None, visible: Bool[Tensor, "B P"] | None, prefix_length: int, key: Tensor, queries: int
) -> Tensor | None:
    """Prepend P columns to an attention mask: every token sees the whole prefix of its row, whatever the padding.

    Args:
        mask: (B or 1, 1 or H, T, S), True or 0 where visible, False or -inf elsewhere; None: everything is.
        visible: Which prefix slots of a row are real; None: all.
        prefix_length: P.
        key: The keys with the prefix in front, for shape and device.
        queries: T.
    """
    if mask is None:
        if visible is None:
            return None
        mask = key.new_ones(1, 1, queries, key.shape[2] - prefix_length, dtype=torch.bool)
    columns = visible[:, None, None] if visible is not None else mask.new_ones(1, 1, 1, prefix_length, dtype=torch.bool)
    if mask.dtype != torch.bool:
        columns = torch.zeros_like(columns, dtype=mask.dtype).masked_fill_(~columns, torch.finfo(mask.dtype).min)
    batch = max(mask.shape[0], columns.shape[0])
    columns = columns.expand(batch, mask.shape[1], mask.shape[2], -1)
    return torch.cat([columns, mask.expand(batch, -1, -1, -1)], dim=-1)


@contextlib.contextmanager
def visible_slots(count: int) -> Iterator[None]:
    """While the block runs, the first `count` cache slots are prefix slots: no sliding window hides them."""
    token = num_visible_slots.set(count)
    try:
        yield
    finally:
        num_visible_slots.reset(token)
