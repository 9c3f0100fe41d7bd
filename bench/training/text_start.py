"""What is left of a text in P positions: cut, every nth position, or matched; before training and after some steps.

    python -m bench.training.text_start --document DOCUMENT --questions train.jsonl --test test.jsonl
    python -m bench.training.text_start --prompt bench/training/system_prompt.txt --prefix-length 32

With a document: the loss per token of the answers to `--test`, without the end token, behind the bare model, the whole
text and each start.
With a prompt: the KL divergence per token from the model that has the whole prompt in view, over its own answers to
some requests, and the share of the bare model's divergence that a start removes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.loss import batch_loss
from prefixtune.data import Example
from prefixtune.data.batching import collate
from prefixtune.data.encoding import TokenizedExample, encode_examples
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat
from prefixtune.training.config import TrainConfig
from prefixtune.training.starts.build import build_encoder
from prefixtune.training.train import train

REQUESTS = (
    "When does the Gannet leave, and when does it arrive?",
    "Can I bring my dog?",
    "How much is a private cabin for two?",
    "My train was three hours late. What do I get?",
    "I want to cancel my ticket for tomorrow night.",
    "Is there a train from Ashby to Dunmore on Monday?",
    "Can I take a bicycle on the Osprey?",
    "You are terrible, my suitcase is lost!",
    "Which company is better, yours or the Northern Express?",
    "Thank you for your help.",
    "Does my child of eight pay the full price?",
    "Will it snow in Highpass at the weekend?",
)


def starts(backbone: Backbone, path: Path, length: int) -> Mapping[str, tuple[Prefix, float]]:
    """The whole text and each way to fewer positions, with the seconds that it takes."""
    made = {}
    for how in ("whole", "cut", "stride", "match"):
        begin = time.perf_counter()
        options: dict[str, Any] = {"prefix_length": 0}
        if how != "whole":
            options = {"prefix_length": length, "compaction": how}
        config = TrainConfig(initialization="text", init_text=f"@{path}", **options)
        made[how] = build_encoder(config, backbone)[0].bake(), time.perf_counter() - begin
    return made


@torch.no_grad()
def loss_per_token(backbone: Backbone, prefix: Prefix | None, examples: Sequence[TokenizedExample]) -> float:
    """Nats per label."""
    chunks = [examples[first : first + 16] for first in range(0, len(examples), 16)]
    return float(torch.cat([batch_loss(backbone, prefix, collate(backbone, some)) for some in chunks]).mean())


def read(path: Path) -> list[Example]:
    """Questions with their answers."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Example(f"Question: {row['question']}\nAnswer:", (f" {row['answer']}\n",)) for row in rows]


def answers_alone(examples: Sequence[TokenizedExample]) -> list[TokenizedExample]:
    """Without the end token: a text in view does not make a model stop after an answer, only training does."""
    return [replace(example, targets=tuple(target[:-1] for target in example.targets)) for example in examples]


def compare_on_questions(backbone: Backbone, options: argparse.Namespace) -> None:
    """The table of a document."""
    form = TextFormat("{source}", "{target}")
    tests = answers_alone(encode_examples(backbone, read(options.test), form, prefix_length=0).examples)
    made = starts(backbone, options.document, options.prefix_length)
    print(f"bare model: {loss_per_token(backbone, None, tests):.3f}")
    for how, (prefix, seconds) in made.items():
        line = f"{how} (P = {prefix.prefix_length}, {seconds:.1f} s): {loss_per_token(backbone, prefix, tests):.3f}"
        if options.steps and how != "whole":
            settings: dict[str, Any] = {"compaction": how, "prefix_length": options.prefix_length}
            config = TrainConfig(
                initialization="text",
                init_text=f"@{options.document}",
                prompt_format=form.prompt,
                target_format=form.target,
                max_steps=options.steps,
                output=str(options.output / how),
                **settings,
            )
            result = train(config, backbone=backbone, examples=read(options.questions))
            line += f"; after {options.steps} steps {loss_per_token(backbone, result.prefix, tests):.3f}"
        print(line, flush=True)


@torch.no_grad()
def logarithms(backbone: Backbone, prefix: Prefix | None, request: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Log probabilities of every token where the answer's tokens are predicted."""
    logits = backbone.forward(torch.tensor([[*request, *answer]]), prefixes=prefix).logits[0]
    chosen: Tensor = logits[len(request) - 1 : -1].float().log_softmax(-1)
    return chosen


def compare_on_requests(backbone: Backbone, options: argparse.Namespace) -> None:
    """The table of a prompt."""
    made = starts(backbone, options.prompt, options.prefix_length)
    whole = made["whole"][0]
    requests = [backbone.encode(f"\nTraveller: {request}\nAssistant:") for request in REQUESTS]
    answers = generate_ids(backbone, requests, [whole] * len(requests), config=GenerateConfig(max_new_tokens=32))
    divergence = {}
    for how, prefix in (("bare", None), *((how, prefix) for how, (prefix, _) in made.items())):
        parts = []
        for request, answer in zip(requests, answers, strict=True):
            teacher = logarithms(backbone, whole, request, answer)
            parts.append((teacher.exp() * (teacher - logarithms(backbone, prefix, request, answer))).sum(-1))
        divergence[how] = float(torch.cat(parts).mean())
        share = 1 - divergence[how] / divergence["bare"]
        print(f"{how}: KL {divergence[how]:.3f} per token, {share:.0%} recovered", flush=True)


def main() -> None:
    """Read the options and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--prefix-length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/text-start"))
    for name in ("document", "questions", "test", "prompt"):
        parser.add_argument(f"--{name}", type=Path)
    options = parser.parse_args()
    backbone = load_backbone(options.backbone)
    if options.document is not None:
        compare_on_questions(backbone, options)
    if options.prompt is not None:
        compare_on_requests(backbone, options)


if __name__ == "__main__":
    main()
