"""What stands in for a CUDA graph on a CPU: the operations of a function, recorded once and computed again in place.

As in a graph, a replay runs no Python of the function: whatever it had computed from numbers, and not on tensors, stays
as it was when it was recorded. As a graph does, it refuses what waits for the device or copies numbers to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from prefixtune.engine.decode_graphs import WAITING

REFUSED = (*WAITING, "aten.lift_fresh")


class Recorder(TorchDispatchMode):
    """Records operations with their tensors while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(REFUSED):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        inputs = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        writes = any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
        # A view sees what its tensor holds.
        if writes or not all(tensor.untyped_storage().data_ptr() in inputs for tensor in _tensors(out)):
            self.calls.append((func, args, kwargs or {}, None if writes else out))
        return out

    def replay(self) -> None:
        """Compute all operations again, into the same tensors."""
        for func, args, kwargs, out in self.calls:
            made = func(*args, **kwargs)
            if out is not None:
                for old, new in zip(_tensors(out), _tensors(made), strict=True):
                    old.copy_(new)


def record(compute: Callable[[], Tensor], device: torch.device, pool: Any) -> Callable[[], Tensor]:
    """As `decode_graphs.capture`, on a CPU."""
    compute()
    with Recorder() as recorder:
        out = compute()

    def replay() -> Tensor:
        recorder.replay()
        return out

    return replay


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_iter(values) if isinstance(value, torch.Tensor)]
