"""What the header of a composed prefix says of its parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from prefixtune.errors import ConfigError
from prefixtune.prefix.geometry import SITES
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.tensor_file import hash_tensors

__all__ = ["MAX_PARTS", "check_count", "content_hash", "describe_parts", "lead_header", "same_templates"]

MAX_PARTS = 64
"""Most parts of one prefix, those of its parts included."""

_KEPT = ("task", "description", "license")
_TEMPLATES = ("prompt", "target", "separator", "end", "source", "target_template", "chat_template", "system")
_LIMITS = ("longest_prompt", "longest_target")
_LONGEST = 200
"""Characters that are kept of a part's texts."""
_HASH = 71
"""Characters of `sha256:` and 64 digits."""


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
    """Mode and parts of a composed prefix, as far as its header, which may come from anybody, can be believed.

    No parts: for any other prefix, and where the lengths of joined parts are not those of the prefix.
    """
    composition = prefix.header.get("composition")
    if not isinstance(composition, Mapping):
        return "", []
    mode, parts = str(composition.get("mode"))[:20], composition.get("parts")
    if not isinstance(parts, list | tuple) or not 0 < len(parts) <= MAX_PARTS:
        return mode, []
    if not all(isinstance(part, Mapping) for part in parts):
        return mode, []
    read = [_read_part(part) for part in parts]
    if mode == "concatenate":
        for site in prefix.sites:
            if sum(part.get("prefix_length", {}).get(site, 0) for part in read) != prefix.length(site):
                return mode, []
    return mode, read


def _read_part(part: Mapping[str, Any]) -> dict[str, Any]:
    """The known fields of an entry, each with its type, and not longer than `_entry` writes it."""
    entry: dict[str, Any] = {"name": part["name"][:_LONGEST] if isinstance(part.get("name"), str) else "?"}
    if isinstance(part.get("hash"), str):
        entry["hash"] = part["hash"][:_HASH]
    lengths = part.get("prefix_length")
    if isinstance(lengths, Mapping):
        entry["prefix_length"] = {
            site: lengths[site] for site in SITES if type(lengths.get(site)) is int and lengths[site] > 0
        }
    entry |= {key: part[key][:_LONGEST] for key in _KEPT if isinstance(part.get(key), str)}
    if _is_number(part.get("dev_loss")):
        entry["dev_loss"] = part["dev_loss"]
    if isinstance(part.get("backbone_dtype"), str):
        entry["backbone_dtype"] = part["backbone_dtype"][:40]
    if isinstance(part.get("scores"), Mapping):
        entry["scores"] = _scores(part["scores"])
    if _is_number(part.get("weight")):
        entry["weight"] = part["weight"]
    inner = part.get("composition")
    if isinstance(inner, Mapping) and isinstance(inner.get("hashes"), list | tuple):
        hashes = [one[:_HASH] for one in inner["hashes"][:MAX_PARTS] if isinstance(one, str)]
        entry["composition"] = {"mode": str(inner.get("mode"))[:20], "hashes": hashes}
    return entry


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
    scores = header.get("scores")
    if isinstance(scores, Mapping):
        entry["scores"] = _scores(scores)
    return entry


def _scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key)[:40]: scores[key] for key in list(scores)[:20] if _is_plain(scores[key])}


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(cast(float, value))


def _is_plain(value: object) -> bool:
    return (isinstance(value, str) and len(value) <= 40) or _is_number(value)
