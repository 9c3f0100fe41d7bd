"""`prefixtune length`: find how long a prefix should be, in one run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from prefixtune.cli.options import ConfigOptions, OutputOptions, command, json_option
from prefixtune.cli.show import print_event, print_json
from prefixtune.cli.training import preset_layer, stored_layer
from prefixtune.training.config import TrainConfig
from prefixtune.utils.config import CommaList, Layer
from prefixtune.utils.console import Console

if TYPE_CHECKING:
    from prefixtune.evaluation.length import LengthResult

__all__ = ["length"]


USUAL = {"nested": True, "prefix_length": 64, "output": "runs/length"}
"""Values in place of training's usual ones."""


class LengthOptions(ConfigOptions, OutputOptions, TrainConfig):
    """The options of `prefixtune length`."""

    defaults_elsewhere = tuple(USUAL)

    lengths: CommaList[int] = Field(
        (), description="lengths to measure besides the whole; none: 1, 2, 3, 4, 6, 8, 12, 16 and so on"
    )
    significance: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="a length is worse than the best where the p-value of the difference is below this",
    )
    samples: int = Field(1000, ge=2, le=100_000, description="draws of the bootstrap and of the paired randomization")
    resume: bool = Field(False, description="go on with the run in --output")
    preset: str = Field(
        "",
        description="hyperparameters such as the paper's (see `prefixtune data --tasks`), beneath file and options",
    )
    as_json: bool = json_option("every event and the curve, one a line,")

    @classmethod
    def layers(cls, given: Mapping[str, Any]) -> Iterable[Layer]:
        """This command's usual values, those of --preset, and the file of --config or that of the run to resume."""
        if given.get("resume") and "config" not in given:
            file = [stored_layer(given.get("output", USUAL["output"]))]
        else:
            file = list(super().layers(given))
        values = {**(file[0].values if file else {}), **given}
        # Examples and a prefix have a length of their own.
        starts = (
            values.get("init_examples", "0") not in ("0", 0)
            or values.get("initialization") == "examples"
            or values.get("init_prefix")
        )
        usual = Layer({name: value for name, value in USUAL.items() if not (starts and name == "prefix_length")})
        if "preset" not in given:
            return [usual, *file]
        return [usual, preset_layer(values), *file]


@command
def length(options: LengthOptions) -> int:
    """Find how long a prefix should be: train once, measure every length, and cut it to the shortest that will do.

    One nested run of --prefix-length positions (64 if it is not given) makes the first p positions a good prefix for
    every p. The development loss at each length has a 95 % interval; the chosen length is the shortest whose loss is
    not significantly higher than the best. The folder of the run (runs/length if --output is not given) then has the
    curve as length.json and as pictures, and the prefix cut to that length.

    For example:
        prefixtune length --task e2e --train trainset.csv --dev devset.csv --output runs/how-long
        prefixtune length --train my.jsonl --dev held_out.jsonl --prefix-length 128 --lengths 8,16,32
        prefixtune length --resume --output runs/how-long
    """
    from prefixtune.evaluation.length import find_length
    from prefixtune.training.progress import show_training

    config = options.part(TrainConfig)
    console = Console(quiet=options.quiet or options.as_json)
    with show_training(console) as show:
        result = find_length(
            config,
            lengths=options.lengths,
            significance=options.significance,
            samples=options.samples,
            resume=options.resume,
            on_event=print_event if options.as_json else show,
            on_length=lambda length: console.info(f"measuring the first {length} positions ..."),
            progress=False,
        )
    if options.as_json:
        _print_curve(result)
    else:
        _print_table(result, console)
    return 0


def _print_curve(result: LengthResult) -> None:
    for point in result.lengths:
        print_json({"event": "length", **point.model_dump()})
    print_json({"event": "result", "best": result.best, "chosen": result.chosen, "path": str(result.path)})


def _print_table(result: LengthResult, console: Console) -> None:
    notes = {result.best: "best", result.chosen: "chosen"}
    rows: list[list[str | int]] = [
        [
            point.prefix_length,
            f"{point.loss:.4f}",
            "{:.4f} to {:.4f}".format(*point.interval),
            f"{point.difference:.4f}",
            f"{point.p_value:.4f}",
            f"{point.num_bytes:,}",
            notes.get(point.prefix_length, ""),
        ]
        for point in result.lengths
    ]
    columns = ["p", "loss", "95 % interval", "worse than the best by", "p-value", "bytes", ""]
    console.table("", columns, rows, result=True)
    print(f"{result.path}: {result.path.stat().st_size:,} bytes")
    if result.num_sources < 50:
        console.warn(
            f"only {result.num_sources} development sources: with few, even a much shorter prefix may not be "
            "significantly worse."
        )
    console.info(f'try it: prefixtune generate --prefix {result.path} "..."')
