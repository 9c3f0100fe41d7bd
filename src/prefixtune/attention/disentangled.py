"""Prefixes in front of disentangled attention (DeBERTa), which does not go through transformers' registry.

During a call, hooks lengthen what such a layer reads by P positions. They replace the keys and values that it projects
from these by those of the prefix, and cut the P positions off its output. The layer's own code computes the attention.
A prefix has no position: it is at distance 0 from every token, so that the order of its positions does not matter.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PrefixKV", "disentangled_prefix", "is_disentangled"]


PrefixKV = tuple[Tensor, Tensor, Tensor | None]
"""Keys and values of a prefix, each (B, H, P, D), and which of its slots are real, (B, P); None: all."""

KVCallback = Callable[[nn.Module, Tensor, Tensor], None]
"""Is called with a layer and the keys and values of the text, (B, H, T, D)."""


def is_disentangled(module: nn.Module) -> bool:
    """Whether a module is such a layer's attention."""
    return type(module).__name__ == "DisentangledSelfAttention" and (
        hasattr(module, "in_proj") or hasattr(module, "key_proj")
    )


@contextlib.contextmanager
def disentangled_prefix(
    module: nn.Module,
    prefix_kv: Callable[[nn.Module, int], PrefixKV | None],
    on_kv: KVCallback,
    is_active: Callable[[], bool],
) -> Iterator[None]:
    """While the block runs, a layer attends with a prefix in front.

    Args:
        module: The layer's attention.
        prefix_kv: Returns the prefix for a layer and a number of rows; None: no prefix there.
        on_kv: Is called with the keys and values of the text.
        is_active: Whether a call is one of this context; another thread may use the model meanwhile.
    """
    call = _Call(module, prefix_kv, on_kv, is_active)
    with contextlib.ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(call.before, with_kwargs=True).remove)
        for name in ("in_proj", "key_proj", "value_proj"):
            part = getattr(module, name, None)
            if part is not None:
                stack.callback(part.register_forward_hook(getattr(call, name)).remove)
        stack.callback(module.register_forward_hook(call.after).remove)
        yield


@dataclass(eq=False)
class _Call:
    """The hooks of one layer, and what they keep during a call.

    Attributes:
        text: What the layer reads: its projections of anything else are of positions.
        prefix: What is in front.
        keys: The text's, until its values are known.
    """

    module: Any
    prefix_kv: Callable[[nn.Module, int], PrefixKV | None]
    on_kv: KVCallback
    is_active: Callable[[], bool]
    text: Tensor | None = None
    prefix: PrefixKV | None = None
    keys: Tensor | None = None

    @property
    def length(self) -> int:
        """P."""
        return 0 if self.prefix is None else int(self.prefix[0].shape[2])

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        """Lengthen text, mask and distances by P positions in front.

        While torch registers or removes a hook, another thread's call meets it without keyword arguments.
        """
        if kwargs is None or not self.is_active():
            return None
        arguments = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        del arguments["self"]
        self.text = arguments["hidden_states"]
        rows, text_length = self.text.shape[:2]
        self.prefix = self.prefix_kv(module, rows)
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
        if not self.is_active():
            return None
        length = self.length
        self.text = self.prefix = self.keys = None
        return output[0][:, length:], None if output[1] is None else output[1][:, :, length:]

    def _replace(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Replace the first P keys and values by the prefix's, (B, P + T, H, D); the text's go to the callback."""
        length = self.length
        self.on_kv(self.module, keys[:, length:].transpose(1, 2), values[:, length:].transpose(1, 2))
        return self._with_prefix(keys, 0), self._with_prefix(values, 1)

    def _with_prefix(self, projected: Tensor, part: int) -> Tensor:
        """Keys (part 0) or values (part 1), the first P of them the prefix's."""
        if self.prefix is None:
            return projected
        prefix = (self.prefix[0], self.prefix[1])[part]
        return torch.cat([prefix.transpose(1, 2).to(projected), projected[:, self.length :]], dim=1)
