"""What the header of a composed prefix says of its parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prefixtune.errors import ConfigError
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.tensor_file import hash_tensors

MAX_PARTS = 64
"""Most parts of one prefix, those of its parts included."""

_KEPT = ("task", "description", "license")
_TEMPLATES = ("prompt", "target", "separator", "end", "source", "target_template", "chat_template", "system")
_LIMITS = ("longest_prompt", "longest_target")
_LONGEST = 200
"""Characters that are kept of a part's texts."""


def content_hash(prefix: Prefix) -> str:
    """`sha256:` and 64 digits of a prefix's tensors: names, types, shapes and bytes; whatever its header says."""
    tensors = {
        f"{site}.{index}.{part}": tensor
        for site, layers in prefix.layers.items()
        for index, pair in enumerate(layers)
        for part, tensor in zip(("key", "value"), pair, strict=True)
    }
    if prefix.head is not None:
        tensors |= {"head.weight": prefix.head.weight, "head.bias": prefix.head.bias}
    return hash_tensors(tensors)


def lead_header(prefixes: Sequence[Prefix], lead: int) -> dict[str, Any]:
    """The header of a composed prefix, but for its parts: what the leading part says, or the next before it that does.

    Task, form and text format go together, so that they come from one part.
    """
    order = [prefixes[lead], *reversed(prefixes[:lead]), *prefixes[lead + 1 :]]
    header: dict[str, Any] = {}
    for name in ("backbone", "method"):
        found = next((prefix.header[name] for prefix in order if prefix.header.get(name) is not None), None)
        if found is not None:
            header[name] = found
    speaking = next(
        (prefix.header for prefix in order if prefix.header.get("text_format") is not None), order[0].header
    )
    header |= {name: speaking[name] for name in ("task", "form", "text_format") if speaking.get(name) is not None}
    if "text_format" in header:
        header["text_format"] = _widen(header["text_format"], prefixes)
    if prefixes[lead].header.get("labels"):
        header["labels"] = prefixes[lead].header["labels"]
    licenses = [prefix.header.get("license") for prefix in prefixes]
    if licenses[0] and all(one == licenses[0] for one in licenses):
        header["license"] = licenses[0]
    return header


def same_templates(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two text formats write the same text around a source, whatever lengths they were trained with."""
    return all((one.get(name) or "") == (other.get(name) or "") for name in _TEMPLATES)


def _widen(text_format: Mapping[str, Any], prefixes: Sequence[Prefix]) -> dict[str, Any]:
    """A text format with the longest prompt and target of the parts that write the same text."""
    formats = [prefix.header.get("text_format") for prefix in prefixes]
    alike = [one for one in formats if isinstance(one, Mapping) and same_templates(one, text_format)]
    longest = {
        name: max(one[name] for one in alike) for name in _LIMITS if all(type(one.get(name)) is int for one in alike)
    }
    return {**text_format, **longest}


def describe_parts(
    prefixes: Sequence[Prefix], names: Sequence[str], *, nested: str = "", weights: Sequence[float] = ()
) -> list[dict[str, Any]]:
    """One entry per part: its content's hash, length, task and scores.

    Args:
        prefixes: The parts, in order.
        names: What they are called.
        nested: Parts that were composed in this mode are replaced by their own parts; of other modes, the parts' hashes
            are kept.
        weights: Of the parts, where they have any.

    Raises:
        ConfigError: There are too many.
    """
    check_count(prefixes, nested)
    parts: list[dict[str, Any]] = []
    for number, (prefix, name) in enumerate(zip(prefixes, names, strict=True)):
        mode, inner = _composition(prefix)
        if inner and mode == nested:
            parts.extend(inner)
            continue
        entry = _entry(prefix, name)
        if weights:
            entry["weight"] = weights[number]
        if inner:
            entry["composition"] = {"mode": mode, "hashes": [part.get("hash", "") for part in inner]}
        parts.append(entry)
    return parts


def check_count(prefixes: Sequence[Prefix], nested: str = "") -> None:
    """Refuse prefixes of which a composed one would have too many parts.

    Args:
        prefixes: The parts.
        nested: As in `describe_parts`.

    Raises:
        ConfigError: They are more than `MAX_PARTS`.
    """
    compositions = map(_composition, prefixes)
    count = sum(len(inner) if inner and mode == nested else 1 for mode, inner in compositions)
    if count > MAX_PARTS:
        raise ConfigError(
            f"the result would have {count} parts, but at most {MAX_PARTS} are allowed.", hint="compose fewer."
        )


def _composition(prefix: Prefix) -> tuple[str, list[dict[str, Any]]]:
    """Mode and parts of a composed prefix, as its header has them; no parts: of any other prefix."""
    composition = prefix.header.get("composition")
    if not isinstance(composition, Mapping):
        return "", []
    parts = composition.get("parts")
    if not isinstance(parts, list) or len(parts) > MAX_PARTS or not all(isinstance(part, Mapping) for part in parts):
        return "", []
    return str(composition.get("mode")), [dict(part) for part in parts]


def _entry(prefix: Prefix, name: str) -> dict[str, Any]:
    header = prefix.header
    entry: dict[str, Any] = {
        "name": name[:_LONGEST],
        "hash": content_hash(prefix),
        "prefix_length": prefix.lengths,
    }
    entry |= {key: str(header[key])[:_LONGEST] for key in _KEPT if header.get(key)}
    training = header.get("training")
    if isinstance(training, Mapping):
        entry |= {key: training[key] for key in ("dev_loss", "backbone_dtype") if _is_plain(training.get(key))}
    return entry


def _is_plain(value: object) -> bool:
    return (isinstance(value, str) and len(value) <= 40) or (type(value) in (int, float) and math.isfinite(value))  # type: ignore[arg-type]
