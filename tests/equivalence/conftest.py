"""Fixtures of several equivalence tests."""

import functools

import pytest

from prefixtune.data.encoding import TokenizedExample
from prefixtune.engine.request import Request, SamplingParams


@pytest.fixture(scope="module")
def made(tiny_backbone):
    """Tiny backbones by name, each made once: leave them as they are."""
    return functools.cache(tiny_backbone)


@pytest.fixture
def examples(random_ids):
    """Sources shared by several targets, of one token and of more than a window."""
    shapes = [(7, (3, 6, 1)), (1, (4,)), (12, (5, 2)), (3, (9,))]
    return [
        TokenizedExample(
            tuple(random_ids(prompt, seed=prompt)),
            tuple(tuple(random_ids(count, seed=100 * prompt + count)) for count in targets),
        )
        for prompt, targets in shapes
    ]


PREFIXES = {
    "decoder": (6, 6, 3, None, None, 1, 1),
    "encoder-decoder": ({"encoder": 4, "decoder": 3, "cross": 5}, {"decoder": 6}, {"encoder": 2}, {"cross": 7}, None),
}


@pytest.fixture
def requests(random_ids, random_prefix):
    """Requests with prompts of 1 to 30 tokens, and prefixes of several lengths and sites, some shared, and none."""

    def make(backbone, n=1, **rules):
        lengths = PREFIXES[backbone.kind]
        made = {repr(one): one and random_prefix(backbone, one, seed).detach() for seed, one in enumerate(lengths)}
        prefixes = [made[repr(one)] for one in lengths]
        sampling = SamplingParams(**{"max_new_tokens": 10, **rules})
        return [
            Request(tuple(random_ids(count, count)), prefixes[number % len(prefixes)], sampling, n=n)
            for number, count in enumerate((7, 30, 2, 9, 1, 5, 14, 3, 21)[: 7 if backbone.kind == "decoder" else 9])
        ]

    return make
