"""Put prefixes in front of a frozen model's attention: the only place that touches transformers' internals.

Two routes, which must agree (see `tests/equivalence`):

- *injected*: one attention function in transformers' registry takes the prefix as an argument of the call, puts each
  row's own keys and values in front and widens the mask. Gradients flow through it, under checkpointing too.
- *prefilled*: for generation with decoder-only models, the prefix is a cache that is already filled, so that a decode
  step costs no more.

DeBERTa's attention is outside that registry; hooks, for the length of a call, give it the prefix (see `disentangled`).

The model stays untouched: no class is swapped, no forward copied, nothing cached on a module; two prefixes can be used
at once. Knows nothing of tokenizers, files, artifacts or training.

Positions: a decoder-only model's text starts at position P of its row's prefix; in encoders and encoder-decoders the
text's positions are not shifted, and the prefix carries no relative position bias. Sliding windows count text positions
only: the prefix stays visible to every token.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from prefixtune.disentangled import Front, hooked, is_disentangled
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.packing import Group, Packing
from prefixtune.prefix import Geometry, KeyValue, Prefix, describe

__all__ = [
    "ATTENTION",
    "ATTENTIONS",
    "Call",
    "Group",
    "Injection",
    "Layout",
    "Packing",
    "Serving",
    "Special",
    "activations",
    "attend_by_hand",
    "attend_group",
    "cache_argument",
    "check_fits",
    "checkpointing",
    "cuts_empty_layers",
    "encode",
    "forward",
    "growing_cache",
    "injecting",
    "main_device",
    "prefilled_cache",
    "record",
    "register",
    "relative_bias",
    "serve",
    "setting",
    "stack",
    "visible_slots",
    "watching",
]

ATTENTION = "prefixtune"
"""The name of the attention function in transformers' registry."""

ATTENTIONS = {"sdpa": ATTENTION, "eager": f"{ATTENTION}_eager", "flex": f"{ATTENTION}_flex"}
"""What computes the attention, behind the prefix -> its name in the registry."""

_SMALL_GROUP = 512
"""Below this many positions, plain matrix products beat the CPU's fused bf16 kernel (2.7 times at 150 positions)."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where a model's attention layers are, as seen by running it (see `probe`).

    Attributes:
        geometry: Per site, every layer's KV heads and head sizes.
        places: Attention module -> its (site, layer number); layers that share keys and values share a place.
        kind: `decoder`, `encoder` or `encoder-decoder`.
        packable: Whether rows may be packed: nothing but attention passes between positions, and these can be told.
        carries: Whether an argument of the model's call reaches every attention layer. Where it does not, the prefix
            travels beside the call, and layers cannot be recomputed in the backward pass.
        cache_layers: Where each decoder layer's keys and values lie in the model's cache; None: they cannot be put
            there beforehand, so that generation injects them.
        notes: What a user should know, such as sites that are not available and why.
    """

    geometry: Geometry
    places: Mapping[nn.Module, tuple[str, int]]
    kind: str = "decoder"
    packable: bool = True
    carries: bool = True
    cache_layers: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()


@runtime_checkable
class Serving(Protocol):
    """What keeps the keys and values of many texts, of which a row holds the next tokens (see `serve`)."""

    def attend(
        self,
        place: tuple[str, int],
        query: Float[Tensor, "1 Hq T Dk"],
        key: Float[Tensor, "1 H S Dk"],
        value: Float[Tensor, "1 H S Dv"],
        special: Special,
        window: int | None,
    ) -> Float[Tensor, "1 T Hq Dv"]:
        """Note keys and values (the tokens' own, at `cross` those of sources), and attend to all that is seen."""


@dataclass(frozen=True, eq=False)
class Injection:
    """What travels with one call down to every attention layer.

    Attributes:
        places: The model's layout.
        layers: Site -> per layer, keys and values of shape (B or 1, H, P, D).
        visible: Site -> which prefix slots are real, (B, P); None: all are.
        packing: The structure of a packed row; None: an ordinary batch.
        several: In a packed row whose groups have prefixes of their own: for each prefix what `layers` is for one.
        infix: In a packed row, the sources do not see the prefix, only the targets do.
        recorded: When set, every layer's own keys and values are noted here.
        serving: When set, it keeps all keys and values itself, the prefixes' too, and computes the attention.
    """

    places: Mapping[nn.Module, tuple[str, int]]
    layers: Mapping[str, Sequence[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    visible: Mapping[str, Tensor | None] = field(default_factory=dict)
    packing: Packing | None = None
    several: Sequence[Mapping[str, Sequence[tuple[Tensor, Tensor]]]] = ()
    infix: bool = False
    recorded: list[tuple[nn.Module, Tensor, Tensor]] | None = None
    serving: Serving | None = None

    def front(self, module: nn.Module) -> tuple[Tensor, Tensor] | None:
        """The keys and values that stand in front at an attention layer."""
        site, number = self.places.get(module, ("", 0))
        return self.layers[site][number] if site in self.layers else None

    def fronts(self, module: nn.Module, packing: Packing) -> list[tuple[Tensor, Tensor] | None]:
        """The keys and values that stand in front of each group of a packed row at an attention layer."""
        if packing.owners is None:
            return [self.front(module)] * len(packing.groups)
        site, number = self.places.get(module, ("", 0))
        each = [layers[site][number] if site in layers else None for layers in self.several]
        return [each[owner] for owner in packing.owners]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the attention function, as `watching` sees it.

    Attributes:
        module: The attention layer.
        carried: Whether the argument that holds the prefix came along.
        queries: How many positions look.
        key: What they look at.
        value: What they get.
        extras: Names of the other arguments that held a number, a tensor or the like.
        weighs: Whether the mask adds to scores, beyond hiding what may not be seen.
    """

    module: nn.Module
    carried: bool
    queries: int
    key: Tensor
    value: Tensor
    extras: frozenset[str]
    weighs: bool = False


_watched: contextvars.ContextVar[list[Call] | None] = contextvars.ContextVar("watched", default=None)
_current: contextvars.ContextVar[Injection | None] = contextvars.ContextVar("current", default=None)
_slots: contextvars.ContextVar[int] = contextvars.ContextVar("slots", default=0)
_told: contextvars.ContextVar[Mapping[str, Tensor]] = contextvars.ContextVar("told")


@contextlib.contextmanager
def watching(model: nn.Module | None = None) -> Iterator[list[Call]]:
    """While the block runs, every call of the attention function is noted in the list that it yields.

    Args:
        model: Note the calls of its disentangled attention too, which has no place in a layout yet.
    """
    calls: list[Call] = []
    token = _watched.set(calls)
    none = Injection({})
    inside = _current.set(none) if model is not None else None
    try:
        with _disentangled([] if model is None else model.modules(), none):
            yield calls
    finally:
        _watched.reset(token)
        if inside is not None:
            _current.reset(inside)


@contextlib.contextmanager
def injecting(injection: Injection) -> Iterator[None]:
    """While the block runs, every call of the model has these prefixes in front.

    For generation, whose loop hands no argument of ours on. An argument of a call wins over it.
    """
    token = _current.set(injection)
    try:
        with _disentangled(injection.places, injection):
            yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def _disentangled(modules: Iterable[nn.Module], injection: Injection) -> Iterator[None]:
    """While the block runs, layers of disentangled attention have the prefix in front too."""

    def front(module: nn.Module, rows: int) -> Front | None:
        pair = injection.front(module)
        if pair is None:
            return None
        visible = injection.visible.get(injection.places[module][0])
        return _to_rows(pair[0], rows), _to_rows(pair[1], rows), None if visible is None else _to_rows(visible, rows)

    def seen(module: nn.Module, key: Tensor, value: Tensor) -> None:
        watched = _watched.get()
        if watched is not None:
            watched.append(Call(module, False, key.shape[2], key, value, frozenset()))
        if injection.recorded is not None:
            injection.recorded.append((module, key, value))

    with contextlib.ExitStack() as stack:
        for module in modules:
            if is_disentangled(module):
                stack.enter_context(hooked(module, front, seen, lambda: _current.get() is injection))
        yield


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

    slots = _slots.get()
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
    injection = prefix_injection if prefix_injection is not None else _current.get()
    if query.dtype != value.dtype:
        # Under autocast, rotary embeddings leave queries and keys in float32.
        query, key = query.to(value.dtype), key.to(value.dtype)
    watched = _watched.get()
    if watched is not None:
        own = {"position_bias": position_bias, "softcap": softcap, "s_aux": s_aux, **kwargs}
        extras = frozenset(name for name, given in own.items() if not isinstance(given, bool | str | None))
        carried, weighs = prefix_injection is not None, _weighs(attention_mask)
        watched.append(Call(module, carried, query.shape[2], key, value, extras, weighs))
    front = None
    if injection is not None:
        if injection.recorded is not None:
            injection.recorded.append((module, key, value))
        front = injection.front(module)
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        special = Special(scale, position_bias, softcap, s_aux, kernel != "sdpa")
        window = kwargs.get("sliding_window")
        if injection.serving is not None:
            return injection.serving.attend(injection.places[module], query, key, value, special, window), None
        if injection.packing is not None:
            site, fronts = injection.places[module][0], injection.fronts(module, injection.packing)
            biases = injection.packing.bias(
                site,
                [0 if each is None else each[0].shape[2] for each in fronts],
                window,
                query.dtype,
                query.device,
                infix=injection.infix,
            )
            return _attend_packed(injection.packing, site, fronts, query, key, value, special, biases), None
    by_hand = kernel != "sdpa" or softcap is not None or s_aux is not None
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is None and causal and query.shape[2] > 1 and (front is not None or by_hand):
        attention_mask = query.new_ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
        attention_mask = attention_mask.tril(key.shape[2] - query.shape[2])
    if front is not None and injection is not None:
        length, rows = front[0].shape[2], query.shape[0]
        visible = injection.visible.get(injection.places[module][0])
        key = torch.cat([_to_rows(front[0], rows).to(key), key], dim=2)
        value = torch.cat([_to_rows(front[1], rows).to(value), value], dim=2)
        if visible is not None:
            visible = _to_rows(visible, rows).to(key.device)
        attention_mask = extend_mask(attention_mask, visible, length, key, query.shape[2])
        if position_bias is not None:
            position_bias = nn.functional.pad(position_bias, (length, 0))
    if by_hand:
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        special = Special(scale, position_bias, softcap, s_aux)
        spelled_out = _attend_by_flex if kernel == "flex" and _flexible(query, key, value, special) else attend_by_hand
        return spelled_out(query, key, value, attention_mask, special).transpose(1, 2).contiguous(), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, position_bias=position_bias, **kwargs)
    return out, None


def _weighs(mask: Tensor | None) -> bool:
    """Whether a mask holds other numbers than 0 and those that hide."""
    if mask is None or not mask.is_floating_point():
        return False
    return bool(((mask != 0) & (mask > 0.5 * torch.finfo(mask.dtype).min)).any())


def _to_rows(given: Tensor, rows: int) -> Tensor:
    """One entry for all rows, one per row, or one per text whose beams are rows side by side."""
    if given.shape[0] == 1:
        return given.expand(rows, *given.shape[1:])
    return given if given.shape[0] == rows else given.repeat_interleave(rows // given.shape[0], dim=0)


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


@dataclass(frozen=True, eq=False)
class Special:
    """How scores are made beyond the product of queries and keys.

    Attributes:
        scale: Multiplies the scores.
        position_bias: (1, Hq, T, S), added to them; None: nothing.
        softcap: They are squeezed into (-softcap, softcap); None: not.
        sinks: (Hq,), one more score per query that draws weight and gives no value; None: not there.
        spelled_out: Compute it by hand even where a fused function could.
    """

    scale: float
    position_bias: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    spelled_out: bool = False


def attend_by_hand(
    query: Float[Tensor, "B Hq T Dk"],
    key: Float[Tensor, "B H S Dk"],
    value: Float[Tensor, "B H S Dv"],
    mask: Tensor | None,
    special: Special,
) -> Float[Tensor, "B Hq T Dv"]:
    """Attention spelled out, for what torch's fused function does not compute."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = (query @ key.transpose(2, 3)).float() * special.scale
    if special.softcap is not None:
        scores = torch.tanh(scores / special.softcap) * special.softcap
    if special.position_bias is not None:
        scores = scores + special.position_bias
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if special.sinks is not None:
        sinks = special.sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1].to(value.dtype) @ value
    return scores.softmax(-1).to(value.dtype) @ value


def _flexible(query: Tensor, key: Tensor, value: Tensor, special: Special) -> bool:
    """Whether flex_attention computes it: it has no sinks, and on the CPU no gradients."""
    learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    return special.sinks is None and not (learning and query.device.type == "cpu")


def _attend_by_flex(
    query: Float[Tensor, "B Hq T Dk"],
    key: Float[Tensor, "B H S Dk"],
    value: Float[Tensor, "B H S Dv"],
    mask: Tensor | None,
    special: Special,
) -> Float[Tensor, "B Hq T Dv"]:
    """Attention by torch's flex_attention: the same scores as `attend_by_hand`."""
    shape = (*query.shape[:3], key.shape[2])
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    parts = [part for part in (special.position_bias, mask) if part is not None]
    added = sum(parts[1:], parts[0]).expand(shape) if parts else query.new_zeros(()).expand(shape)
    cap = special.softcap
    # Lambdas, since nothing may wrap what torch is to trace.
    if cap is None:
        score = lambda given, row, head, place, seen: given + added[row, head, place, seen]  # noqa: E731
    else:
        score = lambda given, row, head, place, seen: torch.tanh(given / cap) * cap + added[row, head, place, seen]  # noqa: E731
    out: Tensor = _flex(query.device.type)(
        query, key, value, score_mod=score, scale=special.scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out


@functools.cache
def _flex(device_type: str) -> Callable[..., Any]:
    """Torch's flex_attention; compiled on accelerators, which is what it is for."""
    from torch.nn.attention.flex_attention import flex_attention

    if device_type != "cpu":
        compiled: Callable[..., Any] = torch.compile(flex_attention)
        return compiled

    def plain(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            # That it is not compiled is meant: compiling for a CPU takes minutes and gains nothing.
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            return flex_attention(*args, **kwargs)

    return plain


def _attend_packed(
    packing: Packing,
    site: str,
    fronts: Sequence[tuple[Tensor, Tensor] | None],
    query: Float[Tensor, "1 Hq T Dk"],
    key: Float[Tensor, "1 H S Dk"],
    value: Float[Tensor, "1 H S Dv"],
    special: Special,
    biases: Sequence[Tensor | None],
) -> Float[Tensor, "1 T Hq Dv"]:
    """Attention of a packed row, group by group, so that nothing is computed across groups."""
    # `split` and `squeeze`, not slices and indices: their backward passes write each gradient once.
    ours, theirs = packing.sizes(site)
    split = query.split(ours, dim=2), key.split(theirs, dim=2), value.split(theirs, dim=2)
    outputs = []
    row, column = 0, 0
    for front, bias, group_query, group_key, group_value in zip(fronts, biases, *split, strict=True):
        length = 0 if front is None else front[0].shape[2]
        queries, keys = group_query.shape[2], group_key.shape[2]
        if front is not None:
            group_key = torch.cat([front[0].to(key), group_key], dim=2)
            group_value = torch.cat([front[1].to(value), group_value], dim=2)
        relative = special.position_bias
        if relative is not None:
            relative = nn.functional.pad(relative[..., row : row + queries, column : column + keys], (length, 0))
        row, column = row + queries, column + keys
        if special.softcap is not None or special.sinks is not None or special.spelled_out:
            part = Special(special.scale, relative, special.softcap, special.sinks)
            mask = None if bias is None else bias[None, None]
            outputs.append(attend_by_hand(group_query, group_key, group_value, mask, part)[0])
        else:
            outputs.append(attend_group(group_query, group_key, group_value, bias, relative, special.scale))
    # Some models look at it as one row, which needs it in this order in memory.
    return torch.cat(outputs, dim=1).transpose(0, 1).unsqueeze(0).contiguous()


def attend_group(
    query: Float[Tensor, "1 Hq T Dk"],
    key: Float[Tensor, "1 H S Dk"],
    value: Float[Tensor, "1 H S Dv"],
    bias: Float[Tensor, "T S"] | None,
    relative: Float[Tensor, "1 Hq T S"] | None,
    scale: float,
) -> Float[Tensor, "Hq T Dv"]:
    """Attention of one group."""
    heads, queries, kv_heads = query.shape[1], query.shape[2], key.shape[1]
    # Query heads that share a KV head stand side by side as rows, so that keys are never repeated.
    rows = query.reshape(1, kv_heads, -1, query.shape[-1])
    if relative is not None:
        relative = relative.to(query.dtype) if bias is None else relative.to(query.dtype) + bias
        bias = relative.reshape(kv_heads, -1, key.shape[2])
    elif bias is not None:
        bias = bias.repeat(heads // kv_heads, 1)
    small = queries <= _SMALL_GROUP and query.dtype != torch.float32 and query.device.type == "cpu"
    if small:
        # Scores and softmax in float32, as the fused kernel does: rounded scores would blur the gradient.
        wide = rows.squeeze(0).float(), key.squeeze(0).float().transpose(1, 2)
        scores = torch.bmm(*wide) * scale if bias is None else torch.baddbmm(bias.float(), *wide, alpha=scale)
        out = torch.bmm(scores.softmax(-1).to(query.dtype), value.squeeze(0))
    else:
        out = nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=bias, scale=scale)
    return out.reshape(heads, queries, -1)


# --- what a model is like ---------------------------------------------------------------------------------------------


def check_fits(prefix: Prefix, geometry: Geometry, name: str) -> None:
    """Refuse a prefix whose shapes are not the backbone's.

    Raises:
        BackboneError: Sites, layers, KV heads or head sizes differ; names both sides.
    """
    for site, shapes in prefix.geometry.items():
        if geometry.get(site) != shapes:
            raise BackboneError(
                f"the prefix has {describe(prefix.geometry)}, but {name!r} has {describe(geometry)}.",
                hint="load the backbone that the prefix was trained for; `prefixtune inspect FILE` names it.",
            )


def main_device(model: Any) -> torch.device:
    """Where a model's inputs go: the device of its embeddings, also when they are kept elsewhere between calls."""
    embeddings = model.get_input_embeddings()
    hook = getattr(embeddings, "_hf_hook", None)
    where = getattr(hook, "execution_device", None)
    if where is not None:
        return torch.device(where)
    device: torch.device = embeddings.weight.device
    return device


def setting(config: Any, name: str) -> Any:
    """A setting of a configuration, or None; where it differs by layer, a list of all of them."""
    try:
        return getattr(config, name, None)
    except Exception:
        # Such a configuration refuses to name one for all layers.
        layers = config.per_layer_config
        return [getattr(one, name, None) for one in (layers.values() if isinstance(layers, Mapping) else layers)]


def cache_argument(model: Any) -> str:
    """The name under which a model's forward takes its cache (transformers 5.24 renamed it)."""
    parameters = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


# --- the injected route ----------------------------------------------------------------------------------------------


def stack(prefixes: Sequence[Prefix | None], geometry: Geometry, dtype: torch.dtype, device: Any) -> Injection:
    """Bring the rows' prefixes to one length per site, shorter ones padded in front with hidden slots.

    Args:
        prefixes: One per row, or a single one for all rows; None: that row has no prefix.
        geometry: The backbone's.
        dtype: Of the result.
        device: The backbone's.
    """
    layers: dict[str, list[tuple[Tensor, Tensor]]] = {}
    visible: dict[str, Tensor | None] = {}
    for site, shapes in geometry.items():
        lengths = [0 if prefix is None else prefix.length(site) for prefix in prefixes]
        longest = max(lengths)
        if longest == 0:
            continue
        rows: list[list[KeyValue]] = []
        for prefix, length in zip(prefixes, lengths, strict=True):
            if prefix is None or length == 0:
                rows.append(
                    [
                        (
                            torch.zeros(s.num_kv_heads, longest, s.key_dim, dtype=dtype, device=device),
                            torch.zeros(s.num_kv_heads, longest, s.value_dim, dtype=dtype, device=device),
                        )
                        for s in shapes
                    ]
                )
                continue
            front = (0, 0, longest - length, 0)
            rows.append(
                [
                    (
                        nn.functional.pad(k.to(device, dtype), front) if length < longest else k.to(device, dtype),
                        nn.functional.pad(v.to(device, dtype), front) if length < longest else v.to(device, dtype),
                    )
                    for k, v in prefix.layers[site]
                ]
            )
        layers[site] = [
            (torch.stack([row[n][0] for row in rows]), torch.stack([row[n][1] for row in rows]))
            for n in range(len(shapes))
        ]
        all_real = all(length == longest for length in lengths)
        slots = torch.arange(longest, device=device)
        visible[site] = None if all_real else slots[None, :] >= longest - torch.tensor(lengths, device=device)[:, None]
    return Injection({}, layers, visible)


def forward(
    model: Any,
    layout: Layout,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Tensor | None = None,
    *,
    prefixes: Prefix | Sequence[Prefix | None] | None = None,
    packing: Packing | None = None,
    decoder_input_ids: Int[Tensor, "R Td"] | None = None,
    decoder_attention_mask: Tensor | None = None,
    source_rows: Int[Tensor, " R"] | None = None,
    **kwargs: Any,
) -> Any:
    """Run the model with prefixes in front; gradients reach the prefixes.

    Args:
        model: The frozen model, probed before.
        layout: What `probe` found.
        input_ids: A batch, padded on either side; or one packed row. For an encoder-decoder, the sources.
        attention_mask: (B, T), nonzero where a token is real; None: all are. Not with `packing`.
        prefixes: One for all rows, or one per row, of any lengths; None: no prefix (in a list: for that row).
        packing: The structure of a packed row (B = 1). Where it names owners, `prefixes` has one for each of them.
        decoder_input_ids: Encoder-decoder only: what the decoder reads.
        decoder_attention_mask: (R, Td), nonzero where one is real.
        source_rows: Which source each of the decoder's rows looks at, where several share one (then with one prefix for
            all); None: each has its own.
        **kwargs: For the model, such as `logits_to_keep`.

    Returns:
        The model's output; its logits are (B, T, vocabulary), the prefix has none.

    Raises:
        ConfigError: The counts of rows and prefixes differ, a packed row comes with a mask or several prefixes, or
            `decoder_input_ids` are missing or given to a model without a decoder of its own.
        BackboneError: A prefix does not fit the model.
    """
    rows = [prefixes] if prefixes is None or isinstance(prefixes, Prefix) else list(prefixes)
    batch = input_ids.shape[0]
    owned = packing is not None and packing.owners is not None
    if packing is not None and owned:
        last = max(packing.owners or (0,))
        if last >= len(rows):
            raise ConfigError(
                f"{len(rows)} prefixes, but a group's owner is {last}.",
                hint="give one prefix for each owner, counted from 0.",
            )
    elif len(rows) not in (1, batch) or (source_rows is not None and len(rows) > 1):
        raise ConfigError(
            f"{len(rows)} prefixes for {batch} rows.", hint="give one for all rows, or one (or None) per row."
        )
    if packing is not None and (attention_mask is not None or (len(rows) > 1 and not owned) or batch > 1):
        raise ConfigError(
            "a packed row stands alone, without a mask, with one prefix, or with owners of its groups.",
            hint="use a padded batch.",
        )
    if (decoder_input_ids is None) == (layout.kind == "encoder-decoder"):
        raise ConfigError(
            f"{type(model).__name__} is of kind {layout.kind!r}: decoder_input_ids go with an encoder-decoder only.",
            hint="give them to an encoder-decoder, and to no other model.",
        )
    if decoder_input_ids is None and (decoder_attention_mask is not None or source_rows is not None):
        raise ConfigError(
            "decoder_attention_mask and source_rows go with decoder_input_ids.", hint="leave them out for this model."
        )
    if packing is not None and layout.kind != "decoder" and not layout.packable:
        raise ConfigError(f"{type(model).__name__} takes no packed rows.", hint="use `collate`, which pads them.")
    for prefix in rows:
        if prefix is not None:
            check_fits(prefix, layout.geometry, type(model).__name__)
    infix = any(prefix is not None and prefix.placement == "infix" for prefix in rows)
    if infix and owned:
        raise ConfigError("an infix stands in a row by itself.", hint="run it without other prefixes.")
    if infix and (packing is None or layout.kind != "decoder"):
        raise ConfigError(
            "an infix stands between source and target, which only a packed row tells apart.",
            hint="use `collate` with a decoder-only model.",
        )
    # In float32 until a layer casts it: so the gradients of a row's groups gather in float32 too.
    place = layout.geometry, torch.float32, main_device(model)
    if owned:
        several = [stack([row], *place).layers for row in rows]
        injection = Injection(layout.places, packing=packing, several=several, infix=infix)
    else:
        made = stack(rows, *place)
        injection = Injection(layout.places, made.layers, made.visible, packing, infix=infix)
    call: dict[str, Any] = {**kwargs, "prefix_injection": injection}
    if layout.kind != "encoder":
        call["use_cache"] = False
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if packing is not None:
        # A ready-made 4-D mask stops transformers from building one; the attention function goes by the packing.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    if layout.kind == "decoder":
        lengths = [0 if prefix is None else prefix.length() for prefix in rows]
        if packing is not None:
            shift = packing.shifts(lengths) * (packing.in_targets() if infix else 1)
            call["position_ids"] = (packing.positions() + shift).to(input_ids.device)
        else:
            shift = torch.tensor(lengths, device=input_ids.device)[:, None]
            call["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0) + shift
    elif packing is None:
        _tell_positions(call, model, mask, decoder_attention_mask)
    beside = contextlib.nullcontext() if layout.carries else injecting(injection)
    packed = {}
    if packing is not None and layout.kind == "encoder-decoder":
        packed = {site: packing.positions(site)[0] for site in ("encoder", "decoder")}
    with beside, _telling(model, layout, packed):
        if layout.kind != "encoder-decoder":
            return model(input_ids=input_ids, attention_mask=mask, **call)
        call["decoder_input_ids"] = decoder_input_ids
        call["decoder_attention_mask"] = mask if packing is not None else decoder_attention_mask
        if source_rows is not None:
            encoder = model.get_encoder()
            encoded = encoder(input_ids=input_ids, attention_mask=mask, prefix_injection=injection, return_dict=True)
            encoded.last_hidden_state = encoded.last_hidden_state[source_rows]
            return model(encoder_outputs=encoded, attention_mask=mask[source_rows], **call)
        return model(input_ids=input_ids, attention_mask=mask, **call)


def serve(
    model: Any,
    layout: Layout,
    input_ids: Int[Tensor, "1 T"],
    position_ids: Int[Tensor, "1 T"],
    serving: Serving,
    logits_to_keep: Int[Tensor, " N"] | None,
    encoded: Float[Tensor, "1 S E"] | None = None,
) -> Float[Tensor, "1 _N V"]:
    """Run a model that writes on the next tokens of many texts, which stand side by side in one row.

    Args:
        model: The frozen model, probed before; its rows can be packed.
        layout: What `probe` found.
        input_ids: The tokens; those of the decoder.
        position_ids: Where each stands in its text, counted from where the backbone's positions start: from the
            prefix's start in a decoder-only model.
        serving: Keeps the texts' keys and values.
        logits_to_keep: At which places of the row logits are wanted; None: at all.
        encoded: Encoder-decoder only: encoded sources (see `encode`), side by side, whose keys and values are to be
            kept; where there are none, any single position.
    """
    injection = Injection(layout.places, serving=serving)
    # A ready-made 4-D mask stops transformers from building one.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    call: dict[str, Any] = {"attention_mask": mask, "use_cache": False, "prefix_injection": injection}
    if logits_to_keep is not None:
        call["logits_to_keep"] = logits_to_keep
    if layout.kind == "encoder-decoder":
        from transformers.modeling_outputs import BaseModelOutput

        call |= {"decoder_input_ids": input_ids, "decoder_attention_mask": mask}
        call["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded)
        # Mixtures of experts look for it.
        call["encoder_outputs"].router_logits = None
    else:
        call |= {"input_ids": input_ids, "position_ids": position_ids}
    beside = contextlib.nullcontext() if layout.carries else injecting(injection)
    with beside, _telling(model, layout, {"decoder": position_ids[0]}):
        logits: Tensor = model(**call).logits
    return logits


def encode(model: Any, layout: Layout, input_ids: Int[Tensor, "1 S"], prefix: Prefix | None) -> Float[Tensor, "1 S E"]:
    """What an encoder-decoder's encoder makes of a source, with the prefix in front at the site `encoder`."""
    made = stack([prefix], layout.geometry, model.dtype, main_device(model))
    injection = Injection(layout.places, made.layers, made.visible)
    with contextlib.nullcontext() if layout.carries else injecting(injection):
        output = model.get_encoder()(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            prefix_injection=injection,
            return_dict=True,
        )
    encoded: Tensor = output.last_hidden_state
    return encoded


def relative_bias(
    model: Any, layout: Layout, length: int, encoded: Float[Tensor, "1 S E"]
) -> dict[int, Float[Tensor, "Hq N"]]:
    """What an encoder-decoder's decoder adds to scores at each distance, from 0 on: by layer, where it adds anything.

    Found by running a row of so many tokens; beyond `relative_attention_max_distance`, where the model's settings name
    one, all distances are alike, so that the row need be no longer.
    """
    farthest = getattr(model.config, "relative_attention_max_distance", None)
    count = length if farthest is None else min(length, farthest + 1)
    noted = _BiasNotes()
    # A row of one token tells whether there is any; where there is none, positions may be few.
    for tokens in (1, count):
        ids = torch.zeros(1, tokens, dtype=torch.long, device=main_device(model))
        serve(model, layout, ids, torch.arange(tokens, device=ids.device)[None], noted, None, encoded)
        if not noted.found:
            break
    return noted.found


class _BiasNotes:
    """Notes position biases as the last token of a row sees them, in place of attending."""

    def __init__(self) -> None:
        self.found: dict[int, Float[Tensor, "Hq N"]] = {}

    def attend(
        self,
        place: tuple[str, int],
        query: Float[Tensor, "1 Hq T Dk"],
        key: Float[Tensor, "1 H S Dk"],
        value: Float[Tensor, "1 H S Dv"],
        special: Special,
        window: int | None,
    ) -> Float[Tensor, "1 T Hq Dv"]:
        """Note the bias; what is returned has the right shape only."""
        if place[0] == "decoder" and special.position_bias is not None:
            self.found[place[1]] = special.position_bias[0, :, -1].flip(-1)
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


def _tell_positions(call: dict[str, Any], model: Any, mask: Tensor, decoder_mask: Tensor | None) -> None:
    """Count positions from a row's first real token on, in models that rotate by position.

    A prefix does not move with a row's padding, as the keys of the text do. Tables of positions are left to the models,
    which count in ways of their own.
    """
    taken = inspect.signature(type(model).forward).parameters
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if "position_ids" in taken and table is None:
        call["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    if "decoder_position_ids" in taken and decoder_mask is not None:
        call["decoder_position_ids"] = (decoder_mask.long().cumsum(-1) - 1).clamp(min=0)


@contextlib.contextmanager
def _telling(model: Any, layout: Layout, positions: Mapping[str, Int[Tensor, " T"]]) -> Iterator[None]:
    """While the block runs, an encoder-decoder's position embeddings are told where the tokens of a row stand, by site.

    Such models take no `position_ids`, but their position embeddings do. Models with a relative bias have none of
    these. Only calls of this context are told; another thread may use the model meanwhile.
    """
    if not positions or layout.kind != "encoder-decoder":
        yield
        return
    device = main_device(model)
    token = _told.set({site: places.to(device) for site, places in positions.items()})
    handles = []
    for site, part in (("encoder", model.get_encoder()), ("decoder", model.get_decoder())):
        embedding = getattr(part, "embed_positions", None)
        if embedding is not None:

            def tell(module: nn.Module, args: Any, given: dict[str, Any] | None = None, *, site: str = site) -> Any:
                told = _told.get({})
                # While torch registers or removes a hook, another thread's call meets it without keyword arguments.
                return None if given is None or site not in told else (args, {**given, "position_ids": told[site]})

            handles.append(embedding.register_forward_pre_hook(tell, with_kwargs=True))
    try:
        yield
    finally:
        _told.reset(token)
        for handle in handles:
            handle.remove()


@torch.no_grad()
def record(model: Any, layout: Layout, input_ids: Int[Tensor, "1 T"]) -> Prefix:
    """The keys and values that the model computes for a text, as its attention sees them: a prefix of T positions.

    An encoder-decoder reads the text on both sides; the site `cross` is what its decoder sees of the encoded text.
    """
    inputs = {"input_ids": input_ids}
    if layout.kind == "encoder-decoder":
        inputs["decoder_input_ids"] = input_ids
    return activations(model, layout, **inputs).to(device="cpu")


def activations(model: Any, layout: Layout, **inputs: Tensor) -> Prefix:
    """The keys and values that the model computes for its inputs (one row), differentiable in them, in float32."""
    recorded: list[tuple[nn.Module, Tensor, Tensor]] = []
    injection = Injection(layout.places, recorded=recorded)
    call: dict[str, Any] = {**inputs, "prefix_injection": injection}
    if layout.kind != "encoder":
        call["use_cache"] = False
    with contextlib.nullcontext() if layout.carries else injecting(injection):
        model(**call)
    found: dict[tuple[str, int], KeyValue] = {}
    for module, key, value in recorded:
        place = layout.places.get(module)
        if place is not None:
            found.setdefault(place, (key[0].float(), value[0].float()))
    return Prefix({site: tuple(found[site, n] for n in range(len(shapes))) for site, shapes in layout.geometry.items()})


@contextlib.contextmanager
def checkpointing(model: Any, enabled: bool = True) -> Iterator[None]:
    """Recompute layers in the backward pass instead of keeping their activations, while the block runs.

    transformers recomputes only layers that are marked as training, so the layers (not what is inside them) are
    marked; with the dropout silenced at load this changes no number.

    Raises:
        BackboneError: The model does not support it.
    """
    if not enabled:
        yield
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise BackboneError(
            f"{type(model).__name__} does not support gradient checkpointing.", hint="train without it."
        )
    # transformers 5.24 renamed the switch.
    names = ("activation_checkpointing", "gradient_checkpointing")
    name = next(name for name in names if hasattr(model, f"{name}_enable"))
    getattr(model, f"{name}_enable")({"use_reentrant": False})
    # It also hooks the embeddings so that their output takes gradients, and forgets the hooks: not needed here.
    model.disable_input_require_grads()
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()
        model.eval()


# --- the prefilled route ---------------------------------------------------------------------------------------------


def prefilled_cache(
    model: Any, layout: Layout, prefixes: Sequence[Prefix | None], *, repeats: int = 1, static_length: int | None = None
) -> tuple[Any, Bool[Tensor, "B P"]]:
    """A cache that already holds every row's prefix, shorter ones padded in front.

    Args:
        model: The frozen model.
        layout: What `probe` found.
        prefixes: One per row; None: that row has no prefix.
        repeats: Rows per text, as beam search needs them.
        static_length: Room for as many positions, the prefix's included, in buffers that are written in place; None: a
            cache that grows.

    Returns:
        The cache, and which of its slots are real, one row per text (not repeated).
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    made = stack(prefixes, layout.geometry, model.dtype, main_device(model))
    if static_length is None:
        cache = growing_cache(model)
    else:
        cache = StaticCache(config=model.config, max_cache_len=static_length)
        cache.layers = [
            StaticLayer(static_length) if getattr(layer, "is_sliding", False) else layer for layer in cache.layers
        ]
    rows = len(prefixes)
    pairs = made.layers.get("decoder", ())
    for number, (key, value) in zip(layout.cache_layers or (), pairs, strict=bool(pairs)):
        cache.update(
            key.expand(rows, -1, -1, -1).repeat_interleave(repeats, dim=0),
            value.expand(rows, -1, -1, -1).repeat_interleave(repeats, dim=0),
            number,
        )
    longest = pairs[0][0].shape[2] if pairs else 0
    visible = made.visible.get("decoder")
    if visible is None:
        visible = torch.ones(rows, longest, dtype=torch.bool, device=main_device(model))
    return cache, visible


def growing_cache(model: Any) -> Any:
    """An empty cache that forgets nothing: a windowed layer's own would forget the prefix, and cannot be cut back.

    The mask applies the window.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=model.config)
    cache.layers = [DynamicLayer() if getattr(layer, "is_sliding", False) else layer for layer in cache.layers]
    return cache


@functools.cache
def cuts_empty_layers() -> bool:
    """Whether transformers can shorten a cache of which some layers were never filled; 5.20 cannot."""
    from transformers.cache_utils import DynamicLayer

    try:
        DynamicLayer().crop(-1)
    except (TypeError, AttributeError):
        return False
    return True


@contextlib.contextmanager
def visible_slots(count: int) -> Iterator[None]:
    """While the block runs, the first `count` cache slots are prefix slots: no sliding window hides them."""
    token = _slots.set(count)
    try:
        yield
    finally:
        _slots.reset(token)
