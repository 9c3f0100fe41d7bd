"""What a call of the model carries down to its attention layers: the prefixes, and how a row is made up.

Layers in transformers' registry find it in a context variable (see `registry.attend`). Disentangled attention (DeBERTa)
does not go through the registry. Hooks lengthen what such a layer reads by P positions, replace the keys and values
that it projects from these by those of the prefix, and cut the P positions off its output. The layer's own code
computes the attention. A prefix has no position: it is at distance 0 from every token.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prefixtune.attention.kernels import ScoreOptions
from prefixtune.attention.layout import Layout, using
from prefixtune.attention.masks import causal_mask, extend_mask
from prefixtune.attention.packing import Packing
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix


@runtime_checkable
class AttentionBackend(Protocol):
    """What keeps the keys and values of many texts; a row holds their next tokens (see `forward_with_backend`)."""

    def attend(
        self,
        layer: tuple[Site, int],
        query: Float[Tensor, "1 Hq T Dk"],
        key: Float[Tensor, "1 H S Dk"],
        value: Float[Tensor, "1 H S Dv"],
        scores: ScoreOptions,
    ) -> Float[Tensor, "1 T Hq Dv"]:
        """Store keys and values (the tokens' own; at `cross` those of sources), and attend to all that is visible."""


@dataclass(frozen=True, eq=False)
class Injection:
    """What travels with one call down to every attention layer.

    Attributes:
        layer_of: Attention module -> its (site, index), as in the model's layout.
        layers: Site -> per layer, keys and values of shape (B or 1, H, P, D).
        prefix_mask: Site -> which prefix slots are real, (B, P); None: all are.
        packing: The structure of a packed row; None: an ordinary batch.
        layers_by_prefix: In a packed row, what `layers` is in a batch, for each prefix.
        backend: Keeps all keys and values itself, the prefixes' too, and computes the attention; None: nothing does.
    """

    layer_of: Mapping[nn.Module, tuple[Site, int]]
    layers: Mapping[Site, Sequence[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    prefix_mask: Mapping[Site, Tensor | None] = field(default_factory=dict)
    packing: Packing | None = None
    layers_by_prefix: Sequence[Mapping[Site, Sequence[tuple[Tensor, Tensor]]]] = ()
    backend: AttentionBackend | None = None

    def rows_in_front(self, module: nn.Module, rows: int) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Keys and values in front of a batch's rows, (B, H, P, D), and their slots that are real; None: no prefix."""
        site, index = self.layer_of.get(module, (None, 0))
        if site is None or site not in self.layers:
            return None
        key, value = self.layers[site][index]
        mask = self.prefix_mask.get(site)
        return to_rows(key, rows), to_rows(value, rows), None if mask is None else to_rows(mask, rows)

    def prepend(
        self,
        module: nn.Module,
        query: Float[Tensor, "B Hq T Dk"],
        key: Float[Tensor, "Bk H S Dk"],
        value: Float[Tensor, "Bk H S Dv"],
        mask: Tensor | None,
        scores: ScoreOptions,
    ) -> tuple[Tensor, Tensor, Tensor | None, ScoreOptions]:
        """Keys, values, mask and position bias with the prefix of the layer in front; as they were without one.

        On an accelerator, fused causal attention in which all rows see their whole prefix is left without a mask.
        """
        front = self.rows_in_front(module, query.shape[0])
        if front is None:
            return key, value, mask, scores
        prefix_key, prefix_value, prefix_mask = front
        length = prefix_key.shape[2]
        plain = prefix_mask is None and scores.fused and scores.position_bias is None
        unmasked = plain and query.device.type != "cpu" and attention_observer.get() is None
        if mask is None and scores.causal and query.shape[2] > 1 and not unmasked:
            mask = causal_mask(query, key)
        key = torch.cat([prefix_key.to(key), key], dim=2)
        value = torch.cat([prefix_value.to(value), value], dim=2)
        if scores.position_bias is not None:
            scores = replace(scores, position_bias=nn.functional.pad(scores.position_bias, (length, 0)))
        return key, value, extend_mask(mask, prefix_mask, length, key, query.shape[2]), scores


class AttentionCall(NamedTuple):
    """One call of the attention function, as `trace_calls` sees it.

    Attributes:
        module: The attention layer.
        key: The keys that it attends to.
        value: The values that it gets.
        mask: What it was given to hide positions.
        arguments: The other arguments.
    """

    module: nn.Module
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    arguments: Mapping[str, Any] = MappingProxyType({})


traced_calls: contextvars.ContextVar[list[AttentionCall] | None] = contextvars.ContextVar("traced_calls", default=None)
AttentionObserver = Callable[[tuple[Site, int], int, Tensor, Tensor, Tensor, Tensor | None, ScoreOptions, int], None]
"""Gets a layer's (site, index), P, queries, keys and values with the prefix in front, mask, score options, and where in
the row the first query is."""

attention_observer: contextvars.ContextVar[AttentionObserver | None] = contextvars.ContextVar(
    "attention_observer", default=None
)
current_injection: contextvars.ContextVar[Injection | None] = contextvars.ContextVar("injection", default=None)


@contextlib.contextmanager
def trace_calls(model: nn.Module) -> Iterator[list[AttentionCall]]:
    """While the block runs, every call of a model's attention is added to the list that it yields.

    The model need not have been probed; what is injected in the block is traced, too.
    """
    calls: list[AttentionCall] = []
    # Without prefixes, any number of a layer does.
    with using(traced_calls, calls), injecting(Injection(dict.fromkeys(model.modules(), ("encoder", 0)))):
        yield calls


def observe_attention(observer: AttentionObserver) -> contextlib.AbstractContextManager[None]:
    """While the block runs, `observer` is called before each layer attends; in a packed row, for each of its groups.

    The engine's rows, generation, whose cache holds the prefix, and disentangled attention are not observed.
    """
    return using(attention_observer, observer)


@contextlib.contextmanager
def injecting(injection: Injection) -> Iterator[None]:
    """While the block runs, every call of the model has these prefixes in front, and carries what else is given.

    Calls of other threads are not concerned.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(using(current_injection, injection))
        for module in injection.layer_of:
            own = type(module).__name__ == "DisentangledSelfAttention"
            if own and (hasattr(module, "in_proj") or hasattr(module, "key_proj")):
                _Disentangled(module, injection).hook(stack)
        yield


def to_rows(tensor: Tensor, rows: int) -> Tensor:
    """One entry for all rows, one per row, or one per text whose beams are neighbouring rows."""
    if tensor.shape[0] == 1:
        return tensor.expand(rows, *tensor.shape[1:])
    return tensor if tensor.shape[0] == rows else tensor.repeat_interleave(rows // tensor.shape[0], dim=0)


def batch_prefixes(prefixes: Sequence[Prefix | None], layout: Layout, dtype: torch.dtype, device: Any) -> Injection:
    """The rows' prefixes as one batch: shorter ones are padded in front, with hidden slots.

    Args:
        prefixes: One per row, or a single one for all rows; None: that row has no prefix.
        layout: The model's.
        dtype: Of the result.
        device: The model's.
    """
    layers: dict[Site, list[tuple[Tensor, Tensor]]] = {}
    prefix_mask: dict[Site, Tensor | None] = {}
    for site, shapes in layout.geometry.items():
        lengths = [0 if prefix is None else prefix.length(site) for prefix in prefixes]
        if not any(lengths):
            continue
        layers[site] = []
        for index, shape in enumerate(shapes):
            rows = [
                (torch.zeros(shape.num_kv_heads, 0, shape.key_dim), torch.zeros(shape.num_kv_heads, 0, shape.value_dim))
                if prefix is None or length == 0
                else prefix.layers[site][index]
                for prefix, length in zip(prefixes, lengths, strict=True)
            ]
            key, value = (_stack([tensor.to(device, dtype) for tensor in side]) for side in zip(*rows, strict=True))
            layers[site].append((key, value))
        ends, longest = torch.tensor(lengths, device=device)[:, None], max(lengths)
        every = min(lengths) == longest
        prefix_mask[site] = None if every else torch.arange(longest, device=device)[None] >= longest - ends
    return Injection(layout.layer_of, layers, prefix_mask)


def _stack(rows: Sequence[Float[Tensor, "H _P D"]]) -> Float[Tensor, "B H P D"]:
    """Rows of several lengths, padded in front."""
    if len(rows) == 1:
        return rows[0][None]
    longest = max(row.shape[1] for row in rows)
    return torch.stack([nn.functional.pad(row, (0, 0, longest - row.shape[1], 0)) for row in rows])


@dataclass(eq=False)
class _Disentangled:
    """The hooks of one layer of disentangled attention, and what they keep during a call.

    Attributes:
        module: The layer's attention.
        injection: What is in front; another thread may use the model with another one meanwhile.
        text: What the layer reads: its projections of anything else are of positions.
        prefix: Keys and values in front, each (B, H, P, D), and which of its slots are real, (B, P); None: all.
        keys: The text's, until its values are known.
    """

    module: Any
    injection: Injection
    text: Tensor | None = None
    prefix: tuple[Tensor, Tensor, Tensor | None] | None = None
    keys: Tensor | None = None

    def hook(self, stack: contextlib.ExitStack) -> None:
        """Register them, until the stack is closed."""
        stack.callback(self.module.register_forward_pre_hook(self.before, with_kwargs=True).remove)
        for name in ("in_proj", "key_proj", "value_proj"):
            if (part := getattr(self.module, name, None)) is not None:
                stack.callback(part.register_forward_hook(getattr(self, name)).remove)
        stack.callback(self.module.register_forward_hook(self.after).remove)

    @property
    def length(self) -> int:
        """P."""
        return 0 if self.prefix is None else int(self.prefix[0].shape[2])

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        """Lengthen text, mask and distances by P positions in front.

        While torch registers or removes a hook, another thread's call meets it without keyword arguments.
        """
        if kwargs is None or current_injection.get() is not self.injection:
            return None
        arguments = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        del arguments["self"]
        self.text = arguments["hidden_states"]
        rows, text_length = self.text.shape[:2]
        self.prefix = self.injection.rows_in_front(module, rows)
        if self.prefix is None:
            return None
        length = self.length
        self.text = arguments["hidden_states"] = nn.functional.pad(self.text, (0, 0, length, 0))
        mask, prefix_mask = arguments["attention_mask"].bool(), self.prefix[2]
        columns = mask.new_ones(1, 1, 1, length) if prefix_mask is None else prefix_mask[:, None, None]
        parts = (columns.expand(rows, 1, text_length, -1), mask.expand(rows, 1, text_length, -1))
        arguments["attention_mask"] = nn.functional.pad(torch.cat(parts, dim=-1), (0, 0, length, 0), value=True)
        if arguments.get("relative_pos") is not None:
            arguments["relative_pos"] = nn.functional.pad(arguments["relative_pos"], (length, 0, length, 0))
        return (), dict(arguments)

    def in_proj(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Queries, keys and values at once: head by head, and the values without their bias."""
        if args[0] is not self.text:
            return None
        heads = self.module.num_attention_heads
        queries, keys, values = output.unflatten(-1, (heads, -1)).chunk(3, dim=-1)
        bias = self.module.v_bias.view(heads, -1)
        keys, values = self._replace(keys, values + bias)
        return torch.cat([queries, keys, values - bias], dim=-1).flatten(-2)

    def key_proj(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Keys, which come before the values."""
        if args[0] is not self.text:
            return None
        self.keys = output.unflatten(-1, (self.module.num_attention_heads, -1))
        return self._with_prefix(self.keys, 0).flatten(-2)

    def value_proj(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Values."""
        if args[0] is not self.text or self.keys is None:
            return None
        values = output.unflatten(-1, (self.module.num_attention_heads, -1))
        return self._replace(self.keys, values)[1].flatten(-2)

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Cut the prefix's positions off."""
        if current_injection.get() is not self.injection:
            return None
        length = self.length
        self.text = self.prefix = self.keys = None
        return output[0][:, length:], None if output[1] is None else output[1][:, :, length:]

    def _replace(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Replace the first P keys and values by the prefix's, (B, P + T, H, D); the text's are traced."""
        if (calls := traced_calls.get()) is not None:
            key, value = (part[:, self.length :].transpose(1, 2) for part in (keys, values))
            calls.append(AttentionCall(self.module, key, value))
        return self._with_prefix(keys, 0), self._with_prefix(values, 1)

    def _with_prefix(self, projected: Tensor, part: int) -> Tensor:
        """Keys (part 0) or values (part 1), the first P of them the prefix's."""
        if self.prefix is None:
            return projected
        prefix = self.prefix[:2][part]
        return torch.cat([prefix.transpose(1, 2).to(projected), projected[:, self.length :]], dim=1)
