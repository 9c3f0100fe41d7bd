"""Prepares a backbone for the checks: random prefixes, strong enough to show in every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prefixtune.attention.compute import add_noise, prefix_from_tokens
from prefixtune.attention.injection import trace_calls
from prefixtune.backbone.backbone import Backbone
from prefixtune.doctor.reference import (
    Text,
    append_tokens,
    attention_outputs,
    compute_outputs,
    relative_difference,
    replace_layer,
    scale_values,
)
from prefixtune.doctor.subject import EXTRA_POSITIONS, Subject, random_ids
from prefixtune.errors import BackboneError
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix

__all__ = ["prepare"]


_STRENGTHS = (1.0, 4.0, 16.0)
"""What the prefixes' values are multiplied by, until every layer's prefix shows in its output and in the model's."""
_NOISE_FACTOR = 10.0
"""How many times the float noise a change must be."""
_TOLERANCES = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Half-precision dtype -> largest relative difference between results that should be equal."""
_FLOAT32_TOLERANCE = 1e-4
_MIN_OUTPUT_EFFECTS = {torch.bfloat16: 4e-3}
"""Dtype -> how much a layer's prefix should change the model's outputs, or the prefixes are made stronger."""
_MIN_OUTPUT_EFFECT = 1e-3


def prepare(backbone: Backbone, prefix_length: int, seed: int) -> Subject:
    """Compute two prefixes from random tokens and noise, and strengthen them until every layer's prefix shows.

    Raises:
        BackboneError: Not every layer that was found at loading attends through the registry now.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(int(backbone.model.get_input_embeddings().weight.shape[0]), len(backbone.tokenizer))
    special = set(backbone.tokenizer.all_special_ids)
    vocabulary = torch.tensor([token_id for token_id in range(size) if token_id not in special])
    row = random_ids(vocabulary, 8, generator)
    text = append_tokens(backbone, row, row[::-1]) if backbone.kind == "encoder-decoder" else Text(row)
    _check_registry(backbone, text)

    def random_prefix(length: int) -> Prefix:
        ids = torch.tensor([random_ids(vocabulary, length, generator)], device=backbone.device)
        prefix = prefix_from_tokens(backbone.model, backbone.layout, ids)
        return add_noise(prefix, generator).to(device=backbone.device)

    lengths = (prefix_length, prefix_length + EXTRA_POSITIONS, prefix_length)
    first, second, other = (random_prefix(length) for length in lengths)
    for strength in _STRENGTHS:
        # Values of the opposite sign: those of two texts may be much the same.
        strong, replacement = scale_values(first, strength), scale_values(other, -strength)
        effects = _measure_effects(backbone, text, strong, replacement)
        if effects.all_show:
            break
    return Subject(
        backbone,
        _TOLERANCES.get(backbone.dtype, _FLOAT32_TOLERANCE),
        effects.min_output_effect,
        strong,
        scale_values(second, strength),
        effects.layers,
        effects.layer_bounds,
        strength,
        vocabulary,
        generator,
    )


def _check_registry(backbone: Backbone, text: Text) -> None:
    with trace_calls() as calls:
        compute_outputs(backbone, [text], [None])
    reached = {call.module for call in calls if call.got_injection or not backbone.layout.forwards_kwargs}
    missing = backbone.layout.layer_of.keys() - reached
    if missing:
        count = "no" if len(missing) == len(backbone.layout.layer_of) else "not every"
        raise BackboneError(f"{count} layer attends through transformers' registry, as it did when it was loaded.")


@dataclass(frozen=True)
class _Effects:
    """What changes when one layer's prefix is replaced.

    Attributes:
        layers: Site and index of a layer -> the change of that layer's output.
        layer_bounds: Site and index of a layer -> how large the change must be: a multiple of the float noise.
        min_output_effect: How large a change of the model's outputs must be.
        all_show: Whether every layer's change is that large, and shows in the model's outputs.
    """

    layers: dict[tuple[Site, int], float]
    layer_bounds: dict[tuple[Site, int], float]
    min_output_effect: float
    all_show: bool


def _measure_effects(backbone: Backbone, text: Text, prefix: Prefix, replacement: Prefix) -> _Effects:
    """Replace one layer's prefix after another, and compare the changes with the float noise."""

    def difference(tensor: torch.Tensor, reference: torch.Tensor) -> float:
        return relative_difference([tensor], [reference], backbone.dtype)

    by_layer = attention_outputs(backbone, [text], [prefix])
    outputs = compute_outputs(backbone, [text], [prefix])[0]
    noise, output_noise = dict.fromkeys(by_layer, 0.0), 0.0
    for num_rows in (1, 2):
        rows, prefixes = [text] * num_rows, [prefix] * num_rows
        again = attention_outputs(backbone, rows, prefixes)
        noise = {layer: max(noise[layer], difference(again[layer], output)) for layer, output in by_layer.items()}
        output_noise = max(output_noise, difference(compute_outputs(backbone, rows, prefixes)[0], outputs))
    effects, output_effects = {}, []
    for layer in by_layer:
        changed = replace_layer(prefix, replacement, *layer)
        effects[layer] = difference(attention_outputs(backbone, [text], [changed])[layer], by_layer[layer])
        output_effects.append(difference(compute_outputs(backbone, [text], [changed])[0], outputs))
    eps = float(torch.finfo(backbone.dtype).eps)
    bounds = {layer: max(_NOISE_FACTOR * level, eps) for layer, level in noise.items()}
    all_show = min(output_effects) >= _MIN_OUTPUT_EFFECTS.get(backbone.dtype, _MIN_OUTPUT_EFFECT) and all(
        effects[layer] >= bounds[layer] for layer in effects
    )
    return _Effects(effects, bounds, max(_NOISE_FACTOR * output_noise, eps), all_show)
