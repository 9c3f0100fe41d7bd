"""Faults of a request's body: all of them in one answer, each with its field, the value got and what is allowed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from prefixtune.errors import did_you_mean, short_repr
from prefixtune.server.responses import ApiError, bad_request, capitalize
from prefixtune.utils.config import allowed_range

__all__ = [
    "Check",
    "Fault",
    "faults_of",
    "in_slices",
    "refuse",
    "supported_fields",
    "unknown_fields",
    "whole",
    "whole_ids",
]


_MAX_FAULTS = 10
"""Most faults that an answer lists."""
_MAX_LENGTH = 900
"""Of their sentences, so that a response has room for all of them and the number of the others."""
_SLICE = 100
"""Items of a list that are checked at once."""
_MEANINGS = {"bool_type": "true or false", "dict_type": "an object", "list_type": "a list", "string_type": "a text"}
"""pydantic's errors in the words of JSON; of the others, its own words are clear."""


class Fault(NamedTuple):
    """One thing that is wrong with a body.

    Attributes:
        message: A sentence; empty for an unknown field, and for a fault that is only counted.
        param: The field at fault, as in `messages[0].role`.
        code: For programs.
        hint: Of an unknown field: the nearest ones.
    """

    message: str
    param: str
    code: str | None = None
    hint: str = ""


@dataclass(frozen=True)
class Check:
    """An annotation of a type: whatever is wrong with a value, one sentence says it.

    Attributes:
        text: What the value must be or, if it is not supported, why.
        kind: Which of the two.
        deep: Whether faults within the value are named by themselves.
    """

    text: str
    kind: Literal["must_be", "not_supported"] = "must_be"
    deep: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The schema of the type, with this check around it."""
        schema = handler(source)
        return schema if self.deep else core_schema.no_info_wrap_validator_function(self._validate, schema)

    def _validate(self, value: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise self.error() from None

    def error(self) -> PydanticCustomError:
        """The error of a value."""
        return PydanticCustomError(self.kind, "{text}", {"text": self.text})


def whole(values: list[Any]) -> list[Any]:
    """5.0 -> 5: JSON may write a whole number as either."""
    return [
        int(value) if isinstance(value, float) and value.is_integer() and -(2**63) <= value < 2**63 else value
        for value in values
    ]


def whole_ids(ids: Any) -> Any:
    """The same for token ids, where they need it."""
    return whole(ids) if isinstance(ids, list) and float in set(map(type, ids)) else ids


def in_slices(items: Any, validate: Callable[[Any], list[Any]]) -> list[Any]:
    """Check a list up to the first slice with faults: to collect all faults of a long list takes long."""
    valid: list[Any] = []
    if not isinstance(items, list) or len(items) <= _SLICE:
        return validate(items)
    for start in range(0, len(items), _SLICE):
        end = start + _SLICE
        try:
            valid += validate(items[start:end])
        except ValidationError:
            # Fails again, and with the right indices.
            return validate(items[:end])
    return valid


def refuse(faults: Sequence[Fault]) -> ApiError:
    """400: the faults in one message, with the field and the code of the first."""
    message, num_listed = "", 0
    for sentence, num_faults in _sentences(faults[:_MAX_FAULTS]):
        if message and len(message) + len(sentence) > _MAX_LENGTH:
            break
        # The name of a field begins a sentence as it is.
        is_name = not message or not sentence.partition(" ")[0].isalpha()
        message = f"{message} {sentence if is_name else capitalize(sentence)}".lstrip()
        num_listed += num_faults
    if more := len(faults) - num_listed:
        # Of a list, only the first faults are searched for.
        least = "at least " if any("[" in fault.param for fault in faults) else ""
        message += f" There is {least}1 more fault." if more == 1 else f" There are {least}{more} more faults."
    return bad_request(message, faults[0].param, faults[0].code)


def _sentences(faults: Sequence[Fault]) -> Iterator[tuple[str, int]]:
    """Sentences, and how many faults each has: unknown fields with the same hint share one."""
    for hint, group in itertools.groupby(faults, lambda fault: fault.hint):
        same = list(group)
        if hint:
            names = ", ".join(short_repr(fault.param) for fault in same)
            yield f"unknown field{'s' if len(same) > 1 else ''} {names}. {hint}", len(same)
        else:
            yield from ((fault.message, 1) for fault in same)


def faults_of(error: ValidationError, model: type[BaseModel]) -> list[Fault]:
    """What is wrong with a body, in the order of the model's fields."""
    details = error.errors(include_url=False, include_context=False)
    # Sentences of faults that no answer lists are not made: a body may have very many.
    rest = [Fault("", _name(one["loc"])) for one in details[_MAX_FAULTS:]]
    return [_fault(one, model) for one in details[:_MAX_FAULTS]] + rest


def supported_fields(model: type[BaseModel]) -> list[str]:
    """The fields that a body may have; those that are not supported have a schema of their own."""
    return [name for name, field in model.model_fields.items() if not field.json_schema_extra]


def unknown_fields(names: Sequence[str], known: Iterable[str]) -> list[Fault]:
    """Fields that there are not, each with the nearest one."""
    hints = [capitalize(did_you_mean(name.rpartition(".")[2], known)) for name in names[:_MAX_FAULTS]]
    listed = [Fault("", name, "unknown_field", hint) for name, hint in zip(names, hints, strict=False)]
    return listed + [Fault("", "")] * (len(names) - len(listed))


def _name(path: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _fault(details: ErrorDetails, model: type[BaseModel]) -> Fault:
    kind, path = details["type"], details["loc"]
    name = _name(path)
    shown = short_repr(name) if len(path) == 1 else name if len(name) <= 80 else f"{name[:77]}..."
    model, field = _locate(path, model)
    if kind == "extra_forbidden":
        return unknown_fields([name], supported_fields(model))[0]
    if kind == "not_supported":
        return Fault(f"{shown} is not supported: {details['msg']}.", name, "unsupported_field")
    allowed = _allowed(details, model, field if isinstance(path[-1], str) else None)
    if kind == "missing":
        return Fault(f"{shown} is missing; it must be {allowed}.", name)
    return Fault(f"{shown} is {_short(details['input'])}, but must be {allowed}.", name)


def _locate(path: tuple[int | str, ...], model: type[BaseModel]) -> tuple[type[BaseModel], FieldInfo | None]:
    """The innermost model on a path, and the last field in it."""
    field: FieldInfo | None = None
    for part in path:
        field = model.model_fields.get(part) if isinstance(part, str) else field
        inner = get_args(field.annotation) if field else ()
        model = next((kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)), model)
    return model, field


def _allowed(details: ErrorDetails, model: type[BaseModel], field: FieldInfo | None) -> str:
    """What a value must be: by what is known of its field, else by the error."""
    if field is not None:
        if texts := [rule.text for rule in field.metadata if isinstance(rule, Check)]:
            return texts[0]
        if bounds := allowed_range(field):
            return ("a number " if _is_float(field.annotation) else "a whole number ") + bounds
        if get_origin(field.annotation) is Literal:
            return f"one of {', '.join(get_args(field.annotation))}"
    if details["type"] == "model_type":
        required = [repr(name) for name, field in model.model_fields.items() if field.is_required()]
        return " with ".join(["an object", *([" and ".join(required)] if required else [])])
    return _MEANINGS.get(details["type"]) or details["msg"].removeprefix("Input should be ")


def _is_float(kind: Any) -> bool:
    return kind is float or any(_is_float(part) for part in get_args(kind))


def _short(value: Any) -> str:
    # The pieces of a long value are not all made.
    text = "".join(itertools.islice(json.JSONEncoder(ensure_ascii=False).iterencode(value), 41))
    return text if len(text) <= 40 else f"{text[:37]}..."
