"""Parts of every command: its parser, and JSON on stdout."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, NoReturn

from prefixtune.errors import ConfigError

__all__ = ["AddCommand", "CommandParser", "add_json_and_quiet", "print_json"]


class CommandParser(argparse.ArgumentParser):
    """argparse whose errors are a `ConfigError`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise a `ConfigError`; argparse calls this for wrong arguments."""
        raise ConfigError(f"{message}.", hint=f"`{self.prog} --help` explains the options.")

    def options(self) -> list[str]:
        """All long options."""
        return [text for action in self._actions for text in action.option_strings if text.startswith("--")]


AddCommand = Callable[..., CommandParser]
"""Adds a command: its name, the function that runs it, one line of help, and more help."""


def add_json_and_quiet(parser: CommandParser, what: str) -> None:
    """Add --json, which prints `what`, and --quiet."""
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress, only results and errors")


def print_json(value: object) -> None:
    """One JSON value on a line of stdout, at once."""
    print(json.dumps(value, ensure_ascii=False), flush=True)
