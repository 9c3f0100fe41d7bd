"""Memories beside what else can be made of the same documents and questions: exact answers, alone and joined.

    python -m research.memories.field DATA RUN RESULTS.json [--arms NAME ...]

RUN is the folder of a run of `joined`: ours. What is trained here takes the same questions, as many steps of as many of
them, and the same seed. What is in RESULTS.json already is kept.

- `bare`: no document. `view`: the documents' text before the question; `own_keys`, the control: the keys and values of
  that text in front, as a prefix. `solved`: the text and eight solved questions. `bm25`, `bm25_solved`: three lines of
  the text, found by BM25, without and with the solved questions.
- `closed`: the start of ours, without training. `ours`: trained for company. `questions`, a control: a prefix that
  starts from words and trains alone on the same questions, without the document.
- `cartridges`: the recipe of Cartridges (Eyuboglu et al. 2025): the document's first P keys and values, trained as they
  are at a rate of 2e-2, the first position frozen, each alone; the model with the document in view answers, and its 20
  likeliest tokens are learned. `cartridges_given`: the same with the given answers.
- `lora`: an adapter of rank 8 for each; several are merged by the mean of their products. `lora_sum`: by their sum.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bm25s
import torch
from torch.nn.modules.module import register_module_forward_hook

from bench.serve import SRC
from bench.server import Server
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.distill import distill
from prefixtune.distillation.wording import Wording, choose_wording, in_view
from prefixtune.prefix.encoder import SiteEncoder
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.artifact import load_tuned, load_weights, save_weights
from prefixtune.training.config import TrainConfig
from prefixtune.training.run_folder import WEIGHTS_FILE
from prefixtune.training.train import train
from research.memories.joined import Answer, Rows, by_prefixes, documents, encode, measure, score

_SOLVED, _LINES = 8, 3
_TEXTS = ("bare", "view", "solved", "bm25", "bm25_solved")
_TRAINED = ("closed", "questions", "lora", "lora_sum", "cartridges_given", "cartridges")
_ARMS = (*_TEXTS, "own_keys", "ours", *_TRAINED, "first_token")


@dataclass(frozen=True)
class Field:
    """What all arms share: the model, the documents, and of the run that is ours folder, length and work."""

    backbone: Backbone
    wording: Wording
    found: Sequence[tuple[str, str, Rows, Rows]]
    run: Path
    length: int
    work: dict[str, Any]

    def before(self, asked: dict[str, str], front: tuple[int, ...], lines: int, solved: int) -> str:
        """What stands before a question: some documents, or the lines that BM25 finds; and solved questions."""
        passages = [line for number in front for line in self.found[number][1].splitlines()]
        if lines:
            passages = retrieve(passages, asked["question"], lines)
        pool = [row for number in front for row in self.found[number][2]]
        wording = self.wording.text_format
        return (self.wording.view(self.backbone, "\n".join(passages)) if passages else "") + "".join(
            wording.format_prompt(row["question"], "") + wording.format_target(row["answer"])
            for row in random.Random(0).sample(pool, solved)
        )

    def texts(self, lines: int, solved: int) -> Answer:
        """Text before each question."""

        def answer(own: int, front: tuple[int, ...]) -> tuple[int, float, int]:
            asked = encode(self.backbone, self.found[own][3], self.wording, 0)
            # Joined as tokens, as with the own keys and values: as one text, their seam may become other tokens.
            views = (self.backbone.encode(self.before(row, front, lines, solved)) for row in self.found[own][3])
            examples = [replace(one, prompt=(*view, *one.prompt)) for one, view in zip(asked, views, strict=True)]
            return score(self.backbone, None, examples)

        return answer

    def prefixes(self, made: Sequence[Prefix]) -> Answer:
        """A prefix for each document, joined."""
        return by_prefixes(self.backbone, made, self.tests, self.wording)

    @property
    def tests(self) -> list[Rows]:
        """The questions to measure with."""
        return [rows for *_, rows in self.found]

    def memories(self, output: Path, *, answers: bool = True, **more: Any) -> Sequence[Prefix]:
        """A memory of each document, trained alone."""
        questions = self.run / "questions" if answers else output / "questions"
        for name, _, rows, _ in () if answers else self.found:
            questions.mkdir(parents=True, exist_ok=True)
            body = "".join(json.dumps({"question": row["question"]}) + "\n" for row in rows)
            (questions / f"{name}.jsonl").write_text(body, encoding="utf-8")
        options = {"document": str(self.run / "text"), "questions": str(questions), "output": str(output / "runs")}
        config = DistillConfig(**{**options, "prefix_length": self.length, **self.work, **more})
        resume = (output / "runs" / DistillConfig.file_name).exists()
        return [one.prefix for one in distill(config, backbone=self.backbone, resume=resume)]

    def loras(self, output: Path, weight: Callable[[int], float]) -> Answer:
        """An adapter for each document; several are merged into one, each times a weight."""
        for name, _, _, _ in self.found:
            if not (output / name / WEIGHTS_FILE).exists():
                config = TrainConfig(
                    method="lora",
                    train=str(self.run / "questions" / f"{name}.jsonl"),
                    prompt_format=self.wording.prompt,
                    target_format=self.wording.target,
                    output=str(output / name),
                    **self.work,
                )
                train(config, resume=(output / name / TrainConfig.file_name).exists())

        def answer(own: int, front: tuple[int, ...]) -> tuple[int, float, int]:
            parts = [output / self.found[number][0] / WEIGHTS_FILE for number in front]
            backbone, _ = load_tuned(merge(parts, weight(len(parts)), output / "merged"), dtype=self.work["dtype"])
            return score(backbone, None, encode(backbone, self.found[own][3], self.wording, 0))

        return answer


def retrieve(lines: Sequence[str], question: str, number: int) -> list[str]:
    """The lines that BM25 finds for a question, best first."""
    index, quiet = bm25s.BM25(), {"show_progress": False}
    index.index(bm25s.tokenize(list(lines), **quiet), **quiet)
    found, _ = index.retrieve(bm25s.tokenize([question], **quiet), corpus=list(lines), k=number, **quiet)
    return [str(line) for line in found[0]]


def merge(parts: Sequence[Path], weight: float, output: Path) -> Path:
    """Adapters of one rank as one whose products are the sum of theirs times a weight."""
    weights = [load_weights(part) for part in parts]
    rank = sum(header["method_size"] for _, header in weights)
    merged = {}
    for name in weights[0][0]:
        own = [tensors[name] for tensors, _ in weights]
        merged[name] = torch.cat(own) if "lora_A" in name else weight * torch.cat(own, 1)
    save_weights(output, merged, {**weights[0][1], "method_size": rank})
    return output


def detach_sink(module: torch.nn.Module, inputs: Any, rows: Any) -> Any:
    """The first position of a prefix does not train."""
    return torch.cat([rows[:1].detach(), rows[1:]]) if isinstance(module, SiteEncoder) else None


def make(field: Field, arm: str, output: Path) -> tuple[Answer, Path | None]:
    """An arm, and the file of its first document."""
    if arm == "bare":
        return lambda own, _: field.texts(0, 0)(own, ()), None
    if arm in _TEXTS:
        return field.texts(_LINES if "bm25" in arm else 0, _SOLVED if "solved" in arm else 0), None
    names = [name for name, *_ in field.found]
    if arm == "own_keys":
        return field.prefixes([in_view(field.backbone, field.wording, text) for _, text, *_ in field.found]), None
    if arm == "ours":
        files = [field.run / "runs" / name / "prefix.safetensors" for name in names]
        return field.prefixes([load_prefix(file, field.backbone) for file in files]), files[0]
    if arm in ("lora", "lora_sum"):
        answer = field.loras(output.with_name("lora"), (lambda n: 1.0) if arm == "lora_sum" else (lambda n: 1 / n))
        return answer, output.with_name("lora") / names[0] / WEIGHTS_FILE
    if arm in ("closed", "questions"):
        made = field.memories(output, **({"max_steps": 0} if arm == "closed" else {"initialization": "words"}))
    else:
        recipe = {"compaction": "cut", "reparameterization": "none", "learning_rate": 2e-2}
        with register_module_forward_hook(detach_sink):
            made = field.memories(output, answers=arm == "cartridges_given", **recipe)
    return field.prefixes(made), output / "runs" / names[0] / "prefix.safetensors"


def first_token(field: Field, folder: Path) -> dict[str, float]:
    """Milliseconds to the first token, one request at a time, through `serve`: medians over 24 questions."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, *_ in field.found:
        shutil.copy(field.run / "runs" / name / "prefix.safetensors", folder / f"{name}.safetensors")
    words = f"{sys.executable} -m prefixtune serve --backbone-id m --dtype {field.work['dtype']} --quiet --port".split()
    words += ["{port}", "--backbone", field.backbone.name, "--prefixes", str(folder.resolve())]
    names, everything = [name for name, *_ in field.found], tuple(range(len(field.found)))
    sides: dict[str, tuple[str, tuple[int, ...], int]] = {"bare": ("m", (), 0), "memory": (names[0], (), 0)}
    sides |= {"joined": ("+".join(names), (), 0), "view": ("m", (0,), 0), "all_in_view": ("m", everything, 0)}
    sides["bm25"] = "m", everything, _LINES
    medians = {}
    with closing(Server("prefixtune", words, SRC)) as server:
        for side, (model, front, lines) in sides.items():
            rows = field.found[0][3][:24]
            asked = [field.wording.text_format.format_prompt(row["question"], "") for row in rows]
            prompts = [field.before(row, front, lines, 0) + one for row, one in zip(rows, asked, strict=True)]
            done = [server.complete([{"model": model, "prompt": one, "max_tokens": 1}]) for one in prompts]
            medians[side] = round(1000 * statistics.median(one.first[0] for one in done), 1)
    return medians


def main() -> None:
    """Measure what is missing, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "run", "results"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--arms", nargs="+", default=_ARMS, choices=_ARMS)
    options = parser.parse_args()
    made = json.loads((options.run / "joined.json").read_text(encoding="utf-8"))
    ours = made["options"]
    work = {name: ours[name] for name in ("backbone", "dtype", "batch_size", "seed")}
    work |= {"max_steps": ours["steps"], "eval_every": 0}
    backbone = load_backbone(ours["backbone"], dtype=ours["dtype"])
    wording = choose_wording(DistillConfig(document="text", questions="questions"), backbone, None)
    found = [one for one in documents(options.data) if not ours["documents"] or one[0] in ours["documents"]]
    field = Field(backbone, wording, found, options.run, ours["length"], work)
    results = json.loads(options.results.read_text(encoding="utf-8")) if options.results.exists() else {}
    for arm in options.arms:
        if arm not in results:
            output = options.run / "field" / arm
            if arm == "first_token":
                results[arm] = first_token(field, output)
            else:
                started = time.monotonic()
                answer, file = make(field, arm, output)
                seconds = made["training_seconds"] if arm == "ours" else round(time.monotonic() - started)
                facts = {"seconds": seconds, "bytes": file.stat().st_size if file else 0}
                results[arm] = facts | measure(answer, field.tests, joined=arm not in ("bare", "own_keys"))
            options.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(arm, json.dumps(results[arm]), flush=True)


if __name__ == "__main__":
    main()
