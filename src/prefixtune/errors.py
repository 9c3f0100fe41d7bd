"""Every exception of this project, as one tree.

    PrefixError
    ├── ConfigError       an option, a configuration file or an argument is wrong
    ├── BackboneError     a model cannot be loaded, or cannot have a prefix
    ├── CheckpointError   an artifact or a training state is broken, foreign or newer
    ├── DataError         an input file, a row or an example is wrong
    ├── TrainingError     a run cannot go on (the loss is not finite, the disk is full)
    └── RequestError      a generation request cannot be served
        ├── ContextLengthError  it needs more positions than there are
        └── EngineFull     it could be another time: too many wait (in `engine.request`)

A message says what failed, the value got, what is allowed, and in `hint` the next step. The command line prints
`error:` and `hint:` and exits with 2; anything that is not a `PrefixError` is a bug and keeps its traceback.

What a message quotes may come from anybody. `PrefixError` itself makes one printable line of bounded length of it, so
that no value forges a second line or fills a log; `short_repr` shortens a single value.

`PrefixWarning` is for what a user should know though the work goes on.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class PrefixError(Exception):
    """The root: catch this to catch every mistake that this project reports.

    Args:
        message: What failed, the value got, and what is allowed.
        hint: The next step, as a sentence; empty when there is none to give.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message = _one_line(message)
        self.hint = _one_line(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} Hint: {self.hint}" if self.hint else self.message


_LONGEST_MESSAGE = 4000


def _one_line(text: str) -> str:
    """A message without what is not printable; of one that is too long, its beginning and its end."""
    if len(text) > _LONGEST_MESSAGE:
        text = f"{text[: _LONGEST_MESSAGE // 2]} ... {text[-_LONGEST_MESSAGE // 2 :]}"
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


class PrefixWarning(UserWarning):
    """What a user should know though the work goes on; filter it by this category."""


class ConfigError(PrefixError):
    """An option, a configuration file or an argument is wrong; lists all faults at once."""


class BackboneError(PrefixError):
    """A model cannot be loaded, or cannot have a prefix."""


class CheckpointError(PrefixError):
    """An artifact or a training state is truncated, foreign, non-finite or of a newer format."""


class DataError(PrefixError):
    """An input file, one of its rows, or an example is wrong.

    Attributes:
        of_development: It is one of the development data of a run.
    """

    of_development = False


@contextlib.contextmanager
def reading_development_data() -> Iterator[None]:
    """While the block reads a run's development data, a mistake in it is told from one in the training data.

    Raises:
        DataError: With `of_development`, in place of any other.
    """
    try:
        yield
    except DataError as error:
        told = DataError(f"in the development data: {error.message}", hint=error.hint)
        told.of_development = True
        raise told from error


class TrainingError(PrefixError):
    """A training run cannot go on; the last good state is kept."""


class RequestError(PrefixError):
    """A generation request cannot be served."""


class ContextLengthError(RequestError):
    """It needs more positions than there are."""


_LONGEST_WORD = 1000


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Suggest the nearest known word, as a hint.

    >>> did_you_mean("prefix_lenght", ["prefix_length", "seed"])
    "did you mean 'prefix_length'?"
    >>> did_you_mean("zzz", ["prefix_length", "seed"])
    'known: prefix_length, seed.'

    Args:
        word: What was written.
        known: What could have been meant.
    """
    names = sorted(known)
    # A word may come from outside; one that is much longer resembles none, and comparing it takes long.
    close = difflib.get_close_matches(word[:_LONGEST_WORD], names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}."


def describe_value(value: object) -> str:
    """A value of a wrong type, in a few words for a message.

    >>> describe_value(3), describe_value("a b"), describe_value({"a": 1}), describe_value(None)
    ('3 (of type int)', "'a b' (of type str)", 'of type dict', 'None (of type NoneType)')
    """
    kind = f"of type {type(value).__name__}"
    return f"{short_repr(value)} ({kind})" if isinstance(value, str | int | float | None) else kind


def short_repr(value: object, longest: int = 60) -> str:
    r"""A value as messages show it: its `repr`, which escapes what is not printable, cut to a few characters.

    >>> short_repr("a" * 100), short_repr("a\nerror: b")
    ("'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...", "'a\\nerror: b'")

    Args:
        value: Anything, of any size and from anybody.
        longest: Most characters of the result.
    """
    try:
        text = repr(value[: longest + 1] if isinstance(value, str | bytes | list | tuple) else value)
    except (ValueError, RecursionError):
        # Python refuses to write a number of more than 4,300 digits.
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def first_line(error: BaseException) -> str:
    r"""The first line of another program's error; of one without a message, its type.

    >>> first_line(OSError("no room\nat all")), first_line(KeyError())
    ('no room', 'KeyError')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on; ten at most."""
    seen = 0
    while error is not None and seen < 10:
        yield error
        error, seen = error.__cause__ or (None if error.__suppress_context__ else error.__context__), seen + 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is lacking, of the processor or of the device; torch has no class of its own for the former.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    (True, True)
    """
    return any(
        isinstance(one, MemoryError)
        or type(one).__name__ == "OutOfMemoryError"
        or (isinstance(one, RuntimeError) and "can't allocate memory" in str(one))
        for one in causes(error)
    )
