"""Run trainings, show their progress or print their events as JSON lines, and find values beneath their options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.cli.common import print_event
from prefixtune.errors import ConfigError, PrefixError
from prefixtune.training.config import TrainConfig
from prefixtune.training.presets import preset, without_conflicts
from prefixtune.utils.config import Layer
from prefixtune.utils.console import Console

__all__ = ["preset_layer", "run_training", "run_training_together", "stored_layer"]


def run_training(
    console: Console, config: TrainConfig, *, resume: bool = False, as_json: bool = False, **options: Any
) -> Any:
    """`training.train` with its progress shown, or with its events as JSON lines.

    Raises:
        KeyboardInterrupt: It was interrupted; the text says how to continue.
    """
    from prefixtune.training.train import train as run

    try:
        return run(
            config,
            resume=resume,
            progress=not (console.quiet or as_json),
            on_event=print_event if as_json else None,
            **options,
        )
    except KeyboardInterrupt as stopped:
        resume_line = f"go on with `prefixtune train --resume --output {config.output}`."
        if str(stopped):
            raise KeyboardInterrupt(f"{stopped}; {resume_line}") from None
        if (Path(config.output) / "state.safetensors").exists():
            raise KeyboardInterrupt(f"stopped at once; the last save is kept; {resume_line}") from None
        raise KeyboardInterrupt("nothing was trained yet.") from None


def run_training_together(
    console: Console, configs: Sequence[TrainConfig], *, resume: bool = False, as_json: bool = False
) -> Any:
    """`training.train_together` with its progress shown, or with its events as JSON lines.

    Raises:
        KeyboardInterrupt: It was interrupted; the text says how to continue.
    """
    from prefixtune.training.progress import show_training
    from prefixtune.training.train import train_together as run

    console.info(f"{len(configs)} runs share the backbone {configs[0].backbone}")
    with show_training(console, num_runs=len(configs)) as show:
        try:
            return run(configs, resume=resume, on_event=print_event if as_json else show)
        except KeyboardInterrupt as stopped:
            kept = str(stopped) or "stopped at once; the last saves are kept"
            raise KeyboardInterrupt(f"{kept}; go on with the same command and --resume.") from None


def stored_layer(folder: str) -> Layer:
    """The configuration of a run to resume."""
    from prefixtune.training.folder import stored_config

    try:
        return Layer.from_file(stored_config(folder), TrainConfig.model_fields)
    except PrefixError as error:
        return Layer({}, error=error)


def preset_layer(values: Mapping[str, Any]) -> Layer:
    """The values of a preset for the run that these values, of a file and the command line, describe.

    Left out is what these values do not go with, as it is not what the user gave.
    """
    start = {"initialization": "prefix"} if values.get("init_prefix") else {}
    task, method = (str(values.get(name, TrainConfig.default(name))) for name in ("task", "method"))
    limit = str(values.get("limit", ""))
    num_targets = int(limit) if limit.isdecimal() else 0
    try:
        values_of_preset = preset(values["preset"], task, method, num_targets=num_targets or 100)
        if values["preset"] == "paper-low-data" and not num_targets:
            raise ConfigError(
                "the preset paper-low-data depends on the number of training targets, but limit does not give it.",
                hint="--limit 50, 100, 200 or 500.",
            )
        return Layer({**without_conflicts(values_of_preset, {**start, **values}), **start})
    except PrefixError as error:
        return Layer({}, error=error)
