"""Commands that still use argparse.

Exit codes: 0 success, 1 a failed check or a bug (with its traceback), 2 wrong use or input, 130 interrupted. With
`--json` an error is one JSON object on stderr, and nothing else is written there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from prefixtune import __version__
from prefixtune.cli.commands import (
    evaluate,
    generate,
    score,
)
from prefixtune.cli.common import CommandParser
from prefixtune.errors import ConfigError, did_you_mean

__all__ = ["build_parser", "parse"]


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the words of a command that uses argparse."""
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
        generate,
        evaluate,
        score,
    ):
        module.register(command)
    return parser, parsers
