"""pydantic's validation errors in this project's words: the name, the value, what is allowed."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from prefixtune.errors import describe_value, did_you_mean

__all__ = ["MAX_FAULTS", "cut", "describe_fault", "describe_unknown", "join_faults", "show_value", "table_at"]

_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "a table",
    "mapping": "a table",
    "model": "a table",
}
"""The first word of an error's type -> what it wants."""

_BOUNDS = {
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "above {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "below {lt:g}",
    "too_short": "of at least {min_length}",
    "too_long": "of at most {max_length}",
    "string_too_short": "at least {min_length} characters long",
    "string_too_long": "at most {max_length} characters long",
}

MAX_FAULTS = 50
"""Of one source, in a message."""

_LONGEST, _MOST_BITS = 200, 14_000


def show_value(value: object) -> str:
    """A value as messages show it; a long one is cut.

    >>> show_value("80"), show_value(True), show_value({"a": 1})
    ("'80'", 'True', 'of type dict')
    >>> show_value([1, 10**5000])
    '[1, a number of 16610 bits]'
    """
    if isinstance(value, str):
        return cut(repr(value[: 2 * _LONGEST]))
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        # Python refuses to write one of more than 4,300 digits.
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, list | tuple):
        items = ", ".join(map(show_value, value[:_LONGEST]))
        return cut(f"[{items}]" if isinstance(value, list) else f"({items}{',' * (len(value) == 1)})")
    return cut(repr(value)) if isinstance(value, int | float) else describe_value(value)


def cut(text: str) -> str:
    """A text as messages show it; a long one is cut."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def describe_fault(error: ErrorDetails, name: str, allowed_range: str = "") -> str:
    """One error of pydantic as `NAME is VALUE, but must be ...`.

    Args:
        error: From `ValidationError.errors()`.
        name: How to name the value.
        allowed_range: All bounds of the value, if it has several; empty: the one that is broken.

    >>> import pydantic
    >>> class Model(pydantic.BaseModel):
    ...     size: int = pydantic.Field(ge=1)
    >>> try:
    ...     Model(size=0)
    ... except pydantic.ValidationError as error:
    ...     print(describe_fault(error.errors()[0], "size"))
    size is 0, but must be at least 1
    """
    kind, context = error["type"], error.get("ctx", {})
    if kind == "missing":
        return f"{name} is missing"
    if kind == "value_error":
        return f"{name} {context['error']}"
    value = show_value(error["input"])
    if kind in _BOUNDS:
        return f"{name} is {value}, but must be {allowed_range or _BOUNDS[kind].format(**context)}"
    if kind == "literal_error":
        choices = [choice for choice in re.findall(r"'([^']*)'", context["expected"]) if choice]
        nearest = did_you_mean(str(error["input"])[:80], choices)
        suggestion = f" ({nearest})" if nearest.startswith("did") else ""
        return f"{name} is {value}, but must be one of {', '.join(map(repr, choices))}{suggestion}"
    # A whole number that is no float's is too large for one.
    if kind == "finite_number":
        return f"{name} is {value}, but must be a finite number {allowed_range}".rstrip()
    if kind == "float_type" and type(error["input"]) is int:
        return f"{name} is {value}, but must be {allowed_range or 'a number'} and at most {sys.float_info.max:.1e}"
    return f"{name} is {value}, but must be {_wanted(kind, context)}"


def _wanted(kind: str, context: Mapping[str, Any]) -> str:
    word = kind.split("_")[0]
    return _WANTED.get(word, f"of another type ({kind}{f', {dict(context)}' if context else ''})")


def describe_unknown(kind: str, name: str, known: Iterable[str], suggestion: str, earlier: Sequence[str]) -> str:
    """An unknown name, with the nearest known one; `earlier` faults may already list all known ones."""
    suggestion = suggestion or did_you_mean(name, known)
    ending = f" ({suggestion.removesuffix('.')})"
    if suggestion.startswith("known:") and any(fault.endswith(ending) for fault in earlier):
        ending = ""
    return f"unknown {kind} {show_value(name)}{ending}"


def join_faults(faults: Sequence[str]) -> str:
    """At most `MAX_FAULTS` of them, and how many more there are."""
    more = [f"and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else []
    return "; ".join([*faults[:MAX_FAULTS], *more])


def table_at(kind: Any, path: Sequence[int | str]) -> type[BaseModel] | None:
    """The model at a path into a value of a type: of a mapping's or list's values, or of a model's field."""
    for part in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[str(part)].annotation
        else:
            kind = get_args(kind)[-1] if isinstance(part, str) else get_args(kind)[0]
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
