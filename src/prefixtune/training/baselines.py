"""What other methods than a prefix train, to compare with: the whole model, its top layers, adapters, LoRA.

Each works on a loaded backbone that is its own, and changes it: parameters are set to train, layers may be put in. What
is trained is kept in float32; the rest stays as it was loaded, and products are computed in the loaded dtype. Knows
nothing of prefixes, data, losses and files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.lora import add_adapter
from prefixtune.backbone.packaged import silence
from prefixtune.errors import BackboneError, ConfigError, did_you_mean

__all__ = ["DEFAULT_SIZES", "Bottleneck", "Tuning", "freeze_tuned", "load_tuned_weights", "tune", "tuned_weights"]


DEFAULT_SIZES = {"full": 0, "top": 2, "adapter": 64, "lora": 8}
"""Method -> layers from the top, width of a bottleneck, or rank, where none is given."""


@dataclass(frozen=True)
class Tuning:
    """What is trained.

    Attributes:
        method: `full`, `top`, `adapter` or `lora`.
        size: Layers from the top (`top`), the bottleneck's width (`adapter`), the rank (`lora`); 0: the usual one.

    Raises:
        ConfigError: There is no such method, or the size is negative.
    """

    method: str
    size: int = 0

    def __post_init__(self) -> None:
        if self.method not in DEFAULT_SIZES:
            raise ConfigError(f"unknown method {self.method!r}.", hint=did_you_mean(self.method, DEFAULT_SIZES))
        if self.size < 0:
            raise ConfigError(f"method_size is {self.size}, but must be at least 0.", hint="0 takes the usual size.")
        if not self.size:
            object.__setattr__(self, "size", DEFAULT_SIZES[self.method])


class Bottleneck(nn.Module):
    """A bottleneck adapter (Houlsby et al. 2019; its place after the layer: Lin et al. 2020), without effect at first.

    h + W_up gelu(W_down LayerNorm(h)), with W_up = 0 at the start.

    Args:
        hidden_size: d, the width of the model.
        bottleneck_size: m, the width between.
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
        """What a layer gave, with the adapter's part added."""
        added: Tensor = self.up(nn.functional.gelu(self.down(self.norm(hidden.to(self.norm.weight.dtype)))))
        return hidden + added.to(hidden.dtype)


def tune(backbone: Backbone, tuning: Tuning, *, seed: int = 0) -> Backbone:
    """Set a backbone's parameters to train, putting adapters in where the method has some.

    Args:
        backbone: Loaded for this alone: it is changed.
        tuning: What is trained.
        seed: Of fresh parameters.

    Returns:
        The same backbone, told so; its fingerprint stays that of the weights that it was loaded with.

    Raises:
        BackboneError: The model's layers are not where they are looked for.
    """
    model, dtype = backbone.model, backbone.dtype
    if tuning.method == "full":
        model.requires_grad_(True)
    elif tuning.method == "lora":
        with silence():
            add_adapter(model, tuning.size, seed=seed)
    else:
        layers = decoder_layers(backbone)
        if tuning.method == "top":
            if tuning.size > len(layers):
                raise ConfigError(
                    f"method_size is {tuning.size}, but {backbone.name!r} has {len(layers)} layers.",
                    hint="train fewer of them, or use method = 'full'.",
                )
            for layer in layers[-tuning.size :]:
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


def _through_bottleneck(layer: Any, inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (layer.bottleneck(output[0]), *output[1:])
    return layer.bottleneck(output)


def decoder_layers(backbone: Backbone) -> list[Any]:
    """The layers of the model that writes, from the bottom up.

    Raises:
        BackboneError: No list of layers holds one attention layer of the decoder each.
    """
    places = [module for module, (site, _) in backbone.layout.layer_of.items() if site == "decoder"]
    for modules in backbone.model.modules():
        if isinstance(modules, nn.ModuleList) and len(modules) >= len(places) > 0:
            held = [sum(place in set(layer.modules()) for place in places) for layer in modules]
            if sum(held) == len(places) and max(held) == 1:
                return list(modules)
    raise BackboneError(
        f"the layers of {backbone.name!r} are not in one list with an attention layer each.",
        hint="use method = 'prefix', 'lora' or 'full'.",
    )


def tuned_weights(backbone: Backbone) -> dict[str, Tensor]:
    """What was trained, by name, as it is now."""
    return {name: parameter.detach() for name, parameter in backbone.adapter_parameters.items()}


@torch.no_grad()
def load_tuned_weights(backbone: Backbone, tensors: Mapping[str, Tensor]) -> None:
    """Put trained weights into a backbone that was tuned likewise.

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
    """End the training: what was trained takes the dtype of the rest, and needs no gradient any more."""
    for parameter in backbone.adapter_parameters.values():
        parameter.data = parameter.data.to(backbone.dtype)
        parameter.requires_grad_(False)
    for module in backbone.model.modules():
        if isinstance(module, Bottleneck):
            module.to(backbone.dtype)
    return dataclasses.replace(backbone, compute_dtype=None)
