"""Check and convert the values of configuration classes: names, types, choices."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from prefixtune.errors import ConfigError, describe_value, did_you_mean

__all__ = ["as_config", "as_float", "check_names", "fit_types", "type_fault"]

_LEAST, _MOST = -(2**63), 2**63 - 1
"""Whole numbers of a configuration are TOML's: of 64 bits, with a sign."""

_C = TypeVar("_C")


def check_names(
    kind: type, names: Iterable[str], what: str, hint: str, elsewhere: Mapping[str, str] | None = None
) -> None:
    """Refuse unknown names of configuration fields, all at once.

    Args:
        kind: The configuration's class.
        names: The names to check.
        what: The beginning of the message: `the file has unknown keys`, say.
        hint: Says where all names are listed.
        elsewhere: Names of other programs, and what to write here instead.

    Raises:
        ConfigError: A name is unknown; names the nearest known one.
    """
    known = [field.name for field in dataclasses.fields(kind)]
    listed = [f"{name!r}: {did_you_mean(name, known, elsewhere)}" for name in names if name not in known]
    if listed:
        raise ConfigError(f"{what}: {'; '.join(listed)}", hint=hint)


def as_config(kind: type[_C], given: _C | Mapping[str, Any] | None, options: Mapping[str, Any]) -> _C:
    """A configuration from an object, a dict or keyword options.

    Args:
        kind: The configuration's class; has `from_mapping`.
        given: The object or the dict.
        options: The keyword options.

    Raises:
        ConfigError: Both a config and options were passed, or the config has another type, or a name or value is wrong.
    """
    if given is not None and options:
        raise ConfigError(f"got both a config and {', '.join(options)}.", hint="give one of the two.")
    if isinstance(given, kind):
        return given
    values = options if given is None else given
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"config is {describe_value(given)}, but must be of type {kind.__name__}, or a dict.",
            hint=f"write config={kind.__name__}(...), or the options themselves as keywords.",
        )
    read: Any = kind
    made: _C = read.from_mapping(values)
    return made


def fit_types(config: Any) -> dict[str, str]:
    """Check that the values of a configuration have their fields' types.

    Whole numbers become floats and lists become tuples where a field has these.

    Returns:
        Field name -> what is wrong with its value.
    """
    owner: Any = type(config)
    kinds, faults = _kinds_of(owner), {}
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), kinds[field.name]
        if kind is float and type(value) is int:
            object.__setattr__(config, field.name, as_float(value))
        elif get_origin(kind) is tuple and isinstance(value, list):
            object.__setattr__(config, field.name, tuple(value))
        if fault := type_fault(field.name, getattr(config, field.name), kind):
            faults[field.name] = fault
    return faults


def as_float(value: int) -> float:
    """A whole number as a float; infinite, and so out of every range, if it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


@functools.cache
def _kinds_of(kind: type) -> dict[str, Any]:
    """The types of a configuration's fields."""
    return get_type_hints(kind)


def type_fault(name: str, value: Any, kind: Any) -> str:
    """What is wrong with a value's type, or with a value that is none of the allowed ones; empty: nothing.

    >>> type_fault("port", "80", int)
    "port is '80', but must be of type int"
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        if isinstance(value, str) and value in parts:
            return ""
        shown = repr(value) if isinstance(value, str) else describe_value(value)
        return f"{name} is {shown}, but must be one of {', '.join(parts)} ({did_you_mean(str(value)[:80], parts)})"
    if origin in (Union, UnionType):
        good, wanted = any(not type_fault(name, value, part) for part in parts), _name_of(kind)
    elif origin is tuple:
        good = isinstance(value, tuple) and all(not type_fault(name, item, parts[0]) for item in value)
        wanted = "a list of whole numbers" if parts[0] is int else "a list of texts"
    elif kind is float:
        good, wanted = isinstance(value, int | float) and not isinstance(value, bool), "of type float"
    else:
        good = isinstance(value, origin or kind) and not (kind is int and isinstance(value, bool))
        wanted = _name_of(kind)
        if good and isinstance(value, str) and not _is_utf8(value):
            good, wanted = False, "UTF-8 text"
        if good and isinstance(value, int) and not _LEAST <= value <= _MOST:
            good, wanted = False, f"between {_LEAST} and {_MOST}"
    shown = repr(value) if isinstance(value, str | bool | int | float | list | tuple) else describe_value(value)
    return "" if good else f"{name} is {shown if len(shown) <= 200 else shown[:200] + '...'}, but must be {wanted}"


def _is_utf8(text: str) -> bool:
    """Whether a file can hold the text; half a surrogate pair, possible in JSON and arguments, cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _name_of(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):
        return " or ".join("None" if part is NoneType else _name_of(part) for part in get_args(kind))
    plain = get_origin(kind) or kind
    return {"Mapping": "a table (a dict)", "Sequence": "a list"}.get(plain.__name__, f"of type {plain.__name__}")
