"""Train memories of several documents beside each other, and count their exact answers alone and joined.

    python -m research.memories.joined DATA OUTPUT [--steps 200] [--batch-size 4] [--documents NAME ...] ...
    python -m research.memories.joined DATA OUTPUT --documents NAME --beside EARLIER/runs

The second trains one more beside those of an earlier run, which stay as they are, and measures all.
DATA has a folder NAME-NUMBER per document: document.txt, train.jsonl and test.jsonl (`question`, `answer`). An answer
is exact if each of its tokens, and the end of its line, is the likeliest one: what greedy decoding writes. `--parts`
cuts each document of night trains into several, and its questions with it.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.loss import batch_hits
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data.batching import collate
from prefixtune.data.encoding import TokenizedExample
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.distill import distill
from prefixtune.distillation.inputs import Question
from prefixtune.distillation.wording import Wording, choose_wording, encode_questions
from prefixtune.prefix.compose import concatenate
from prefixtune.prefix.prefix import Prefix

Rows = list[dict[str, str]]
Answer = Callable[[int, tuple[int, ...]], tuple[int, float, int]]
"""Of a document's questions with some documents in front: exact answers, the loss summed, and tokens (see `score`)."""


def documents(data: Path, parts: int = 1) -> Iterator[tuple[str, str, Rows, Rows]]:
    """Each document's name, text, and questions to train on and to measure with."""
    for folder in sorted(path.parent for path in data.glob("*-*/document.txt")):
        head, *lines = (folder / "document.txt").read_text(encoding="utf-8").strip().splitlines()
        rows = [
            [json.loads(line) for line in (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
            for part in ("train", "test")
        ]
        if parts == 1:
            yield folder.name, "\n".join([head, *lines]), rows[0], rows[1]
            continue
        size = len(lines) // parts
        for part, some in enumerate(lines[first : first + size] for first in range(0, parts * size, size)):
            names = {line.split()[1] for line in some}
            about = [[row for row in of if names & set(re.findall(r"\w+", row["question"]))] for of in rows]
            yield f"{folder.name}{'abcdefgh'[part]}", "\n".join([head, *some]), about[0], about[1]


def train(options: argparse.Namespace, backbone: Backbone) -> tuple[list[Prefix], list[Rows], DistillConfig]:
    """The memories, the questions to measure each with, and how they were made; what is there already is kept."""
    tests, folder = [], options.output
    for name, text, trained, test in documents(options.data, options.parts):
        if options.documents and name not in options.documents:
            continue
        for part, content in (("text", f"{name}.txt"), ("questions", f"{name}.jsonl")):
            (folder / part).mkdir(parents=True, exist_ok=True)
            body = text if part == "text" else "".join(f"{json.dumps(row)}\n" for row in trained)
            (folder / part / content).write_text(body, encoding="utf-8")
        tests.append(test)
    config = DistillConfig(
        document=str(folder / "text"),
        questions=str(folder / "questions"),
        dtype=options.dtype,
        prefix_length=options.length,
        beside=options.beside,
        learning_rate=options.rate,
        keep_general=options.keep_general,
        max_steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
        eval_every=0,
        save_every=20,
        output=str(folder / "runs"),
    )
    earlier = {}
    if options.beside not in ("", "self"):
        paths = sorted(Path(options.beside).glob("*/prefix.safetensors"))
        earlier = {path.parent.name: load_prefix(path, backbone) for path in paths}
    tests = [test for name, _, _, test in documents(options.data, options.parts) if name in earlier] + tests
    resume = (folder / "runs" / "distill.toml").exists()
    made = [result.prefix for result in distill(config, backbone=backbone, resume=resume)]
    return [*earlier.values(), *made], tests, config


def encode(backbone: Backbone, rows: Rows, wording: Wording, positions: int) -> list[TokenizedExample]:
    """Questions and answers as examples that leave so many positions for memories."""
    return encode_questions(backbone, [Question(row["question"], row["answer"]) for row in rows], wording, positions)


@torch.no_grad()
def score(backbone: Backbone, prefix: Prefix | None, examples: Sequence[TokenizedExample]) -> tuple[int, float, int]:
    """Of some questions: exact answers, the loss summed over the answers' tokens, and their number."""
    exact, loss, tokens = 0, 0.0, 0
    for first in range(0, len(examples), 16):
        batch = collate(backbone, examples[first : first + 16], share_beginnings=True)
        losses, hits = batch_hits(backbone, prefix, batch)
        # The end token is left out: the line ends before it.
        kept = torch.cat([batch.target_index[1:] == batch.target_index[:-1], torch.tensor([False])])
        wrong = ~hits.cpu() & kept
        exact += batch.num_targets - len(set(batch.target_index[wrong].tolist()))
        loss += float(losses.cpu()[kept].sum())
        tokens += int(kept.sum())
    return exact, loss, tokens


def by_prefixes(backbone: Backbone, prefixes: Sequence[Prefix], tests: Sequence[Rows], wording: Wording) -> Answer:
    """Answers with the prefixes of some documents joined; all questions leave room for all of them."""
    positions = sum(prefix.length() for prefix in prefixes)
    examples = [encode(backbone, rows, wording, positions) for rows in tests]

    def answer(own: int, front: tuple[int, ...]) -> tuple[int, float, int]:
        # All stand at the same positions, so that their order means nothing.
        joined = concatenate([prefixes[number] for number in front], backbone.rotation)
        return score(backbone, joined, examples[own])

    return answer


def measure(answer: Answer, tests: Sequence[Rows], *, joined: bool = True) -> dict[str, Any]:
    """Exact answers of each document's questions with its own in front, another's, and its own and the next ones."""
    count = len(tests)
    fronts: dict[str, tuple[int, ...]] = {"alone": (0,)}
    if joined:
        sizes = sorted({size for size in (2, 4, 8, 16, count) if size <= count})
        fronts |= {"another": (1,), **{f"joined_{size}": tuple(range(size)) for size in sizes}}
    result: dict[str, Any] = {}
    for name, steps in fronts.items():
        found = [answer(own, tuple((own + step) % count for step in steps)) for own in range(count)]
        exact = [round(one[0] / len(rows), 4) for one, rows in zip(found, tests, strict=True)]
        loss = sum(one[1] for one in found) / sum(one[2] for one in found)
        result[name] = {"exact": round(sum(exact) / count, 4), "loss": round(loss, 4), "documents": exact}
    return result


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--documents", nargs="+", default=(), help="some of them; none: all")
    parser.add_argument("--beside", default="self", help="self; runs of earlier memories; nothing: each alone")
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4, help="questions of each document in a step")
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--keep-general", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1, choices=range(1, 9), help="parts of each document")
    return parser.parse_args(arguments)


def main() -> None:
    """Train, measure, and write `OUTPUT/joined.json`."""
    options = parse()
    started = time.monotonic()
    backbone = load_backbone(options.backbone, dtype=options.dtype)
    memories, tests, config = train(options, backbone)
    seconds = round(time.monotonic() - started)
    kept = {name: value for name, value in vars(options).items() if name not in ("data", "output")}
    found = measure(by_prefixes(backbone, memories, tests, choose_wording(config, backbone, None)), tests)
    result = {"options": kept, "training_seconds": seconds, **found}
    (options.output / "joined.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
