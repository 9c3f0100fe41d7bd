"""A command's options as one pydantic model, and cyclopts' view of it.

cyclopts splits the command line into options and their texts; the model parses and checks these, together with
configuration files and environment variables, and names all that is wrong in one `ConfigError`.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter, Token
from pydantic import Field
from pydantic.fields import FieldInfo

from prefixtune.cli.show import Table, print_event, print_json
from prefixtune.utils.config import Config, Layer, allowed_range, has_commas
from prefixtune.utils.console import Console, print_table

_WITH_HYPHEN = ("train", "dev", "data", "test", "outputs", "against", "weights")
_NO_DEFAULT_SHOWN = ("", 0, None, False, ())


PREFIX = "a file, the folder of a run, or hub:OWNER/NAME; A+B joins several"
"""What names a prefix, for the help."""
Conflicts = Iterator[tuple[tuple[str, ...], str]]
"""What is wrong with several options together, as of `Config.conflicts`."""

PathText = Annotated[str, Field(min_length=1)]
"""A text that, left out, means something else: an empty one, as of a shell's variable that is not set, is refused."""


def option(default: Any = ..., description: str = "", *, group: str = "", **settings: Any) -> Any:
    """A field of a command's options.

    Args:
        default: `...`: the option must be given.
        description: For the help.
        group: The heading that the help lists it under; empty: the usual one.
        **settings: How the command line has it: `flag` (its name, if not the field's), `positional` (an argument
            without a name; of a tuple's type: all that follow), `metavar` and `many`. All others are those of
            pydantic's `Field`, such as `ge`.
    """
    extra = {name: settings.pop(name) for name in ("flag", "positional", "metavar", "many") if name in settings}
    return Field(
        default, description=description, json_schema_extra=extra | ({"group": group} if group else {}), **settings
    )


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

    def apart(self, name: str, *others: str) -> Conflicts:
        """Options that cannot be given together with the first one."""
        given = [other for other in others if self.has(other)]
        if given and self.has(name):
            yield (name, *given), f"{self.flag(name)} cannot go with {' and '.join(map(self.flag, given))}"

    def only_with(self, name: str, *others: str) -> Conflicts:
        """Options that say more of the first one, which they need."""
        given = [other for other in others if self.has(other)]
        if given and not self.has(name):
            yield (name, *given), f"{' and '.join(map(self.flag, given))}: give {self.flag(name)} too"

    def has(self, name: str) -> bool:
        """Whether an option says something else than its default."""
        return bool(getattr(self, name) != self.default(name))

    @classmethod
    def flag(cls, name: str) -> str:
        """The option of a field, or the name of an argument."""
        name, dot, rest = name.partition(".")
        extra = _extra(cls.model_fields[name]) if name in cls.model_fields else {}
        flag = name.upper() if extra.get("positional") else f"--{extra.get('flag', name.replace('_', '-'))}"
        return f"{flag}{dot}{rest}"


class OutputOptions(CommandOptions):
    """The options of a command that prints results, and shows progress."""

    quiet: bool = option(False, "no progress, only results and errors")
    as_json: bool = option(False, "print results as JSON on stdout, one value a line", flag="json")

    @functools.cached_property
    def console(self) -> Console:
        """For people; programs, which --json is for, also read stderr."""
        return Console(quiet=self.quiet or self.as_json)

    def show(self, facts: Mapping[str, Any], *parts: str | Table) -> None:
        """Print a result on stdout: `facts` as one JSON value for programs, or lines and tables for people."""
        if self.as_json:
            print_json(facts)
            return
        for part in parts:
            if isinstance(part, Table):
                print_table(*part)
            else:
                print(part)


class ReadingOptions(CommandOptions):
    """How examples are read."""

    data: str = option("", "examples: a file, a folder, hub:NAME, or - (stdin)", metavar="PATH")
    task: str = option("", "how the data are read (default: the prefix's or the run's task)")
    split: Literal["", "train", "dev", "test"] = option("", "which part of a folder")
    source: str | None = option(None, "records: column or template (default: as in training)")
    target: str | None = option(None, "records: column or template (default: as in training)")
    form: str = option("", "what the columns are, where several forms fit: messages, prompt, instruction, text, ...")


class ConfigOptions(CommandOptions):
    """The options of a command whose configuration, of which it has all fields, may come from a file.

    It stands before the configuration among the bases: `class TrainOptions(ConfigOptions, TrainConfig)`.
    """

    config: str = option(
        "", 'TOML file with the options of the groups below, as in dtype = "auto"; the command line wins over it'
    )
    print_config: bool = option(False, "print the final configuration as TOML, and do nothing else")

    @classmethod
    def layers(cls, given: Mapping[str, Any]) -> Iterable[Layer]:
        """The file that is named by `--config`."""
        path = given.get("config")
        return [] if path is None else [Layer.from_file(path, cls.configuration().model_fields)]

    @classmethod
    def configuration(cls) -> type[Config]:
        """The configuration that it has the fields of."""
        return next(base for base in cls.__mro__ if issubclass(base, Config) and not issubclass(base, CommandOptions))


class RunOptions(ConfigOptions, OutputOptions):
    """The options of a command that fills the folder `output`, and can go on if it was stopped."""

    resume: bool = option(False, "go on with the run in --output, from where it was stopped")
    usual: ClassVar[Mapping[str, Any]] = {}
    """Values in place of the configuration's usual ones."""

    @property
    def reporting(self) -> dict[str, Any]:
        """How a run reports, and whether it resumes: arguments of its function."""
        shown = not (self.quiet or self.as_json)
        return {"resume": self.resume, "progress": shown, "on_event": print_event if self.as_json else None}

    @classmethod
    def layers(cls, given: Mapping[str, Any]) -> Iterable[Layer]:
        """The file of --config, or the configuration of the run to resume."""
        if not given.get("resume") or "config" in given:
            return super().layers(given)
        from prefixtune.training.config import TrainConfig

        config = cls.configuration()
        assert issubclass(config, TrainConfig)
        path = config.stored(given.get("output", cls.usual.get("output", cls.default("output"))))
        # Where the folder is now: it may have been moved.
        return [Layer.from_file(path, config.model_fields), Layer({"output": str(path.parent)})]


def command(run: Callable[[Any], int | None]) -> Callable[..., int]:
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
    # All fields but tables and those without a meaning here.
    parameters = [
        _parameter(options, name, field)
        for name, field in options.model_fields.items()
        if name not in options.unused and get_origin(field.annotation) is not Mapping
    ]
    parameters.sort(key=lambda parameter: (parameter.kind, parameter.name in OutputOptions.model_fields))
    parsed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    parsed.__annotations__ = {}
    parsed.options, parsed.run = options, run  # type: ignore[attr-defined]
    return parsed


def _parameter(options: type[CommandOptions], name: str, field: FieldInfo) -> inspect.Parameter:
    extra, kind = _extra(field), field.annotation
    several, switch = get_origin(kind) is tuple, kind is bool
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
        # The last one counts, but several prefixes may be meant.
        "allow_repeating": several or name != "prefix",
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
