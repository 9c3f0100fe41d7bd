"""Make one prefix of several: one after the other, or number by number.

Joined, the result is what attention sees with all of them in front: each moved on by the lengths before it, the text
behind all. Where one was trained beside others, all stand at the same positions, right before the text, as in training.
Values have no position, so that only keys turn (see `rotation`). Number by number, prefixes of one length are averaged.
The header says what the parts were.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, combinations, zip_longest
from numbers import Real
from typing import Any, Literal

import torch

from prefixtune.errors import BackboneError, ConfigError, short_repr
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.prefix.geometry import Site, describe
from prefixtune.prefix.header import backbone_origin
from prefixtune.prefix.prefix import KeyValue, Prefix, content_hash, from_named
from prefixtune.prefix.rotation import Rotation

MAX_PARTS = 64
"""Most parts of one prefix, those of its parts included."""

MAX_QUESTIONS = 256
"""Most questions that are stored with a prefix."""
_TEMPLATES = ("prompt", "target", "separator", "end", "source", "target_template", "chat_template", "system")
_LIMITS = ("longest_prompt", "longest_target")
_SHARED = {"positions": "shared"}
"""In the header of joined parts that all end where the text begins."""


# --- one after the other ---------------------------------------------------------------------------------------------


def concatenate(prefixes: Sequence[Prefix], rotation: Rotation | None = None, *, names: Sequence[str] = ()) -> Prefix:
    """One prefix of several, one after the other; its header says what each was.

    A head, labels, task and text format are those of the last part that has them: it stands next to the text. Dtypes
    are promoted to the most exact.

    Args:
        prefixes: At least one, in order; of one backbone.
        rotation: The backbone's; None: as a part's header has it.
        names: What to call the parts in messages and in the header; none: by number.

    Raises:
        BackboneError: They are of different backbones.
        CheckpointError: The rotation in a header cannot be used.
        ConfigError: They cannot be joined: no rotation is known, their adapters do not
            fit, several have a head, they are too many, or nothing is left of the model's positions.
    """
    names = check_joinable(prefixes, names)
    rotation = _known(rotation, prefixes)
    total, most = sum(prefix.length() for prefix in prefixes), rotation.max_positions
    if most is not None and total >= most:
        what = f"joined, the prefixes take {total:,} of the model's {most:,} positions, and the text needs some."
        raise ConfigError(what, hint="join fewer, or cut them: `prefixtune compose FILE --length P`.")
    heads = [number for number, prefix in enumerate(prefixes) if prefix.head is not None or prefix.header.get("labels")]
    if len(heads) > 1:
        raise ConfigError(f"{names[heads[0]]} and {names[heads[1]]} both classify.", hint="join only one that does.")
    lead = heads[0] if heads else len(prefixes) - 1
    parts = _describe_parts(prefixes, names, "concatenate")
    header = lead_header(prefixes, lead) | {"rotation": rotation.to_header()}
    shared = any(
        map(_is_shared, [*_trained_beside(prefixes), *(prefix.header.get("composition") for prefix in prefixes)])
    )
    header["composition"] = {"mode": "concatenate", **(_SHARED if shared else {}), "parts": parts}
    return Prefix(join(prefixes, rotation, shared=shared).layers, header, prefixes[lead].head)


def _is_shared(facts: object) -> bool:
    """Whether parts stand at the same positions, as the part of a header on their training or composition says."""
    return isinstance(facts, Mapping) and facts.get("positions") == "shared"


def _trained_beside(prefixes: Sequence[Prefix]) -> list[object]:
    """Beside what each was trained, as its header has it."""
    return [(prefix.header.get("training") or {}).get("beside") for prefix in prefixes]


def join(prefixes: Sequence[Prefix], rotation: Rotation, *, shared: bool) -> Prefix:
    """The tensors of `concatenate`, without its checks, header and head; differentiable.

    In a decoder-only model each part is turned on by the lengths before it; or, where they share positions, by those of
    all others, so that each ends where the text begins. Where the text is not shifted (encoders, encoder-decoders), no
    key turns, and each site holds the parts that have it.
    """
    dtype, lengths = _widest(prefixes), [prefix.length() for prefix in prefixes]
    starts = [sum(lengths) - length for length in lengths] if shared else accumulate(lengths, initial=0)
    turned = [
        rotation.turn(prefix.to(dtype, prefixes[0].device), start)
        for prefix, start in zip(prefixes, starts, strict=False)
    ]
    layers: dict[Site, list[Sequence[KeyValue]]] = {}
    for prefix in turned:
        for site, pairs in prefix.layers.items():
            layers.setdefault(site, []).append(pairs)

    def joined(*pairs: KeyValue) -> KeyValue:
        key, value = (torch.cat(side, dim=1) for side in zip(*pairs, strict=True))
        return key, value

    return Prefix({site: tuple(map(joined, *parts)) for site, parts in layers.items()})


# --- number by number ------------------------------------------------------------------------------------------------


def average(prefixes: Sequence[Prefix], weights: Sequence[float] | None = None, *, names: Sequence[str] = ()) -> Prefix:
    """The mean of prefixes of one length, of keys, values and heads, computed in float32.

    Task and text format are those of the last part that has them.

    Args:
        prefixes: Of one backbone.
        weights: One for each, with sum 1; a negative one, or one above 1, goes beyond a part. None: equal ones.
        names: What to call the parts in messages and in the header; none: by number.

    Raises:
        BackboneError: They are of different backbones.
        ConfigError: Their lengths or labels differ, or the weights do not fit.
    """
    names = check_joinable(prefixes, names)
    mode = "average" if weights is None else "interpolate"
    weights = [1 / len(prefixes)] * len(prefixes) if weights is None else weights
    are_numbers = isinstance(weights, Iterable) and all(isinstance(one, Real) for one in weights)
    if not are_numbers or len(weights) != len(prefixes) or not abs(sum(weights) - 1) <= 1e-6:
        hint = f"give {len(prefixes)} numbers, each divided by their sum."
        raise ConfigError(f"the weights are {short_repr(weights)}, and not one for each, with sum 1.", hint=hint)
    weights = [float(one) for one in weights]
    named = [prefix.named_tensors() for prefix in prefixes]
    kinds = [
        ({key: tensor.shape for key, tensor in one.items()}, prefix.header.get("labels"))
        for one, prefix in zip(named, prefixes, strict=True)
    ]
    if (other := next((name for name, kind in zip(names, kinds, strict=True) if kind != kinds[0]), None)) is not None:
        raise ConfigError(
            f"{names[0]} and {other} have different lengths or labels, so that they cannot be averaged.",
            hint="cut the longer one with `prefixtune compose FILE --length P`, or join them with --mode concatenate.",
        )
    dtype, device = _widest(prefixes), prefixes[0].device
    mean = {
        key: torch.stack([weight * one[key].to(device).float() for weight, one in zip(weights, named, strict=True)])
        for key in named[0]
    }
    header = lead_header(prefixes, len(prefixes) - 1)
    if any(prefix.header.get("rotation") for prefix in prefixes) and (rotation := stored_rotation(prefixes)):
        header["rotation"] = rotation.to_header()
    header["composition"] = {"mode": mode, "parts": _describe_parts(prefixes, names, mode, weights)}
    # It stands where its parts do.
    if any(_is_shared(prefix.header.get("composition")) for prefix in prefixes):
        header["composition"] |= _SHARED
    elif any(map(_is_shared, _trained_beside(prefixes))):
        header["training"] = {"beside": {**_SHARED}}
    # A head keeps its own dtype.
    dtypes = {key: named[0][key].dtype if key.startswith("head.") else dtype for key in mean}
    return from_named({key: tensor.sum(0).to(dtypes[key]) for key, tensor in mean.items()}, header)


# --- cut -------------------------------------------------------------------------------------------------------------


def cut(
    prefix: Prefix, length: int, rotation: Rotation | None = None, *, end: Literal["start", "end"] = "end"
) -> Prefix:
    """Some of a prefix's positions.

    The header has no development loss: it is the whole's, and stands in its entry of the parts.

    Cut at the end, the first ones stay as they are. Cut at the start, the keys of the rest are turned back, so that it
    begins at position 0; what it has taken over from the positions before it stays in it. Of joined parts that share
    positions, all that stay are turned back, so that they end where the text begins.

    Args:
        prefix: The whole.
        length: How many positions stay, at every site that has more.
        rotation: The backbone's; None: as the header has it. Needed where keys turn.
        end: Where to cut.

    Raises:
        CheckpointError: The rotation in the header cannot be used.
        ConfigError: Nothing would be cut, or left; no rotation is known; or an argument is of a wrong type.
    """
    if end not in ("start", "end") or type(length) is not int or length not in range(1, prefix.prefix_length):
        what = f"the prefix has {prefix.prefix_length} positions, and cannot be cut to {length!r} at {end!r}."
        raise ConfigError(what, hint="choose a smaller length, at least 1, and 'start' or 'end'.")
    kept, shared = prefix[:length] if end == "end" else prefix[-length:], _is_shared(prefix.header.get("composition"))
    if end == "start" or shared:
        kept = _known(rotation, [prefix]).turn(kept, -max(0, prefix.length() - length))
    header = dict(prefix.header)
    # What was measured of the whole, its part does not have.
    for name, measured in (("training", ("dev_loss",)), ("initialization", ("prefix_length", "at_most"))):
        if isinstance(header.get(name), Mapping):
            header[name] = {key: value for key, value in header[name].items() if key not in measured}
    if (prefix.header.get("composition") or {}).get("mode") == "concatenate":
        # Which of them are about what stays is not known.
        header.pop("questions", None)
    parts = _describe_parts([prefix], [str(prefix.header.get("task") or "the whole")], "cut")
    header["composition"] = {"mode": "cut", "at": end, **(_SHARED if shared else {}), "parts": parts}
    return Prefix(kept.layers, header, prefix.head)


# --- what belongs together -------------------------------------------------------------------------------------------


def check_joinable(prefixes: Sequence[Prefix], names: Sequence[str] = ()) -> list[str]:
    """Refuse prefixes that do not belong together; returns their names, for messages.

    Raises:
        BackboneError: Their shapes or their backbones' fingerprints differ.
        ConfigError: There is none, one is no prefix or has a LoRA adapter of its own; or the names are too few or too
            many.
    """
    if not prefixes or not all(isinstance(one, Prefix) for one in prefixes):
        hint = "give a list of Prefix: Prefix.from_pretrained(path) reads one from a file."
        raise ConfigError(f"prefixes is {short_repr(prefixes)}.", hint=hint)
    names = list(names) or [f"prefix {number}" for number in range(1, len(prefixes) + 1)]
    if len(names) != len(prefixes):
        raise ConfigError(f"{len(names)} names for {len(prefixes)} prefixes.", hint="give one for each, or none.")
    for name, prefix in zip(names, prefixes, strict=True):
        if prefix.header.get("adapter"):
            raise ConfigError(f"{name} was trained on a LoRA adapter.", hint="compose prefixes of the plain backbone.")
    known = [(prefix.geometry, backbone_origin(prefix.header)) for prefix in prefixes]
    hint = "compose prefixes of one backbone, with the same weights; `prefixtune inspect FILE` names it."
    for (name, (shapes, origin)), (other, (other_shapes, other_origin)) in combinations(
        zip(names, known, strict=True), 2
    ):
        if any(shapes[site] != other_shapes[site] for site in shapes.keys() & other_shapes.keys()):
            raise BackboneError(f"{name} has {describe(shapes)}, but {other} {describe(other_shapes)}.", hint=hint)
        marks = origin.fingerprint, other_origin.fingerprint
        if all(marks) and not fingerprints_match(*marks):
            raise BackboneError(
                f"{name} was trained for {origin.name!r} and {other} for {other_origin.name!r}, whose weights differ.",
                hint=hint,
            )
    return names


def stored_rotation(prefixes: Sequence[Prefix]) -> Rotation | None:
    """How keys turn with position, as the headers say; None: none does.

    Raises:
        CheckpointError: A header has one that cannot be used for its prefix.
    """
    if any(
        set(prefix.sites) != {"decoder"} or backbone_origin(prefix.header).kind == "encoder-decoder"
        for prefix in prefixes
    ):
        # The text behind the prefix is not shifted.
        return Rotation("none")
    # All have the same: a fingerprint is of the rotary settings, too.
    stored = [(prefix.header["rotation"], prefix) for prefix in prefixes if prefix.header.get("rotation") is not None]
    found = [Rotation.from_header(value, prefix.geometry) for value, prefix in stored]
    return found[0] if found else None


def _known(rotation: Rotation | None, prefixes: Sequence[Prefix]) -> Rotation:
    rotation = rotation or stored_rotation(prefixes)
    if rotation is None:
        hint = "pass the backbone's: load_backbone(...).rotation."
        raise ConfigError("no header says how keys turn with position.", hint=hint)
    return rotation


def _widest(prefixes: Sequence[Prefix]) -> torch.dtype:
    """The dtype that holds the numbers of all."""
    return functools.reduce(torch.promote_types, (prefix.dtype for prefix in prefixes))


# --- the header ------------------------------------------------------------------------------------------------------


def lead_header(prefixes: Sequence[Prefix], lead: int) -> dict[str, Any]:
    """The header of a composed prefix, but for its parts: what the leading part says, or the next before it that does.

    Task, form and text format go together, so that they come from one part.
    """
    order = [prefix.header for prefix in (prefixes[lead], *reversed(prefixes[:lead]), *prefixes[lead + 1 :])]
    speaking = next((header for header in order if header.get("text_format") is not None), order[0])
    header: dict[str, Any] = {name: speaking.get(name) for name in ("task", "form", "text_format")}
    for name in ("backbone", "method"):
        header[name] = next((one[name] for one in order if one.get(name) is not None), None)
    if header["text_format"] is not None:
        # With the longest prompt and target of the parts that write the same text.
        formats = [one["text_format"] for one in order if one.get("text_format") is not None]
        alike = [one for one in formats if same_templates(one, header["text_format"])]
        limits = {name: max(one.get(name, 0) for one in alike) for name in _LIMITS if name in header["text_format"]}
        if all(one.get("max_length") for one in alike):
            limits["max_length"] = max(one["max_length"] for one in alike)
        elif "max_length" in header["text_format"]:
            limits["max_length"] = 0
        header["text_format"] = header["text_format"] | limits
    header["labels"] = order[0].get("labels") or None
    asked = zip_longest(*(prefix.header.get("questions") or () for prefix in prefixes))
    header["questions"] = [pair for some in asked for pair in some if pair][:MAX_QUESTIONS] or None
    licenses = {one.get("license") for one in order}
    header["license"] = licenses.pop() if len(licenses) == 1 else None
    return {name: value for name, value in header.items() if value is not None}


def same_templates(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two text formats write the same text around a source, whatever lengths they were trained with."""
    return all((one.get(name) or "") == (other.get(name) or "") for name in _TEMPLATES)


def _describe_parts(
    prefixes: Sequence[Prefix], names: Sequence[str], mode: str, weights: Sequence[float] = ()
) -> list[Mapping[str, Any]]:
    """What each part of a composed prefix was; joined ones that are joined again are replaced by their own parts.

    Raises:
        ConfigError: There are too many.
    """
    parts: list[Mapping[str, Any]] = []
    for number, (prefix, name) in enumerate(zip(prefixes, names, strict=True)):
        header, earlier = prefix.header, prefix.header.get("composition") or {}
        # Whoever wrote the file may have made them up.
        listed = earlier.get("parts")
        inner = [part for part in listed if isinstance(part, Mapping)] if isinstance(listed, list) else []
        if inner and mode == earlier.get("mode") == "concatenate":
            parts += inner
            continue
        entry: dict[str, Any] = {"name": name, "hash": content_hash(prefix), "prefix_length": prefix.lengths}
        entry |= {key: header.get(key) for key in ("task", "license")}
        entry |= {key: (header.get("training") or {}).get(key) for key in ("dev_loss", "backbone_dtype")}
        if weights:
            entry["weight"] = weights[number]
        if inner:
            entry["composition"] = {"mode": earlier.get("mode"), "hashes": [part.get("hash", "") for part in inner]}
        parts.append({key: value for key, value in entry.items() if value is not None})
    if len(parts) > MAX_PARTS:
        raise ConfigError(f"it would have {len(parts)} parts, more than {MAX_PARTS}.", hint="compose fewer.")
    return parts
