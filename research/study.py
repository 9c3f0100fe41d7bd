"""A grid of training runs, each scored on one test set: `python -m research.study research/studies/low_data.toml`.

Every point of a study is run for each size of the training set and each sample of it. A run has a folder, and is done
when its `evaluation.json` is there. The same command goes on where it was, and several processes may work on one study:
a run belongs to the process that holds its lock. A study that is changed needs another folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import shutil
import statistics
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field

import prefixtune as pt
from prefixtune.backbone.backbone import Backbone
from prefixtune.data import TASKS, read_task
from prefixtune.errors import DataError, PrefixError, TrainingError
from prefixtune.evaluation.evaluate import instruction_format
from prefixtune.evaluation.scores import write_evaluation
from prefixtune.prefix.text_format import TextFormat
from prefixtune.results import EVALUATION_FILE
from prefixtune.training.artifact import load_tuned
from prefixtune.training.prepare import load_for
from prefixtune.training.presets import preset, without_conflicts
from prefixtune.training.run_folder import PREFIX_FILE, STATE_FILE, WEIGHTS_FILE
from prefixtune.utils.files import write_text


class Study(BaseModel):
    """The file of a study.

    Attributes:
        output: The folder of its runs.
        task: How the data is read and scored, as in `prefixtune data --tasks`.
        train: The training set.
        dev: The development set, by which rates and steps are chosen.
        test: The test set.
        sizes: Numbers of training targets; 0: all.
        samples: How often each point is run: each time on another sample, with another seed.
        first_sample: The number of the first sample. It seeds the draw, so other numbers are other samples.
        rate_samples: Samples that learning rates are chosen on, by the mean loss; none: the first sample.
        rate_size: The size that learning rates are chosen at; 0: each size chooses its own.
        pairs: Draw single pairs of a source and a target, to train on and to choose by, not sources with all targets.
        steps: Steps by size, over the points' `max_steps`.
        dev_limit: Development sources of a sample; 0: all.
        test_limit: Test sources, a fixed sample; 0: all.
        try_steps: Steps of the runs that a learning rate is chosen by; 0: as many as the point's.
        decoding: Settings of `prefixtune generate`, over the task's.
        settings: Settings of `prefixtune train` that all points have.
        points: Settings of each point, over these. `method = "none"` scores the bare model, which is asked by
            `init_text`; `learning_rates` is a list to choose from; `preset` names settings beneath all others.
    """

    model_config = ConfigDict(extra="forbid")

    output: str
    task: str
    train: str
    dev: str
    test: str
    sizes: list[int] = [0]
    samples: int = Field(1, ge=1)
    first_sample: int = 0
    rate_samples: list[int] = []
    rate_size: int = 0
    pairs: bool = False
    steps: dict[int, int] = {}
    dev_limit: int = 0
    test_limit: int = 0
    try_steps: int = 0
    decoding: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    points: dict[str, dict[str, Any]] = Field(min_length=1)

    def read(self, split: Literal["train", "dev", "test"]) -> list[pt.Example]:
        """The examples of a split that have a target."""
        source, target = self.settings.get("source"), self.settings.get("target")
        examples = read_task(self.task, getattr(self, split), split=split, source=source, target=target)
        if self.pairs and split != "test":
            return [dataclasses.replace(example, targets=(one,)) for example in examples for one in example.targets]
        return [example for example in examples if example.targets]

    def settings_of(self, point: str, size: int) -> dict[str, Any]:
        """The settings of a point at a size, those of its preset beneath."""
        given = {**self.settings, **self.points[point]}
        if size in self.steps:
            given["max_steps"] = self.steps[size]
        name = given.pop("preset", "")
        beneath = preset(name, self.task, given.get("method", "prefix")) if name else {}
        return {**without_conflicts(beneath, {**given, "dev": self.dev}), **given}


def read_study(path: Path, data: str = "") -> Study:
    """The study of a TOML file; with `data`, its sets are in this folder.

    Raises:
        DataError: It is no study.
    """
    try:
        study = Study(**tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} is no study: {error}", hint="see research/README.md.") from error
    if not data:
        return study
    sets = {name: os.path.join(data, getattr(study, name)) for name in ("train", "dev", "test")}
    return study.model_copy(update=sets)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: a point, a size and a sample."""

    point: str
    size: int
    sample: int

    @property
    def group(self) -> str:
        """What its repetitions have in common."""
        return f"{self.point}-n{self.size or 'all'}"

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.group}-s{self.sample}"


def cells(study: Study) -> list[Cell]:
    """All runs; each point once before any is repeated, so that a study that is cut short has them all."""
    return [
        Cell(point, size, study.first_sample + number)
        for number in range(study.samples)
        for size in study.sizes
        for point in study.points
    ]


def run(study: Study) -> dict[str, str]:
    """Do what is left of a study; returns what became of each run: done, failed (and why), or another's."""
    return {cell.name: run_cell(study, cell) for cell in cells(study)}


def run_on_ray(study: Study, address: str, gpus: float = 0) -> dict[str, str]:
    """The same on a Ray cluster, whose machines share the file system.

    Args:
        study: The study.
        address: Of the cluster; `local` starts one here.
        gpus: That each run takes.
    """
    import ray

    # The workers find this folder, and all that this process does.
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)])}}
    ray.init(address=address, runtime_env=environment, log_to_driver=False)
    try:
        task, runs = ray.remote(num_gpus=gpus, max_retries=0)(run_cell), cells(study)
        states = ray.get([task.remote(study, cell) for cell in runs])
        return {cell.name: state for cell, state in zip(runs, states, strict=True)}
    finally:
        ray.shutdown()


def run_cell(study: Study, cell: Cell) -> str:
    """Do a run, unless it is done; returns what became of it."""
    folder = Path(study.output) / cell.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{folder}.lock", timeout=0):
            if not (folder / EVALUATION_FILE).exists():
                print(cell.name, flush=True)
                _train_and_score(study, cell, folder)
            return "done"
    except Timeout:
        return "of another process"
    except PrefixError as error:
        return f"failed: {error}"


def _train_and_score(study: Study, cell: Cell, folder: Path) -> None:
    """Train and score a run, or what is left of it."""
    settings = study.settings_of(cell.point, cell.size)
    rates = settings.pop("learning_rates", [])
    if not (trains := settings.get("method") != "none"):
        del settings["method"]
    if len(rates) > 1:
        settings["learning_rate"] = _choose_rate(study, cell, rates)
    elif rates:
        settings["learning_rate"] = rates[0]
    config = _config(study, settings, folder, cell.sample)
    facts: dict[str, Any] = {**dataclasses.asdict(cell), "title": cell.name, "task": study.task, "split": "test"}
    if trains:
        facts["training"] = _train(study, cell, config)
    backbone, prefix, text_format = _load(config, trains=trains)
    task, examples = TASKS[study.task], sample(study.read("test"), study.test_limit, "test")
    outcome = pt.evaluate(
        backbone,
        examples,
        prefix,
        text_format=text_format,
        config={**task.decoding, **study.decoding},
        protocol=task.protocol,
        kind=task.kind,
        metrics=task.metrics if task.kind == "generation" else None,
        intervals=task.kind == "generation",
    )
    facts |= {"data": study.test, "method": config.method if trains else "none", "backbone": config.backbone}
    write_evaluation(folder, outcome, examples, protocol=task.protocol, **facts)
    (folder / STATE_FILE).unlink(missing_ok=True)


def _config(study: Study, settings: Mapping[str, Any], folder: Path, seed: int) -> pt.TrainConfig:
    return pt.TrainConfig(**{**settings, "task": study.task, "output": str(folder), "seed": seed})


def _train(study: Study, cell: Cell, config: pt.TrainConfig) -> dict[str, Any]:
    """Train a run, or go on with it; returns what it took."""
    folder = Path(config.output)
    resume = (folder / STATE_FILE).exists()
    if not resume:
        # It was stopped before its first save.
        shutil.rmtree(folder, ignore_errors=True)
    result = pt.train(
        config,
        examples=sample_targets(study.read("train"), cell.size, f"train/{cell.sample}"),
        dev_examples=sample(study.read("dev"), study.dev_limit, "dev"),
        resume=resume,
        progress=False,
    )
    return {
        "learning_rate": config.learning_rate,
        "dev_loss": None if math.isnan(result.best_loss) else result.best_loss,
        "trained_parameters": result.num_trained,
        "file_bytes": result.path.stat().st_size,
        "steps": result.steps,
        "seconds": round(sum(event["seconds"] for event in result.events if event["event"] == "step"), 2),
    }


def _choose_rate(study: Study, cell: Cell, rates: Sequence[float]) -> float:
    """The rate with the lowest development loss, of runs on `rate_samples`; what was tried is kept in `rates/`.

    Raises:
        TrainingError: No run reached its end.
    """
    cell = dataclasses.replace(cell, size=study.rate_size or cell.size)
    settings = study.settings_of(cell.point, cell.size)
    del settings["learning_rates"]
    folder = Path(study.output) / "rates"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{cell.group}.json"
    with FileLock(f"{path}.lock"):
        losses: dict[str, float | None] = json.loads(path.read_text()) if path.exists() else {}
        for rate in rates:
            if str(rate) in losses:
                continue
            tried = {**settings, "learning_rate": rate}
            if study.try_steps:
                tried |= {"max_steps": study.try_steps, "eval_every": study.try_steps}
            found: list[float | None] = []
            for number in study.rate_samples or [study.first_sample]:
                config = _config(study, tried, folder / f"{cell.group}-{rate:g}-s{number}", seed=number)
                try:
                    found.append(_train(study, dataclasses.replace(cell, sample=number), config)["dev_loss"])
                except TrainingError as error:
                    print(f"{cell.group} at {rate:g}: {error}", flush=True)
                    found.append(None)
                shutil.rmtree(config.output, ignore_errors=True)
            reached = [loss for loss in found if loss is not None]
            losses[str(rate)] = statistics.fmean(reached) if len(reached) == len(found) else None
            # Whole or not at all, whenever the process is killed.
            write_text(path, json.dumps(losses) + "\n")
    finite = {rate: loss for rate in rates if (loss := losses[str(rate)]) is not None}
    if not finite:
        raise TrainingError(f"no run of {cell.group} reached its end.", hint="give lower learning_rates.")
    return min(finite, key=finite.__getitem__)


def _load(config: pt.TrainConfig, *, trains: bool) -> tuple[Backbone, Path | None, TextFormat | None]:
    """What is scored: a model, its prefix if it has one, and the text format where that is not the prefix's."""
    folder = Path(config.output)
    if trains and not config.trains_prefix:
        backbone, text_format = load_tuned(
            folder / WEIGHTS_FILE, name_or_path=config.backbone, dtype=config.dtype, device=config.device
        )
        return backbone, None, text_format
    backbone = load_for(config)
    if trains:
        return backbone, folder / PREFIX_FILE, None
    return backbone, None, instruction_format(backbone, config.init_text)


# --- samples ----------------------------------------------------------------------------------------------------------


def sample(examples: Sequence[pt.Example], count: int, seed: str) -> list[pt.Example]:
    """`count` examples, whole, in their order; 0, or more than there are: all."""
    if not 0 < count < len(examples):
        return list(examples)
    return [examples[index] for index in sorted(random.Random(seed).sample(range(len(examples)), count))]


def sample_targets(examples: Sequence[pt.Example], count: int, seed: str) -> list[pt.Example]:
    """Examples with all of their targets, drawn until there are `count` targets; the last may lose some. 0: all.

    Raises:
        DataError: There are fewer.
    """
    available = sum(len(example.targets) for example in examples)
    if count > available:
        raise DataError(f"a sample has {count} targets, but there are {available}.", hint="lower sizes.")
    if not count:
        return list(examples)
    drawn: list[pt.Example] = []
    for example in random.Random(seed).sample(examples, len(examples)):
        if count > 0:
            drawn.append(dataclasses.replace(example, targets=example.targets[:count]))
            count -= len(example.targets)
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is left of a study, or list its runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("file", type=Path, help="the study, a TOML file")
    parser.add_argument("--data", default="", help="folder of its data sets (default: where the command is started)")
    parser.add_argument("--plan", action="store_true", help="only list the runs")
    parser.add_argument("--ray", metavar="ADDRESS", help="hand the runs to a Ray cluster; local: one of this machine")
    parser.add_argument("--gpus", type=float, default=0, help="that a run takes on a Ray cluster")
    options = parser.parse_args(arguments)
    try:
        study = read_study(options.file, options.data)
    except PrefixError as error:
        print(error, file=sys.stderr)
        return 2
    if options.plan:
        print("\n".join(cell.name for cell in cells(study)))
        return 0
    states = run_on_ray(study, options.ray, options.gpus) if options.ray else run(study)
    print("\n".join(f"{name}: {state}" for name, state in states.items()))
    return int(any(state.startswith("failed") for state in states.values()))


if __name__ == "__main__":
    sys.exit(main())
