"""Data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefixtune.data import TASKS, Example, ExampleLike, as_examples, limit_targets, read_task
from prefixtune.data.labels import validate_labels
from prefixtune.errors import ConfigError, DataError, check_all
from prefixtune.training.checkpoint import PREFIX_FILE, STATE_FILE, WEIGHTS_FILE
from prefixtune.training.checks import early_checks
from prefixtune.training.config import TrainConfig
from prefixtune.training.distributed import ProcessGroup

__all__ = ["read_data"]


def _with_targets(examples: list[Example], what: str) -> list[Example]:
    """The examples, of which some must have a target."""
    if not examples:
        raise DataError(f"the {what} data has no example.", hint="check the file and `limit`.")
    if not any(example.targets for example in examples):
        raise DataError(
            f"the {what} data has {len(examples):,} examples, and none has a target to learn.",
            hint="name the column or template of the targets (--target), or give another file.",
        )
    return examples


def read_data(
    config: TrainConfig,
    examples: Sequence[ExampleLike] | None,
    dev_examples: Sequence[ExampleLike] | None,
    processes: ProcessGroup,
    *,
    resume: bool,
    loads: bool,
) -> tuple[list[Example], list[Example]]:
    """Read what is not given, and check all that can be without a backbone, which takes long to load.

    Returns:
        The examples to train on and those to choose by, as far as they are used.
    """
    folder = Path(config.output)
    if (
        not resume
        and processes.is_main
        and any((folder / name).exists() for name in (STATE_FILE, PREFIX_FILE, WEIGHTS_FILE))
    ):
        raise ConfigError(
            f"{str(folder)!r} already holds a run.",
            hint="go on with --resume (resume=True), choose another --output (output), or delete it.",
        )
    chosen: list[Example] = []
    dev: list[Example] = []
    kind = TASKS[config.task].kind if config.task in TASKS else "generation"

    def check_labels() -> None:
        # What could not be read is reported by itself.
        if kind != "generation" and chosen and (dev or not config.dev):
            validate_labels(kind, chosen, dev, by=config.classifier, words=config.words_by_label)

    check_all(
        [
            lambda: chosen.extend(
                limit_targets(_with_targets(_training_data(config, examples), "training"), config.limit)
            ),
            lambda: dev.extend(limit_targets(_development_data(config, dev_examples), config.dev_limit)),
            check_labels,
            *early_checks(config, processes, has_dev=bool(dev_examples or config.dev), loads=loads),
        ]
    )
    return chosen, dev


def _training_data(config: TrainConfig, examples: Sequence[ExampleLike] | None) -> list[Example]:
    if examples is not None:
        return as_examples(examples, config.source or None, config.target or None)
    parts = TASKS[config.task].parts if config.task in TASKS else ()
    if not config.train and config.task in TASKS and not parts:
        raise ConfigError("no training file is given.", hint="set train (--train FILE).")
    return _read(config, config.train or (*parts, "")[0], "train")


def _development_data(config: TrainConfig, examples: Sequence[ExampleLike] | None) -> list[Example]:
    if examples is not None:
        dev = as_examples(examples, config.source or None, config.target or None, "development example")
    else:
        dev = _read(config, config.dev, "dev") if config.dev else []
    return _with_targets(dev, "development") if dev else []


def _read(config: TrainConfig, path: str, split: str) -> list[Example]:
    """The examples of a file, or of a folder's split."""
    return read_task(config.task, path, source=config.source or None, target=config.target or None, split=split)
