"""The base of every configuration: pydantic models whose mistakes are all named in one `ConfigError`.

A field is written once, with its type, range, choices, default and help. The keys of TOML and YAML files, the options
of commands, environment variables, Python's keyword arguments, the JSON schema and the documentation come from it.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails

from prefixtune.errors import ConfigError, PrefixError, describe_value, did_you_mean
from prefixtune.utils.config_files import read_config_file
from prefixtune.utils.faults import MAX_FAULTS, cut, describe_fault, describe_unknown, join_faults, show_value, table_at
from prefixtune.utils.home import expand_home

__all__ = [
    "CommaList",
    "Config",
    "DTypeName",
    "DeviceName",
    "Layer",
    "Table",
    "TextList",
    "allowed_range",
    "has_commas",
    "option_group",
]

_MIN_INT, _MAX_INT = -(2**63), 2**63 - 1
"""Whole numbers are TOML's: of 64 bits, with a sign."""

_WRITTEN = ("data_folder", "figures", "output", "outputs", "prefixes")
"""Fields that name what is written: one with `~` in front would be made, and not be missing as an input is."""

_T = TypeVar("_T")
_ConfigT = TypeVar("_ConfigT", bound="Config")
_PartT = TypeVar("_PartT", bound="Config")


def _split_commas(value: Any) -> Any:
    """`"a, b"` and `["a", "b"]` -> `("a", "b")`."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        return value
    texts = [part.split(",") if isinstance(part, str) else [part] for part in value]
    return tuple(part.strip() if isinstance(part, str) else part for parts in texts for part in parts if part != "")


def _wrap_text(value: Any) -> Any:
    """`"a"` and `["a"]` -> `("a",)`."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class _OrText:
    """In the JSON schema, one text too is allowed."""

    @staticmethod
    def __get_pydantic_json_schema__(schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(schema) | {"type": ["array", "string"]}


CommaList = Annotated[tuple[_T, ...], BeforeValidator(_split_commas), _OrText]
"""A list that may be written as one text with commas."""

TextList = Annotated[tuple[str, ...], BeforeValidator(_wrap_text), _OrText]
"""One text or several."""


def _check_device(name: str) -> str:
    if name not in ("auto", "cpu", "cuda", "mps"):
        # Only torch knows all names, and takes a second to load.
        import torch

        try:
            torch.device(name)
        except RuntimeError:
            raise ValueError(f"is {show_value(name)}, but must be cpu, cuda, cuda:0, mps or auto") from None
    return name


DeviceName = Annotated[str, AfterValidator(_check_device)]
"""What torch calls a device, or `auto`; whether the machine has it is seen when a model loads."""

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
"""The dtype of a model that is loaded."""


def option_group(name: str, **extra: Any) -> Callable[..., Any]:
    """A `Field` of pydantic that the help of commands lists under `name`; `extra` is for `cli.options`."""
    return functools.partial(Field, json_schema_extra={"group": name, **extra})


def has_commas(field: FieldInfo) -> bool:
    """Whether it is a list that may be written as one text with commas."""
    return any(getattr(item, "func", None) is _split_commas for item in field.metadata)


def allowed_range(field: FieldInfo) -> str:
    """The bounds of a number; empty: it has none.

    >>> class Model(BaseModel):
    ...     port: int = Field(0, ge=0, le=65535)
    ...     rate: float = Field(1.0, gt=0)
    >>> [allowed_range(field) for field in Model.model_fields.values()]
    ['between 0 and 65535', 'above 0']
    """
    bounds = {
        name: value
        for item in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if (value := getattr(item, name, None)) is not None
    }
    if bounds.keys() == {"ge", "le"}:
        return f"between {bounds['ge']} and {bounds['le']}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return " and ".join(f"{words[name]} {value}" for name, value in bounds.items())


@dataclass(frozen=True)
class Layer:
    """Values from one source. Layers are stacked; later ones win.

    Attributes:
        values: Field name -> value.
        kind: What messages call a name in it: key, option, variable.
        name: How the source writes a field's name; messages use it.
        where: The source, in front of what is wrong with its values; empty: none.
        text: Values are texts (of options, of environment variables), or lists of these where one is repeated.
        fields: The only names that are allowed; None: those of the configuration.
        faults: What is wrong with the source itself.
        error: Why the source cannot be read; None: it can.
    """

    values: Mapping[str, Any]
    kind: str = "option"
    name: Callable[[str], str] = str
    where: str = ""
    text: bool = False
    fields: frozenset[str] | None = None
    faults: Sequence[str] = ()
    error: PrefixError | None = None

    @classmethod
    def from_file(cls, path: str | Path, fields: Iterable[str] | None = None) -> Layer:
        """Read a TOML file, or a YAML file (.yaml, .yml)."""
        allowed = None if fields is None else frozenset(fields)
        try:
            return cls(read_config_file(Path(path)), "key", where=repr(str(path)), fields=allowed)
        except ConfigError as error:
            return cls({}, "key", error=error)

    @classmethod
    def from_environment(
        cls, prefix: str, environment: Mapping[str, str], fields: Iterable[str] | None = None
    ) -> Layer:
        """Take the variables whose names begin with `prefix`."""
        values = {name[len(prefix) :].lower(): text for name, text in environment.items() if name.startswith(prefix)}
        allowed = None if fields is None else frozenset(fields)
        return cls(values, "variable", lambda field: f"{prefix}{field.upper()}", text=True, fields=allowed)

    def value(self, name: str, field: FieldInfo) -> Any:
        """A value for a field; a text that is none of the field's type is left as it is, and validation refuses it."""
        value = self.values[name]
        if has_commas(field) and (self.text or isinstance(value, str)):
            item = get_args(field.annotation)[0]
            return tuple(_parse(item, part) for part in _split_commas(value))
        return _parse(field.annotation, value) if self.text else value


def _parse(kind: Any, text: Any) -> Any:
    """A text as a value of a type, or the text itself if it is none."""
    if not isinstance(text, str):
        return text
    if get_origin(kind) is Annotated:
        # Its bounds are checked with all others.
        kind = get_args(kind)[0]
    try:
        return _adapter(kind).validate_strings(text)
    except ValidationError:
        return text


_adapter = functools.cache(TypeAdapter)


class Table(BaseModel):
    """A strict and frozen pydantic model: a table inside a configuration."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Config(Table):
    """The base of every configuration.

    Raises:
        ConfigError: Unknown names (with the nearest known one) or values that are not allowed; all faults at once.
    """

    hint: ClassVar[str] = "leave the option out to use its default."
    """The next step, for messages."""
    other_names: ClassVar[Mapping[str, str]] = {}
    """Names of other programs, and what to write instead."""
    unused: ClassVar[Collection[str]] = ()
    """Inherited fields that mean nothing here; commands do not have them as options."""
    error_class: ClassVar[type[PrefixError]] = ConfigError
    """What wrong values raise."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Add the fields to the docstring."""
        fields = "".join(f"\n    {name}: {field.description or ''}" for name, field in cls.model_fields.items())
        cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\nAttributes:{fields}"

    def __init__(self, /, **values: Any) -> None:
        self._fill([Layer(values)])

    # Inside another model, pydantic validates the fields itself, and the outer one reports their faults.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        shown = show_value(value) if isinstance(value, bool | int | float) else "..."
        raise ConfigError(
            f"{type(self).__name__} is frozen: {show_value(name)} cannot be set.",
            hint=f"make a changed copy: config.replace({cut(name)}={shown})",
        )

    def __delattr__(self, name: str) -> NoReturn:
        raise ConfigError(
            f"{type(self).__name__} is frozen: {show_value(name)} cannot be deleted.",
            hint="make a new one without it.",
        )

    @classmethod
    def from_layers(cls: type[_ConfigT], *layers: Layer) -> _ConfigT:
        """Stack values of several sources, and validate them together.

        Raises:
            ConfigError: As for the class; each fault names its value as its source does.
        """
        config = cls.__new__(cls)
        config._fill(layers)
        return config

    @classmethod
    def from_file(cls: type[_ConfigT], path: str | Path, **overrides: Any) -> _ConfigT:
        """Read a TOML or YAML file; `overrides` replace its values.

        Raises:
            ConfigError: The file cannot be read, or a key or value is wrong.
        """
        return cls.from_layers(Layer.from_file(path), Layer(overrides))

    @classmethod
    def from_arguments(cls: type[_ConfigT], config: object, options: Mapping[str, Any]) -> _ConfigT:
        """From what a function was called with: an object, a dict, or keyword options.

        Raises:
            ConfigError: Both a config and options were passed, or the config has another type, or a value is wrong.
        """
        if config is not None and options:
            raise ConfigError(f"got both a config and {', '.join(options)}.", hint="give one of the two.")
        if isinstance(config, cls):
            return config
        values = options if config is None else config
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"config is {describe_value(config)}, but must be of type {cls.__name__}, or a dict.",
                hint=f"write config={cls.__name__}(...), or the options themselves as keywords.",
            )
        return cls(**values)

    @classmethod
    def default(cls, name: str) -> Any:
        """The default of a field."""
        return cls.model_fields[name].get_default(call_default_factory=True)

    def replace(self: _ConfigT, **changes: Any) -> _ConfigT:
        """A validated copy with some values changed.

        Raises:
            ConfigError: An unknown name, or a value that is not allowed.
        """
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)

    def model_copy(self: _ConfigT, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> _ConfigT:
        """`replace`: unlike pydantic's own, it validates the changes."""
        return self.replace(**(update or {}))

    def part(self, kind: type[_PartT]) -> _PartT:
        """The values of the fields that `kind`, a configuration that this one inherits from, has."""
        return kind(**{name: getattr(self, name) for name in kind.model_fields})

    def to_dict(self) -> dict[str, Any]:
        """All values by name, as JSON has them."""
        return self.model_dump(mode="json")

    def to_toml(self) -> str:
        """A TOML document with all values that are not None."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON schema of its files."""
        schema = cls.model_json_schema()
        for name, field in cls.model_fields.items():
            # What `json_schema_extra` says is for the command line.
            for key in field.json_schema_extra if isinstance(field.json_schema_extra, dict) else ():
                del schema["properties"][name][key]
        for name in cls.unused:
            del schema["properties"][name]
        for model in (schema, *schema.get("$defs", {}).values()):
            model["description"] = model["description"].partition("\n")[0]
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """What is wrong with several values together: the fields' names, and a message.

        Each value is already known to be valid alone.
        """
        yield from ()

    @field_validator("*", mode="before")
    @classmethod
    def _as_text(cls, value: Any, info: ValidationInfo) -> Any:
        """A path is text; of one to write to, `~` is the home folder, also in `--output=~/x`, where shells leave it."""
        if cls.model_fields[str(info.field_name)].annotation is Path:
            return value
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif isinstance(value, list | tuple) and any(isinstance(item, os.PathLike) for item in value):
            value = [os.fspath(item) if isinstance(item, os.PathLike) else item for item in value]
        if info.field_name in _WRITTEN and isinstance(value, str) and value.startswith("~"):
            return str(expand_home(value))
        return value

    @field_validator("*")
    @classmethod
    def _check_storable(cls, value: Any) -> Any:
        """TOML has whole numbers of 64 bits and UTF-8 text; a lone surrogate, possible in JSON, is none."""
        verb, items = ("has", value) if isinstance(value, tuple) else ("is", (value,))
        for item in items:
            if isinstance(item, int) and not _MIN_INT <= item <= _MAX_INT:
                raise ValueError(f"{verb} {show_value(item)}, but must be between {_MIN_INT} and {_MAX_INT}")
            if isinstance(item, str) and not _is_utf8(item):
                raise ValueError(f"{verb} {show_value(item)}, but must be UTF-8 text")
        return value

    def _fill(self, layers: Sequence[Layer]) -> None:
        """Validate stacked values into this new instance."""
        known = type(self).model_fields
        source: dict[str, Layer] = {}
        # Source -> what is wrong with its values.
        faults: dict[str, list[str]] = {"": []}
        for layer in layers:
            listed = faults.setdefault(layer.where, [])
            listed.extend(layer.faults)
            allowed = known.keys() if layer.fields is None else layer.fields
            source |= dict.fromkeys((name for name in layer.values if name in allowed), layer)
            unknown = [name for name in layer.values if name not in allowed]
            names = [layer.name(field) for field in allowed]
            for name in unknown[:MAX_FAULTS]:
                other = self.other_names.get(name, "")
                listed.append(describe_unknown(layer.kind, layer.name(name), names, other, listed))
            listed.extend(unknown[MAX_FAULTS:])  # Only counted.
        unreadable = [layer.error for layer in layers if layer.error]
        faults[""] += [f"{error.message.removesuffix('.')} ({error.hint.removesuffix('.')})" for error in unreadable]
        values = {name: layer.value(name, known[name]) for name, layer in source.items()}
        wrong: set[str] = set()
        for detail in self._wrong_values(values):
            name = str(detail["loc"][0])
            wrong.add(name)
            if name in source or not unreadable:
                layer = source.get(name, layers[-1])
                listed = faults[layer.where]
                listed.append(_describe_wrong(layer, detail, known[name]) if len(listed) < MAX_FAULTS else "")
        for layer, detail in self._wrong_replaced(layers, source):
            faults[layer.where].append(_describe_wrong(layer, detail, known[str(detail["loc"][0])]))
        if not unreadable:
            # What seems to be missing may be in a file that cannot be read.
            right = {name: value for name, value in values.items() if name not in wrong}
            faults[""] += self._conflicts_of(right, wrong)
        if len(unreadable) == sum(map(len, faults.values())) == 1:
            raise unreadable[0]
        if any(faults.values()):
            parts = [f"{where}: " * bool(where) + join_faults(items) for where, items in faults.items() if items]
            raise self.error_class(f"{'; '.join(parts)}.", hint=self.hint)

    def _wrong_values(self, values: Mapping[str, Any]) -> list[ErrorDetails]:
        try:
            BaseModel.__init__(self, **values)
        except ValidationError as error:
            return error.errors(include_url=False)
        return []

    def _wrong_replaced(
        self, layers: Sequence[Layer], source: Mapping[str, Layer]
    ) -> Iterator[tuple[Layer, ErrorDetails]]:
        """What is wrong with options and variables whose values a later layer replaces."""
        known = type(self).model_fields
        for layer in layers:
            allowed = known.keys() if layer.fields is None else layer.fields
            names = [name for name in layer.values if name in allowed and source[name] is not layer]
            if layer.text and names:
                replaced = {name: layer.value(name, known[name]) for name in names}
                details = type(self).__new__(type(self))._wrong_values(replaced)
                yield from ((layer, detail) for detail in details if detail["type"] != "missing")

    def _conflicts_of(self, values: Mapping[str, Any], wrong: set[str]) -> list[str]:
        """Conflicts among the values that are valid alone."""
        instance = self
        if wrong:
            instance = type(self).__new__(type(self))
            try:
                BaseModel.__init__(instance, **values)
            except ValidationError:
                return []  # A value without a default is wrong or missing.
        return [message for names, message in instance.conflicts() if not wrong.intersection(names)]


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _describe_wrong(layer: Layer, detail: ErrorDetails, field: FieldInfo) -> str:
    first, *rest = detail["loc"]
    unknown = str(rest.pop()) if detail["type"] == "extra_forbidden" else None
    if is_key := rest[-1:] == ["[key]"]:
        # Of a mapping; the key itself stands before.
        rest = rest[:-2]
    name = cut(layer.name(str(first)) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest))
    if unknown is not None:
        table = table_at(field.annotation, rest)
        suggestion = did_you_mean(unknown, table.model_fields if table else ())
        return f"{name} has the unknown key {show_value(unknown)} ({suggestion.removesuffix('.')})"
    return describe_fault(detail, f"a key of {name}" if is_key else name, "" if rest else allowed_range(field))
