"""The loss without a position against transformers alone, whose cache holds the prefix with that position masked."""

import pytest
import torch
from torch.nn import functional as F

from oracles import behind_cache, cache_of
from prefixtune.data.encoding import TokenizedExample
from prefixtune.explain.ablation import without_positions
from prefixtune.explain.subject import Subject
from prefixtune.prefix.text_format import TextFormat

P = 4


def subject_of(backbone, prefix, rows):
    return Subject(backbone, prefix, TextFormat(), (), tuple(rows), None, {}, batch_size=2)


def rows_of(random_ids):
    sizes = [(6, 5), (2, 4), (3, 3)]
    return [
        TokenizedExample(tuple(random_ids(p, 2 * n)), (tuple(random_ids(t, 9 * n)),)) for n, (p, t) in enumerate(sizes)
    ]


@torch.no_grad()
@pytest.mark.parametrize("hidden", [range(1, 3), range(4)])
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gpt_neox", "qwen3"])
def test_a_decoders_position_is_hidden_and_moves_nothing(
    name, hidden, tiny_backbone, tiny_models, random_prefix, random_ids
):
    backbone, oracle = tiny_backbone(name), tiny_models(name).requires_grad_(False)
    oracle.set_attn_implementation("eager")
    prefix, rows = random_prefix(backbone, P).detach(), rows_of(random_ids)
    expected = []
    for row in rows:
        ids = [*row.prompt, *row.targets[0]]
        mask = torch.ones(1, P + len(ids), dtype=torch.long)
        mask[0, list(hidden)] = 0
        behind = behind_cache(oracle, cache_of(prefix), torch.tensor([ids]), P, attention_mask=mask)
        logits = behind.logits[0, len(row.prompt) - 1 : -1]
        expected.append(float(F.cross_entropy(logits, torch.tensor(row.targets[0]), reduction="sum")))
    subject = subject_of(backbone, prefix, rows)
    assert without_positions(subject, prefix, hidden)[:, 0].tolist() == pytest.approx(expected, rel=1e-5)
    assert without_positions(subject, prefix, range(3, 4))[:, 0].tolist() != pytest.approx(
        without_positions(subject, prefix, range(2, 3))[:, 0].tolist(), rel=1e-4
    )
