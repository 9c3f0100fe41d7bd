"""Whether a decoder's layers are plain: what runtimes other than this project's need for a prefix in their cache."""

from __future__ import annotations

from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import BackboneError
from prefixtune.prefix.rotation import length_dependent_turn

__all__ = ["check_plain_layers"]


_HINT = "use `prefixtune generate` or `prefixtune serve` for it."


def check_plain_layers(backbone: Backbone, target: str, length: int | None = None) -> None:
    """Refuse a decoder whose layers another runtime would compute differently with a prefix in its cache.

    Args:
        backbone: A decoder-only model.
        target: What the runtime is called.
        length: Most positions of a text there; None: as many as the backbone has.

    Raises:
        BackboneError: Not all layers keep keys and values of one shape, turned alike in every text, or see the whole
            text.
    """
    shapes = backbone.geometry["decoder"]
    config = backbone.model.config.get_text_config(decoder=True)
    if len(set(shapes)) > 1 or shapes[0].key_dim != shapes[0].value_dim:
        raise BackboneError(
            f"the layers of {backbone.name!r} differ in KV heads or head sizes; {target} takes equal ones.",
            hint=_HINT,
        )
    window, max_positions = _find_window(config), length or backbone.max_positions
    # One that holds every position never takes effect.
    if window is not None and (max_positions is None or window < max_positions):
        raise BackboneError(
            f"{backbone.name!r} has a window of {window or 'some'} positions; in prefixtune the prefix stays visible "
            f"to every token, in {target} it would leave the window.",
            hint=_HINT,
        )
    turn = length_dependent_turn(config)
    if turn is not None:
        raise BackboneError(
            f"the keys of {backbone.name!r} turn by other frequencies in a longer text (rope_type {turn!r}), which was "
            f"not compared with {target}.",
            hint=_HINT,
        )
    if backbone.layout.cache_layers != tuple(range(len(shapes))) or config.num_hidden_layers != len(shapes):
        raise BackboneError(
            f"the cache of {backbone.name!r} does not hold every layer's own keys and values, so {target} cannot start "
            "from a prefix in it.",
            hint=_HINT,
        )


def _find_window(config: Any) -> int | None:
    """The window of layers that do not see the whole text (0: unknown size); None: all layers see it."""
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if layer_types is not None:
        return int(window or 0) if {"sliding_attention", "chunked_attention"} & set(layer_types) else None
    return None if window is None else int(window)
