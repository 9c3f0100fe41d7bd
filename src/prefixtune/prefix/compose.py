"""Make one prefix of several: one after the other, or number by number.

Joined one after the other, the result is what attention sees with all of them in front: each moved on by the lengths
before it, the text behind all. Values have no position, so that only keys turn (see `rotation`). Number by number,
prefixes of one length are averaged.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from itertools import accumulate
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from prefixtune.errors import BackboneError, CheckpointError, ConfigError, short_repr
from prefixtune.prefix.composition import check_count, describe_parts, lead_header
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.prefix.geometry import SITES, Site, describe
from prefixtune.prefix.header import backbone_origin
from prefixtune.prefix.prefix import Head, KeyValue, Prefix
from prefixtune.prefix.rotation import Rotation


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
    rotation, lead = check_join(prefixes, rotation, names=names)
    if rotation is None:
        raise ConfigError(
            "no header says how keys turn with position: the files are older than joining.",
            hint="pass the backbone's rotation: load_backbone(...).rotation.",
        )
    joined = join(prefixes, rotation)
    names = _named(prefixes, names)
    header = lead_header(prefixes, lead) | {"rotation": rotation.to_header()}
    header["composition"] = {"mode": "concatenate", "parts": describe_parts(prefixes, names, nested="concatenate")}
    return Prefix(joined.layers, header, prefixes[lead].head)


def check_join(
    prefixes: Sequence[Prefix], rotation: Rotation | None = None, *, names: Sequence[str] = ()
) -> tuple[Rotation | None, int]:
    """Refuse prefixes that cannot stand one after the other, before anything is computed.

    Args:
        prefixes: At least one, in order.
        rotation: The backbone's; None: as the headers have it.
        names: What to call the parts in messages; none: by number.

    Returns:
        The rotation (None: it is unknown), and which part the result has its head, task and text format of.

    Raises:
        PrefixError: As `concatenate`.
    """
    names = check_joinable(prefixes, names)
    rotation = rotation or stored_rotation(prefixes, names)
    total, most = sum(prefix.length() for prefix in prefixes), None if rotation is None else rotation.max_positions
    if most is not None and total >= most:
        raise ConfigError(
            f"joined, the prefixes take {total:,} positions, but the model has {most:,}, and the text needs some.",
            hint="join fewer, or cut them: `prefixtune cut FILE --length P`.",
        )
    check_count(prefixes, "concatenate")
    heads = [number for number, prefix in enumerate(prefixes) if prefix.head is not None or prefix.header.get("labels")]
    if len(heads) > 1:
        raise ConfigError(
            f"{names[heads[0]]} and {names[heads[1]]} both classify, and a prefix has one set of labels.",
            hint="join one prefix that classifies with others that do not.",
        )
    return rotation, heads[0] if heads else len(prefixes) - 1


def join(prefixes: Sequence[Prefix], rotation: Rotation) -> Prefix:
    """The tensors of `concatenate`, without its checks, header and head; differentiable.

    In a decoder-only model each part is turned on by the lengths before it. Where the text is not shifted (encoders,
    encoder-decoders), no key turns, and each site holds the parts that have it.
    """
    dtype = _widest(prefixes)
    starts = accumulate((prefix.length() for prefix in prefixes), initial=0)
    turned = [
        rotation.turn(prefix.to(dtype, prefixes[0].device), start)
        for prefix, start in zip(prefixes, starts, strict=False)
    ]
    layers: dict[Site, tuple[KeyValue, ...]] = {}
    for site in SITES:
        parts = [prefix.layers[site] for prefix in turned if site in prefix.layers]
        if parts:
            layers[site] = tuple(
                (torch.cat([key for key, _ in layer], dim=1), torch.cat([value for _, value in layer], dim=1))
                for layer in zip(*parts, strict=True)
            )
    return Prefix(layers)


# --- number by number ------------------------------------------------------------------------------------------------


def average(prefixes: Sequence[Prefix], *, names: Sequence[str] = ()) -> Prefix:
    """The mean of prefixes of one length, of keys, values and heads; see `interpolate` for what is refused."""
    names = check_joinable(prefixes, names)
    _check_labels(prefixes)
    return _blend(prefixes, [1 / len(prefixes)] * len(prefixes), names, "average")


def interpolate(prefixes: Sequence[Prefix], weights: Sequence[float], *, names: Sequence[str] = ()) -> Prefix:
    """The weighted mean of prefixes of one length, of keys, values and heads.

    Task and text format are those of the last part that has them.

    Args:
        prefixes: Of one backbone.
        weights: One for each, with sum 1; a negative one, or one above 1, goes beyond a part.
        names: What to call the parts in messages and in the header; none: by number.

    Raises:
        BackboneError: They are of different backbones.
        ConfigError: Their lengths or labels differ, or the weights do not fit.
    """
    names = check_joinable(prefixes, names)
    _check_labels(prefixes)
    are_numbers = isinstance(weights, Sequence) and all(isinstance(one, Real) for one in weights)
    if not are_numbers or len(weights) != len(prefixes) or not abs(sum(weights) - 1) <= 1e-6:
        raise ConfigError(
            f"the weights are {short_repr(weights)}, but must be {len(prefixes)} numbers with sum 1.",
            hint="divide each by their sum.",
        )
    return _blend(prefixes, [float(weight) for weight in weights], names, "interpolate")


def _blend(prefixes: Sequence[Prefix], weights: Sequence[float], names: Sequence[str], mode: str) -> Prefix:
    """The weighted sum of prefixes, in float32, and its header."""
    lengths = [prefix.lengths for prefix in prefixes]
    for name, other in zip(names, lengths, strict=True):
        if other != lengths[0]:
            raise ConfigError(
                f"{names[0]} has {_lengths(lengths[0])} positions, but {name} {_lengths(other)}.",
                hint="cut the longer one with `prefixtune cut`, or join them with --mode concatenate.",
            )
    dtype, device = _widest(prefixes), prefixes[0].device

    def total(tensors: Sequence[Tensor]) -> Tensor:
        parts = [w * tensor.to(device).float() for w, tensor in zip(weights, tensors, strict=True)]
        return torch.stack(parts).sum(0).to(dtype)

    layers: dict[Site, tuple[KeyValue, ...]] = {
        site: tuple(
            (total([key for key, _ in layer]), total([value for _, value in layer]))
            for layer in zip(*(prefix.layers[site] for prefix in prefixes), strict=True)
        )
        for site in prefixes[0].sites
    }
    heads = [prefix.head for prefix in prefixes if prefix.head is not None]
    head = Head(total([one.weight for one in heads]), total([one.bias for one in heads])) if heads else None
    header = lead_header(prefixes, len(prefixes) - 1)
    rotation = stored_rotation(prefixes, names)
    if rotation is not None and any(prefix.header.get("rotation") is not None for prefix in prefixes):
        header["rotation"] = rotation.to_header()
    header["composition"] = {"mode": mode, "parts": describe_parts(prefixes, names, weights=weights)}
    return Prefix(layers, header, head)


def _check_labels(prefixes: Sequence[Prefix]) -> None:
    """Refuse to average heads of different labels.

    Raises:
        ConfigError: Labels or shapes of heads differ, or only some have a head.
    """
    kinds = [
        (prefix.header.get("labels"), None if prefix.head is None else tuple(prefix.head.weight.shape))
        for prefix in prefixes
    ]
    if any(kind != kinds[0] for kind in kinds):
        raise ConfigError(
            "the prefixes have different labels, or only some have any, so that their heads cannot be averaged.",
            hint="blend prefixes of one set of labels.",
        )


def _lengths(lengths: Mapping[Site, int]) -> str:
    return ", ".join(f"{site} {length}" for site, length in lengths.items())


# --- cut -------------------------------------------------------------------------------------------------------------


def cut(
    prefix: Prefix, length: int, rotation: Rotation | None = None, *, end: Literal["start", "end"] = "end"
) -> Prefix:
    """Some of a prefix's positions.

    The header has no development loss: it is the whole's, and stands in its entry of the parts.

    Cut at the end, the first ones stay as they are. Cut at the start, the keys of the rest are turned back, so that it
    begins at position 0; what it has taken over from the positions before it stays in it.

    Args:
        prefix: The whole.
        length: How many positions stay, at every site that has more.
        rotation: The backbone's; None: as the header has it. Needed at the start only.
        end: Where to cut.

    Raises:
        CheckpointError: The rotation in the header cannot be used.
        ConfigError: Nothing would be cut, or left; no rotation is known; or an argument is of a wrong type.
    """
    _check_prefixes([prefix])
    if end not in ("start", "end"):
        raise ConfigError(f"end is {end!r}, but must be 'start' or 'end'.", hint="'end' keeps the first positions.")
    if not isinstance(length, int) or not 1 <= length < prefix.prefix_length:
        raise ConfigError(
            f"the prefix has {prefix.prefix_length} positions, and cannot be cut to {length!r}.",
            hint="choose a smaller length, at least 1.",
        )
    if end == "end":
        kept = prefix[:length]
    else:
        rotation = rotation or stored_rotation([prefix])
        if rotation is None:
            raise ConfigError(
                "the header does not say how keys turn with position: the file is older than joining.",
                hint="pass the backbone's rotation: load_backbone(...).rotation.",
            )
        kept = rotation.turn(prefix[-length:], -max(0, prefix.length() - length))
    whole = describe_parts([prefix], [str(prefix.header.get("task") or "the whole")])
    header = {**_unmeasured(prefix.header), "composition": {"mode": "cut", "at": end, "parts": whole}}
    return Prefix(kept.layers, header, prefix.head)


def _unmeasured(header: Mapping[str, Any]) -> dict[str, Any]:
    """A header without what was measured of the whole, which its part does not have."""
    kept = dict(header)
    for name, measured in (("training", ("dev_loss",)), ("initialization", ("prefix_length", "at_most"))):
        if isinstance(header.get(name), Mapping):
            kept[name] = {key: value for key, value in header[name].items() if key not in measured}
    return kept


# --- what belongs together -------------------------------------------------------------------------------------------


def _named(prefixes: Sequence[Prefix], names: Sequence[str]) -> list[str]:
    return list(names) or [f"prefix {number}" for number in range(1, len(prefixes) + 1)]


def _widest(prefixes: Sequence[Prefix]) -> torch.dtype:
    """The dtype that holds the numbers of all."""
    return functools.reduce(torch.promote_types, (prefix.dtype for prefix in prefixes))


def stored_rotation(prefixes: Sequence[Prefix], names: Sequence[str] = ()) -> Rotation | None:
    """How keys turn with position, as the headers say; None: none does.

    Args:
        prefixes: At least one.
        names: What to call them in messages; none: by number.

    Raises:
        CheckpointError: A header has one that cannot be used for its prefix, or two have different ones.
    """
    names = _named(prefixes, names)
    if any(map(_is_unshifted, prefixes)):
        return Rotation("none")
    found: list[tuple[str, Rotation]] = []
    for name, prefix in zip(names, prefixes, strict=True):
        if prefix.header.get("rotation") is None:
            continue
        try:
            rotation = Rotation.from_header(prefix.header["rotation"])
            rotation.check(prefix.geometry)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error.message}", hint=error.hint) from error
        if found and (what := found[0][1].differs_in(rotation)):
            raise CheckpointError(
                f"{found[0][0]} and {name} do not agree on how keys turn with position: they differ in {what}.",
                hint="`prefixtune compose --backbone NAME` finds the rotation by running the backbone.",
            )
        found.append((name, rotation))
    return found[0][1] if found else None


def _is_unshifted(prefix: Prefix) -> bool:
    """Whether the text behind a prefix is not shifted, so that nothing is moved: in encoders."""
    return set(prefix.sites) != {"decoder"} or backbone_origin(prefix.header).kind == "encoder-decoder"


def check_joinable(prefixes: Sequence[Prefix], names: Sequence[str] = ()) -> list[str]:
    """Refuse prefixes that do not belong together; returns their names, for messages.

    Raises:
        BackboneError: Their shapes or their backbones' fingerprints differ.
        ConfigError: There is none, one is no prefix or has a LoRA adapter of its own; or the names are too few or too
            many.
    """
    _check_prefixes(prefixes)
    if len(names) not in (0, len(prefixes)):
        raise ConfigError(f"{len(names)} names for {len(prefixes)} prefixes.", hint="give one for each, or none.")
    names = _named(prefixes, names)
    # By site, the first part that has it; and the first one that says of which weights it is.
    by_site: dict[Site, tuple[str, Prefix]] = {}
    known: tuple[str, Prefix] | None = None
    for name, prefix in zip(names, prefixes, strict=True):
        if prefix.header.get("adapter"):
            raise ConfigError(
                f"{name} was trained together with a LoRA adapter, which other prefixes were not made for.",
                hint="compose prefixes of the plain backbone.",
            )
        for site, shapes in prefix.geometry.items():
            other_name, other = by_site.setdefault(site, (name, prefix))
            if other.geometry[site] != shapes:
                raise BackboneError(
                    f"{other_name} has {describe(other.geometry)}, but {name} {describe(prefix.geometry)}.",
                    hint="compose prefixes of one backbone; `prefixtune inspect FILE` names it.",
                )
        if backbone_origin(prefix.header).fingerprint:
            known = known or (name, prefix)
            _check_same_backbone(known[1].header, prefix.header, known[0], name)
    return names


def _check_prefixes(prefixes: object) -> None:
    """Refuse arguments that are no prefixes.

    Raises:
        ConfigError: There is none, or one is something else.
    """
    if not isinstance(prefixes, Sequence) or not prefixes or not all(isinstance(one, Prefix) for one in prefixes):
        raise ConfigError(
            f"prefixes is {short_repr(prefixes)}, but must be a list of Prefix.",
            hint="Prefix.from_pretrained(path) reads one from a file.",
        )


def _check_same_backbone(one: Mapping[str, Any], other: Mapping[str, Any], name: str, other_name: str) -> None:
    first, second = backbone_origin(one), backbone_origin(other)
    if not fingerprints_match(first.fingerprint, second.fingerprint):
        raise BackboneError(
            f"{name} was trained for {first.name!r} and {other_name} for {second.name!r}, whose weights differ.",
            hint="compose prefixes of one backbone, with the same weights; `prefixtune inspect FILE` names it.",
        )
