"""The command line: parse, call the command, and print errors as one line with a hint.

Exit codes: 0 success, 1 a failed check or job, or a bug (with its traceback), 2 wrong use or input, or a run that
cannot go on, 130 interrupted. With `--json` an error is one JSON object on stderr, and nothing else is written there.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import itertools
import json
import logging
import os
import pkgutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from cyclopts import App, CycloptsError, Group

from prefixtune import __version__
from prefixtune.cli.options import CommandOptions, ConfigOptions
from prefixtune.errors import ConfigError, PrefixError, PrefixWarning, first_line, is_out_of_memory
from prefixtune.utils.console import Console

COMMANDS = {
    "Start": {
        "demo": "train two prefixes on eight rows each, and ask both and the bare model in one batch",
        "prepare": "fetch the default backbone and store it, ready to load without a network",
        "doctor": "check that a backbone carries prefixes correctly; exits with 1 if anything fails",
        "env": "show versions, devices, precision and folders: what a bug report needs",
    },
    "Train": {
        "train": "train a prefix and store it as one small file",
        "distill": "put a document, a long prompt or a teacher into a prefix",
        "length": "find how long a prefix should be: one run, its loss at every length, and the shortest that will do",
        "jobs": "train on a server: upload data, start a job, follow it, pause it, cancel it",
        "data": "look at data before a run: form, lengths, what would be cut, an example with labels; list the tasks",
    },
    "Compose": {
        "compose": "make one prefix of several: joined, averaged or interpolated; or cut one to fewer positions",
    },
    "Use": {
        "generate": "generate with a prefix, from arguments or from lines on stdin",
        "chat": "talk with a model and its prefixes in the terminal",
        "serve": "serve one model and many prefixes over HTTP, with OpenAI's interface",
        "worker": "train what servers are asked for, one worker per device",
    },
    "Measure": {
        "evaluate": "decode for every example of a file and score the outputs; or score outputs of any system",
        "lm-eval": "measure a backbone with prefixes on the tasks of lm-eval, the evaluation harness",
        "report": "make one page of runs and evaluations, to look at",
        "explain": "show what a prefix does and says: attention, losses without its parts, nearest text, its own words",
    },
    "Share": {
        "inspect": "show a prefix file: header, sizes, norms per layer; or list a folder",
        "convert": "take a prefix from PEFT or the Hugging Face hub, or give one to PEFT",
        "push": "upload a prefix to the Hugging Face hub, with a model card made from its header and scores",
        "export": "write a prefix for llama.cpp, or with its backbone as an ONNX graph",
    },
}
"""Group -> command -> one line of help."""
_MODULES = {
    **dict.fromkeys(("prepare", "doctor", "env"), "setup"),
    **dict.fromkeys(("convert", "push", "export"), "share"),
    "length": "train",
    "inspect": "compose",
    "worker": "serve",
    "report": "explain",
}
"""Commands whose module has another name."""
_COMPLETION = "complete commands, options and choices by the Tab key, in bash, zsh or fish"
_EPILOGUE = (
    "Start with `prefixtune demo`. Each command explains itself: `prefixtune train --help`. Mistakes exit with 2; "
    "failed checks and jobs, and bugs with 1; with --json a mistake is one JSON object on stderr."
)
_RESUMABLE = ("distill", "evaluate", "length", "train")
_GO_ON = "what was stored is kept: the same command goes on, with --resume if it has that option."
_LESS_MEMORY = (
    "lower what the command has of --batch-size, --max-length, --decode-batch and --max-new-tokens; train with "
    "--gradient-checkpointing; or choose a smaller backbone."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code.

    Args:
        arguments: The command and its options; None: those of this process, which ends with it.
    """
    if arguments is not None:
        return _main(list(arguments))
    _prepare_streams()
    # Importing torch and transformers makes a million objects that stay: looking at them seldom is quicker.
    gc.set_threshold(10_000)
    return _main(sys.argv[1:])


def _prepare_streams() -> None:
    """Let neither a closed stream nor a character that an encoding lacks stop a command; what is piped in is UTF-8."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # A terminal's own encoding is that of the locale. A byte order mark, as Windows' programs write, is no text.
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8-sig")


def _main(words: Sequence[str]) -> int:
    # --json also holds for errors in the arguments themselves.
    as_json = "--json" in [word.partition("=")[0] for word in itertools.takewhile("--".__ne__, words)]
    try:
        with _messages(as_json):
            code = run(words)
        sys.stdout.flush()
        return code
    except BaseException as error:
        # rich, which prints the help, turns a pipe that its reader has closed into the end of the program.
        closed = isinstance(error.__context__ if isinstance(error, SystemExit) else error, BrokenPipeError)
        if closed or (isinstance(error, OSError) and error.filename is None):
            # Python would complain, when it closes stdout, of results that cannot be written.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if closed:
            return 0
        failure = _failure(error, *words[:1])
        if failure is None:
            raise
        if as_json:
            print(json.dumps(failure), file=sys.stderr)
        else:
            Console().error(failure["error"], failure["hint"])
        return int(failure["exit_code"])


def _failure(error: BaseException, command: str = "") -> dict[str, Any] | None:
    """Why a command failed, as `--json` prints it; None: it is a bug, or the program's end."""
    kind, code = type(error).__name__, 2
    if isinstance(error, PrefixError):
        message, hint = error.message, error.hint
    elif isinstance(error, KeyboardInterrupt):
        kind, code, message = "Interrupted", 130, "interrupted."
        hint = "; ".join(filter(None, (str(error), _GO_ON if command in _RESUMABLE else "")))
    elif isinstance(error, OSError) and error.strerror is not None:
        place = "" if error.filename is None else f" {str(error.filename)!r}"
        kind, message = PrefixError.__name__, f"cannot read or write{place}: {error.strerror}."
        hint = "free some space." if error.errno == errno.ENOSPC else "check the path, its permissions and the disk."
    elif is_out_of_memory(error):
        kind, hint = "OutOfMemoryError", _LESS_MEMORY
        message = f"out of memory: {first_line(error).removesuffix('.')}."
    else:
        return None
    return {"error": message, "hint": hint, "kind": kind, "exit_code": code}


def run(words: Sequence[str]) -> int:
    """Run a command; returns its exit code, and raises errors.

    Raises:
        PrefixError: Wrong use or input.
    """
    try:
        app = build_app(words[0] if words else "")
        parsed, bound, _ = app.parse_args(list(words), print_error=False, exit_on_error=False)
    except CycloptsError as error:
        error.verbose = False
        command = f" {words[0]}" if any(words[0] in names for names in COMMANDS.values()) else ""
        raise ConfigError(str(error), hint=f"`prefixtune{command} --help` explains it.") from error
    function: Any = parsed
    if not hasattr(function, "options"):
        # --help, --version and shell completion are cyclopts' own.
        function(*bound.args, **bound.kwargs)
        return 0
    options = function.options.read(bound.arguments)
    if isinstance(options, ConfigOptions) and options.print_config:
        print(options.part(options.configuration()).to_toml().rstrip())
        return 0
    return int(function.run(options) or 0)


def build_app(command: str = "") -> App:
    """The command line, to run `command`, whose help is its function's docstring; the others are not imported."""
    app = App(
        name="prefixtune",
        help="Train, evaluate and use prefixes for frozen language models (prefix-tuning).",
        help_epilogue=None if command else _EPILOGUE,
        version=f"prefixtune {__version__}",
        help_format="plaintext",
        group_parameters=Group("Options", sort_key=0),
        default_command=None,
    )
    groups = {title: Group.create_ordered(title) for title in COMMANDS}
    for title, commands in COMMANDS.items():
        for name, text in commands.items():
            shown = None if name == command else text
            app.command(_function(name), name=name, help=shown, group=groups[title])
    app.register_install_completion_command(add_to_startup=False, help=_COMPLETION, group=groups["Start"])
    return app


def command_options() -> dict[str, type[CommandOptions]]:
    """Command -> its options, in the order of the help; imports all commands."""
    names = [name for commands in COMMANDS.values() for name in commands]
    return {name: pkgutil.resolve_name(_function(name)).options for name in names}


def _function(command: str) -> str:
    """Where a command's function is: its module, a colon and its name."""
    name = command.replace("-", "_")
    return f"prefixtune.cli.commands.{_MODULES.get(name, name)}:{name}"


@contextlib.contextmanager
def _messages(as_json: bool) -> Iterator[None]:
    """Show this project's warnings as one line, without the position in the code; with --json, no messages at all.

    Programs read stderr: what libraries log there, such as every try to reach the hub, is left out too.
    """
    console = Console(quiet=as_json)
    with warnings.catch_warnings():
        warnings.simplefilter("default", PrefixWarning)
        show = warnings.showwarning

        def show_plainly(message: Warning | str, category: type[Warning], *rest: Any, **options: Any) -> None:
            if issubclass(category, PrefixWarning):
                console.warn(str(message))
            elif not as_json:
                show(message, category, *rest, **options)

        warnings.showwarning = show_plainly
        logging.disable(logging.WARNING if as_json else logging.NOTSET)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


if __name__ == "__main__":
    sys.exit(main())
