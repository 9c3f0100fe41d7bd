"""The rotary frequencies that a model's configuration asks for, and whether a prefix was computed with the same.

A prefix holds keys that are turned already. Settings that change the frequencies (`rope_parameters`, vLLM's
`--hf-overrides`) change neither shapes nor weights: only the header's `rotation` shows that it was made with others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from prefixtune.errors import CheckpointError
from prefixtune.prefix.rotation import Rotation

__all__ = ["Frequencies", "differing_layer", "layer_frequencies", "longrope_limit"]


Frequencies = tuple[float, ...]
"""Radians per position of each pair of numbers that turns."""

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
    settings = _settings_by_kind(config)
    by_kind = {kind: _frequencies(settings.get(kind, {}), head_dim) for kind in set(kinds)}
    return [by_kind[kind] for kind in kinds[:num_layers]]


def longrope_limit(config: Any) -> int | None:
    """The number of positions beyond which vLLM turns all keys by other frequencies (LongRoPE); None: there is none."""
    limits = [
        settings.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for settings in _settings_by_kind(config).values()
        if settings.get("rope_type") == "longrope"
    ]
    return min((int(limit) for limit in limits if limit), default=None)


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


def _settings_by_kind(config: Any) -> dict[str, Mapping[str, Any]]:
    """The rotary settings of each kind of layers; a single set of them is certain for full attention only."""
    settings = getattr(config, "rope_parameters", None) or {}
    nested = {kind: one for kind, one in settings.items() if isinstance(one, Mapping)}
    return nested or {"full_attention": settings}


def _frequencies(settings: Mapping[str, Any], head_dim: int) -> Frequencies | None:
    """The frequencies of one set of rotary settings; None: of a kind that is not computed here, or incomplete."""
    scale = {"default": _unscaled, "linear": _linear, "llama3": _llama3, "yarn": _yarn}.get(
        str(settings.get("rope_type", "default"))
    )
    try:
        size, theta = int(head_dim * (settings.get("partial_rotary_factor") or 1.0)), float(settings["rope_theta"])
        plain = [theta ** (-2 * pair / size) for pair in range(size // 2)]
        return None if scale is None else tuple(scale(plain, settings))
    except (LookupError, TypeError, ValueError, ArithmeticError):
        return None


def _unscaled(plain: Sequence[float], _: Mapping[str, Any]) -> list[float]:
    return list(plain)


def _linear(plain: Sequence[float], settings: Mapping[str, Any]) -> list[float]:
    return [frequency / settings["factor"] for frequency in plain]


def _llama3(plain: Sequence[float], settings: Mapping[str, Any]) -> list[float]:
    """Slow pairs are stretched by the factor, fast ones are not, those between them by a part of it."""
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    scaled = []
    for frequency in plain:
        turns = settings["original_max_position_embeddings"] * frequency / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        scaled.append(frequency * (kept + (1 - kept) / settings["factor"]))
    return scaled


def _yarn(plain: Sequence[float], settings: Mapping[str, Any]) -> list[float]:
    """As `_llama3`, but the part falls linearly with a pair's index (Peng et al. 2023, YaRN)."""
    size, theta, original = 2 * len(plain), settings["rope_theta"], settings["original_max_position_embeddings"]
    first, last = (
        size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (settings.get("beta_fast") or 32, settings.get("beta_slow") or 1)
    )
    if settings.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    width = (last - first) or 0.001
    kept = [1 - min(max((pair - first) / width, 0.0), 1.0) for pair in range(len(plain))]
    return [f * (part + (1 - part) / settings["factor"]) for f, part in zip(plain, kept, strict=True)]
