"""Packed and padded rows against a row for each pair, the fused loss against PyTorch's, and the plan of an epoch."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import losses_one_by_one
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import collate, pack, pad
from prefixtune.data.encoding import TokenizedExample
from prefixtune.data.tokenized import epoch_batches
from prefixtune.training.score import evaluation_loss

DECODERS = ("gpt2", "llama", "opt", "gpt_neox", "qwen3", "mistral")
ENCODER_DECODERS = ("bart", "mbart", "pegasus", "t5", "t5_gated", "m2m_100")
SITES = [{"encoder": 4, "decoder": 3, "cross": 5}, *({site: 3} for site in ("encoder", "decoder", "cross"))]


def batches(backbone, examples):
    """What training makes of the examples, and padded rows."""
    chosen = collate(backbone, examples)
    assert (chosen.packing is not None) == backbone.layout.packable == ("m2m" not in backbone.name)
    yield chosen
    start = backbone.decoder_start_id if backbone.kind == "encoder-decoder" else None
    yield pad(examples, pad_id=backbone.pad_id, decoder_start_id=start)


@pytest.mark.parametrize(
    ("name", "lengths"),
    [*((name, 5) for name in DECODERS), *((name, lengths) for name in ENCODER_DECODERS for lengths in SITES)],
)
def test_packed_and_padded_rows_are_one_pair_at_a_time(name, lengths, made, random_prefix, examples, assert_same):
    backbone = made(name)
    prefix = random_prefix(backbone, lengths)
    expected = losses_one_by_one(backbone, prefix, examples)
    weights = torch.rand(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weights).sum(), prefix.tensors())
    for batch in batches(backbone, examples):
        losses = batch_loss(backbone, prefix, batch)
        assert_same(losses, expected)
        assert batch.target_index.tolist() == [n for n, size in enumerate((3, 6, 1, 4, 5, 2, 9)) for _ in range(size)]
        assert_same(torch.autograd.grad((losses * weights).sum(), prefix.tensors()), wanted)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
@torch.no_grad()
def test_evaluation_with_and_without_a_prefix(name, made, random_prefix, examples, assert_same):
    backbone = made(name)
    for prefix in (None, random_prefix(backbone, 4)):
        expected = losses_one_by_one(backbone, prefix, examples)
        for batch in batches(backbone, examples):
            assert_same(batch_loss(backbone, prefix, batch), expected)
        for size in (1, 2, 64):
            loss = evaluation_loss(backbone, prefix, examples, size)
            assert loss == pytest.approx(float(expected.mean()), rel=1e-5)


def test_a_source_is_read_once_for_all_of_its_targets(made, examples):
    packed, padded = batches(made("llama"), examples)
    # The last token of a source opens each of its targets.
    assert packed.input_ids.shape == (1, sum(len(example.prompt) - 1 for example in examples) + len(packed.labels))
    assert padded.input_ids.shape == (7, 16)
    packed, padded = batches(made("bart"), examples)
    assert packed.input_ids.shape == (1, sum(len(example.prompt) for example in examples))
    assert packed.decoder_input_ids.shape == (1, len(packed.labels))
    assert (padded.input_ids.shape, padded.decoder_input_ids.shape) == ((4, 12), (7, 9))
    assert padded.source_rows.tolist() == [0, 0, 0, 1, 2, 2, 3]


def test_a_loss_counts_targets_or_tokens_alike(made, random_prefix, examples, assert_same):
    backbone, batch = made("llama"), pack(examples)
    losses = batch_loss(backbone, random_prefix(backbone, 5), batch)
    parts = losses.split([3, 6, 1, 4, 5, 2, 9])
    # sentence: sum over a target's tokens, mean over targets (the paper); token: mean over tokens.
    assert_same(losses.sum() / batch.num_targets, torch.stack([part.sum() for part in parts]).mean())
    assert_same(losses.sum() / len(batch.labels), losses.mean())


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [*((name, 0.2) for name in ("llama", "mistral", "gpt2")), *((name, 0.35) for name in ("bart", "t5", "m2m_100"))],
)
def test_bfloat16_is_float32_up_to_rounding(name, tolerance, tiny_backbone, random_prefix, examples, assert_same):
    backbone = tiny_backbone(name)
    prefix = random_prefix(backbone, 5 if backbone.kind == "decoder" else SITES[0])
    exact = losses_one_by_one(backbone, prefix, examples)
    wanted = torch.autograd.grad(exact.mean(), prefix.tensors())
    backbone.model.to(torch.bfloat16)
    for batch in batches(backbone, examples):
        losses = batch_loss(backbone, prefix, batch)
        assert losses.dtype == torch.float32
        assert_same(losses, exact, tolerance=0.05)
        assert_same(torch.autograd.grad(losses.mean(), prefix.tensors()), wanted, tolerance=tolerance)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("phimoe", {}), ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3})],
    ids=["phimoe", "qwen2_moe"],
)
def test_a_window_that_is_in_the_mask_alone_is_kept(
    name, settings, tiny_backbone, random_prefix, examples, assert_same
):
    backbone = tiny_backbone(name, **settings)
    prefix = random_prefix(backbone, 5)
    assert backbone.layout.packable
    assert_same(batch_loss(backbone, prefix, pack(examples)), losses_one_by_one(backbone, prefix, examples))


# --- the loss --------------------------------------------------------------------------------------------------------


# --- the plan of an epoch --------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    batch_size=st.integers(1, 20),
    targets_per_source=st.integers(1, 12),
    seed=st.one_of(st.none(), st.integers(0, 3)),
    epoch=st.integers(0, 3),
)
def test_an_epoch_yields_every_target_once(counts, batch_size, targets_per_source, seed, epoch):
    examples = [
        TokenizedExample((source,), tuple((source, number) for number in range(count)))
        for source, count in enumerate(counts)
    ]

    def plan():
        return list(
            epoch_batches(
                examples, batch_size=batch_size, targets_per_source=targets_per_source, seed=seed, epoch=epoch
            )
        )

    batches = plan()
    seen = Counter((hand.prompt, target) for hands in batches for hand in hands for target in hand.targets)
    assert seen == Counter((example.prompt, target) for example in examples for target in example.targets)
    sizes = [sum(len(hand.targets) for hand in hands) for hands in batches]
    assert all(size == batch_size for size in sizes[:-1])
    assert 1 <= sizes[-1] <= batch_size
    assert all(1 <= len(hand.targets) <= targets_per_source for hands in batches for hand in hands)
    assert plan() == batches


def test_the_order_is_a_function_of_seed_and_epoch():
    examples = [TokenizedExample((source,), ((source, 0), (source, 1))) for source in range(20)]

    def order(seed, epoch):
        return list(epoch_batches(examples, batch_size=4, targets_per_source=1, seed=seed, epoch=epoch))

    torch.manual_seed(1)
    first = order(0, 0)
    torch.manual_seed(2)
    assert order(0, 0) == first
    assert order(0, 1) != first
    assert order(1, 0) != first
    in_file_order = [hand.targets[0] for hands in order(None, 0) for hand in hands]
    assert in_file_order == [target for example in examples for target in example.targets]
    assert order(None, 5) == order(None, 0)
