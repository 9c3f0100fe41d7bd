"""`prefixtune train`: train a prefix, or another method to compare with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import Field

from prefixtune.cli.options import ConfigOptions, OutputOptions, command, json_option
from prefixtune.cli.show import print_json
from prefixtune.cli.training import preset_layer, run_training, run_training_together, stored_layer
from prefixtune.training.config import TrainConfig
from prefixtune.utils.config import Layer, TextList
from prefixtune.utils.console import Console

__all__ = ["train"]


class TrainOptions(ConfigOptions, OutputOptions, TrainConfig):
    """The options of `prefixtune train`."""

    resume: bool = Field(False, description="go on with the run in --output")
    together: TextList = Field(
        (),
        description="TOML files, each of a run with its own output: trained at once, sharing every pass over "
        "the backbone",
        json_schema_extra={"many": [1, None], "metavar": "FILE"},
    )
    preset: str = Field(
        "",
        description="hyperparameters such as the paper's (see `prefixtune data --tasks`), beneath file and options",
    )
    as_json: bool = json_option("every event, one a line,")

    @classmethod
    def layers(cls, given: Mapping[str, Any]) -> Iterable[Layer]:
        """The values of --preset, beneath the file of --config or that of the run to resume."""
        if "together" in given:
            return []
        if given.get("resume") and "config" not in given:
            file = [stored_layer(given.get("output", cls.default("output")))]
        else:
            file = list(super().layers(given))
        if "preset" not in given:
            return file
        return [preset_layer({**(file[0].values if file else {}), **given}), *file]

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Also: what cannot go with --together."""
        if not self.together:
            yield from super().conflicts()
            return
        given = [name for name in ("config", "preset", "output", "print_config") if name in self.model_fields_set]
        if given:
            flags = " and ".join(map(self.flag, given))
            yield ("together", *given), f"{flags} cannot go with --together: write it into the file that each run has"


@command
def train(options: TrainOptions) -> int:
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

    console = Console(quiet=options.quiet or not is_main_process())
    if options.together:
        # Each is configured by its file; the other options apply to all.
        configs = [TrainConfig.from_file(path, **options.given(TrainConfig)) for path in options.together]
        results = run_training_together(console, configs, resume=options.resume, as_json=options.as_json)
    else:
        configs = [options.part(TrainConfig)]
        results = [run_training(console, configs[0], resume=options.resume, as_json=options.as_json)]
    for config, result in zip(configs, results, strict=True) if is_main_process() else ():
        size = result.path.stat().st_size
        if options.as_json:
            print_json({"event": "result", "run": config.output, "path": str(result.path), "file_bytes": size})
            continue
        best = "" if math.isnan(result.best_loss) else f", development loss {result.best_loss:.4f} per token"
        stored = result.num_trained if result.prefix is None else result.prefix.num_parameters
        print(f"{result.path}: {stored:,} parameters, {size:,} bytes{best}")
        if result.prefix is None:
            console.info(f"score it: prefixtune evaluate --run {config.output} --data FILE")
        else:
            console.info(f'try it: prefixtune generate --prefix {result.path} "..."')
    return 0
