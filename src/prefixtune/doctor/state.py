"""Everything about a model that the checks must not change."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefixtune.backbone.fingerprint import weights

__all__ = ["ModelState"]

_BOOKKEEPING = frozenset({"_gradient_checkpointing_func", "gradient_checkpointing", "_require_grads_hooks"})
"""Attributes that transformers' gradient checkpointing leaves behind; they have no effect once it is off."""


@dataclass(frozen=True)
class ModelState:
    """A model's state at one moment.

    Attributes:
        tensors: Name of a parameter or buffer -> a hash of its bits.
        modules: Name of a module -> its class, attributes, number of hooks, and mode.
        gradients: Names of the parameters that take or hold a gradient.
    """

    tensors: dict[str, str]
    modules: dict[str, tuple[object, ...]]
    gradients: frozenset[str]

    @classmethod
    def of(cls, model: Any) -> ModelState:
        """The model's state now."""
        tensors = {}
        for name, tensor in [*weights(model), *model.named_buffers()]:
            tensors[name] = f"{tensor.dtype} {tuple(tensor.shape)} {_hash(tensor)}"
        modules: dict[str, tuple[object, ...]] = {}
        for name, module in model.named_modules():
            attributes = vars(module)
            hooks = sum(len(attributes[name]) for name in attributes if name.endswith("_hooks"))
            names = frozenset(attributes) - _BOOKKEEPING
            modules[name] = (type(module), names, hooks, module.training)
        gradients = (name for name, p in model.named_parameters() if p.requires_grad or p.grad is not None)
        return cls(tensors, modules, frozenset(gradients))

    def changes(self, other: ModelState) -> list[str]:
        """What differs, in words."""
        changes = [
            name for name in self.tensors.keys() | other.tensors if self.tensors.get(name) != other.tensors.get(name)
        ]
        parts = ("class", "attributes", "hooks", "mode")
        for name in self.modules.keys() | other.modules:
            before, after = self.modules.get(name), other.modules.get(name)
            if before is None or after is None:
                changes.append(f"module {name!r}")
            elif before != after:
                changed = [part for part, a, b in zip(parts, before, after, strict=True) if a != b]
                changes.append(f"{' and '.join(changed)} of {name or 'the model'}")
        changes += [f"gradient of {name}" for name in self.gradients ^ other.gradients]
        return sorted(changes)


def _hash(tensor: Tensor) -> str:
    """A hash of a tensor's bits; of a quantized tensor, of all its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        return " ".join(_hash(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    if tensor.device.type == "meta":
        return "a buffer kept elsewhere"
    bits: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(bits).hexdigest()
