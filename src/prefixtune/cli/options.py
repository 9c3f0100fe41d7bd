"""A command's options as one pydantic model, and cyclopts' view of it.

cyclopts splits the command line into options and their texts; the model parses and checks these, together with
configuration files and environment variables, and names all that is wrong in one `ConfigError`.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter, Token
from pydantic import Field
from pydantic.fields import FieldInfo

from prefixtune.utils.config import Config, Layer, allowed_range, has_commas

__all__ = ["CommandOptions", "ConfigOptions", "OutputOptions", "PathText", "command", "json_option", "positional"]

_WITH_HYPHEN = ("train", "dev", "data", "test", "outputs", "against", "weights")
_NO_DEFAULT_SHOWN = ("", 0, None, False, ())


PathText = Annotated[str, Field(min_length=1)]
"""A path that, left out, means something else: an empty one, as of a shell's variable that is not set, is refused."""


def positional(default: Any = ..., **options: Any) -> Any:
    """A `Field` that is an argument without a name; of a tuple's type: all that follow."""
    return Field(default, json_schema_extra={"positional": True}, **options)


def json_option(what: str) -> Any:
    """The field `as_json` of a command that can print `what` for programs: `--json`."""
    return Field(False, description=f"print {what} as JSON on stdout", json_schema_extra={"flag": "json"})


def form_option() -> Any:
    """The field `form` of a command that reads examples, of type `Literal["", FormName]`."""
    return Field("", description="records without source: what the columns are, where several readings fit")


class CommandOptions(Config):
    """The options of one command; those that it inherits from a configuration may also come from a file."""

    defaults_elsewhere: ClassVar[Collection[str]] = ()
    """Fields whose defaults depend on other things, and are not shown."""

    @classmethod
    def layers(cls, given: Mapping[str, Any]) -> Iterable[Layer]:
        """The sources beneath the command line, such as a file that `given` names; the first is the lowest.

        Args:
            given: The texts of the options that the command line has.
        """
        return ()

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Self:
        """The options from a command line.

        Args:
            given: Field name -> the text of an option, its texts if it is a list, or whether a switch is on.

        Raises:
            ConfigError: Something is wrong with it, or with a file that it names.
        """
        return cls.from_layers(*cls.layers(given), Layer(given, cls.flag))

    def given(self, kind: type[Config]) -> dict[str, Any]:
        """The values that the command line or a file has for the fields of a configuration."""
        return {name: getattr(self, name) for name in kind.model_fields if name in self.model_fields_set}

    @classmethod
    def flag(cls, name: str) -> str:
        """The option of a field, or the name of an argument."""
        name, dot, rest = name.partition(".")
        extra = _extra(cls.model_fields[name]) if name in cls.model_fields else {}
        flag = name.upper() if extra.get("positional") else f"--{extra.get('flag', name.replace('_', '-'))}"
        return f"{flag}{dot}{rest}"


class OutputOptions(CommandOptions):
    """The options of a command that shows progress."""

    quiet: bool = Field(False, description="no progress, only results and errors")


class ConfigOptions(CommandOptions):
    """The options of a command whose configuration, of which it has all fields, may come from a file.

    It stands before the configuration among the bases: `class TrainOptions(ConfigOptions, TrainConfig)`.
    """

    config: str = Field(
        "",
        description='TOML file with the options of the groups below, as in dtype = "auto"; what the command line says '
        "wins over it",
    )
    print_config: bool = Field(False, description="print the final configuration as TOML, and do nothing else")

    @classmethod
    def layers(cls, given: Mapping[str, Any]) -> Iterable[Layer]:
        """The file that is named by `--config`."""
        path = given.get("config")
        return [] if path is None else [Layer.from_file(path, cls.configuration().model_fields)]

    @classmethod
    def configuration(cls) -> type[Config]:
        """The configuration that it has the fields of."""
        return next(base for base in cls.__mro__ if issubclass(base, Config) and not issubclass(base, CommandOptions))


def command(run: Callable[[Any], int]) -> Callable[..., int]:
    """A function for cyclopts, whose parameters are the fields of `run`'s options; its help is `run`'s docstring.

    Its arguments are texts; `main` reads `options` from these and calls `run`.
    """
    options: type[CommandOptions] = get_type_hints(run)["options"]

    @functools.wraps(run)
    def parsed(*arguments: Any, **values: Any) -> int:
        raise NotImplementedError("main reads the options and calls `run`")

    # cyclopts shows a docstring's lines as they are: each paragraph becomes one, for it to wrap; indented lines stay.
    parsed.__doc__ = re.sub(r"(?<=\S)\n(?=\S)", " ", inspect.cleandoc(run.__doc__ or ""))
    options.hint = f"`prefixtune {run.__name__.replace('_', '-')} --help` explains the options."
    parameters = [_parameter(options, name, field) for name, field in _parameters_of(options)]
    parameters.sort(key=lambda parameter: (parameter.kind, parameter.name in OutputOptions.model_fields))
    parsed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    parsed.__annotations__ = {}
    parsed.options, parsed.run = options, run  # type: ignore[attr-defined]
    return parsed


def _parameters_of(options: type[CommandOptions]) -> list[tuple[str, FieldInfo]]:
    """The fields that a command line can have: all but tables and those without a meaning here."""
    fields = [(name, field) for name, field in options.model_fields.items() if name not in options.unused]
    return [(name, field) for name, field in fields if get_origin(field.annotation) is not Mapping]


def _parameter(options: type[CommandOptions], name: str, field: FieldInfo) -> inspect.Parameter:
    extra, kind = _extra(field), field.annotation
    several, switch = get_origin(kind) is tuple or "many" in extra, kind is bool
    item: Any = get_args(kind)[0] if get_origin(kind) is tuple else kind
    choices = [choice for choice in get_args(item) if choice] if get_origin(item) is Literal else []
    notes = [text for text in (allowed_range(field), "required" if field.is_required() else "") if text]
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    settings: dict[str, Any] = {
        "name": None
        if extra.get("positional")
        else [options.flag(name), *(f"--{alias}" for alias in extra.get("aliases", ()))],
        "help": " ".join([field.description or "", *([f"({', '.join(notes)})"] if notes else [])]),
        "show_default": name not in options.defaults_elsewhere and default not in _NO_DEFAULT_SHOWN,
        # What a file of --config may switch on, the command line can switch off.
        "negative": None if switch and "group" in extra else (),
        "consume_multiple": extra.get("many", False),
        "allow_repeating": True,
        # A lone - is standard input, and weights may be negative.
        "allow_leading_hyphen": name in _WITH_HYPHEN and "many" not in extra,
    }
    if not switch:
        settings["converter"] = functools.partial(_texts, several)
        metavar = "A,B,..." if has_commas(field) else _metavar(item)
        settings["metavar"] = "CHOICE" if choices else extra.get("metavar", metavar)
        default = list(map(str, default or ())) if several else str(default)
    if "group" in extra:
        settings["group"] = _group(extra["group"])
    # cyclopts takes every text; the model checks it. The choices are for the help and for the shell's completion, which
    # completes names of files where any text is allowed.
    text: Any = Literal[*choices] | str if choices else Path if _metavar(item) == "TEXT" else str
    hint: Any = bool if switch else list[text] if several else text
    where = inspect.Parameter.POSITIONAL_ONLY if extra.get("positional") else inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, where, default=default, annotation=Annotated[hint, Parameter(**settings)])


def _metavar(kind: Any) -> str:
    kinds = [part for part in get_args(kind) or (kind,) if part is not NoneType]
    return {int: "N", float: "X"}.get(kinds[0], "TEXT")


def _texts(several: bool, _: Any, tokens: Sequence[Token]) -> str | list[str]:
    """What the command line has for an option: all texts of a list, else the last one."""
    texts = [token.value for token in tokens]
    return texts if several else texts[-1]


def _extra(field: FieldInfo) -> Mapping[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


@functools.cache
def _group(name: str) -> Group:
    return Group.create_ordered(name)
