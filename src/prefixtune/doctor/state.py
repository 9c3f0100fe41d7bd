"""State."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefixtune.backbone.backbone import weights

__all__ = ["State"]

_BOOKKEEPING = frozenset({"_gradient_checkpointing_func", "gradient_checkpointing", "_require_grads_hooks"})
"""Attributes that transformers' gradient checkpointing leaves behind; without effect once it is off."""


# --- what must stay as it is -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """Everything about a model that must not change.

    Attributes:
        tensors: Name of a parameter or buffer -> a hash of its bits.
        modules: Name of a module -> its class, attributes, number of hooks, and mode.
        gradients: Names of the parameters that take gradients or hold one.
    """

    tensors: dict[str, str]
    modules: dict[str, tuple[object, ...]]
    gradients: frozenset[str]

    @classmethod
    def of(cls, model: Any) -> State:
        """A model's present state."""
        tensors = {}
        for name, tensor in [*weights(model), *model.named_buffers()]:
            tensors[name] = f"{tensor.dtype} {tuple(tensor.shape)} {_hash(tensor)}"
        modules: dict[str, tuple[object, ...]] = {}
        for name, module in model.named_modules():
            attributes = vars(module)
            hooks = sum(len(attributes[name]) for name in attributes if name.endswith("_hooks"))
            names = frozenset(attributes) - _BOOKKEEPING
            modules[name] = (type(module), names, hooks, module.training)
        taking = (name for name, p in model.named_parameters() if p.requires_grad or p.grad is not None)
        return cls(tensors, modules, frozenset(taking))

    def changes(self, other: State) -> list[str]:
        """What differs, in words."""
        words = [
            name for name in self.tensors.keys() | other.tensors if self.tensors.get(name) != other.tensors.get(name)
        ]
        parts = ("class", "attributes", "hooks", "mode")
        for name in self.modules.keys() | other.modules:
            one, two = self.modules.get(name), other.modules.get(name)
            if one is None or two is None:
                words.append(f"module {name!r}")
            elif one != two:
                changed = [part for part, a, b in zip(parts, one, two, strict=True) if a != b]
                words.append(f"{' and '.join(changed)} of {name or 'the model'}")
        words += [f"gradient of {name}" for name in self.gradients ^ other.gradients]
        return sorted(words)


def _hash(tensor: Tensor) -> str:
    """A hash of a tensor's bits; of a quantized one's, of all it is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return " ".join(_hash(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    if tensor.device.type == "meta":
        return "a buffer kept elsewhere"
    bits: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(bits).hexdigest()
