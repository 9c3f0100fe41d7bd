"""What a prefix does to requests about other things, and how it learns to leave them alone.

A share of the training is general requests with the bare model as teacher ("data mixing" of Cartridges++, 2026). The
requests were written by hand, and the answers of those that are trained on by SmolLM2-135M-Instruct
(`research/memories/general.py`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.head import head_pass
from prefixtune.backbone.loss import head_inputs, teacher_labels
from prefixtune.data.batching import collate
from prefixtune.data.encoding import TokenizedExample, encode_examples, encode_pairs, encode_prompts
from prefixtune.data.examples import Example
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.routing import general_requests
from prefixtune.prefix.text_format import TextFormat

__all__ = ["bare_texts", "general_examples", "general_of_step", "measure_silence"]

_NEW_TOKENS = 32
_BATCH = 32


def general_examples(backbone: Backbone, text_format: TextFormat, prefix_length: int) -> list[TokenizedExample]:
    """General requests with answers, in a run's format, with the bare model's likeliest tokens as labels.

    Args:
        backbone: Who teaches.
        text_format: The text around a request and its answer.
        prefix_length: P; what finds no room behind it is left out.
    """
    room = (backbone.max_positions or 2**20) - backbone.prefix_positions(prefix_length)
    pairs = [Example(request, (answer,)) for request, answer in general_requests()["train"]]
    encoded = encode_pairs(backbone, text_format, pairs)
    pairs = [pair for pair, (one, other) in zip(pairs, encoded, strict=True) if len(one) + len(other) <= room]
    rows = encode_examples(backbone, pairs, text_format, prefix_length=prefix_length).examples if pairs else []
    taught: list[TokenizedExample] = []
    for first in range(0, len(rows), _BATCH):
        some = rows[first : first + _BATCH]
        lengths = [len(row.targets[0]) for row in some]
        parts = teacher_labels(backbone, None, collate(backbone, some), lengths=lengths)
        taught += [replace(row, soft_targets=(labels,)) for row, labels in zip(some, parts, strict=True)]
    return taught


def general_of_step(
    general: Sequence[TokenizedExample], share: float, targets: int, seed: int, step: int
) -> list[TokenizedExample]:
    """The general requests of a step, drawn by seed and step: on average a share of the step's other targets."""
    draw = random.Random(f"{seed}/{step}/general")
    return draw.sample(general, min(int(share * targets + draw.random()), len(general)))


def bare_texts(backbone: Backbone, text_format: TextFormat, prefix_length: int) -> list[TokenizedExample]:
    """The bare model's greedy texts of 32 tokens to requests about other things.

    Args:
        backbone: Who writes them.
        text_format: The text around a request.
        prefix_length: P; a request that finds no room behind it is left out.
    """
    room = (backbone.max_positions or 2**20) - backbone.prefix_positions(prefix_length) - _NEW_TOKENS
    asked = [ids for ids in encode_prompts(backbone, text_format, general_requests()["test"]) if len(ids) <= room]
    config = GenerateConfig(max_new_tokens=_NEW_TOKENS, batch_size=_BATCH)
    texts = generate_ids(backbone, asked, [None] * len(asked), config=config)
    # The end token is a token of a text, too.
    ended = ([*text, backbone.eos_id][:_NEW_TOKENS] for text in texts)
    return [TokenizedExample(tuple(ids), (tuple(text),)) for ids, text in zip(asked, ended, strict=True)]


@torch.no_grad()
def measure_silence(
    backbone: Backbone, prefixes: Mapping[str, Prefix], texts: Sequence[TokenizedExample]
) -> dict[str, dict[str, Any]]:
    """How prefixes change the bare model's texts to requests about other things.

    Args:
        backbone: The model.
        prefixes: By name.
        texts: Of `bare_texts`.

    Returns:
        By name: `requests`; `unchanged`: texts that the prefix leaves as they are; `kl`: nats per token of the bare
        model's texts from the bare model, over the whole vocabulary. Empty: there are no texts.
    """
    prefixes = {name: prefix.to(device=backbone.device) for name, prefix in prefixes.items()}
    divergence, unchanged, tokens = dict.fromkeys(prefixes, 0.0), dict.fromkeys(prefixes, 0), 0
    for first in range(0, len(texts), _BATCH):
        some = texts[first : first + _BATCH]
        batch = collate(backbone, some)
        bare, _ = head_inputs(backbone, None, batch)
        tokens += len(bare)

        def compare(logits: Tensor, rows: slice, slopes: Tensor | None, bare: Tensor = bare) -> tuple[Tensor, ...]:
            was, own = (each.float().log_softmax(-1) for each in (backbone.head(bare[rows]), logits))
            return (was.exp() * (was - own)).sum(-1), own.argmax(-1)

        for name, prefix in prefixes.items():
            nats, likeliest = head_pass(backbone.head, head_inputs(backbone, prefix, batch)[0], compare)
            divergence[name] += float(nats.sum())
            # Greedy decoding writes the same text if, and only if, each of its tokens stays the likeliest.
            same = (likeliest.cpu() == batch.labels).split([len(row.targets[0]) for row in some])
            unchanged[name] += sum(bool(one.all()) for one in same)
    return {
        name: {"requests": len(texts), "unchanged": unchanged[name], "kl": round(divergence[name] / tokens, 4)}
        for name in (prefixes if texts else ())
    }
