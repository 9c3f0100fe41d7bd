"""A packed row against one padded row per pair, the fused loss against PyTorch's, and the plan of an epoch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from prefixtune.backbone.loss import batch_loss, token_losses
from prefixtune.data.batching import pack
from prefixtune.data.encoding import TokenizedExample
from prefixtune.data.tokenized import epoch_batches
from prefixtune.training.score import evaluation_loss


@pytest.fixture
def examples(random_ids: Any) -> list[TokenizedExample]:
    """Sources shared by several targets, of one token and of more than a window."""
    shapes = [(7, (3, 6, 1)), (1, (4,)), (12, (5, 2)), (3, (9,))]
    return [
        TokenizedExample(
            tuple(random_ids(prompt, seed=prompt)),
            tuple(tuple(random_ids(count, seed=100 * prompt + count)) for count in targets),
        )
        for prompt, targets in shapes
    ]


def pair_losses(backbone: Any, prefix: Any, examples: list[TokenizedExample]) -> list[Tensor]:
    """Each target's losses, from an ordinary batch: one right-padded row per (source, target)."""
    pairs = [(example.prompt, target) for example in examples for target in example.targets]
    width = max(len(prompt) + len(target) for prompt, target in pairs)
    ids, labels = torch.full((len(pairs), width), backbone.pad_id), torch.full((len(pairs), width), -100)
    mask = torch.zeros_like(ids)
    for number, (prompt, target) in enumerate(pairs):
        stop = len(prompt) + len(target)
        ids[number, :stop], mask[number, :stop] = torch.tensor([*prompt, *target]), 1
        labels[number, len(prompt) : stop] = torch.tensor(target)
    logits = backbone.forward(ids, mask, prefixes=prefix).logits
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return [row[real] for row, real in zip(flat.view(len(pairs), -1), labels[:, 1:] != -100, strict=True)]


@pytest.mark.parametrize("reduction", ["sentence", "token"])
def test_packed_is_padded(
    reduction: str, backbone: Any, random_prefix: Any, examples: list[TokenizedExample], assert_same: Any
):
    prefix, batch = random_prefix(backbone, 5), pack(examples)
    expected = pair_losses(backbone, prefix, examples)
    losses = batch_loss(backbone, prefix, batch)
    assert batch.input_ids.shape[1] < sum(len(e.prompt) + len(t) for e in examples for t in e.targets)
    assert_same(losses, torch.cat(expected))
    assert batch.target_index.tolist() == [n for n, part in enumerate(expected) for _ in part]

    # sentence: sum over a target's tokens, mean over targets (the paper); token: mean over tokens.
    wanted = torch.stack([part.sum() for part in expected]).mean()
    if reduction == "token":
        wanted = torch.cat(expected).mean()
    loss = (losses * batch.weights(reduction, batch.num_targets, len(batch.labels))).sum()
    assert_same(loss, wanted)
    assert_same(torch.autograd.grad(loss, prefix.tensors()), torch.autograd.grad(wanted, prefix.tensors()))


def test_packed_is_padded_without_a_prefix(backbone: Any, examples: list[TokenizedExample], assert_same: Any):
    expected = torch.cat(pair_losses(backbone, None, examples))
    assert_same(batch_loss(backbone, None, pack(examples)), expected)
    assert evaluation_loss(backbone, None, examples) == pytest.approx(float(expected.mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("phimoe", {}), ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3})],
    ids=["phimoe", "qwen2_moe"],
)
def test_a_window_that_is_in_the_mask_alone_is_kept(
    name: str,
    settings: dict[str, Any],
    tiny_backbone: Any,
    random_prefix: Any,
    examples: list[TokenizedExample],
    assert_same: Any,
):
    backbone = tiny_backbone(name, **settings)
    prefix = random_prefix(backbone, 5)
    assert backbone.layout.packable
    assert_same(batch_loss(backbone, prefix, pack(examples)), torch.cat(pair_losses(backbone, prefix, examples)))


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_evaluation_loss_does_not_depend_on_the_batch(
    batch_size: int, tiny_backbone: Any, random_prefix: Any, examples: list[TokenizedExample]
):
    backbone = tiny_backbone("mistral")
    prefix = random_prefix(backbone, 4)
    expected = float(torch.cat(pair_losses(backbone, prefix, examples)).detach().mean())
    assert evaluation_loss(backbone, prefix, examples, batch_size) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_packed_is_padded_in_bfloat16(
    name: str, tiny_backbone: Any, random_prefix: Any, examples: list[TokenizedExample], assert_same: Any
):
    backbone = tiny_backbone(name)
    prefix = random_prefix(backbone, 5)
    exact = torch.cat(pair_losses(backbone, prefix, examples))
    wanted = torch.autograd.grad(exact.mean(), prefix.tensors())
    backbone.model.to(torch.bfloat16)
    losses = batch_loss(backbone, prefix, pack(examples))
    assert losses.dtype == torch.float32
    assert_same(losses, exact, tolerance=0.05)
    assert_same(torch.autograd.grad(losses.mean(), prefix.tensors()), wanted, tolerance=0.2)


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 150])
def test_token_losses_are_cross_entropy(rows: int, dtype: torch.dtype, assert_same: Any):
    generator = torch.Generator().manual_seed(rows)
    logits = (torch.randn(rows, 50, generator=generator) * 8).to(dtype).requires_grad_()
    labels = torch.randint(0, 50, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator)
    expected = F.cross_entropy(logits.float(), labels, reduction="none")
    losses = token_losses(logits, labels)
    assert losses.dtype == torch.float32
    assert_same(losses, expected, tolerance=1e-6)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), logits)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), logits)
    assert gradient.dtype == dtype
    assert_same(gradient, wanted, tolerance=1e-6 if dtype == torch.float32 else 2**-7)


def test_the_loss_gradient_is_the_true_slope():
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([0, 6, 3, 3, 1])
    (gradient,) = torch.autograd.grad(token_losses(logits, labels).sum(), logits)
    probabilities = logits.detach().softmax(-1)
    assert torch.allclose(gradient, probabilities - F.one_hot(labels, 7), atol=1e-6)


# --- the plan of an epoch --------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    batch_size=st.integers(1, 20),
    targets_per_source=st.integers(1, 12),
    seed=st.one_of(st.none(), st.integers(0, 3)),
    epoch=st.integers(0, 3),
)
def test_an_epoch_yields_every_target_once(
    counts: list[int], batch_size: int, targets_per_source: int, seed: int | None, epoch: int
):
    examples = [
        TokenizedExample((source,), tuple((source, number) for number in range(count)))
        for source, count in enumerate(counts)
    ]

    def plan() -> list[list[TokenizedExample]]:
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

    def order(seed: int | None, epoch: int) -> list[list[TokenizedExample]]:
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
