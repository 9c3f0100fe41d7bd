"""The start of a run's prefix: what it is before the first step, and what the header says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import ConfigError
from prefixtune.prefix.geometry import Site, spell_lengths
from prefixtune.prefix.prefix import Prefix

__all__ = ["Start", "by_site", "check_lengths", "lengths_from"]


@dataclass(frozen=True)
class Start:
    """What a run's prefix starts from.

    Attributes:
        prefix: In float32; None: random numbers.
        description: What the header says of it: its `kind` and more.
        blocks: By index of a training example that the prefix was made from: the positions `[first, stop)` of its
            block in the prefix.
    """

    prefix: Prefix | None
    description: dict[str, Any]
    blocks: Mapping[int, tuple[int, int]] = field(default_factory=dict)


def by_site(backbone: Backbone, prefix_length: int | Mapping[Site, int]) -> dict[Site, int]:
    """P of all sites of a backbone, or of those that are named."""
    if isinstance(prefix_length, int):
        return dict.fromkeys(backbone.geometry, prefix_length)
    return dict(prefix_length)


def lengths_from(wanted: Mapping[Site, int], actual: Mapping[Site, int]) -> dict[Site, int]:
    """P of each site of a run that starts from a prefix: what the run gives it, or else that of the prefix.

    Args:
        wanted: What the run gives each site; 0: nothing.
        actual: P of each site of the prefix.
    """
    return {site: length or actual.get(site, 0) for site, length in wanted.items()}


def check_lengths(actual: Mapping[Site, int], wanted: Mapping[Site, int]) -> None:
    """Refuse a start with other positions than the run trains.

    Args:
        actual: P of each site of the prefix to start from.
        wanted: The run's prefix length at each site.

    Raises:
        ConfigError: Its sites or lengths are others.
    """
    if actual != wanted:
        by_name = len(actual.keys() | wanted.keys()) > 1
        has, runs = _spell(actual, by_name), _spell(wanted, by_name)
        is_longer = max(actual.values(), default=0) > max(wanted.values(), default=0)
        cut = ", or cut the prefix: `prefixtune cut FILE --length P`" if is_longer else ""
        raise ConfigError(
            f"the prefix to start from has length {has}, but {'sites' if by_name else 'prefix_length'} is {runs}.",
            hint=f"set {'sites' if by_name else 'prefix_length'} to {has}{cut}.",
        )


def _spell(lengths: Mapping[Site, int], by_name: bool) -> str:
    """Lengths as the options `prefix_length`, of one site, and `sites` take them."""
    return spell_lengths(lengths) if by_name else ",".join(map(str, lengths.values()))
