"""`prefixtune serve`: one model and many prefixes over HTTP."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from typing import Any, Literal, get_args, get_origin, get_type_hints

from prefixtune.cli.common import AddCommand
from prefixtune.errors import ConfigError
from prefixtune.server.settings import ENVIRONMENT, ServeConfig
from prefixtune.utils.console import Console

__all__ = ["register"]


def register(command: AddCommand) -> None:
    """Add the command and its options to the command line."""
    parser = command(
        "serve",
        run,
        "serve one model and many prefixes over HTTP, with OpenAI's interface",
        """

examples:
  prefixtune serve --prefixes prefixes
  prefixtune serve --config serve.toml --host 0.0.0.0
  prefixtune serve --new-key alice""",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"TOML file with the keys below, and tables [keys.NAME]; variables such as {ENVIRONMENT}PORT win over it, "
        "and flags over both",
    )
    parser.add_argument(
        "--new-key",
        metavar="NAME",
        nargs="?",
        const="me",
        help="make an API key, print it and its table, and exit",
    )
    parser.add_argument("--quiet", action="store_true", help="only errors on stderr; the log on stdout has its level")
    group = parser.add_argument_group("vLLM")
    group.add_argument(
        "--vllm-python",
        metavar="FILE",
        default=sys.executable,
        help="the Python of the environment with vLLM (default: this one)",
    )
    group.add_argument(
        "--vllm-args",
        metavar="TEXT",
        default="",
        help='further options of vLLM, as in --vllm-args="--tensor-parallel-size 2"',
    )
    group.add_argument("--show-command", action="store_true", help="print the command that starts vLLM, and exit")
    hints = get_type_hints(ServeConfig)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(ServeConfig):
        if field.name == "keys":
            continue
        name = field.metadata["group"]
        group = groups[name] = groups.get(name) or parser.add_argument_group(name)
        flag, kind = f"--{field.name.replace('_', '-')}", hints[field.name]
        text = field.metadata["help"] + (f" (default: {field.default})" if field.default not in ("", 0, ()) else "")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        elif get_origin(kind) is Literal:
            group.add_argument(flag, default=argparse.SUPPRESS, metavar="{" + ",".join(get_args(kind)) + "}", help=text)
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}.get(kind, "A,B,...")
            parse = kind if kind in (int, float) else str
            group.add_argument(flag, type=parse, default=argparse.SUPPRESS, metavar=metavar, help=text)


def run(options: argparse.Namespace) -> int:
    """`prefixtune serve`."""
    if options.new_key is not None:
        return _new_key(options.new_key)
    names = {field.name for field in dataclasses.fields(ServeConfig)}
    flags = {name: value for name, value in vars(options).items() if name in names}
    config = ServeConfig.from_sources(options.config, os.environ, flags)
    if config.engine == "vllm":
        from prefixtune.cli.commands.serve_vllm import start_vllm

        return start_vllm(config, options)
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401

        from prefixtune.server.launch import run as launch
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "prometheus_client"):
            raise
        raise ConfigError(
            f"serving needs {error.name}, which is not installed.", hint='pip install "prefixtune[serve]"'
        ) from error
    return launch(config, Console(quiet=options.quiet))


def _new_key(name: str) -> int:
    from prefixtune.server.auth import hash_key, new_key

    key = new_key()
    print(f"key for its user; it is not stored anywhere:\n\n    {key}\n")
    print("table for the file of --config:\n")
    print(f'    [keys.{json.dumps(name)}]\n    hash = "{hash_key(key)}"')
    print(
        '    prefixes = ["*"]              # patterns of model names\n    requests_per_minute = 0       # 0: any number'
    )
    print("    concurrent = 0                # requests at once; 0: any number\n    admin = false")
    return 0
