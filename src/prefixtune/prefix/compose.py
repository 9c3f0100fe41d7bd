"""Make one prefix of several: one after the other, or number by number.

Joined one after the other, the result is what attention sees with all of them in front: each moved on by the lengths
before it, the text behind all. Values have no position, so that only keys turn (see `rotation`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from prefixtune.errors import BackboneError, ConfigError
from prefixtune.prefix.composition import describe_parts, lead_header
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.prefix.geometry import SITES, Site, describe
from prefixtune.prefix.prefix import KeyValue, Prefix
from prefixtune.prefix.rotation import Rotation

__all__ = ["check_joinable", "concatenate", "join", "stored_rotation"]


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
        ConfigError: They cannot be joined: no rotation is known, their placements or adapters do not fit, several have
            a head, or nothing is left of the model's positions.
    """
    names = check_joinable(prefixes, names)
    rotation = rotation or stored_rotation(prefixes)
    if rotation is None:
        raise ConfigError(
            "no header says how keys turn with position: the files are older than joining.",
            hint="pass the backbone's rotation: load_backbone(...).rotation.",
        )
    total, most = sum(prefix.length() for prefix in prefixes), rotation.max_positions
    if most is not None and total >= most:
        raise ConfigError(
            f"joined, the prefixes take {total:,} positions, but the model has {most:,}, and the text needs some.",
            hint="join fewer, or cut them: `prefixtune cut FILE --length P`.",
        )
    joined = join(prefixes, rotation)
    heads = [number for number, prefix in enumerate(prefixes) if prefix.head is not None or prefix.header.get("labels")]
    if len(heads) > 1:
        raise ConfigError(
            f"{names[heads[0]]} and {names[heads[1]]} both classify, and a prefix has one set of labels.",
            hint="join one prefix that classifies with others that do not.",
        )
    lead = heads[0] if heads else len(prefixes) - 1
    header = lead_header(prefixes, lead) | {"rotation": rotation.to_header()}
    header["composition"] = {"mode": "concatenate", "parts": describe_parts(prefixes, names, nested="concatenate")}
    return Prefix(joined.layers, header, prefixes[lead].head)


def join(prefixes: Sequence[Prefix], rotation: Rotation) -> Prefix:
    """The tensors of `concatenate`, without its checks, header and head; differentiable.

    In a decoder-only model each part is turned on by the lengths before it. Where the text is not shifted (encoders,
    encoder-decoders), no key turns, and each site holds the parts that have it.
    """
    dtype = prefixes[0].dtype
    for prefix in prefixes:
        dtype = torch.promote_types(dtype, prefix.dtype)
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


def stored_rotation(prefixes: Sequence[Prefix]) -> Rotation | None:
    """How keys turn with position, as the first header that knows it says; None: none does.

    Raises:
        CheckpointError: A header has one that cannot be used.
    """
    for prefix in prefixes:
        if prefix.header.get("rotation") is not None:
            return Rotation.from_header(prefix.header["rotation"])
    return None


def check_joinable(prefixes: Sequence[Prefix], names: Sequence[str] = ()) -> list[str]:
    """Refuse prefixes that do not belong together; returns their names, for messages.

    Raises:
        BackboneError: Their shapes or their backbones' fingerprints differ.
        ConfigError: There is none, one has a LoRA adapter of its own, or one is an infix and another is not.
    """
    if not prefixes:
        raise ConfigError("there is no prefix to compose.", hint="give at least one.")
    names = list(names) or [f"prefix {number}" for number in range(1, len(prefixes) + 1)]
    first = prefixes[0]
    for name, prefix in zip(names, prefixes, strict=True):
        if prefix.header.get("adapter"):
            raise ConfigError(
                f"{name} was trained together with a LoRA adapter, which other prefixes were not made for.",
                hint="compose prefixes of the plain backbone.",
            )
        if prefix.placement != first.placement:
            raise ConfigError(
                f"{names[0]} is placed {first.placement!r}, but {name} {prefix.placement!r}.",
                hint="compose prefixes of one placement.",
            )
        shared = set(prefix.sites) & set(first.sites)
        mine, theirs = first.geometry, prefix.geometry
        if not shared or any(mine[site] != theirs[site] for site in shared):
            raise BackboneError(
                f"{names[0]} has {describe(mine)}, but {name} {describe(theirs)}.",
                hint="compose prefixes of one backbone; `prefixtune inspect FILE` names it.",
            )
        _check_same_backbone(first.header, prefix.header, names[0], name)
    return names


def _check_same_backbone(one: Mapping[str, Any], other: Mapping[str, Any], name: str, other_name: str) -> None:
    first, second = one.get("backbone"), other.get("backbone")
    if not isinstance(first, Mapping) or not isinstance(second, Mapping):
        return
    prints = first.get("fingerprint"), second.get("fingerprint")
    if None not in prints and not fingerprints_match(str(prints[0]), str(prints[1])):
        raise BackboneError(
            f"{name} was trained for {first.get('name')!r} and {other_name} for {second.get('name')!r}, whose weights "
            "differ.",
            hint="compose prefixes of one backbone, with the same weights; `prefixtune inspect FILE` names it.",
        )
