"""The methods that a prefix is compared with: the whole model, adapters or LoRA are trained.

Each changes a backbone that was loaded for it: parameters are set to train, layers may be inserted. What trains is kept
in float32; the rest stays in the dtype that it was loaded in, and products are computed in that dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.identity import fingerprint
from prefixtune.backbone.lora import add_adapter, has_adapter
from prefixtune.backbone.quiet import quiet_transformers
from prefixtune.errors import BackboneError, ConfigError, did_you_mean
from prefixtune.training.config import DEFAULT_SIZES


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


def tune(backbone: Backbone, method: str, size: int = 0, *, seed: int = 0) -> Backbone:
    """Set a backbone's parameters to train, and insert adapters if the method has some.

    Args:
        backbone: It is changed, so it must be used for nothing else.
        method: `full`, `adapter` or `lora`.
        size: The bottleneck's width (`adapter`), or the rank (`lora`); 0: the default.
        seed: Of new parameters.

    Returns:
        The same backbone, which computes in its loaded dtype; its fingerprint stays that of the weights as loaded.

    Raises:
        BackboneError: The model has no list of layers to insert adapters in, or has a LoRA adapter already.
        ConfigError: There is no such method.
    """
    if method not in DEFAULT_SIZES:
        raise ConfigError(f"unknown method {method!r}.", hint=did_you_mean(method, DEFAULT_SIZES))
    model, dtype, size = backbone.model, backbone.dtype, size or DEFAULT_SIZES[method]
    if method == "full":
        model.requires_grad_(True)
    elif method == "lora":
        if has_adapter(model):
            raise BackboneError(f"{backbone.name!r} holds a LoRA adapter already.", hint="merge it first.")
        with quiet_transformers():
            add_adapter(model, size, seed=seed)
    else:
        layers = decoder_layers(backbone)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for layer in layers:
                layer.bottleneck = Bottleneck(backbone.hidden_size, size).to(backbone.device)
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
    raise BackboneError(f"{backbone.name!r} has no plain list of layers.", hint="use another method.")


@torch.no_grad()
def load_tuned_weights(backbone: Backbone, tensors: Mapping[str, Tensor]) -> None:
    """Put trained weights into a backbone that `tune` prepared in the same way.

    Raises:
        BackboneError: Names or shapes differ.
    """
    own = backbone.adapter_parameters
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != {name: parameter.shape for name, parameter in own.items()}:
        raise BackboneError(f"the trained weights do not fit {backbone.name!r}.", hint="load the header's backbone.")
    for name, parameter in own.items():
        parameter.copy_(tensors[name])


def freeze_tuned(backbone: Backbone) -> Backbone:
    """End the training: the trained parameters take the dtype of the rest, and need no gradient any more.

    What is trained on the model from now on is for these weights, as its fingerprint then says.
    """
    for parameter in backbone.adapter_parameters.values():
        parameter.data = parameter.data.to(backbone.dtype)
        parameter.requires_grad_(False)
    tuned = fingerprint(backbone.model, backbone.geometry)
    return dataclasses.replace(backbone, compute_dtype=None, fingerprint=tuned)
