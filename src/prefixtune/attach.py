"""Put prefixes in front of a frozen model's attention: the only place that touches transformers' internals.

Two routes, which must agree (see `tests/equivalence`):

- *injected*: one attention function in transformers' registry takes the prefix as an argument of the call, puts each
  row's own keys and values in front and widens the mask. Gradients flow through it, under checkpointing too.
- *prefilled*: for generation, the prefix is a cache that is already filled, so that a decode step costs no more.

The model stays untouched: no class is swapped, no forward copied, nothing cached on a module; two prefixes can be used
at once. Knows nothing of tokenizers, files, artifacts or training.

Positions: the text of a row starts at position P of that row's prefix. Sliding windows count text positions only: the
prefix stays visible to every token.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from prefixtune.errors import BackboneError, ConfigError
from prefixtune.prefix import Geometry, KeyValue, LayerShape, Prefix, describe

__all__ = [
    "ATTENTION",
    "Group",
    "Layout",
    "Packing",
    "cache_argument",
    "check_fits",
    "checkpointing",
    "forward",
    "prefilled_cache",
    "probe",
    "record",
    "visible_slots",
]

ATTENTION = "prefixtune"
"""The name of the attention function in transformers' registry."""

_SMALL_GROUP = 512
"""Below this many positions, plain matrix products beat the CPU's fused bf16 kernel (2.7 times at 150 positions)."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where a model's attention layers are, as seen by running it.

    Attributes:
        geometry: Per site, every layer's KV heads and head sizes.
        places: Attention module -> its (site, layer number).
    """

    geometry: Geometry
    places: Mapping[nn.Module, tuple[str, int]]


@dataclass(frozen=True)
class Group:
    """One source and its targets, side by side in a packed row.

    Every target sees the source and itself, never another target; the source sees itself alone.

    Attributes:
        start: Where the source begins in the row.
        source_length: Positions of the shared source; may be 0.
        target_lengths: Positions of each target.
    """

    start: int
    source_length: int
    target_lengths: tuple[int, ...]

    @property
    def stop(self) -> int:
        """Where the last target ends in the row."""
        return self.start + self.source_length + sum(self.target_lengths)

    def positions(self) -> Int[Tensor, " N"]:
        """Text positions: each target goes on where the source ends."""
        targets = [torch.arange(length) + self.source_length for length in self.target_lengths]
        return torch.cat([torch.arange(self.source_length), *targets])

    def mask(self, window: int | None = None) -> Bool[Tensor, "N N"]:
        """Which position (row) sees which (column).

        Args:
            window: Only the nearest `window` text positions are visible; None: all.
        """
        lengths = torch.tensor([self.source_length, *self.target_lengths])
        part = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        seen = (part[None, :] == 0) | (part[None, :] == part[:, None])
        seen = seen.tril()
        if window is not None:
            position = self.positions()
            seen &= position[:, None] - position[None, :] < window
        return seen


@dataclass(frozen=True)
class Packing:
    """How the positions of one packed row see each other: group by group, and nothing across groups."""

    groups: tuple[Group, ...]
    _bias: dict[tuple[Any, ...], list[Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def positions(self) -> Int[Tensor, "1 T"]:
        """Text positions of the row, without the prefix's shift."""
        return torch.cat([group.positions() for group in self.groups])[None]

    def bias(self, prefix_length: int, window: int | None, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Per group, an additive mask (N, P + N); made once per row, not once per layer."""
        key = (prefix_length, window, dtype, device)
        if key not in self._bias:
            self._bias[key] = [
                torch.zeros(group.stop - group.start, prefix_length + group.stop - group.start, dtype=dtype)
                .masked_fill_(~nn.functional.pad(group.mask(window), (prefix_length, 0), value=True), float("-inf"))
                .to(device)
                for group in self.groups
            ]
        return self._bias[key]


@dataclass(frozen=True, eq=False)
class Injection:
    """What travels with one call down to every attention layer.

    Attributes:
        places: The model's layout.
        layers: Site -> per layer, keys and values of shape (B or 1, H, P, D).
        visible: Site -> which prefix slots are real, (B, P); None: all are.
        packing: The structure of a packed row; None: an ordinary batch.
        recorded: When set, every layer's own keys and values are noted here.
    """

    places: Mapping[nn.Module, tuple[str, int]]
    layers: Mapping[str, Sequence[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    visible: Mapping[str, Tensor | None] = field(default_factory=dict)
    packing: Packing | None = None
    recorded: list[tuple[nn.Module, Tensor, Tensor]] | None = None


_probed: contextvars.ContextVar[list[tuple[nn.Module, bool]] | None] = contextvars.ContextVar("probed", default=None)
_slots: contextvars.ContextVar[int] = contextvars.ContextVar("slots", default=0)


# --- the attention function and its mask -----------------------------------------------------------------------------


def _register() -> None:
    """Add this project's attention function and mask to transformers' registries; once, when first needed."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if ATTENTION not in AttentionInterface():
        AttentionInterface.register(ATTENTION, attend)
        AttentionMaskInterface.register(ATTENTION, make_mask)


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


def attend(
    module: nn.Module,
    query: Float[Tensor, "B Hq T Dk"],
    key: Float[Tensor, "B H S Dk"],
    value: Float[Tensor, "B H S Dv"],
    attention_mask: Tensor | None,
    *,
    prefix_injection: Injection | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B T Hq Dv"], None]:
    """Attention with the row's prefix in front: K = [P_key; K], V = [P_val; V] (Li & Liang 2021, eq. 3).

    Registered in transformers; called by every attention layer. Without an injection it is plain
    scaled-dot-product attention.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    probed = _probed.get()
    if probed is not None:
        probed.append((module, prefix_injection is not None))
    for unknown in ("softcap", "s_aux"):
        if kwargs.get(unknown) is not None:
            raise BackboneError(
                f"{type(module).__name__} attends with {unknown!r}, which this attention function does not compute.",
                hint="choose another backbone.",
            )
    if prefix_injection is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out, None
    if prefix_injection.recorded is not None:
        prefix_injection.recorded.append((module, key, value))
    site, number = prefix_injection.places[module] if prefix_injection.layers else ("", 0)
    if prefix_injection.packing is not None:
        front = prefix_injection.layers[site][number] if site in prefix_injection.layers else None
        return _attend_packed(prefix_injection.packing, front, query, key, value, **kwargs), None
    if site in prefix_injection.layers:
        front_key, front_value = prefix_injection.layers[site][number]
        batch, length, queries = query.shape[0], front_key.shape[2], query.shape[2]
        if attention_mask is None and kwargs.get("is_causal", getattr(module, "is_causal", True)) and queries > 1:
            attention_mask = query.new_ones(queries, key.shape[2], dtype=torch.bool).tril(key.shape[2] - queries)
            attention_mask = attention_mask[None, None]
        key = torch.cat([front_key.to(key.dtype).expand(batch, -1, -1, -1), key], dim=2)
        value = torch.cat([front_value.to(value.dtype).expand(batch, -1, -1, -1), value], dim=2)
        attention_mask = extend_mask(attention_mask, prefix_injection.visible.get(site), length, key, queries)
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return out, None


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


def _attend_packed(
    packing: Packing,
    front: tuple[Tensor, Tensor] | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> Float[Tensor, "1 T Hq Dv"]:
    """Attention of a packed row, group by group, so that nothing is computed across groups."""
    if kwargs.get("position_bias") is not None:
        raise BackboneError("a packed row cannot carry a relative position bias.", hint="use padded batches.")
    heads, kv_heads = query.shape[1], key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    length = 0 if front is None else front[0].shape[2]
    biases = packing.bias(length, sliding_window, query.dtype, query.device)
    # `split` and `squeeze`, not slices and indices: their backward passes write each gradient once.
    sizes = [group.stop - group.start for group in packing.groups]
    parts = zip(biases, query.split(sizes, dim=2), key.split(sizes, dim=2), value.split(sizes, dim=2), strict=True)
    outputs = []
    for bias, group_query, group_key, group_value in parts:
        positions = group_query.shape[2]
        if front is not None:
            group_key = torch.cat([front[0].to(key.dtype), group_key], dim=2)
            group_value = torch.cat([front[1].to(value.dtype), group_value], dim=2)
        # Query heads that share a KV head stand side by side as rows, so that keys are never repeated.
        rows = group_query.reshape(1, kv_heads, -1, query.shape[-1])
        bias = bias.repeat(heads // kv_heads, 1)
        if query.dtype != torch.float32 and query.device.type == "cpu" and positions <= _SMALL_GROUP:
            # Scores and softmax in float32, as the fused kernel does: rounded scores would blur the gradient.
            wide = rows.squeeze(0).float(), group_key.squeeze(0).float().transpose(1, 2)
            scores = torch.baddbmm(bias.float(), *wide, alpha=scale)
            out = torch.bmm(scores.softmax(-1).to(query.dtype), group_value.squeeze(0))
        else:
            out = nn.functional.scaled_dot_product_attention(rows, group_key, group_value, attn_mask=bias, scale=scale)
        outputs.append(out.reshape(heads, positions, -1))
    return torch.cat(outputs, dim=1).transpose(0, 1).unsqueeze(0)


# --- looking at a model ----------------------------------------------------------------------------------------------


@torch.no_grad()
def probe(model: Any) -> Layout:
    """Choose this project's attention function for a model and find its layers by running two tokens through it.

    Raises:
        BackboneError: The model attends through code of its own, in some or all layers, or drops the argument that
            carries the prefix.
    """
    _register()
    kind = f"{type(model).__name__} (model type {getattr(model.config, 'model_type', '?')!r})"
    hint = "use a model whose attention goes through transformers' AttentionInterface, such as LLaMA, Qwen or GPT-2."
    try:
        model.set_attn_implementation(ATTENTION)
    except (ValueError, ImportError) as error:
        raise BackboneError(f"{kind} cannot take another attention function: {error}", hint=hint) from error
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    recorded: list[tuple[nn.Module, Tensor, Tensor]] = []
    seen: list[tuple[nn.Module, bool]] = []
    token = _probed.set(seen)
    try:
        model(input_ids=ids, use_cache=False, prefix_injection=Injection({}, recorded=recorded))
    except TypeError as error:
        raise BackboneError(f"{kind} does not pass arguments on to its attention: {error}", hint=hint) from error
    finally:
        _probed.reset(token)
    expected = model.config.get_text_config(decoder=True).num_hidden_layers
    if len(seen) != expected:
        raise BackboneError(
            f"{kind} has {expected} layers, but {len(seen)} of them attend through transformers' registry: "
            "a prefix would not reach the others.",
            hint=hint,
        )
    if not all(carried for _, carried in seen):
        raise BackboneError(
            f"{kind} drops the argument that carries the prefix on the way to its attention.", hint=hint
        )
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise BackboneError(f"{kind} takes no position_ids, so that its text cannot start at position P.", hint=hint)
    text = model.config.get_text_config(decoder=True)
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        raise BackboneError(f"{kind} attends within chunks, whose borders a prefix would move.", hint=hint)
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(input_ids=ids, use_cache=True, **{cache_argument(model): cache})
    for layer, (_, key, value) in zip(cache.layers, recorded, strict=True):
        if layer.keys.shape != key.shape or layer.values.shape != value.shape:
            raise BackboneError(f"{kind} does not cache the keys and values that it attends to.", hint=hint)
    places = {module: ("decoder", number) for number, (module, _, _) in enumerate(recorded)}
    shapes = tuple(LayerShape(int(k.shape[1]), int(k.shape[3]), int(v.shape[3])) for _, k, v in recorded)
    return Layout({"decoder": shapes}, places)


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
    **kwargs: Any,
) -> Any:
    """Run the model with prefixes in front; gradients reach the prefixes.

    Args:
        model: The frozen model, probed before.
        layout: What `probe` found.
        input_ids: A batch, padded on either side; or one packed row.
        attention_mask: (B, T), nonzero where a token is real; None: all are. Not with `packing`.
        prefixes: One for all rows, or one per row, of any lengths; None: no prefix (in a list: for that row).
        packing: The structure of a packed row (B = 1).
        **kwargs: For the model, such as `logits_to_keep`.

    Returns:
        The model's output; its logits are (B, T, vocabulary), the prefix has none.

    Raises:
        ConfigError: The counts of rows and prefixes differ, or a packed row comes with a mask or several prefixes.
        BackboneError: A prefix does not fit the model.
    """
    rows = [prefixes] if prefixes is None or isinstance(prefixes, Prefix) else list(prefixes)
    batch = input_ids.shape[0]
    if len(rows) not in (1, batch):
        raise ConfigError(
            f"{len(rows)} prefixes for {batch} rows.", hint="give one for all rows, or one (or None) per row."
        )
    if packing is not None and (attention_mask is not None or len(rows) > 1 or batch > 1):
        raise ConfigError("a packed row stands alone, without a mask, with one prefix.", hint="use a padded batch.")
    for prefix in rows:
        if prefix is not None:
            check_fits(prefix, layout.geometry, type(model).__name__)
    # In float32 until a layer casts it: so the gradients of a row's groups gather in float32 too.
    made = stack(rows, layout.geometry, torch.float32, model.device)
    injection = Injection(layout.places, made.layers, made.visible, packing)
    shift = torch.tensor([0 if prefix is None else prefix.length() for prefix in rows], device=input_ids.device)[
        :, None
    ]
    mask: Tensor | None
    if packing is not None:
        position_ids = packing.positions().to(input_ids.device) + shift
        # A ready-made 4-D mask stops transformers from building one; the attention function goes by the packing.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    else:
        mask = attention_mask
        real = torch.ones_like(input_ids) if mask is None else mask.long()
        position_ids = (real.cumsum(-1) - 1).clamp(min=0) + shift
        if mask is None:
            mask = real
    return model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=position_ids,
        use_cache=False,
        prefix_injection=injection,
        **kwargs,
    )


@torch.no_grad()
def record(model: Any, layout: Layout, input_ids: Int[Tensor, "1 T"]) -> Prefix:
    """The keys and values that the model computes for a text, as its attention sees them: a prefix of T positions."""
    recorded: list[tuple[nn.Module, Tensor, Tensor]] = []
    model(input_ids=input_ids, use_cache=False, prefix_injection=Injection(layout.places, recorded=recorded))
    layers: dict[str, list[KeyValue]] = {site: [] for site in layout.geometry}
    for module, key, value in recorded:
        layers[layout.places[module][0]].append((key[0].float().cpu(), value[0].float().cpu()))
    return Prefix({site: tuple(pairs) for site, pairs in layers.items()})


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
    model: Any, layout: Layout, prefixes: Sequence[Prefix | None], *, repeats: int = 1
) -> tuple[Any, Bool[Tensor, "B P"]]:
    """A cache that already holds every row's prefix, shorter ones padded in front.

    Args:
        model: The frozen model.
        layout: What `probe` found.
        prefixes: One per row; None: that row has no prefix.
        repeats: Rows per text, as beam search needs them.

    Returns:
        The cache, and which of its slots are real, one row per text (not repeated).
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    made = stack(prefixes, layout.geometry, model.dtype, model.device)
    cache = DynamicCache(config=model.config)
    # A windowed layer would forget the prefix: keep everything, and let the mask apply the window.
    cache.layers = [DynamicLayer() if getattr(layer, "is_sliding", False) else layer for layer in cache.layers]
    rows = len(prefixes)
    pairs = made.layers.get("decoder", ())
    for number, (key, value) in enumerate(pairs):
        cache.update(
            key.expand(rows, -1, -1, -1).repeat_interleave(repeats, dim=0),
            value.expand(rows, -1, -1, -1).repeat_interleave(repeats, dim=0),
            number,
        )
    longest = pairs[0][0].shape[2] if pairs else 0
    visible = made.visible.get("decoder")
    if visible is None:
        visible = torch.ones(rows, longest, dtype=torch.bool, device=model.device)
    return cache, visible


@contextlib.contextmanager
def visible_slots(count: int) -> Iterator[None]:
    """While the block runs, the first `count` cache slots are prefix slots: no sliding window hides them."""
    token = _slots.set(count)
    try:
        yield
    finally:
        _slots.reset(token)
