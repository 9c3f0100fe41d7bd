"""What every export needs: to refuse what a runtime cannot carry, and a manifest beside the files.

Knows nothing of the runtimes' formats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.encoding import format_of
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.prefix.prefix import Prefix, check_fits

__all__ = ["MANIFEST", "check_exportable", "check_prefix", "describe_origin", "write_manifest"]


MANIFEST = "export.json"


def check_exportable(prefix: Prefix, backbone: Backbone, target: str) -> None:
    """Refuse what another runtime would carry wrongly, or what was never tried.

    Raises:
        BackboneError: The backbone is no plain decoder whose layers all keep keys and values of one shape and see the
            whole text, or the prefix does not fit it.
        ConfigError: The prefix is empty, an infix, or holds NaN, or comes with a head.
    """
    name = backbone.name
    if backbone.kind != "decoder":
        raise BackboneError(
            f"{target} gets decoder-only models, but {name!r} is of kind {backbone.kind!r}: a prefix at its sites "
            f"({', '.join(backbone.geometry)}) is no part of a cache that can be filled beforehand.",
            hint="use `prefixtune generate` or `prefixtune serve` for it.",
        )
    check_fits(prefix, backbone.geometry, name)
    check_prefix(prefix, target)
    _check_layers(backbone, target)


def check_prefix(prefix: Prefix, target: str) -> None:
    """Refuse a prefix that another runtime would carry wrongly, whatever the backbone.

    Raises:
        ConfigError: It is empty, an infix, or holds NaN, or comes with a head.
    """
    if prefix.placement != "front":
        raise ConfigError(
            f"the prefix is an {prefix.placement}, which stands between source and target; {target} gets prefixes in "
            "front of the text.",
            hint="use `prefixtune generate`, or `prefixtune train --method prefix`.",
        )
    if prefix.head is not None:
        raise ConfigError(
            f"the prefix comes with a head of {len(prefix.head.bias)} labels, which reads hidden states; {target} "
            "gives the scores of tokens.",
            hint="`prefixtune train --classifier words` makes labels of words that the model writes.",
        )
    if prefix.prefix_length == 0:
        raise ConfigError("the prefix has no positions (P = 0).", hint=f"give {target} the backbone alone.")
    if not prefix.is_finite():
        raise ConfigError("the prefix holds NaN or infinity.", hint="train it again.")


def _check_layers(backbone: Backbone, target: str) -> None:
    shapes = backbone.geometry["decoder"]
    config = backbone.model.config.get_text_config(decoder=True)
    if len(set(shapes)) > 1 or shapes[0].key_dim != shapes[0].value_dim:
        raise BackboneError(
            f"the layers of {backbone.name!r} differ in KV heads or head sizes; {target} gets equal ones.",
            hint="use `prefixtune generate` or `prefixtune serve` for it.",
        )
    window = _window(config)
    if window is not None:
        raise BackboneError(
            f"{backbone.name!r} looks back {window or 'some'} positions only; here the prefix stays visible to every "
            f"token, in {target} it would leave the window.",
            hint="use `prefixtune generate` or `prefixtune serve` for it.",
        )
    if backbone.layout.cache_layers != tuple(range(len(shapes))) or config.num_hidden_layers != len(shapes):
        raise BackboneError(
            f"the cache of {backbone.name!r} does not hold every layer's own keys and values, so that {target} cannot "
            "be given a prefix in it.",
            hint="use `prefixtune generate` or `prefixtune serve` for it.",
        )


def _window(config: Any) -> int | None:
    """How far layers look back, where some do not see the whole text (0: not told); None: all see it."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if kinds is not None:
        return int(window or 0) if {"sliding_attention", "chunked_attention"} & set(kinds) else None
    return None if window is None else int(window)


def describe_origin(prefix: Prefix, backbone: Backbone) -> dict[str, Any]:
    """What a manifest says of where the files come from, and of the text that goes with them."""
    form = format_of(backbone, prefix)
    return {
        "backbone": {"name": backbone.name, "fingerprint": backbone.fingerprint},
        "model_type": backbone.model.config.model_type,
        "prefix_length": prefix.prefix_length,
        "positions": "text starts at position P",
        "text_format": {"prompt": form.format_prompt("{source}", backbone.separator), "target": form.target},
        "end": backbone.end,
        **{key: prefix.header[key] for key in ("task", "license") if prefix.header.get(key)},
    }


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Store what was exported beside the files, as JSON."""
    (folder / MANIFEST).write_text(json.dumps(facts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
