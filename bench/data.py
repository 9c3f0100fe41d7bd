"""The pairs that are measured: E2E where its files are found, otherwise the project's own toy set."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path

from bench.results import ROOT
from prefixtune.backbone.backbone import Backbone
from prefixtune.data import Example, read_task
from prefixtune.data.encoding import TokenizedExample, default_format, encode_examples
from prefixtune.data.tokenized import epoch_batches

E2E = ROOT.parent / "shared" / "data" / "e2e" / "train.jsonl.gz"
"""Where E2E is looked for: beside the repository."""

Batch = list[TokenizedExample]
"""Sources with one or several targets each."""


def read(path: Path | None = None) -> tuple[str, list[Example]]:
    """A name and examples: of E2E; without a path, from beside the repository, or the toy set if that is missing.

    Raises:
        DataError: The file is missing or wrong.
    """
    if path is None and not E2E.is_file():
        return "toy (made by prefixtune)", read_task("toy", "train")
    chosen = path or E2E
    return f"E2E ({chosen.parent.name}/{chosen.name})", read_task("e2e", chosen)


def make_batches(
    backbone: Backbone, examples: Sequence[Example], setting: tuple[int, int], *, number: int, prefix_length: int
) -> list[Batch]:
    """The first full batches of training.

    Args:
        backbone: Reads the texts.
        examples: As `read` gives them.
        setting: Pairs per step, and most targets of a source.
        number: Of batches.
        prefix_length: P.
    """
    pairs, most = setting
    # Only as many as are needed are encoded.
    some = random.Random(0).sample(list(examples), min(len(examples), 4 * pairs * number))
    encoded = encode_examples(backbone, some, default_format(backbone), prefix_length=prefix_length).examples
    batches = (
        batch
        for epoch in count()
        for batch in epoch_batches(encoded, batch_size=pairs, targets_per_source=most, seed=0, epoch=epoch)
        if sum(len(group.targets) for group in batch) == pairs
    )
    return list(islice(batches, number))


def make_prompts(backbone: Backbone, examples: Sequence[Example], number: int, length: int) -> list[list[int]]:
    """Different prompts of exactly `length` tokens."""
    draw = random.Random(1)
    prompts = []
    for _ in range(number):
        ids: list[int] = []
        while len(ids) < length:
            ids += backbone.encode(f"{draw.choice(examples).source}\n")
        prompts.append(ids[:length])
    return prompts


def random_batches(setting: tuple[int, int], sizes: tuple[int, int], *, number: int) -> list[Batch]:
    """Batches of random token ids: `setting` as in `make_batches`, `sizes` the tokens of a source and of a target."""
    draw, (pairs, most) = random.Random(2), setting

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 256) for _ in range(length))

    return [
        [TokenizedExample(ids(sizes[0]), tuple(ids(sizes[1]) for _ in range(most))) for _ in range(pairs // most)]
        for _ in range(number)
    ]
