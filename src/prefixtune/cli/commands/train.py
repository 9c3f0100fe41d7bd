"""`prefixtune train`: train a prefix, or another method to compare with."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from prefixtune.cli.common import AddCommand, add_json_and_quiet, print_json
from prefixtune.cli.training import run_training, run_training_together
from prefixtune.errors import ConfigError
from prefixtune.training.config import TrainConfig
from prefixtune.training.presets import preset
from prefixtune.utils.console import Console

__all__ = ["register"]


def register(command: AddCommand) -> None:
    """Add the command and its options to the command line."""
    parser = command(
        "train",
        run,
        "train a prefix and store it as one small file",
        """

examples:
  prefixtune train --task e2e --train trainset.csv --dev devset.csv --output runs/e2e
  prefixtune train --train my.jsonl --source "{name} is {food}" --target text
  prefixtune train --config run.toml --learning-rate 2e-3
  prefixtune train --resume --output runs/e2e
  prefixtune train --together pubs.toml trains.toml""",
    )
    parser.add_argument("--config", help="TOML file with the keys below (prefix_length = 10); flags win over it")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --output; with more --max-steps it is extended"
    )
    parser.add_argument(
        "--together",
        nargs="+",
        metavar="FILE",
        help="TOML files, each of a run with its own output: trained at once, sharing every pass over the backbone",
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="hyperparameters such as the paper's (see `prefixtune tasks`); the file and flags win over them",
    )
    add_json_and_quiet(parser, "every event, one a line,")
    hints = get_type_hints(TrainConfig)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(TrainConfig):
        group = groups.setdefault(field.metadata["group"], parser.add_argument_group(field.metadata["group"]))
        flag, kind = f"--{field.name.replace('_', '-')}", hints[field.name]
        text = field.metadata["help"].replace("%", "%%")
        shown = repr(field.default) if isinstance(field.default, str) else field.default
        text = f"{text} (default: {shown})" if field.default not in ("", 0) else text
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        elif get_origin(kind) is Literal:
            names = "{" + ",".join(get_args(kind)) + "}"
            group.add_argument(flag, default=argparse.SUPPRESS, metavar=names, help=text)
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}[kind]
            group.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=text)


def run(options: argparse.Namespace) -> int:
    """`prefixtune train`."""
    from prefixtune.training.distributed import is_main_process

    console = Console(quiet=options.quiet or options.json or not is_main_process())
    if options.together:
        return _train_together(options, console)
    config = _train_config(options)
    result = run_training(console, config, resume=options.resume, as_json=options.json)
    if not is_main_process():
        return 0
    if options.json:
        print_json({"event": "result", "path": str(result.path), "file_bytes": result.path.stat().st_size})
        return 0
    best = "" if math.isnan(result.best_loss) else f", development loss {result.best_loss:.4f} per token"
    stored = result.num_trained if result.prefix is None else result.prefix.num_parameters
    print(f"{result.path}: {stored:,} parameters, {result.path.stat().st_size:,} bytes{best}")
    if result.prefix is None:
        console.info(f"score it: prefixtune evaluate --run {config.output} --data FILE")
    else:
        console.info(f'try it: prefixtune generate --prefix {result.path} "..."')
    return 0


def _train_together(options: argparse.Namespace, console: Console) -> int:
    """Train several runs in one process, each configured by a TOML file; other flags apply to all.

    Raises:
        ConfigError: A flag cannot go with --together.
    """
    from prefixtune.training.distributed import is_main_process

    names = {field.name for field in dataclasses.fields(TrainConfig)}
    flags = {name: value for name, value in vars(options).items() if name in names}
    wrong = [f"--{name}" for name in ("config", "preset") if getattr(options, name) is not None]
    wrong += ["--output"] if "output" in flags else []
    if wrong:
        raise ConfigError(
            f"{' and '.join(wrong)} cannot go with --together: each run has its own file.",
            hint="write it into the files.",
        )
    configs = [TrainConfig.from_toml(path, **flags) for path in options.together]
    results = run_training_together(console, configs, resume=options.resume, as_json=options.json)
    for config, result in zip(configs, results, strict=True) if is_main_process() else ():
        if options.json:
            print_json({"event": "result", "run": config.output, "path": str(result.path)})
            continue
        best = "" if math.isnan(result.best_loss) else f", development loss {result.best_loss:.4f} per token"
        print(f"{result.path}: {result.num_trained:,} parameters trained{best}")
    return 0


def _train_config(options: argparse.Namespace) -> TrainConfig:
    """The configuration: flags win over the TOML file, which wins over a preset.

    A run that is resumed without a file uses its own.
    """
    from prefixtune.training.folder import stored_config

    names = {field.name for field in dataclasses.fields(TrainConfig)}
    flags = {name: value for name, value in vars(options).items() if name in names}
    path = options.config
    if options.resume and path is None:
        path = stored_config(flags.get("output", TrainConfig.output))
    config = _read(path, {}, flags)
    if options.preset is None:
        return config
    values = preset(options.preset, config.task, config.method, num_targets=config.limit or 100)
    return _read(path, values, flags)


def _read(path: str | Path | None, preset_values: Mapping[str, Any], flags: Mapping[str, Any]) -> TrainConfig:
    """Flags win over the TOML file, which wins over the values of a preset."""
    if path is None:
        return TrainConfig.from_mapping({**preset_values, **flags}, where="the command")
    return TrainConfig.from_toml(path, beneath=preset_values, **flags)
