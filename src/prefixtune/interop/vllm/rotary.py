"""The rotary frequencies that a model's configuration asks for, and whether a prefix was computed with the same.

A prefix holds keys that are turned already. Settings that change the frequencies (`rope_parameters`, vLLM's
`--hf-overrides`) change neither shapes nor weights: only the header's `rotation` shows that it was made with others.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from prefixtune.errors import CheckpointError
from prefixtune.prefix.rotation import Rotation, rotary_settings

__all__ = ["Frequencies", "differing_layer", "layer_frequencies"]


Frequencies = tuple[float, ...]
"""Radians per position of each pair of numbers that turns."""

_SCALED = ("linear", "llama3", "yarn")
"""Kinds of scaling whose frequencies are the same in every text."""
_PROBED, _MAX_ANGLE = 4096, 0.05
"""Frequencies differ if their angles do by more than this, in radians, after this many positions: found by running a
model in bfloat16, they are off by up to 0.012."""


def layer_frequencies(config: Any, head_dim: int, num_layers: int) -> list[Frequencies | None]:
    """Each layer's rotary frequencies, by the configuration of transformers 5; None: it does not say them.

    Args:
        config: The model's text configuration.
        head_dim: D.
        num_layers: L.
    """
    if getattr(config, "qk_rope_head_dim", None):
        # Only a part of each key turns (latent attention).
        return [None] * num_layers
    kinds: Sequence[str] = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
    # A single set of settings is certain for full attention only.
    settings = rotary_settings(config)
    by_kind = {kind: _frequencies(config, kind, settings.get(kind, {}), head_dim) for kind in set(kinds)}
    return [by_kind[kind] for kind in kinds[:num_layers]]


def differing_layer(stored: object, frequencies: Sequence[Frequencies | None]) -> int | None:
    """The first layer whose keys turn by other frequencies than the model's; None: no difference is known.

    Args:
        stored: The `rotation` of a prefix's header, which may hold none, or one that cannot be used.
        frequencies: From `layer_frequencies`.
    """
    try:
        rotation = Rotation.from_header(stored)
    except CheckpointError:
        return None
    span = min(rotation.max_positions or _PROBED, _PROBED)
    for layer, (turns, expected) in enumerate(zip(rotation.layers.get("decoder", ()), frequencies, strict=False)):
        if turns is None or expected is None:
            continue
        found = sorted(map(abs, turns.frequencies), reverse=True)
        # A pair that hardly turns may not have been found.
        pairs = itertools.zip_longest(found, sorted(expected, reverse=True), fillvalue=0.0)
        if any(abs(one - other) * span > _MAX_ANGLE for one, other in pairs):
            return layer
    return None


def _frequencies(config: Any, kind: str, settings: Mapping[str, Any], head_dim: int) -> Frequencies | None:
    """The frequencies of one kind of layers; None: of settings that are not compared here, or incomplete."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = str(settings.get("rope_type", "default"))
    try:
        if scaling == "default":
            size, theta = int(head_dim * (settings.get("partial_rotary_factor") or 1.0)), float(settings["rope_theta"])
            return tuple(theta ** (-2 * pair / size) for pair in range(size // 2))
        if scaling not in _SCALED:
            return None
        # A single set of settings has no kind.
        scaled, _ = ROPE_INIT_FUNCTIONS[scaling](config, layer_type=kind if kind in config.rope_parameters else None)
        return tuple(scaled.tolist())
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
        return None
