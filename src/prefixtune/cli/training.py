"""Run trainings, show their progress or print their events as JSON lines, and find values beneath their options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefixtune.cli.show import print_event
from prefixtune.training.config import TrainConfig
from prefixtune.training.presets import preset, without_conflicts
from prefixtune.utils.config import Layer
from prefixtune.utils.console import Console

__all__ = ["preset_layer", "run_training", "run_training_together", "stored_layer"]


def run_training(
    console: Console, config: TrainConfig, *, resume: bool = False, as_json: bool = False, **options: Any
) -> Any:
    """`training.train` with its progress shown, or with its events as JSON lines."""
    from prefixtune.training.train import train

    return train(
        config,
        resume=resume,
        progress=not (console.quiet or as_json),
        on_event=print_event if as_json else None,
        **options,
    )


def run_training_together(
    console: Console, configs: Sequence[TrainConfig], *, resume: bool = False, as_json: bool = False
) -> Any:
    """`training.train_together` with its progress shown, or with its events as JSON lines."""
    from prefixtune.training.progress import show_training
    from prefixtune.training.train import train_together

    console.info(f"{len(configs)} runs share the backbone {configs[0].backbone}")
    with show_training(console, num_runs=len(configs)) as show:
        return train_together(configs, resume=resume, on_event=print_event if as_json else show)


def stored_layer(folder: str) -> Layer:
    """The configuration of a run to resume."""
    from prefixtune.training.run_folder import stored_config

    return Layer.from_file(stored_config(folder), TrainConfig.model_fields)


def preset_layer(values: Mapping[str, Any]) -> Layer:
    """The values of a preset for the run that these values, of a file and the command line, describe.

    Left out is what these values do not go with, as it is not what the user gave.
    """
    start = {"initialization": "prefix"} if values.get("init_prefix") else {}
    task, method = (str(values.get(name, TrainConfig.default(name))) for name in ("task", "method"))
    return Layer({**without_conflicts(preset(values["preset"], task, method), {**start, **values}), **start})
