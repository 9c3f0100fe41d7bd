"""`prefixtune train` and `length`: train a prefix, or another method to compare with; find how long it should be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from prefixtune.cli.options import Conflicts, RunOptions, command, option
from prefixtune.cli.show import Table, print_event, print_json
from prefixtune.training.config import TrainConfig
from prefixtune.utils.config import CommaList, Layer, TextList

if TYPE_CHECKING:
    from prefixtune.evaluation.length import LengthResult


class TrainingOptions(RunOptions, TrainConfig):
    """The options of a training."""

    preset: str = option(
        "", "hyperparameters such as the paper's (see `prefixtune data --tasks`), beneath file and options"
    )

    @classmethod
    def layers(cls, given: Mapping[str, Any]) -> Iterable[Layer]:
        """This command's usual values, those of --preset, and the file of --config or that of the run to resume.

        Left out is what the values of the file and the command line do not go with, as it is not what the user gave.
        """
        from prefixtune.training.presets import preset, without_conflicts

        file = list(super().layers(given))
        values, usual = {**(file[0].values if file else {}), **given}, dict(cls.usual)
        if "preset" in given:
            task, method = (str(values.get(name, cls.default(name))) for name in ("task", "method"))
            usual |= preset(given["preset"], task, method)
        return [Layer(without_conflicts(usual, values)), *file]


class TrainOptions(TrainingOptions):
    """The options of `prefixtune train`."""

    together: TextList = option(
        (),
        "files, each of a run with its own output: they share every pass over the backbone",
        many=[1, None],
        metavar="FILE",
    )

    @classmethod
    def layers(cls, given: Mapping[str, Any]) -> Iterable[Layer]:
        """Those of a training; runs that train together each have a file of their own."""
        return [] if "together" in given else super().layers(given)

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Self:
        """With --together, what an option implies is not over what a file says."""
        options = super().read(given)
        return cls.model_construct(set(given), **dict(options)) if options.together else options

    def conflicts(self) -> Conflicts:
        """Also: what cannot go with --together."""
        if not self.together:
            yield from super().conflicts()
        yield from self.apart("together", "config", "preset", "output", "print_config")


@command
def train(options: TrainOptions) -> None:
    """Train a prefix and store it as one small file.

    Options win over the file of --config, and the file over --preset.

    For example:
        prefixtune train --task e2e --train trainset.csv --dev devset.csv --output runs/e2e
        prefixtune train --train my.jsonl --source "{name} is {food}" --target text
        prefixtune train --config run.toml --learning-rate 1e-2
        prefixtune train --resume --output runs/e2e
        prefixtune train --together pubs.toml trains.toml
    """
    from prefixtune.training.distributed import is_main_process
    from prefixtune.training.progress import show_training
    from prefixtune.training.train import train as train_one
    from prefixtune.training.train import train_together

    if options.together:
        # Each is configured by its file; the other options apply to all.
        configs = [TrainConfig.from_file(path, **options.given(TrainConfig)) for path in options.together]
        options.console.info(f"{len(configs)} runs share the backbone {configs[0].backbone}")
        with show_training(options.console, num_runs=len(configs)) as shown:
            on_event = print_event if options.as_json else shown
            results = train_together(configs, resume=options.resume, on_event=on_event)
    else:
        configs = [options.part(TrainConfig)]
        results = [train_one(configs[0], **options.reporting)]
    for config, result in zip(configs, results, strict=True) if is_main_process() else ():
        size = result.path.stat().st_size
        best = "" if math.isnan(result.best_loss) else f", development loss {result.best_loss:.4f} per token"
        stored = result.num_trained if result.prefix is None else result.prefix.num_parameters
        options.show(
            {"event": "result", "run": config.output, "path": str(result.path), "file_bytes": size},
            f"{result.path}: {stored:,} parameters, {size:,} bytes{best}",
        )
        if result.prefix is None:
            options.console.info(f"score it: prefixtune evaluate --run {config.output} --data FILE")
        else:
            options.console.info(f'try it: prefixtune generate --prefix {result.path} "..."')


class LengthOptions(TrainingOptions):
    """The options of `prefixtune length`."""

    usual: ClassVar[Mapping[str, Any]] = {"nested": True, "prefix_length": 64, "output": "runs/length"}
    defaults_elsewhere = tuple(usual)

    lengths: CommaList[int] = option((), "lengths to measure besides the whole; none: 1, 2, 3, 4, 6, 8, 12 and so on")
    significance: float = option(0.05, "below this p-value a length is worse than the best", gt=0, lt=1)


@command
def length(options: LengthOptions) -> None:
    """Find how long a prefix should be: train once, measure every length, and cut it to the shortest that will do.

    One nested run of --prefix-length positions (64 if it is not given) makes the first p positions a good prefix for
    every p. The development loss at each length has a 95 % interval; the chosen length is the shortest whose loss is
    not significantly higher than the best. The folder of the run (runs/length if --output is not given) then has the
    curve as length.json, and the prefix cut to that length.

    For example:
        prefixtune length --task e2e --train trainset.csv --dev devset.csv --output runs/how-long
        prefixtune length --train my.jsonl --dev held_out.jsonl --prefix-length 128 --lengths 8,16,32
        prefixtune length --resume --output runs/how-long
    """
    from prefixtune.evaluation.length import find_length

    result = find_length(
        options.part(TrainConfig),
        lengths=options.lengths,
        significance=options.significance,
        on_length=lambda length: options.console.info(f"measuring the first {length} positions ..."),
        **options.reporting,
    )
    if options.as_json:
        for point in result.lengths:
            print_json({"event": "length", **point.model_dump()})
    facts = {"event": "result", "best": result.best, "chosen": result.chosen, "path": str(result.path)}
    options.show(facts, _curve(result), f"{result.path}: {result.path.stat().st_size:,} bytes")
    if result.num_sources < 50:
        options.console.warn(
            f"only {result.num_sources} development sources: with few, even a much shorter prefix may not be "
            "significantly worse."
        )
    options.console.info(f'try it: prefixtune generate --prefix {result.path} "..."')


def _curve(result: LengthResult) -> Table:
    notes = {result.best: "best", result.chosen: "chosen"}
    rows: list[list[str | int]] = [
        [
            point.prefix_length,
            *(f"{point.loss:.4f}", "{:.4f} to {:.4f}".format(*point.interval), f"{point.difference:.4f}"),
            *(f"{point.p_value:.4f}", f"{point.num_bytes:,}", notes.get(point.prefix_length, "")),
        ]
        for point in result.lengths
    ]
    return Table("", ["p", "loss", "95 % interval", "worse than the best by", "p-value", "bytes", ""], rows)
