"""Folders as the commands write them, with made-up figures: for the tests of the report, and to look at one.

python tests/made_up_runs.py FOLDER     write an evaluation, a training run and three studies there
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PLACES = ("Aromi", "Bibimbap House", "Clowns", "Cotto", "Fitzbillies", "Green Man", "Loch Fyne", "Strada", "Wildwood")
KINDS = ("coffee shop", "pub", "restaurant")
AREAS = ("riverside", "city centre")
MACHINE = {"cpu": "2 cores", "memory_gib": 24, "gpu": None}
VERSIONS = {"prefixtune": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0"}


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def write_lines(path: Path, rows: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def training(folder: Path, *, steps: int = 200, final: float = 1.3, seed: int = 0, end: bool = True) -> Path:
    """A training run: `config.toml`, `events.jsonl`, `prefix.safetensors`."""
    chance = random.Random(f"training {seed}")
    events: list[dict[str, Any]] = [
        {"event": "start", "step": 0, "total_steps": steps, "num_trained": 1_234_432, "num_stored": 92_160}
    ]
    best = math.inf
    for step in range(1, steps + 1):
        loss = final + 1.6 * math.exp(-5 * step / steps) + chance.gauss(0, 0.12)
        tokens = chance.randint(300, 500)
        events.append(
            {
                "event": "step",
                "step": step,
                "loss": 28 * loss,
                "loss_per_token": loss,
                "lr": 1e-3,
                "target_tokens": tokens,
                "seconds": 1.5,
            }
        )
        if step % (steps // 8 or 1) == 0:
            development = final + 0.04 + 1.2 * math.exp(-5 * step / steps) + 0.05 * (step / steps) ** 3
            best = min(best, development)
            events.append({"event": "evaluation", "step": step, "loss": development, "best_loss": best})
    write_lines(folder / "events.jsonl", [*events, {"event": "end", "step": steps}] if end else events)
    (folder / "config.toml").write_text(
        f'backbone = "smollm2-135m"\ntask = "e2e"\ntrain = "train.jsonl"\nprefix_length = 10\nseed = {seed}\n'
        "learning_rate = 0.001\n"
    )
    (folder / "prefix.safetensors").write_bytes(b"\0" * 371_000)
    return folder


def examples(count: int, skill: float, seed: int = 0) -> list[dict[str, Any]]:
    """Outputs of a system; at skill 1 every one is a reference."""
    chance, luck = random.Random("examples"), random.Random(f"outputs {skill} {seed}")
    rows = []
    for number in range(1, count + 1):
        place, kind, area = chance.choice(PLACES), chance.choice(KINDS), chance.choice(AREAS)
        references = [f"{place} is a {kind} in the {area} area.", f"In the {area} there is a {kind} called {place}."]
        wrong = f"{place} is a {luck.choice(KINDS)}. It is in the {luck.choice(AREAS)}, near {luck.choice(PLACES)}."
        rows.append(
            {
                "number": number,
                "source": f"name : {place} | Type : {kind} | area : {area}",
                "references": references,
                "output": luck.choice(references) if luck.random() < skill else wrong,
                "groups": {"type": kind, "seen": "seen" if area == "riverside" else "unseen"},
            }
        )
    return rows


def measure(score: float, width: float = 0.0, *, higher: bool = True, name: str = "made up") -> dict[str, Any]:
    return {
        "score": score,
        "implementation": name,
        "higher_is_better": higher,
        "interval": [score - width, score + width] if width else None,
    }


def evaluation(
    folder: Path,
    score: float = 60.0,
    *,
    title: str = "prefix",
    method: str = "prefix",
    count: int = 60,
    seed: int = 0,
    width: float = 1.9,
    **changes: Any,
) -> Path:
    """An evaluation: `evaluation.json` and `outputs.jsonl`."""

    def scores(score: float) -> dict[str, Any]:
        score = max(score, width)
        return {
            "bleu": measure(score, width, name="sacrebleu 2.6.0 (lower-case, 13a)"),
            "meteor": measure(0.2 + score / 260, width / 300, name="meteor 1.5"),
            "ter": measure(0.95 - score / 120, width / 120, higher=False, name="tercom"),
        }

    values = {
        "kind": "evaluation",
        "title": title,
        "task": "e2e",
        "data": "test.jsonl.gz",
        "split": "test",
        "num_examples": count,
        "method": method,
        "backbone": "smollm2-135m",
        "prefix": f"{title}.safetensors",
        "scores": scores(score),
        "groups": {
            "type": {
                kind: {"num_examples": 20, "scores": scores(score + 4 - 5 * number)}
                for number, kind in enumerate(KINDS)
            },
            "seen": {
                "seen": {"num_examples": 32, "scores": scores(score + 3)},
                "unseen": {"num_examples": 28, "scores": scores(score - 9)},
            },
        },
        "settings": {"decoding": {"num_beams": 5, "min_new_tokens": 5, "max_new_tokens": 100}, "batch_size": 16},
        "seconds": 184.2,
        "machine": MACHINE,
        "versions": VERSIONS,
        **changes,
    }
    write(folder / "evaluation.json", values)
    write_lines(folder / "outputs.jsonl", examples(count, min(max(score / 80, 0), 1), seed))
    return folder


def cell(
    study: Path,
    factors: Mapping[str, Any],
    score: float | None,
    *,
    status: str = "done",
    error: str | None = None,
    parameters: int = 1_234_432,
    stored: int = 92_160,
    seconds: float = 900.0,
) -> Path:
    """A cell of a study; without a score it is what `status` says."""
    identity = "-".join(str(value).replace(" ", "_") for value in factors.values())
    folder = study / "cells" / identity
    figures: dict[str, Any] = {}
    if score is not None:
        seed = 7 * int(factors.get("seed", 0)) + int(factors.get("subset", 0))
        evaluation(folder, score, title=str(factors["method"]), method=str(factors["method"]), seed=seed)
        figures = {"trained_parameters": parameters, "stored_parameters": stored, "evaluate_seconds": 184.2}
        if parameters:
            training(folder, final=2.2 - score / 75, seed=seed, steps=160)
            figures |= {"file_bytes": 4 * stored + 3_000, "train_seconds": seconds, "steps": 160}
            figures |= {"peak_memory_mib": 1_400.0 + parameters / 3e5, "dev_loss": 2.3 - score / 75}
    write(
        folder / "cell.json",
        {"id": identity, "factors": dict(factors), "status": status, "error": error, "figures": figures},
    )
    return folder


def study_json(folder: Path, **changes: Any) -> None:
    """The study's own file."""
    values = {
        "kind": "study",
        "name": "methods",
        "title": "Methods on E2E",
        "task": "e2e",
        "backbone": "smollm2-135m",
        "factors": ["method"],
        "axis": None,
        "metric": "bleu",
        "budget_minutes": 25,
        "machine": MACHINE,
        "cut": ["Each method ran with one seed, not five.", "Decoding was greedy on the first 60 test examples."],
        "tuning": {
            "prefix": {"learning_rate": {"0.0005": 1.42, "0.001": 1.37, "0.002": 1.39}, "chosen": 0.001},
            "fine-tuning": {"learning_rate": {"1e-05": 1.61, "5e-05": 1.44, "0.0001": 1.41}, "chosen": 0.0001},
        },
        "versions": VERSIONS,
        "command": "prefixtune study methods --output studies/methods",
        "date": "2026-11-25",
        **changes,
    }
    write(folder / "study.json", values)


METHODS = {
    "prefix": (62.4, 1_234_432, 92_160, 905.0),
    "fine-tuning": (63.9, 134_515_008, 134_515_008, 1_490.0),
    "adapter": (61.7, 4_130_000, 4_130_000, 1_120.0),
    "lora": (62.2, 921_600, 921_600, 1_010.0),
    "zero-shot": (6.1, 0, 0, 0.0),
}


def methods_study(folder: Path) -> Path:
    """Finished; one run a method."""
    study_json(folder)
    for method, (score, parameters, stored, seconds) in METHODS.items():
        cell(folder, {"method": method}, score, parameters=parameters, stored=stored, seconds=seconds)
    return folder


def low_data_study(folder: Path) -> Path:
    """Unfinished; methods over sizes of data, with repetitions; one cell failed, some wait, one has no score."""
    study_json(
        folder,
        name="low-data",
        title="Little data on E2E",
        axis="num_targets",
        factors=["method", "num_targets", "subset", "seed"],
    )
    chance = random.Random("low data")
    cell(folder, {"method": "zero-shot"}, 6.1, parameters=0, stored=0)
    for method in ("prefix", "fine-tuning"):
        for targets in (50, 100, 200, 500):
            for subset in range(3):
                factors = {"method": method, "num_targets": targets, "subset": subset, "seed": 0}
                base = 14 * math.log10(targets) + (18 if method == "prefix" else 11 + 2.5 * math.log10(targets))
                if (method, targets, subset) == ("fine-tuning", 500, 1):
                    cell(folder, factors, None, status="failed", error="TrainingError: the loss is not finite.")
                elif (method, targets) == ("fine-tuning", 500):
                    cell(folder, factors, None, status="waiting")
                else:
                    cell(folder, factors, base + chance.gauss(0, 2))
    return folder


def length_study(folder: Path) -> Path:
    """Finished; a single series over the prefix length."""
    study_json(
        folder,
        name="length",
        title="Prefix length on E2E",
        axis="prefix_length",
        factors=["prefix_length"],
        tuning={},
        cut=[],
    )
    for length, score in ((1, 52.0), (5, 60.1), (10, 62.4), (20, 62.9), (40, 61.8)):
        cell(folder, {"method": "prefix", "prefix_length": length}, score, stored=9_216 * length)
    return folder


def main() -> int:
    folder = Path(sys.argv[1])
    methods_study(folder / "methods")
    low_data_study(folder / "low-data")
    length_study(folder / "length")
    training(folder / "training")
    evaluation(training(folder / "prefix"))
    evaluation(folder / "bare", 6.1, title="bare model", method="zero-shot")
    return 0


if __name__ == "__main__":
    sys.exit(main())
