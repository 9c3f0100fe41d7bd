"""Starts, parametrizations and LoRA on equal data, steps and batches: development loss and scores, over seeds.

    python -m bench.memories --methods examples-212,lora-4 --seeds 3 --score

A method is named in `METHODS`. Its learning rates are tried with the first seed, and the best by the development loss
is trained with the other seeds. Every finished run is a line of `runs/memories/results.jsonl`: what is there is not run
again, so that the command goes on where it was stopped. Without `--methods` it prints what is there.

Each size draws its training targets once (whole sources); a run's seed orders them and draws its start.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import prefixtune as pt
from prefixtune.backbone.backbone import Backbone
from prefixtune.data import Example, read_task
from prefixtune.inference.config import GenerateConfig
from prefixtune.studies.data import sample_examples, sample_sources
from prefixtune.utils.console import Console

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FOLDERS = {"e2e": _SHARED / "e2e", "webnlg": _SHARED / "webnlg2017", "scitldr": _SHARED / "scitldr"}
"""Where a task's data lies, unless the command line says otherwise."""
RESULTS = Path("runs/memories/results.jsonl")
SCORES = ("bleu", "nist", "rouge_l")
WORDS = "Describe the restaurant in one sentence:"


@dataclass(frozen=True)
class Data:
    """A training set of some size, with its development and test examples.

    Attributes:
        task: As `prefixtune train` names it.
        targets: Training targets; 0: all.
        dev: Development targets.
        settings: Values of `TrainConfig` for all methods.
        words: To start from, where a run starts from words.
    """

    task: str
    targets: int
    dev: int
    settings: Mapping[str, Any]
    words: str = WORDS

    def split(self, name: str, folder: Path) -> list[Example]:
        """The examples of `train`, `dev` or `test` in the task's folder that are used."""
        examples = [e for e in read_task(self.task, str(folder), split=name) if e.targets]
        if name == "test":
            return sample_examples(examples, 300, "test")
        count = self.targets if name == "train" else self.dev
        return sample_sources(examples, count, f"{name}/0") if count else examples


_MANY = {"max_steps": 125, "batch_size": 16, "eval_every": 0, "warmup_steps": 20}
_FEW = {"max_steps": 60, "batch_size": 16, "eval_every": 15, "warmup_steps": 10}
DATA = {
    "e2e-2000": Data("e2e", 2000, 400, _MANY),
    "e2e-100": Data("e2e", 100, 200, _FEW),
    "webnlg": Data("webnlg", 2000, 400, _MANY, "Say these facts in one sentence:"),
    "scitldr": Data("scitldr", 500, 200, {**_MANY, "max_length": 400}, "Summarize the paper in one sentence:"),
}


@dataclass(frozen=True)
class Method:
    """What is compared: options of `prefixtune train`, and the rates that are tried.

    Attributes:
        rates: Peak learning rates.
        options: Values of `TrainConfig`.
    """

    rates: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


def _scaled(rates: Sequence[float] = (1e-2, 2e-2, 4e-2), value_scale: float = 4.0, **options: Any) -> Method:
    return Method(tuple(rates), {"reparameterization": "scaled", "value_scale": value_scale, **options})


def _examples(count: int, rates: Sequence[float] = (1e-2, 2e-2), **options: Any) -> Method:
    start = {"initialization": "examples", "init_examples": count, "prefix_length": 0}
    return _scaled(rates, **{**start, **options})


def _examples_in(length: int, rates: Sequence[float] = (1e-2, 2e-2, 4e-2), **options: Any) -> Method:
    """As many examples as fit a length; 212 positions of SmolLM2-135M are as many numbers as LoRA-8 has."""
    return _scaled(rates, initialization="examples", prefix_length=length, **options)


_LORA = (9e-4, 2.7e-3, 8.1e-3)
METHODS = {
    "words-scaled": _scaled(),
    "words-scaled-values1": _scaled(value_scale=1.0),
    "words-none": Method((5e-3, 1.5e-2, 4.5e-2), {"reparameterization": "none"}),
    "words-residual": Method((1e-3, 3e-3), {"reparameterization": "residual"}),
    "words-mlp": Method((5e-4, 1.5e-3), {"reparameterization": "mlp"}),
    "lora-2": Method(_LORA, {"method": "lora", "method_size": 2}),
    "lora-4": Method(_LORA, {"method": "lora", "method_size": 4}),
    "lora-8": Method(_LORA, {"method": "lora", "method_size": 8}),
    "examples-212": _examples_in(212),
    "examples-212-all": _examples_in(212, example_attention="all"),
    "examples-212-all-seen": _examples_in(212, example_attention="all", leave_one_out=False),
    "examples-212-seen": _examples_in(212, leave_one_out=False),
    "examples-212-random": _examples_in(212, example_choice="random"),
    "examples-212-loss": _examples_in(212, example_choice="loss"),
    "examples-212-dropout": _examples_in(212, prefix_dropout=0.05),
    "examples-2": _examples(2),
    "examples-4": _examples(4),
    "examples-7": _examples(7),
    "examples-4-none": Method(
        (5e-3, 1.5e-2),
        {"reparameterization": "none", "initialization": "examples", "init_examples": 4, "prefix_length": 0},
    ),
    "examples-4-residual": Method(
        (1e-3, 3e-3),
        {"reparameterization": "residual", "initialization": "examples", "init_examples": 4, "prefix_length": 0},
    ),
}


class Bench:
    """Runs what is missing, and keeps every result.

    Args:
        backbone: The frozen model; methods that change weights load their own.
        results: Lines of JSON, one per finished run.
        folders: Where the data of each task lies.
    """

    def __init__(self, backbone: Backbone, results: Path, folders: Mapping[str, Path]) -> None:
        self.backbone, self.results, self.folders, self.console = backbone, results, folders, Console()
        self.examples: dict[tuple[str, str], list[Example]] = {}
        results.parent.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict[str, Any]]:
        """All results so far."""
        return read_rows(self.results)

    def split(self, data: str, name: str) -> list[Example]:
        """The examples of a split, read once."""
        if (data, name) not in self.examples:
            self.examples[data, name] = DATA[data].split(name, self.folders[DATA[data].task])
        return self.examples[data, name]

    def tune(self, data: str, method: str, seeds: int, *, score: bool) -> None:
        """Try the rates with seed 0, and train the best one with the other seeds; score with `score`."""
        for rate in METHODS[method].rates:
            self.train(data, method, rate, 0)
        rate = best_rate(self.rows(), data, method)
        for seed in range(seeds):
            self.train(data, method, rate, seed, score=score)

    def train(self, data: str, method: str, rate: float, seed: int, *, score: bool = False) -> None:
        """One run, unless its result is there."""
        key = {"data": data, "method": method, "rate": rate, "seed": seed}
        done = [row for row in self.rows() if all(row[name] == value for name, value in key.items())]
        if any("bleu" in row or not score for row in done):
            return
        options: dict[str, Any] = {"task": DATA[data].task, "init_text": DATA[data].words}
        options |= {"learning_rate": rate, "seed": seed, **DATA[data].settings, **METHODS[method].options}
        config = pt.TrainConfig(**options, output=str(self.results.parent / "-".join(map(str, key.values()))))
        folder, began = Path(config.output), time.perf_counter()
        if not done:
            backbone = self.backbone if config.trains_prefix else pt.load_backbone(dtype="auto")
            pt.train(
                config,
                backbone=backbone,
                examples=self.split(data, "train"),
                dev_examples=self.split(data, "dev"),
                resume=(folder / "state.safetensors").exists(),
                progress=False,
            )
        row = {**key, **describe(folder), "seconds": round(time.perf_counter() - began)}
        if score:
            row |= self.score(data, folder, trains_prefix=config.trains_prefix)
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.console.info(json.dumps(row))

    def score(self, data: str, folder: Path, *, trains_prefix: bool) -> dict[str, float]:
        """The scores of a run's outputs for the test sources, decoded greedily."""
        from prefixtune.training.artifact import load_tuned

        prefix, backbone, text_format = None, self.backbone, None
        if trains_prefix:
            prefix = pt.load_prefix(folder / "prefix.safetensors")
        else:
            backbone, text_format = load_tuned(folder / "weights.safetensors")
        decoding = GenerateConfig(max_new_tokens=80, batch_size=30)
        test = self.split(data, "test")
        task = DATA[data].task
        result = pt.evaluate(
            backbone, test, prefix, config=decoding, protocol=task, metrics=SCORES, text_format=text_format
        )
        return {name: round(score.score, 4) for name, score in result.scores.items()}


def describe(folder: Path) -> dict[str, Any]:
    """What a finished run's log says."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    start = next(event for event in events if event["event"] == "start")
    losses = [event["loss"] for event in events if event["event"] == "evaluation"]
    return {
        "stored": start["num_stored"],
        "trained": start["num_trained"],
        "dev_loss": round(min(losses), 4),
        "dev_losses": [round(loss, 4) for loss in losses],
        "train_loss": round(statistics.fmean(e["loss_per_token"] for e in events if e["event"] == "step"), 4),
    }


def read_rows(results: Path) -> list[dict[str, Any]]:
    """The results so far; of runs that were scored later, with their scores."""
    if not results.exists():
        return []
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["data"], row["method"], row["rate"], row["seed"]] = row
    return list(rows.values())


def best_rate(rows: Sequence[Mapping[str, Any]], data: str, method: str) -> float:
    """The rate whose run with seed 0 had the lowest development loss."""
    tries = [row for row in rows if (row["data"], row["method"], row["seed"]) == (data, method, 0)]
    rate: float = min(tries, key=lambda row: row["dev_loss"])["rate"]
    return rate


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of a Markdown table: per data and method, the mean over seeds at the best rate."""
    yield "| data | method | stored numbers | rate | seeds | development loss | by seed | BLEU | NIST | ROUGE-L |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for data, method in sorted({(row["data"], row["method"]) for row in rows}):
        rate = best_rate(rows, data, method)
        runs = [row for row in rows if (row["data"], row["method"], row["rate"]) == (data, method, rate)]
        losses = [row["dev_loss"] for row in runs]
        scores = []
        for name in SCORES:
            values = [row[name] for row in runs if name in row]
            scores.append(f"{statistics.fmean(values):.2f}" if values else "")
        cells = [data, method, f"{runs[0]['stored']:,}", f"{rate:g}", len(runs), f"{statistics.fmean(losses):.3f}"]
        yield "| " + " | ".join(map(str, [*cells, " ".join(f"{loss:.3f}" for loss in losses), *scores])) + " |"


def main() -> None:
    """Run what is asked for and missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--data", default="e2e-2000", help=f"of {', '.join(DATA)}")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--score", action="store_true", help="score the test set at the best rate, every seed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    for task, folder in FOLDERS.items():
        parser.add_argument(f"--{task}", type=Path, default=folder, metavar="FOLDER", help=f"where {task} lies")
    options = parser.parse_args()
    if options.methods:
        names, methods = options.data.split(","), options.methods.split(",")
        # All of it now: the last of them are read after hours.
        if unknown := [*(set(names) - set(DATA)), *(set(methods) - set(METHODS))]:
            parser.error(f"there is no {', '.join(sorted(unknown))}; --help names the data and the methods")
        folders = {DATA[name].task: getattr(options, DATA[name].task) for name in names}
        for task, folder in folders.items():
            if not folder.is_dir():
                parser.error(f"there is no folder {folder}; set --{task} to that of {task}")
        bench = Bench(pt.load_backbone(dtype="auto"), options.results, folders)
        for data in names:
            for method in methods:
                bench.tune(data, method, options.seeds, score=options.score)
    print("\n".join(table(read_rows(options.results))))


if __name__ == "__main__":
    main()
