"""Variants: a method with settings of its own under a name of its own, so that several stand side by side in a study.

[variants.prefix-examples]
method = "prefix"
prefix_length = 106
initialization = "examples"
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from prefixtune.errors import did_you_mean, short_repr
from prefixtune.studies.kinds import METHODS, PREFIX_METHODS, SIZED, UNTRAINED, Start, base_method

__all__ = ["check_method", "check_variants", "grid_faults", "variant_lengths", "variant_settings"]


GRID_KEYS = ("method", "prefix_length", "initialization")
"""Keys of a variant that place it in the grid; all others are settings of `prefixtune train`."""
_NAME = re.compile("[a-z][a-z0-9]*(-[a-z0-9]+)*")
_SIZED_NAME = re.compile(f"({'|'.join(SIZED)})[0-9]+")
_MOST_CHARACTERS = 40


def check_method(method: str, variants: Mapping[str, Any] = {}) -> str:
    """A method, with a size or without, or the name of a variant.

    Raises:
        ValueError: It is none.
    """
    if method in variants:
        return method
    base, _, size = method.partition(":")
    if base not in METHODS:
        raise ValueError(f"is {method!r} ({did_you_mean(method, [*METHODS, *variants]).removesuffix('.')})")
    if ":" in method and not (base in SIZED and size.isascii() and size.isdigit() and len(size) < 10 and int(size)):
        raise ValueError(f"is {method!r}, but a size goes with top, adapter and lora, as in adapter:8")
    return method


def check_variants(variants: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    """Check the names of variants, and that each has a method.

    Raises:
        ValueError: A name is not allowed, or a method is missing or unknown.
    """
    for name, values in variants.items():
        if not _NAME.fullmatch(name) or len(name) > _MOST_CHARACTERS:
            raise ValueError(
                f"has the name {short_repr(name)}, but a name has small letters, digits and single hyphens, "
                f"{_MOST_CHARACTERS} at most"
            )
        if name in METHODS or _SIZED_NAME.fullmatch(name):
            raise ValueError(f"has the name {name!r}, which is a method's; choose another, such as 'my-{name}'")
        method = values.get("method")
        if not isinstance(method, str):
            raise ValueError(f"{name!r} has no method; write method = 'prefix', or another one")
        try:
            check_method(method)
        except ValueError as error:
            raise ValueError(f"{name!r} has a method that {error}") from None
    return variants


def grid_faults(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with where a variant stands in the grid."""
    where, base = f"variants.{name}", base_method(str(values["method"]))
    lengths, start = variant_lengths(values), values.get("initialization", "task")
    if ":" in str(values["method"]) and "method_size" in values:
        yield f"{where} has method_size = {short_repr(values['method_size'])} and the size of {values['method']!r}"
    if base in UNTRAINED:
        yield f"{where} has the method {base!r}, which trains nothing and has no variants"
    if base not in PREFIX_METHODS:
        for key in values.keys() & {"prefix_length", "initialization"}:
            yield f"{where} has {key!r}, but the method {base!r} has no prefix"
    is_sound = all(type(length) is int and length >= 1 for length in lengths) and len(set(lengths)) == len(lengths)
    if "prefix_length" in values and not (lengths and is_sound):
        shown = short_repr(values["prefix_length"])
        yield f"{where}.prefix_length is {shown}, but must be a whole number of at least 1, or a list of them"
    if start not in get_args(Start):
        suggestion = did_you_mean(str(start), get_args(Start)).removesuffix(".")
        yield f"{where}.initialization is {short_repr(start)} ({suggestion})"


def variant_lengths(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """A variant's own prefix lengths, of a number or a list; empty: it has none."""
    length = values.get("prefix_length", ())
    return tuple(length) if isinstance(length, list | tuple) else (length,)


def variant_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """A variant's settings of training, without those that place it in the grid."""
    return {key: value for key, value in values.items() if key not in GRID_KEYS}
