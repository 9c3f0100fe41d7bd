"""Several processes that train together: each computes its part of every batch, and the gradients are summed.

`torchrun` and `accelerate launch` start the processes and set the rank of each in its environment.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from prefixtune.errors import BackboneError, ConfigError, first_line

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run.

    Attributes:
        rank: The index of this process, from 0.
        size: How many there are.
        device: Where this process computes, as `load_backbone` takes it; empty: the device of the configuration.
    """

    rank: int = 0
    size: int = 1
    device: str = ""

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and messages."""
        return self.rank == 0

    def split_between_processes(self, items: Sequence[T]) -> list[T]:
        """This process's part of the items; may be empty."""
        return list(items[self.rank :: self.size])

    def all_reduce(self, *values: float) -> tuple[float, ...]:
        """The values, each summed over the processes."""
        if self.size == 1:
            return values
        device = self.device if distributed.get_backend() == "nccl" else "cpu"
        total = torch.tensor(values, dtype=torch.float64, device=device)
        distributed.all_reduce(total)
        return tuple(total.tolist())

    def all_reduce_gradients(self, tensors: Sequence[Tensor]) -> None:
        """Sum the gradients of some tensors over the processes, in one message."""
        if self.size == 1:
            return
        # Where a process had no part in a tensor, the gradient is None.
        gradients = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in tensors]
        message = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
        distributed.all_reduce(message)
        sizes = [gradient.numel() for gradient in gradients]
        for tensor, gradient, part in zip(tensors, gradients, message.split(sizes), strict=True):
            tensor.grad = part.reshape(gradient.shape).to(gradient.dtype)

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        self.all_reduce(0.0)


SINGLE_PROCESS = ProcessGroup()


def is_main_process() -> bool:
    """Whether this process is the one that writes files and messages, by the environment alone."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def init_distributed(device: str) -> Iterator[ProcessGroup]:
    """The processes that this one was started with; a single one, unless the environment says otherwise.

    Args:
        device: That of the configuration: on a CUDA machine each process takes a device of its own, unless it is `cpu`.

    Raises:
        ConfigError: The environment names several processes, but not which one this is, or where they meet.
    """
    size = os.environ.get("WORLD_SIZE", "")
    if not distributed.is_available() or (size in ("", "1") and not distributed.is_initialized()):
        yield SINGLE_PROCESS
        return
    own_device = ""
    if device != "cpu" and torch.cuda.is_available():
        own_device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(own_device)
    initializes = not distributed.is_initialized()
    if initializes:
        # Its functions take the default group of the moment it is imported as a default argument. Imported later, it
        # would hold the group, and with it threads, until the interpreter ends, which then sometimes aborts.
        importlib.import_module("torch.distributed.nn")
        try:
            distributed.init_process_group("nccl" if own_device else "gloo")
        except ValueError as error:
            raise ConfigError(
                f"WORLD_SIZE is {size!r}, but the processes cannot meet: {first_line(error)}",
                hint="start it with torchrun or accelerate launch, or unset WORLD_SIZE.",
            ) from error
    try:
        yield ProcessGroup(distributed.get_rank(), distributed.get_world_size(), own_device)
    finally:
        if initializes:
            distributed.destroy_process_group()


def shard_model(model: Any) -> None:
    """Split a frozen model's weights among the processes, for a backbone larger than a device (FSDP2).

    Each layer's weights are gathered when it runs.

    Raises:
        BackboneError: The model has no stack of layers.
    """
    from torch.distributed.fsdp import fully_shard

    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    outermost = [stack for stack in stacks if not any(stack is not o and stack in set(o.modules()) for o in stacks)]
    if not outermost:
        raise BackboneError(f"{type(model).__name__} has no stack of layers.", hint="train it without --shard.")
    for stack in outermost:
        for layer in stack:
            fully_shard(layer)
    fully_shard(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are split among processes."""
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
