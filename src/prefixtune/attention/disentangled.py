"""Prefixes in front of disentangled attention (DeBERTa), which does not go through transformers' registry.

Hooks, for the length of a call, lengthen what such a layer reads by P positions, put keys and values of the prefix in
the place of what it projects from these, and cut them off its output. The layer's own code computes the attention. A
prefix has no position: it stands at distance 0 from every token, so that the order of its positions is free.

Knows nothing of registries, models and sites.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Front", "Seen", "hooked", "is_disentangled"]


Front = tuple[Tensor, Tensor, Tensor | None]
"""Keys and values of a prefix, each (B, H, P, D), and which of its slots are real, (B, P); None: all."""

Seen = Callable[[nn.Module, Tensor, Tensor], None]
"""Is called with a layer and the keys and values of the text, (B, H, T, D)."""


def is_disentangled(module: nn.Module) -> bool:
    """Whether a module is such a layer's attention."""
    return type(module).__name__ == "DisentangledSelfAttention" and (
        hasattr(module, "in_proj") or hasattr(module, "key_proj")
    )


@contextlib.contextmanager
def hooked(
    module: nn.Module, front: Callable[[nn.Module, int], Front | None], seen: Seen, active: Callable[[], bool]
) -> Iterator[None]:
    """While the block runs, a layer attends with a prefix in front.

    Args:
        module: The layer's attention.
        front: Gives the prefix for a layer and a number of rows; None: none stands there.
        seen: Is called with the keys and values of the text.
        active: Whether a call is one of this context; another thread may use the model meanwhile.
    """
    call = _Call(module, front, seen, active)
    with contextlib.ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(call.before, with_kwargs=True).remove)
        for name in ("in_proj", "key_proj", "value_proj"):
            part = getattr(module, name, None)
            if part is not None:
                stack.callback(part.register_forward_hook(getattr(call, name)).remove)
        stack.callback(module.register_forward_hook(call.after).remove)
        yield


class _Call:
    """The hooks of one layer, and what they keep during a call."""

    def __init__(
        self, module: Any, front: Callable[[nn.Module, int], Front | None], seen: Seen, active: Callable[[], bool]
    ) -> None:
        self.module, self.front, self.seen, self.active = module, front, seen, active
        self.given: Front | None = None
        # Projections that are still to come; later calls project positions, not the text.
        self.awaited: set[str] = set()
        self.keys: Tensor | None = None

    @property
    def length(self) -> int:
        """P."""
        return 0 if self.given is None else int(self.given[0].shape[2])

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        """Lengthen text, mask and distances by P positions in front.

        While torch registers or removes a hook, another thread's call meets it without keyword arguments.
        """
        if kwargs is None or not self.active():
            return None
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        given = bound.arguments
        rows, texts = given["hidden_states"].shape[:2]
        self.given = self.front(module, rows)
        self.awaited = {"in_proj", "key_proj", "value_proj"}
        length = self.length
        if not length or self.given is None:
            return None
        given["hidden_states"] = nn.functional.pad(given["hidden_states"], (0, 0, length, 0))
        mask, visible = given["attention_mask"].bool(), self.given[2]
        columns = mask.new_ones(rows, 1, texts, length)
        if visible is not None:
            columns = visible[:, None, None].expand(rows, 1, texts, length)
        mask = torch.cat([columns, mask.expand(rows, 1, texts, texts)], dim=-1)
        given["attention_mask"] = nn.functional.pad(mask, (0, 0, length, 0), value=True)
        if given.get("relative_pos") is not None:
            given["relative_pos"] = nn.functional.pad(given["relative_pos"], (length, 0, length, 0))
        del given["self"]
        return (), dict(given)

    def in_proj(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Queries, keys and values at once: head by head, and the values without their bias."""
        if not self._is_awaited("in_proj"):
            return None
        heads = self.module.num_attention_heads
        queries, keys, values = output.unflatten(-1, (heads, -1)).chunk(3, dim=-1)
        bias = self.module.v_bias.view(heads, -1)
        keys, values = self._replace(keys, values + bias)
        return torch.cat([queries, keys, values - bias], dim=-1).flatten(-2)

    def key_proj(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Keys, which come before the values."""
        if not self._is_awaited("key_proj"):
            return None
        self.keys = output.unflatten(-1, (self.module.num_attention_heads, -1))
        return self._placed(self.keys, 0).flatten(-2)

    def value_proj(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Values."""
        if not self._is_awaited("value_proj") or self.keys is None:
            return None
        _, values = self._replace(self.keys, output.unflatten(-1, (self.module.num_attention_heads, -1)))
        self.keys = None
        return values.flatten(-2)

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Cut the prefix's positions off."""
        if not self.active() or not self.length:
            return None
        context, length = output[0][:, self.length :], self.length
        self.given = None
        return (context, None if output[1] is None else output[1][:, :, length:])

    def _is_awaited(self, name: str) -> bool:
        if not self.active() or name not in self.awaited:
            return False
        self.awaited.discard(name)
        return True

    def _replace(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The prefix's keys and values in the place of the first P, (B, P + T, H, D); the text's are told."""
        length = self.length
        self.seen(self.module, keys[:, length:].transpose(1, 2), values[:, length:].transpose(1, 2))
        return self._placed(keys, 0), self._placed(values, 1)

    def _placed(self, whole: Tensor, which: int) -> Tensor:
        if self.given is None or not self.length:
            return whole
        front = self.given[0] if which == 0 else self.given[1]
        return torch.cat([front.transpose(1, 2).to(whole), whole[:, self.length :]], dim=1)
