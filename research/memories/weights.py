"""What a weight on one of several joined memories does: exact answers, by the bias in plain keys.

    python -m research.memories.weights DATA RUN RESULTS.json

RUN is the folder of a run of `joined`. A part of weight w has log w added to the scores of its keys: each key is moved
by log w along the direction that all queries of its head have a mean product of 1 with, and least variance, as in a
match. The queries are those of a quarter of the questions to train on, behind all memories. Three uses: all parts get
one weight; the own one gets a larger weight, as a router would give it; and what that costs the others' questions.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixtune.attention.injection import observe_attention
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data.batching import collate
from prefixtune.data.encoding import TokenizedExample
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.wording import choose_wording
from prefixtune.prefix.compose import concatenate
from prefixtune.prefix.prefix import Prefix
from research.memories.joined import documents, encode, score

_ALL = (0.5, 0.7, 1.0, 1.4, 2.0)
_OWN = (2.0, 4.0, 16.0)
_RIDGE = 0.01


@torch.no_grad()
def directions(
    backbone: Backbone, front: Prefix, examples: Sequence[TokenizedExample]
) -> tuple[list[Tensor], list[float]]:
    """By layer the direction of a bias (H, D), and the spread of a bias of 1 in each head."""
    seen: dict[int, list[Tensor]] = {}

    def observer(layer: tuple[str, int], length: int, query: Tensor, key: Tensor, *more: Any) -> None:
        heads = key.shape[1]
        seen.setdefault(layer[1], []).append((query[0].float() * more[2].scale).reshape(heads, -1, query.shape[-1]))

    with observe_attention(observer):
        for first in range(0, len(examples), 16):
            batch = collate(backbone, examples[first : first + 16])
            backbone.hidden_states(**batch.inputs(backbone.device), prefixes=front)
    made, spreads = [], []
    for layer in sorted(seen):
        query = torch.cat(seen[layer], 1).double()
        mean = query.mean(1, keepdim=True)
        spread = (query - mean).mT @ (query - mean) / query.shape[1]
        size = _RIDGE * spread.diagonal(dim1=-2, dim2=-1).mean(-1)
        held = spread + torch.diag_embed(size[:, None].expand(spread.shape[:-1]))
        found = torch.linalg.solve(held, mean.mT)
        found = found / (mean @ found)
        made.append(found[..., 0].float())
        spreads += (found.mT @ spread @ found)[:, 0, 0].sqrt().tolist()
    return made, spreads


def weighted(joined: Prefix, weights: Sequence[float], along: Sequence[Tensor]) -> Prefix:
    """Joined memories of one length, each with a weight."""
    bias = torch.tensor(weights).log().repeat_interleave(joined.length() // len(weights))
    layers = [
        (key + bias[:, None] * direction[:, None].to(key), value)
        for (key, value), direction in zip(joined.layers["decoder"], along, strict=True)
    ]
    return Prefix({"decoder": tuple(layers)}, joined.header)


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "run", "results"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    backbone = load_backbone("smollm2-135m", dtype="float32")
    found = list(documents(options.data, False))
    memories = [load_prefix(options.run / "runs" / name / "prefix.safetensors", backbone) for name, *_ in found]
    config = DistillConfig(document="text", questions="questions")
    wording, numbers = choose_wording(config, backbone, None), range(len(memories))
    asked = [[encode(backbone, rows, wording, 32 * len(memories)) for rows in parts] for _, _, *parts in found]
    # All stand at the same positions, so that their order means nothing.
    joined = concatenate(memories, backbone.rotation)
    along, spreads = directions(backbone, joined, [one for train, _ in asked for one in train[::4]])

    def right(document: int, front: Prefix) -> float:
        return score(backbone, front, asked[document][1])[0] / len(asked[document][1])

    def exact(document: int, weights: Sequence[float]) -> float:
        return right(document, weighted(joined, weights, along))

    def of(weights: dict[int, float]) -> list[float]:
        return [weights.get(number, 1.0) for number in numbers]

    pairs = [(own, (own + 1) % len(memories)) for own in numbers]
    cells: dict[str, dict[float, list[float]]] = {
        "alone": {1.0: [right(own, memories[own]) for own in numbers]},
        "all": {weight: [exact(own, [weight] * len(memories)) for own in numbers] for weight in _ALL},
        "own": {weight: [exact(own, of({own: weight})) for own in numbers] for weight in _OWN},
        "another": {weight: [exact(own, of({other: weight})) for own, other in pairs] for weight in _OWN},
    }
    result: dict[str, Any] = {
        name: {weight: round(statistics.fmean(own), 4) for weight, own in row.items()} for name, row in cells.items()
    }
    result["spread"] = {"median": round(statistics.median(spreads), 3), "largest": round(max(spreads), 3)}
    options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
