"""A packed row's groups as `packed_attention.cpp` reads them."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

from prefixtune.attention.packing import Packing
from prefixtune.prefix.geometry import Site

__all__ = ["GroupEntry", "Plan", "SegmentEntry", "make_plan"]


class GroupEntry(ctypes.Structure):
    """Keys that all of a group see, its segments, and positions of the prefix that it does not see."""

    _fields_ = [(name, ctypes.c_int64) for name in ("first_key", "shared", "first_segment", "num_segments")]
    _fields_ += [(name, ctypes.c_int64) for name in ("first_hidden", "num_hidden")]


class SegmentEntry(ctypes.Structure):
    """Queries that follow each other in one text, and the keys that they alone see."""

    _fields_ = [(name, ctypes.c_int64) for name in ("first_query", "count", "first_key", "own", "position")]
    _fields_ += [("hides_prefix", ctypes.c_int64)]


@dataclass(frozen=True, eq=False)
class Plan:
    """The groups of a row at a site.

    Attributes:
        groups: In the order of the row.
        segments: Of all groups.
        hidden: Positions of prefixes that groups do not see.
        num_queries: Of the row.
        num_keys: Of the row, or of the encoder's row at the site `cross`.
        num_shared: Per group, keys that all of it see.
    """

    groups: ctypes.Array[GroupEntry]
    segments: ctypes.Array[SegmentEntry]
    hidden: ctypes.Array[Any]
    num_queries: int
    num_keys: int
    num_shared: tuple[int, ...]


@functools.lru_cache(maxsize=16)
def make_plan(packing: Packing, site: Site, infix: bool) -> Plan:
    """The groups of a row at a site.

    Args:
        packing: The row.
        site: Where.
        infix: The prefix is hidden from the sources.
    """
    hides = packing.hides_at(site)
    groups: list[GroupEntry] = []
    segments: list[SegmentEntry] = []
    hidden: list[int] = []
    first_query, first_key = 0, 0
    for group, queries, keys in zip(packing.groups, *packing.sizes(site), strict=True):
        own_hidden = sorted(set(group.hidden)) if hides else []
        first_segment, source = len(segments), group.source_length if site == "decoder" else keys
        if site != "decoder":
            # Everything is visible.
            segments.append(SegmentEntry(first_query, queries, 0, 0, -1, 0))
        elif source:
            segments.append(SegmentEntry(first_query, source, 0, 0, 0, int(infix)))
        target = first_query + source
        for length in group.target_lengths if site == "decoder" else ():
            segments.append(SegmentEntry(target, length, target, length, source, 0))
            target += length
        count = len(segments) - first_segment
        groups.append(GroupEntry(first_key, source, first_segment, count, len(hidden), len(own_hidden)))
        hidden += own_hidden
        first_query, first_key = first_query + queries, first_key + keys
    return Plan(
        (GroupEntry * len(groups))(*groups),
        (SegmentEntry * len(segments))(*segments),
        (ctypes.c_int64 * len(hidden))(*hidden),
        first_query,
        first_key,
        tuple(group.shared for group in groups),
    )
