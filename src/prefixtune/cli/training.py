"""Run trainings, and show their progress or print their events as JSON lines."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefixtune.cli.common import print_json
from prefixtune.training.config import TrainConfig
from prefixtune.utils.console import Console

__all__ = ["run_training", "run_training_together"]


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
            on_event=_print_event if as_json else None,
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
            return run(configs, resume=resume, on_event=_print_event if as_json else show)
        except KeyboardInterrupt as stopped:
            kept = str(stopped) or "stopped at once; the last saves are kept"
            raise KeyboardInterrupt(f"{kept}; go on with the same command and --resume.") from None


def _print_event(event: dict[str, Any]) -> None:
    # A reader such as `head` may close the pipe; the training goes on.
    with suppress(BrokenPipeError):
        print_json(event)
