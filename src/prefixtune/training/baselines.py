"""The methods that a prefix is compared with: the whole model, its top layers, adapters or LoRA are trained.

Each changes a backbone that was loaded for it: parameters are set to train, layers may be inserted. What trains is kept
in float32; the rest stays in the dtype that it was loaded in, and products are computed in that dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.lora import add_adapter, has_adapter
from prefixtune.backbone.quiet import quiet_transformers
from prefixtune.errors import BackboneError, ConfigError, did_you_mean
from prefixtune.training.config import DEFAULT_SIZES

__all__ = [
    "Bottleneck",
    "Tuning",
    "freeze_tuned",
    "load_tuned_weights",
    "note_trained",
    "tune",
    "tuned_layers",
    "tuned_weights",
    "was_trained",
]


@dataclass(frozen=True)
class Tuning:
    """A method and its size.

    Attributes:
        method: `full`, `top`, `adapter` or `lora`.
        size: Layers from the top (`top`), the bottleneck's width (`adapter`), the rank (`lora`); 0: the default.

    Raises:
        ConfigError: There is no such method, or the size is negative.
    """

    method: str
    size: int = 0

    def __post_init__(self) -> None:
        if self.method not in DEFAULT_SIZES:
            raise ConfigError(f"unknown method {self.method!r}.", hint=did_you_mean(self.method, DEFAULT_SIZES))
        if self.size < 0:
            raise ConfigError(f"method_size is {self.size}, but must be at least 0.", hint="0 is the default size.")
        if not self.size:
            object.__setattr__(self, "size", DEFAULT_SIZES[self.method])


class Bottleneck(nn.Module):
    """A bottleneck adapter (Houlsby et al. 2019), inserted after a layer (Lin et al. 2020); at first without effect.

    h + W_up gelu(W_down LayerNorm(h)), with W_up = 0 at the start.

    Args:
        hidden_size: d, the width of the model.
        bottleneck_size: m, the width of the bottleneck.
    """

    def __init__(self, hidden_size: int, bottleneck_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.down = nn.Linear(hidden_size, bottleneck_size)
        self.up = nn.Linear(bottleneck_size, hidden_size)
        nn.init.normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """A layer's output with the adapter's part added, of the same shape (B, T, d)."""
        added: Tensor = self.up(nn.functional.gelu(self.down(self.norm(hidden.to(self.norm.weight.dtype)))))
        return hidden + added.to(hidden.dtype)


_TRAINED: WeakSet[nn.Module] = WeakSet()
"""Models of which a run has trained weights."""


def note_trained(backbone: Backbone) -> None:
    """Remember that a run trains weights of a backbone, so that no other begins with what it leaves."""
    if backbone.adapter_parameters:
        _TRAINED.add(backbone.model)


def was_trained(backbone: Backbone) -> bool:
    """Whether a run in this process has trained weights of a backbone."""
    return backbone.model in _TRAINED


def tune(backbone: Backbone, tuning: Tuning, *, seed: int = 0) -> Backbone:
    """Set a backbone's parameters to train, and insert adapters if the method has some.

    Args:
        backbone: It is changed, so it must be used for nothing else.
        tuning: What trains.
        seed: Of new parameters.

    Returns:
        The same backbone, which computes in its loaded dtype; its fingerprint stays that of the weights as loaded.

    Raises:
        BackboneError: The model has no list of layers to train or to insert adapters in, or has a LoRA adapter already.
        ConfigError: The model has fewer layers than are to be trained.
    """
    model, dtype = backbone.model, backbone.dtype
    layers = tuned_layers(backbone, tuning)
    if tuning.method == "full":
        model.requires_grad_(True)
    elif tuning.method == "lora":
        with quiet_transformers():
            add_adapter(model, tuning.size, seed=seed)
    elif tuning.method == "top":
        for layer in layers:
            layer.requires_grad_(True)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for layer in layers:
                layer.bottleneck = Bottleneck(backbone.hidden_size, tuning.size).to(backbone.device)
                layer.register_forward_hook(_through_bottleneck)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.eval()
    return dataclasses.replace(backbone, compute_dtype=dtype)


def tuned_layers(backbone: Backbone, tuning: Tuning) -> list[Any]:
    """The layers that are trained, or that adapters are inserted in; empty: the method asks for none in particular.

    Raises:
        BackboneError: As `tune`.
        ConfigError: As `tune`.
    """
    if tuning.method == "lora" and has_adapter(backbone.model):
        raise BackboneError(
            f"{backbone.name!r} holds a LoRA adapter, whose place the new one would take.",
            hint="train that one further with a prefix (train_adapter), or merge it into its base model first.",
        )
    if tuning.method not in ("top", "adapter"):
        return []
    layers = decoder_layers(backbone)
    if tuning.method == "adapter":
        return layers
    if tuning.size > len(layers):
        raise ConfigError(
            f"method_size is {tuning.size}, but {backbone.name!r} has {len(layers)} layers.",
            hint="train fewer of them, or use method = 'full'.",
        )
    return layers[-tuning.size :]


def _through_bottleneck(layer: Any, inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (layer.bottleneck(output[0]), *output[1:])
    return layer.bottleneck(output)


def decoder_layers(backbone: Backbone) -> list[Any]:
    """The decoder's layers, from the bottom up.

    Raises:
        BackboneError: The model has no list of layers with at most one of the decoder's attention layers in each.
    """
    attention_layers = [module for module, (site, _) in backbone.layout.layer_of.items() if site == "decoder"]
    for layers in backbone.model.modules():
        if isinstance(layers, nn.ModuleList) and len(layers) >= len(attention_layers) > 0:
            counts = [sum(module in set(layer.modules()) for module in attention_layers) for layer in layers]
            if sum(counts) == len(attention_layers) and max(counts) == 1:
                return list(layers)
    raise BackboneError(
        f"{backbone.name!r} has no list of layers with one attention layer in each.",
        hint="use method = 'prefix', 'lora' or 'full'.",
    )


def tuned_weights(backbone: Backbone) -> dict[str, Tensor]:
    """The trained parameters as they are now, by name."""
    return {name: parameter.detach() for name, parameter in backbone.adapter_parameters.items()}


@torch.no_grad()
def load_tuned_weights(backbone: Backbone, tensors: Mapping[str, Tensor]) -> None:
    """Put trained weights into a backbone that `tune` prepared in the same way.

    Raises:
        BackboneError: Names or shapes differ.
    """
    own = backbone.adapter_parameters
    wrong = sorted(
        name
        for name in own.keys() | tensors.keys()
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    if wrong:
        raise BackboneError(
            f"the trained weights do not fit {backbone.name!r}: {', '.join(wrong[:3])} "
            f"({len(wrong)} of {len(own.keys() | tensors.keys())} differ).",
            hint="load the backbone that their header names.",
        )
    for name, parameter in own.items():
        parameter.copy_(tensors[name])


def freeze_tuned(backbone: Backbone) -> Backbone:
    """End the training: the trained parameters take the dtype of the rest, and need no gradient any more."""
    for parameter in backbone.adapter_parameters.values():
        parameter.data = parameter.data.to(backbone.dtype)
        parameter.requires_grad_(False)
    for module in backbone.model.modules():
        if isinstance(module, Bottleneck):
            module.to(backbone.dtype)
    return dataclasses.replace(backbone, compute_dtype=None)
