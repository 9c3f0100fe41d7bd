"""Memories of several documents, trained alone or beside each other, then joined: what each still knows.

    python -m bench.joined --data ../shared/data/memories --seeds 3

Per document's held-out questions: loss per answer token and exact answers of the bare model, of another document's
memory, of its own memory, and of all of them joined (each order of a rotation of the documents, so that every memory
stands at every place once). The share kept is how much of what the own memory knows beyond another's is left when all
are joined: (other - joined) / (other - own). Finished trainings are kept and not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import prefixtune as pt
from prefixtune.backbone.backbone import Backbone
from prefixtune.distillation.distill import distill
from prefixtune.distillation.documents import Question, read_questions
from prefixtune.distillation.report import Reading, read_test
from prefixtune.distillation.teacher import Teacher
from prefixtune.distillation.wording import Wording
from prefixtune.prefix.compose import concatenate
from prefixtune.prefix.prefix import Prefix
from prefixtune.utils.console import Console
from prefixtune.utils.files import write_text

MODES = {"alone": {}, "beside": {"beside": "self"}}
"""How the memories are trained."""


def lay_out(data: Path, names: Sequence[str], folder: Path) -> None:
    """Copy documents and questions to the folders that `distill` reads."""
    for name in names:
        for part, source, ending in (
            ("documents", "document.txt", "txt"),
            ("questions", "train.jsonl", "jsonl"),
            ("test", "test.jsonl", "jsonl"),
        ):
            (folder / part).mkdir(parents=True, exist_ok=True)
            text = (data / name / source).read_text(encoding="utf-8")
            write_text(folder / part / f"{name}.{ending}", text)


def train(backbone: Backbone, folder: Path, output: Path, names: Sequence[str], options: Mapping[str, Any]) -> None:
    """Train the memories, unless they are there."""
    if all((output / name / "prefix.safetensors").exists() for name in names):
        return
    distill(
        {
            "document": str(folder / "documents"),
            "questions": str(folder / "questions"),
            "output": str(output),
            **options,
        },
        backbone=backbone,
        resume=(output / "distill.toml").exists(),
        progress=False,
    )


def measure(backbone: Backbone, memories: Mapping[str, Prefix], tests: Mapping[str, list[Question]]) -> dict[str, Any]:
    """The readings of every memory alone, of the others, and joined; means over documents."""
    wording = Wording("Question: {source}\nAnswer:", " {target}\n")
    reader = Teacher(backbone, "joined")
    names = list(memories)

    def read(view: Prefix | None, name: str) -> Reading:
        test = tests[name]
        return read_test(reader, test, [], [view] * len(test), [], wording, batch_size=32)

    rotated = [names[first:] + names[:first] for first in range(len(names))]
    joined = [concatenate([memories[name] for name in order], backbone.rotation) for order in rotated]
    readings = {
        "bare": [read(None, name) for name in names],
        "own": [read(memories[name], name) for name in names],
        "other": [read(memories[other], name) for name in names for other in names if other != name],
        "joined": [read(prefix, name) for prefix in joined for name in names],
    }
    num_questions = statistics.fmean(map(len, tests.values()))
    figures = {
        kind: {
            "loss": round(statistics.fmean(r.loss or 0.0 for r in some), 4),
            "exact": round(statistics.fmean(r.exact or 0 for r in some) / num_questions, 4),
        }
        for kind, some in readings.items()
    }
    own, other, together = (figures[kind] for kind in ("own", "other", "joined"))
    kept = {
        "loss": (other["loss"] - together["loss"]) / (other["loss"] - own["loss"]),
        "exact": (together["exact"] - other["exact"]) / (own["exact"] - other["exact"]),
    }
    return {**figures, "kept": {name: round(share, 3) for name, share in kept.items()}}


def main() -> None:
    """Train what is missing, measure, and print a line per mode and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/memories"))
    parser.add_argument("--names", default="four-1,four-2,four-3,four-4")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--prefix-length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--beside-rate", type=float, default=0.6)
    parser.add_argument("--learning-rate", type=float, default=0.0, help="0: the default")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/joined"))
    options = parser.parse_args()
    names = options.names.split(",")
    if missing := [name for name in names if not (options.data / name).is_dir()]:
        parser.error(f"{options.data} has no folder {', '.join(missing)}; set --data to the folder of the documents")
    lay_out(options.data, names, options.output)
    tests = {name: read_questions(options.output / "test" / f"{name}.jsonl") for name in names}
    backbone, console = pt.load_backbone(dtype="auto"), Console()
    for seed in range(options.seeds):
        for mode in options.modes.split(","):
            settings = {"prefix_length": options.prefix_length, "max_steps": options.steps, "seed": seed, **MODES[mode]}
            settings["learning_rate"] = options.learning_rate
            if "beside" in settings:
                settings["beside_rate"] = options.beside_rate
            folder = options.output / "-".join([mode, *(str(value) for value in settings.values() if value != "self")])
            train(backbone, options.output, folder, names, settings)
            memories = {name: pt.load_prefix(folder / name / "prefix.safetensors") for name in names}
            figures = {"mode": mode, **settings, **measure(backbone, memories, tests)}
            write_text(folder / "joined.json", json.dumps(figures, indent=1) + "\n")
            console.info(json.dumps(figures))


if __name__ == "__main__":
    main()
