"""Marian's small students, whose decoder has a recurrent cell (SSRU) in place of self-attention.

transformers has no such model. Its MarianMTModel is made, and the decoder's self-attention is replaced; the encoder's
self-attention and the decoder's attention to the encoder are Marian's own, and these are where a prefix stands. A
folder says so in its `config.json`: `"model_type": "marian", "decoder_cell": "ssru"`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefixtune.errors import BackboneError

__all__ = ["SSRU", "has_ssru", "load_with_ssru", "make_with_ssru", "save_with_ssru"]


class SSRU(nn.Module):
    """A simpler simple recurrent unit (Kim et al. 2019), called as Marian's self-attention is.

    The state is `c[t] = f[t] * c[t - 1] + (1 - f[t]) * (W x[t])` with `f[t] = sigmoid(W_f x[t] + b_f)`, and the output
    `relu(c[t])`. In a cache of transformers, states are kept as the layer's values, with keys of zeros beside them, so
    that the cache has the text's length, and beams are reordered as for any other layer.

    Args:
        width: Of x and of the state.
        layer: The decoder layer's number, by which the cache knows it.
    """

    def __init__(self, width: int, layer: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, width, bias=False)
        self.forget = nn.Linear(width, width)
        self.layer = layer

    def forward(self, hidden_states: Tensor, **arguments: Any) -> tuple[Tensor, None]:
        """The outputs of all steps, (B, T, width), and no attention weights.

        Args:
            hidden_states: x, (B, T, width).
            **arguments: Those of Marian's self-attention, of which the cache counts; without one the text begins here.
        """
        keep = torch.sigmoid(self.forget(hidden_states)).float()
        added = (1 - keep) * self.input(hidden_states).float()
        # The cache's name in transformers 5, and before.
        cache = arguments.get("cache", arguments.get("past_key_values"))
        cache = getattr(cache, "self_attention_cache", cache)
        length = 0 if cache is None else int(cache.get_seq_length(self.layer))
        state = added.new_zeros(added[:, 0].shape)
        if cache is not None and length:
            state = cache.layers[self.layer].values[:, 0, length - 1].float()
        states = []
        for step in range(added.shape[1]):
            state = keep[:, step] * state + added[:, step]
            states.append(state)
        output = torch.stack(states, dim=1)
        if cache is not None:
            # One head, as wide as the state.
            values = output.unsqueeze(1).to(hidden_states.dtype)
            cache.update(values.new_zeros((*values.shape[:3], 1)), values, self.layer)
        return torch.relu(output).to(hidden_states.dtype), None


def has_ssru(config: Any) -> bool:
    """Whether a configuration is that of a model whose decoder has these cells."""
    return getattr(config, "model_type", "") == "marian" and getattr(config, "decoder_cell", "") == "ssru"


def make_with_ssru(config: Any) -> Any:
    """A model with new weights, by its configuration."""
    from transformers import MarianMTModel

    model = MarianMTModel(config)
    for number, layer in enumerate(model.model.decoder.layers):
        layer.self_attn = SSRU(config.d_model, number)
    return model.eval()


def load_with_ssru(name: str, config: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The model in a folder.

    Raises:
        BackboneError: Weights are missing, are too many, or have another shape.
    """
    # What is overwritten next must not move the caller's seed.
    with torch.random.fork_rng(devices=[]):
        model = make_with_ssru(config)
    names = model.state_dict().keys() - _tied_names(model)
    weights = load_file(folder / "model.safetensors")
    if weights.keys() != names:
        shown = ", ".join(sorted(weights.keys() ^ names)[:5])
        raise BackboneError(
            f"the checkpoint of {name!r} does not hold exactly the weights of a Marian model with SSRU cells: {shown}.",
            hint="convert it again.",
        )
    model.load_state_dict(weights, strict=False)
    return model.to(dtype)


def _tied_names(model: Any) -> set[str]:
    """The names of parameters that have another name, too."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.named_parameters()}


def save_with_ssru(model: Any, folder: Path) -> None:
    """Write a model's configuration and weights as `load_with_ssru` reads them."""
    model.config.decoder_cell = "ssru"
    model.config.save_pretrained(folder)
    tied = _tied_names(model)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors")
