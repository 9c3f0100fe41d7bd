"""The command line: parse, call the command, and print errors as one line with a hint.

Exit codes: 0 success, 1 a failed check or a bug (with its traceback), 2 wrong use or input, 130 interrupted. With
`--json` an error is one JSON object on stderr, and nothing else is written there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prefixtune import __version__
from prefixtune.cli.commands import (
    convert,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    prepare,
    pull,
    push,
    report,
    score,
    serve,
    study,
    tasks,
    train,
)
from prefixtune.cli.common import CommandParser
from prefixtune.errors import ConfigError, PrefixError, PrefixWarning, did_you_mean
from prefixtune.utils.console import Console

__all__ = ["build_parser", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # --json also holds for errors in the arguments themselves.
    as_json = "--json" in (words[: words.index("--")] if "--" in words else words)
    try:
        options = _parse(words)
        with _shown_warnings(Console(quiet=as_json)):
            code: int = options.run(options)
        sys.stdout.flush()
        return code
    except PrefixError as error:
        return _print_error(error.message, error.hint, type(error).__name__, 2, as_json)
    except KeyboardInterrupt as stopped:
        return _print_error("interrupted.", str(stopped), "Interrupted", 130, as_json)
    except BrokenPipeError:
        # The reader, such as `head`, closed the pipe; keep Python from complaining when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _print_error(message: str, hint: str, kind: str, code: int, as_json: bool) -> int:
    """Print why a command failed on stderr, for people or programs; returns the exit code."""
    if as_json:
        print(json.dumps({"error": message, "hint": hint, "kind": kind, "exit_code": code}), file=sys.stderr)
    else:
        Console().error(message, hint)
    return code


@contextlib.contextmanager
def _shown_warnings(console: Console) -> Iterator[None]:
    """Show this project's own warnings as one line, without the position in the code."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", PrefixWarning)
        show = warnings.showwarning

        def show_plainly(message: Warning | str, category: type[Warning], *rest: Any, **options: Any) -> None:
            if issubclass(category, PrefixWarning):
                console.warn(str(message))
            else:
                show(message, category, *rest, **options)

        warnings.showwarning = show_plainly
        yield


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser, commands_by_name = build_parser()
    if not arguments:
        arguments = ["--help"]
    names = [word for word in arguments if not word.startswith("-")]
    if names and arguments[0] == names[0] and names[0] not in commands_by_name:
        raise ConfigError(f"there is no command {names[0]!r}.", hint=did_you_mean(names[0], commands_by_name))
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        command = commands_by_name[options.command]
        word = unknown[0].split("=")[0]
        if word.startswith("-"):
            raise ConfigError(f"unknown option {word!r}.", hint=did_you_mean(word, command.options()))
        raise ConfigError(f"unexpected argument {word!r}.", hint=f"`{command.prog} --help` explains the options.")
    if getattr(options, "json", False):
        # Programs also read stderr.
        options.quiet = True
    return options


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, CommandParser]]:
    """The parser of the whole command line, and of each command by name."""
    parser = CommandParser(
        prog="prefixtune",
        description="Train, evaluate and use prefixes for frozen language models (prefix-tuning).",
        epilog="Start with `prefixtune demo`. Each command explains itself: `prefixtune train --help`. Mistakes exit "
        "with 2, failed checks and bugs with 1; with --json a mistake is one JSON object on stderr.",
    )
    parser.add_argument("--version", action="version", version=f"prefixtune {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=CommandParser)
    parsers: dict[str, CommandParser] = {}

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str, more: str = "") -> CommandParser:
        sub: CommandParser = subparsers.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}. {more}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        parsers[name] = sub
        return sub

    for module in (
        demo,
        prepare,
        train,
        generate,
        serve,
        evaluate,
        score,
        tasks,
        study,
        report,
        inspect,
        convert,
        push,
        pull,
        export,
        doctor,
    ):
        module.register(command)
    return parser, parsers


if __name__ == "__main__":
    sys.exit(main())
