"""A start from solved examples against the examples in view, and leave-one-out against a prefix without them."""

import pytest
import torch
from torch.nn import functional as F

import prefixtune as pt
from oracles import behind_cache, cache_of
from prefixtune.attention.record import prefix_from_tokens
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import collate, pad
from prefixtune.data.encoding import TokenizedExample
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.data import tokenize
from prefixtune.training.starts.build import build_encoder
from prefixtune.training.starts.examples import from_examples

EXAMPLES = [pt.Example(f"n : {word}", (f"{word} it is.", f"so {word}.")) for word in ("ab", "cde", "fg", "hijk")]
NO_WINDOW = ("gpt2", "llama", "opt", "gpt_neox", "qwen3")
"""A sliding window hides a text in view, and never a prefix."""
ROWS = [(3, 9, 4, 22), (8, 1, 30), (5, 6, 7, 8, 11)]


def without(prefix, first, stop, sites):
    """The prefix with some positions deleted at some sites."""
    layers = {
        site: tuple(
            (torch.cat([k[:, :first], k[:, stop:]], 1), torch.cat([v[:, :first], v[:, stop:]], 1)) for k, v in pairs
        )
        if site in sites
        else pairs
        for site, pairs in prefix.layers.items()
    }
    return Prefix(layers)


def start_of(backbone, **options):
    """The tokenized data of a run that starts from examples, and its prefix before training."""
    config = pt.TrainConfig(**{"init_examples": 3, "init_text": "abc", **options})
    data = tokenize(config, backbone, EXAMPLES, ())
    encoder, _ = build_encoder(config, backbone, plan=data.plan)
    return data, encoder.bake()


def test_an_example_is_a_row_of_training_with_its_end(made):
    backbone = made("llama")
    data, _ = start_of(backbone)
    for example in data.plan.chosen:
        trained = data.train.examples[example.index]
        assert example.row == (*trained.prompt, *trained.targets[0])
        assert example.row[-1] == backbone.eos_id


def test_each_alone_is_computed_alone_at_its_own_positions(family, made, assert_same):
    """With a mask by hand: block-diagonal in one row of all texts."""
    backbone = made(family)
    prefix = from_examples(backbone, ROWS)
    first = 0
    for row in ROWS:
        positions = torch.arange(first, first + len(row))[None]
        cache = backbone.model(torch.tensor([row]), position_ids=positions, use_cache=True).past_key_values
        for layer, (key, value) in enumerate(prefix.layers["decoder"]):
            cached = cache.layers[layer]
            kept = cached.keys.shape[2]  # a sliding window keeps the last ones only
            stop = first + len(row)
            assert_same(key[:, stop - kept : stop], cached.keys[0].float())
            assert_same(value[:, stop - kept : stop], cached.values[0].float())
        first += len(row)
    assert prefix.length() == first


@pytest.mark.parametrize("family", NO_WINDOW)
def test_leave_one_out_is_a_prefix_without_the_block(family, made, assert_same):
    """The positions of the text stay: the independent computation shifts them by the whole prefix, by hand."""
    backbone = made(family)
    data, prefix = start_of(backbone)
    index, (first, stop) = next(iter(data.plan.blocks.items()))
    example = data.train.examples[index]
    assert example.hidden == tuple(range(first, stop))
    others = [other for other in data.train.examples if other is not example]
    losses = batch_loss(backbone, prefix, collate(backbone, [others[0], example, others[1]]))
    count = sum(len(target) for target in others[0].targets)
    own = losses[count : count + sum(len(target) for target in example.targets)]

    cut = without(prefix, first, stop, ("decoder",))
    expected = []
    for target in example.targets:
        ids = torch.tensor([[*example.prompt, *target]])
        with torch.no_grad():
            logits = behind_cache(backbone.model, cache_of(cut), ids, prefix.length()).logits[0]
        expected.append(F.cross_entropy(logits[len(example.prompt) - 1 : -1], torch.tensor(target), reduction="none"))
    assert_same(own, torch.cat(expected))
    padded = batch_loss(backbone, prefix, pad([example], pad_id=backbone.pad_id))
    assert_same(padded, own)


@pytest.mark.parametrize("name", ["bart", "t5", "m2m_100"])
class TestEncoderDecoder:
    def test_source_and_target_are_read_by_the_encoder(self, name, made, assert_same):
        backbone = made(name)
        data, prefix = start_of(backbone)
        first = 0
        for example in data.plan.chosen:
            stop = first + len(example.row)
            alone = prefix_from_tokens(backbone.model, backbone.layout, torch.tensor([example.row]))
            for site in ("encoder", "cross"):
                for (key, value), (k, v) in zip(prefix.layers[site], alone.layers[site], strict=True):
                    assert_same(key[:, first:stop], k)
                    assert_same(value[:, first:stop], v)
            first = stop
        assert prefix.length("encoder") == prefix.length("cross") == first
        assert prefix.length("decoder") == 10

    def test_leave_one_out_is_a_prefix_without_the_block(self, name, made, assert_same):
        backbone = made(name)
        data, prefix = start_of(backbone)
        index, (first, stop) = next(iter(data.plan.blocks.items()))
        example = data.train.examples[index]
        cut = without(prefix, first, stop, ("encoder", "cross"))
        seen = TokenizedExample(example.prompt, example.targets)
        expected = batch_loss(backbone, cut, collate(backbone, [seen]))
        assert_same(batch_loss(backbone, prefix, collate(backbone, [example])), expected)
        padded = pad([example], pad_id=backbone.pad_id, decoder_start_id=backbone.decoder_start_id)
        assert_same(batch_loss(backbone, prefix, padded), expected)
        whole = batch_loss(backbone, prefix, collate(backbone, [seen]))
        assert not torch.allclose(whole, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["jamba", "bamba"])
def test_leave_one_out_where_rows_are_padded(name, made, assert_same):
    """A model that reads no packed rows, as its other layers mix all positions of a row."""
    backbone = made(name)
    assert not backbone.layout.packable
    torch.manual_seed(0)
    data, prefix = start_of(backbone)
    index, (first, stop) = next(iter(data.plan.blocks.items()))
    example = data.train.examples[index]
    batch = collate(backbone, [example, *[e for e in data.train.examples if e is not example]])
    # What is hidden is changed beyond recognition: nothing may follow for this example, but must for the others.
    layers = tuple((key.clone(), value.clone()) for key, value in prefix.layers["decoder"])
    for key, value in layers:
        key[:, first:stop] += 5 * torch.randn_like(key[:, first:stop])
        value[:, first:stop] += 5 * torch.randn_like(value[:, first:stop])
    changed = Prefix({"decoder": layers})
    count = sum(map(len, example.targets))
    losses, after = batch_loss(backbone, prefix, batch), batch_loss(backbone, changed, batch)
    assert_same(after[:count], losses[:count])
    assert not torch.allclose(after[count:], losses[count:], atol=1e-4)
