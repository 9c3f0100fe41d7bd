"""Several processes that train together: each computes its share of every batch, and the gradients are summed.

`torchrun` and `accelerate launch` start them, and tell each its number through the environment; there is no launcher
here. Knows nothing of prefixes and of training.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from prefixtune.errors import BackboneError

__all__ = ["SINGLE_PROCESS", "ProcessGroup", "init_distributed", "is_main_process", "shard"]


T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run.

    Attributes:
        rank: This one's number, from 0 on.
        size: How many there are.
        device: Where this one computes, as `load_backbone` takes it; empty: wherever was asked for.
    """

    rank: int = 0
    size: int = 1
    device: str = ""

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and tells."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of what is to be done; may be nothing."""
        return list(items[self.rank :: self.size])

    def all_reduce(self, *values: float) -> tuple[float, ...]:
        """Each value, summed over the processes."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self._meeting_device)
        distributed.all_reduce(total)
        return tuple(total.tolist())

    def all_reduce_gradients(self, tensors: Sequence[Tensor]) -> None:
        """Sum the gradients of some tensors over the processes, in one message."""
        if self.size == 1:
            return
        # Where a process had no part in a tensor, its gradient is none at all.
        gradients = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in tensors]
        message = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
        distributed.all_reduce(message)
        sizes = [gradient.numel() for gradient in gradients]
        for tensor, gradient, part in zip(tensors, gradients, message.split(sizes), strict=True):
            tensor.grad = part.reshape(gradient.shape).to(gradient.dtype)

    def barrier(self) -> None:
        """Until all processes have come here."""
        self.all_reduce(0.0)

    @property
    def _meeting_device(self) -> torch.device:
        return torch.device(self.device if distributed.get_backend() == "nccl" else "cpu")


SINGLE_PROCESS = ProcessGroup()


def is_main_process() -> bool:
    """Whether this process is the one that writes and tells, as the environment says."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def init_distributed(device: str) -> Iterator[ProcessGroup]:
    """The processes that this one was started with; alone, where nobody says otherwise.

    Args:
        device: What the run was told: on a CUDA machine each process takes a device of its own, unless it is `cpu`.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if not distributed.is_available() or (size == 1 and not distributed.is_initialized()):
        yield SINGLE_PROCESS
        return
    chosen = ""
    if device != "cpu" and torch.cuda.is_available():
        chosen = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(chosen)
    ours = not distributed.is_initialized()
    if ours:
        distributed.init_process_group("nccl" if chosen else "gloo")
    try:
        yield ProcessGroup(distributed.get_rank(), distributed.get_world_size(), chosen)
    finally:
        if ours:
            distributed.destroy_process_group()


def shard(model: Any) -> None:
    """Split a frozen model's weights among the processes; each layer is put together when it is needed (FSDP2).

    For backbones larger than a device.

    Raises:
        BackboneError: The model has no stack of layers.
    """
    from torch.distributed.fsdp import fully_shard

    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    outermost = [stack for stack in stacks if not any(stack is not o and stack in set(o.modules()) for o in stacks)]
    if not outermost:
        raise BackboneError(
            f"{type(model).__name__} has no stack of layers to split.", hint="train it without --shard."
        )
    for stack in outermost:
        for layer in stack:
            fully_shard(layer)
    fully_shard(model)
