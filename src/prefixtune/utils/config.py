"""The base of every configuration: frozen pydantic models whose faults are all named in one `ConfigError`.

A field is written once, with its type, range, choices, default and help. The keys of TOML files, the options of
commands, environment variables, Python's keyword arguments and the documentation come from it.
"""

from __future__ import annotations

import functools
import inspect
import os
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from prefixtune.errors import ConfigError, PrefixError, describe_value, did_you_mean, short_repr
from prefixtune.utils.folders import expand_home

_WRITTEN = ("data_folder", "figures", "output", "prefixes")
"""Fields that name what is written: one with `~` in front would be made, and not be missing as an input is."""
_MOST_FAULTS = 50

_T = TypeVar("_T")
_PartT = TypeVar("_PartT", bound="Config")


def _split_commas(value: Any) -> Any:
    """`"a, b"` and `["a", "b"]` -> `["a", "b"]`."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        return value
    parts = [piece for part in value for piece in (part.split(",") if isinstance(part, str) else [part]) if part != ""]
    return [part.strip() if isinstance(part, str) else part for part in parts]


def _wrap_text(value: Any) -> Any:
    """`"a"` -> `["a"]`."""
    return [value] if isinstance(value, str) else value


CommaList = Annotated[tuple[_T, ...], BeforeValidator(_split_commas)]
"""A list that may be written as one text with commas."""

TextList = Annotated[tuple[str, ...], BeforeValidator(_wrap_text)]
"""One text or several."""

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
    ['at least 0 and at most 65535', 'above 0']
    """
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = [(words[name], getattr(item, name, None)) for item in field.metadata for name in words]
    return " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)


def _describe(fault: ErrorDetails, name: str, known: Iterable[str]) -> str:
    """One fault of a `ValidationError`: what its source calls the value, what pydantic says, and the value."""
    match fault["type"]:
        case "missing":
            return f"{name} is missing"
        case "value_error":
            return f"{name} {fault['ctx']['error']}".strip()
        case "extra_forbidden":
            nearest = did_you_mean(str(fault["loc"][-1]), known)
            return f"{name} is unknown" + f" ({nearest})" * nearest.startswith("did")
    return f"{name} is {short_repr(fault['input'])}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"


@dataclass(frozen=True)
class Layer:
    """Values from one source. Layers are stacked; later ones win.

    Attributes:
        values: Field name -> value, or its text.
        name: How the source writes a field's name; messages use it.
    """

    values: Mapping[str, Any]
    name: Callable[[str], str] = str

    @classmethod
    def from_file(cls, path: str | Path, fields: Collection[str]) -> Layer:
        """Read a TOML file.

        Raises:
            ConfigError: It cannot be read, or has a key that is none of `fields`.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or str(error).removesuffix(".")
            hint = 'name a TOML file, with lines such as dtype = "auto".'
            raise ConfigError(f"cannot read the configuration {str(path)!r}: {reason}.", hint=hint) from error
        unknown = [name for name in values if name not in fields]
        if unknown:
            raise ConfigError(
                f"{str(path)!r} has the unknown keys {', '.join(map(short_repr, unknown[:_MOST_FAULTS]))}.",
                hint=did_you_mean(unknown[0], fields),
            )
        return cls(values, lambda field: f"{field} in {str(path)!r}")

    @classmethod
    def from_environment(cls, prefix: str, environment: Mapping[str, str]) -> Layer:
        """Take the variables whose names begin with `prefix`."""
        values = {name[len(prefix) :].lower(): text for name, text in environment.items() if name.startswith(prefix)}
        return cls(values, lambda field: f"{prefix}{field.upper()}")


class Table(BaseModel):
    """A frozen pydantic model: a table inside a configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Config(Table):
    """The base of every configuration.

    Raises:
        ConfigError: Unknown names (with the nearest known one) or values that are not allowed; all faults at once.
    """

    hint: ClassVar[str] = "leave the option out to use its default."
    """The next step, for messages."""
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
        self._fill(values, {}, str)

    def _fill(
        self, values: Mapping[str, Any], names: Mapping[str, Callable[[str], str]], usual: Callable[[str], str]
    ) -> None:
        """Validate values into this new instance; messages call a field as its source does."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            faults = []
            for fault in error.errors(include_url=False)[:_MOST_FAULTS]:
                way = [str(part) for part in fault["loc"]]
                shown = names.get(way[0], usual)(".".join(way)) if way else ""
                faults.append(_describe(fault, shown, type(self).model_fields if len(way) == 1 else ()))
            raise self.error_class(f"{'; '.join(faults)}.", hint=self.hint) from None

    @classmethod
    def from_layers(cls, *layers: Layer) -> Self:
        """Stack values of several sources, and validate them together.

        Raises:
            ConfigError: As for the class; each fault names its value as its source does.
        """
        values: dict[str, Any] = {}
        names: dict[str, Callable[[str], str]] = {}
        for layer in layers:
            values |= layer.values
            names |= dict.fromkeys(layer.values, layer.name)
        config = cls.__new__(cls)
        config._fill(values, names, layers[-1].name)
        return config

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> Self:
        """Read a TOML file; `overrides` replace its values.

        Raises:
            ConfigError: The file cannot be read, or a key or value is wrong.
        """
        return cls.from_layers(Layer.from_file(path, cls.model_fields), Layer(overrides))

    @classmethod
    def from_arguments(cls, config: object, options: Mapping[str, Any]) -> Self:
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
            hint = f"give a {cls.__name__}, a dict of its fields, or the fields as keywords."
            raise ConfigError(f"config is {describe_value(config)}.", hint=hint)
        return cls(**values)

    @classmethod
    def default(cls, name: str) -> Any:
        """The default of a field."""
        return cls.model_fields[name].get_default(call_default_factory=True)

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some values changed.

        Raises:
            ConfigError: An unknown name, or a value that is not allowed.
        """
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)

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

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """What is wrong with several values together: the fields' names, and a message.

        Each value is already known to be valid alone.
        """
        yield from ()

    @field_validator("*", mode="before")
    @classmethod
    def _as_text(cls, value: Any, info: ValidationInfo) -> Any:
        """A path is text; of one to write to, `~` is the home folder, also in `--output=~/x`, where shells leave it."""
        several = isinstance(value, list | tuple)
        items = [os.fspath(item) if isinstance(item, os.PathLike) else item for item in (value if several else [value])]
        for item in items:
            if isinstance(item, str):
                # A lone surrogate, possible in JSON and in arguments, cannot be stored.
                item.encode()
                if "\0" in item:
                    raise ValueError("has a NUL character, which no path or text may have")
        if info.field_name in _WRITTEN and isinstance(value, str) and value.startswith("~"):
            return str(expand_home(value))
        return items if several else items[0]

    @field_validator("*", mode="after")
    @classmethod
    def _bound(cls, value: Any) -> Any:
        """Libraries take whole numbers of 64 bits."""
        numbers = [one for one in (value if isinstance(value, tuple) else [value]) if isinstance(one, int)]
        if not all(-(2**63) <= one < 2**63 for one in numbers):
            raise ValueError("is a whole number of more than 64 bits")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        messages = [message for _, message in self.conflicts()]
        if messages:
            raise ValueError("; ".join(messages))
        return self
