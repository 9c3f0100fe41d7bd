"""What a group sees of the prefix while it is trained: its first positions, and all but some; packed and padded."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from oracles import behind_cache, cache_of, losses_and_gradients, summed
from prefixtune.backbone.batch import Front
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import collate, join, pack, pad
from prefixtune.data.encoding import TokenizedExample
from prefixtune.prefix.prefix import Head, Prefix

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")

HIDDEN = ((1, 4), (), (0, 2, 3))
LENGTHS = (2, None, 4)
P = 5


@pytest.fixture
def examples(examples):
    """As many as there are sets of positions."""
    return examples[: len(HIDDEN)]


def test_groups_of_one_row_have_the_first_positions_alone(backbone, random_prefix, examples, assert_same):
    prefix = random_prefix(backbone, P)
    marked = [replace(e, front=Front(length)) for e, length in zip(examples, LENGTHS, strict=True)]
    batch = pack(marked)
    assert batch.fronts == tuple(map(Front, LENGTHS))
    got = losses_and_gradients(backbone, prefix, batch, [prefix[: front.length] for front in batch.fronts])
    # Each alone in a padded row, with a prefix that ends there.
    parts = [
        losses_and_gradients(backbone, prefix, pad([e], pad_id=backbone.pad_id), [prefix[:length]])
        for e, length in zip(examples, LENGTHS, strict=True)
    ]
    assert_same(got, summed(parts))


def test_joined_rows_keep_their_own_lengths(tiny_backbone, random_prefix, examples, assert_same):
    """Two runs that train together: the first nested, the second with its whole prefix."""
    backbone = tiny_backbone("llama")
    first, second = random_prefix(backbone, P), random_prefix(backbone, 3, seed=1)
    marked = pack([replace(e, front=Front(length)) for e, length in zip(examples, LENGTHS, strict=True)])
    plain = pack(examples)
    losses = batch_loss(
        backbone, [*(first[:length] for length in LENGTHS), second, first], join([marked, plain, plain])
    )
    alone = [batch_loss(backbone, [first[:length] for length in LENGTHS], marked)]
    alone += [batch_loss(backbone, prefix, plain) for prefix in (second, first)]
    assert_same(losses, torch.cat(alone))


def test_a_padded_row_sees_all_but_the_hidden_positions(backbone, random_prefix, examples, assert_same):
    prefix = random_prefix(backbone, P)
    marked = [replace(e, hidden=hidden) for e, hidden in zip(examples, HIDDEN, strict=True)]
    packed = losses_and_gradients(backbone, prefix, pack(marked), [prefix])
    assert_same(losses_and_gradients(backbone, prefix, pad(marked, pad_id=backbone.pad_id), [prefix]), packed)
    # By hand: transformers' own cache without the hidden rows, and the text where it was.
    assert_same(packed[0].detach(), torch.cat([by_cache(backbone, prefix, e) for e in marked]))


@torch.no_grad()
def by_cache(backbone, prefix, example):
    """Losses of an example's targets by the model's own forward with a cache of the visible positions."""
    visible = [position for position in range(P) if position not in example.hidden]
    losses = []
    for target in example.targets:
        ids = torch.tensor([[*example.prompt, *target]])
        # Mistral's window counts text positions only, which the model's own mask of a cache does not know.
        count, window = ids.shape[1], getattr(backbone.model.config, "sliding_window", None)
        mask = torch.ones(count, count, dtype=torch.bool).tril()
        if window is not None:
            mask = mask.triu(1 - window)
        mask = F.pad(mask, (len(visible), 0), value=True)
        scores = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))[None, None]
        cache = cache_of(prefix, visible)
        logits = behind_cache(backbone.model, cache, ids, P, attention_mask=scores).logits[0]
        start = len(example.prompt)
        losses.append(F.cross_entropy(logits[start - 1 : -1], torch.tensor(target), reduction="none"))
    return torch.cat(losses)


@pytest.mark.parametrize("name", ["bart", "t5", "m2m_100"])
def test_hidden_positions_and_lengths_in_encoder_decoders(name, tiny_backbone, random_prefix, examples, assert_same):
    backbone = tiny_backbone(name)
    prefix = random_prefix(backbone, {"encoder": P, "decoder": 3, "cross": 4})
    marked = [replace(e, hidden=hidden) for e, hidden in zip(examples, HIDDEN, strict=True)]
    start = backbone.decoder_start_id
    padded = pad(marked, pad_id=backbone.pad_id, decoder_start_id=start)
    got = losses_and_gradients(backbone, prefix, padded, [prefix])
    # One source at a time, where a hidden row may as well not be there: encoders shift no position.
    parts = []
    for example in marked:
        shorter = Prefix(
            {
                site: tuple((without(k, example.hidden), without(v, example.hidden)) for k, v in layers)
                if site != "decoder"
                else layers
                for site, layers in prefix.layers.items()
            }
        )
        alone = pad([replace(example, hidden=())], pad_id=backbone.pad_id, decoder_start_id=start)
        parts.append(losses_and_gradients(backbone, prefix, alone, [shorter]))
    assert_same(got, summed(parts))

    same = [replace(e, hidden=(1,), front=Front(2)) for e in examples]
    batch = collate(backbone, same)
    assert batch.fronts == (Front(2),)
    alone = pad([replace(e, hidden=(), front=Front()) for e in examples], pad_id=0, decoder_start_id=start)
    first = Prefix(
        {
            site: tuple(
                (k[:, : 2 if site == "decoder" else 1], v[:, : 2 if site == "decoder" else 1]) for k, v in layers
            )
            for site, layers in prefix.layers.items()
        }
    )
    assert_same(batch_loss(backbone, prefix[:2], batch), batch_loss(backbone, first, alone))


def without(tensor, hidden):
    return tensor[:, [position for position in range(tensor.shape[1]) if position not in hidden]]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_heads_see_all_but_the_hidden_positions(name, tiny_backbone, random_prefix, random_ids, assert_same):
    backbone = tiny_backbone(name)
    site = next(iter(backbone.geometry))
    head = Head(torch.randn(3, backbone.hidden_size), torch.randn(3))
    prefix = Prefix(random_prefix(backbone, P).layers, head=head)
    hidden = (1, 3)
    batch = collate(backbone, [TokenizedExample(tuple(random_ids(6, seed)), ((1,),), (5,), hidden) for seed in (1, 2)])
    got = batch_loss(backbone, prefix, batch)
    # Values of zero and keys of minus infinity would do it; here the rows go and the text stays where it was.
    ids = torch.tensor([random_ids(6, seed) for seed in (1, 2)])
    shorter = Prefix({site: tuple((without(k, hidden), without(v, hidden)) for k, v in prefix.layers[site])})
    if name == "bert":
        states = backbone.hidden_states(ids, prefixes=shorter)
    else:
        states = behind_cache(backbone.model.model, cache_of(shorter, rows=2), ids, P)[0]
    assert_same(got, F.cross_entropy(head(states[:, 5]), torch.tensor([1, 1]), reduction="none"))
