"""Sources that begin alike, computed once in a packed row, against each example in a padded row of its own."""

from dataclasses import replace

import pytest
import torch

from oracles import losses_and_gradients, summed
from prefixtune.backbone.batch import Front, SoftLabels
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import collate, divide, join, pack, pad
from prefixtune.data.encoding import TokenizedExample

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")

BEGINNING, P = 14, 5


@pytest.fixture
def alike(random_ids):
    """Five examples that begin with the same tokens, of which one has only one token more, and one is a conversation.

    Between them stand one that begins otherwise, and one with two targets.
    """
    beginning = tuple(random_ids(BEGINNING, seed=1))

    def example(rest, target):
        tokens = tuple(random_ids(rest + target, seed=10 * rest + target))
        return TokenizedExample((*beginning, *tokens[:rest]), (tokens[rest:],))

    made = [example(1, 4), example(6, 2), example(3, 1), example(3, 9), example(4, 7)]
    made[3] = replace(made[3], turns=((0, 2), (5, 9)))
    other = TokenizedExample(tuple(random_ids(8, seed=2)), (tuple(random_ids(3, seed=3)),))
    two = TokenizedExample((*beginning, 5, 6), tuple(tuple(random_ids(count, seed=count)) for count in (2, 3)))
    return [*made[:3], other, two, *made[3:]]


def one_by_one(backbone, prefix, examples):
    batches = [(pad([e], pad_id=backbone.pad_id), prefix[: e.front.length]) for e in examples]
    return summed([losses_and_gradients(backbone, prefix, batch, [front]) for batch, front in batches])


@pytest.mark.parametrize("hidden", [(), (0, 3)])
def test_shared_is_one_by_one(hidden, backbone, random_prefix, alike, assert_same):
    examples = [replace(example, hidden=hidden) for example in alike]
    batch, apart = (collate(backbone, examples, share_beginnings=shares) for shares in (True, False))
    if backbone.layout.packable:
        assert apart.width - batch.width == 3 * BEGINNING
        assert [len(group.target_lengths) for group in batch.packing.groups] == [3, 1, 2, 2]
    assert batch.target_index.tolist() == apart.target_index.tolist()
    assert batch.labels.tolist() == apart.labels.tolist()
    prefix = random_prefix(backbone, P)
    assert_same(losses_and_gradients(backbone, prefix, batch, [prefix]), one_by_one(backbone, prefix, examples))


def test_only_those_that_see_the_same_of_the_prefix_share(tiny_backbone, random_prefix, alike, assert_same):
    backbone = tiny_backbone("llama")
    first, second, third = alike[:3]
    examples = [
        replace(first, hidden=(1,)),
        replace(second, hidden=(1,)),
        third,
        replace(first, front=Front(2)),
        replace(third, front=Front(2)),
        second,
    ]
    batch = pack(examples, share_beginnings=True)
    assert [len(group.target_lengths) for group in batch.packing.groups] == [2, 1, 2, 1]
    assert batch.packing.prefix_index == (0, 0, 1, 0)
    prefix = random_prefix(backbone, P)
    fronts = [prefix[: front.length] for front in batch.fronts]
    assert_same(losses_and_gradients(backbone, prefix, batch, fronts), one_by_one(backbone, prefix, examples))


def test_joined_rows_share_within_each_run(tiny_backbone, random_prefix, alike, assert_same):
    backbone = tiny_backbone("llama")
    prefixes = [random_prefix(backbone, length, seed=length) for length in (3, 6)]
    losses = batch_loss(backbone, prefixes, join([pack(alike, share_beginnings=True)] * 2))
    assert_same(losses, torch.cat([batch_loss(backbone, prefix, pack(alike)) for prefix in prefixes]))


def test_a_teachers_labels_stay_with_their_targets(tiny_backbone, random_prefix, alike, assert_same):
    backbone, examples = tiny_backbone("llama"), []
    size = int(backbone.model.get_output_embeddings().weight.shape[0])
    for seed, example in enumerate(alike[:3]):
        logits = torch.randn(len(example.targets[0]), size, generator=torch.Generator().manual_seed(seed))
        examples.append(replace(example, soft_targets=(SoftLabels.from_logits(logits, k=7),)))
    prefix = random_prefix(backbone, P)
    shared, apart = (batch_loss(backbone, prefix, pack(examples, share_beginnings=shares)) for shares in (True, False))
    assert_same(shared, apart)


def test_a_short_beginning_of_long_sources_is_not_worth_a_group(random_ids):
    """All positions of a group meet in attention, which costs more than it saves here."""
    long = [TokenizedExample((7, *random_ids(400, seed)), ((1,),)) for seed in range(2)]
    assert len(pack(long, share_beginnings=True).packing.groups) == 2
    begin_alike = [replace(e, prompt=(*random_ids(500), *e.prompt)) for e in long]
    assert len(pack(begin_alike, share_beginnings=True).packing.groups) == 1


@pytest.mark.parametrize("share_beginnings", [True, False])
def test_parts_hold_as_much_as_they_may(share_beginnings, tiny_backbone, random_ids):
    beginning = random_ids(24)
    examples = [
        TokenizedExample((*beginning, *random_ids(10 + seed % 7, seed)), (tuple(random_ids(25, seed)),))
        for seed in range(16)
    ]
    backbone, most = tiny_backbone("llama"), 256
    parts = divide(backbone, examples, most, share_beginnings=share_beginnings)
    assert [example for part in parts for example in part] == examples
    widths = [collate(backbone, part, share_beginnings=share_beginnings).width for part in parts]
    assert max(widths) <= most
    # 16 x 61 or 24 + 16 x 37 positions.
    assert len(parts) == (3 if share_beginnings else 4)
    assert min(widths) > max(widths) / 2
    assert len(divide(tiny_backbone("jamba"), examples, most, share_beginnings=True)) == 4
