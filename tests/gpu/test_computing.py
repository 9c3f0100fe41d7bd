"""On a device a model computes what attention by hand does, alone and packed; its training follows the CPU's."""

import pytest
import torch

from equivalence.test_handwritten import Weights, gpt2, llama
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import collate
from prefixtune.data.encoding import TokenizedExample
from prefixtune.training.train import train

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Relative to the largest number. bfloat16 has 8 bits, and rounds after every operation."""


@pytest.fixture
def examples(random_ids):
    """Sources of one target and of several."""
    shapes = [(7, (3, 6, 1)), (1, (4,)), (12, (5, 2))]
    return [
        TokenizedExample(tuple(random_ids(n, seed=n)), tuple(tuple(random_ids(m, seed=9 * n + m)) for m in targets))
        for n, targets in shapes
    ]


@pytest.mark.parametrize(("family", "by_hand"), [("llama", llama), ("gpt2", gpt2)])
def test_a_prefix_is_attention_by_hand(family, by_hand, device, dtype, placed, random_prefix, random_ids):
    backbone = placed(family, device, dtype)
    prefix = random_prefix(backbone, 5).detach()
    ids = torch.tensor(random_ids(9))
    rounded = prefix.to(getattr(torch, dtype)).to(torch.float32)
    expected = by_hand(Weights(backbone.model), ids, ids[:0], rounded, (0, 0))
    found = backbone.forward(ids[None].to(device), prefixes=prefix.to(device=device)).logits[0].float().cpu()
    assert float((found - expected).abs().max()) <= TOLERANCE[dtype] * float(expected.abs().max())


# Four heads of 16 numbers, and of 8, for which torch compiles no flex_attention.
@pytest.mark.parametrize("hidden_size", [64, 32])
def test_a_packed_row_is_each_pair_alone(hidden_size, device, dtype, placed, random_prefix, examples):
    backbone = placed("llama", device, dtype, hidden_size=hidden_size)
    prefix = random_prefix(backbone, 5).to(device=device).leaves()
    together = batch_loss(backbone, prefix, collate(backbone, examples)).float()
    pairs = [TokenizedExample(example.prompt, (target,)) for example in examples for target in example.targets]
    alone = torch.cat([batch_loss(backbone, prefix, collate(backbone, [pair])).float() for pair in pairs])
    largest = float(alone.detach().abs().max())
    assert float((together - alone).detach().abs().max()) <= TOLERANCE[dtype] * largest
    gradients = [torch.autograd.grad(losses.sum(), prefix.tensors()) for losses in (together, alone)]
    for one, other in zip(*gradients, strict=True):
        assert float((one - other).norm()) <= 2 * TOLERANCE[dtype] * float(other.norm())


def test_training_follows_the_cpu(device, placed, tmp_path):
    rows = [{"source": f"the pub number {number}", "target": f"a pub, {number}"} for number in range(12)]
    losses = []
    for place in ("cpu", device):
        run = train(
            backbone=placed("llama", place, hidden_size=64),
            examples=rows,
            output=str(tmp_path / place / str(len(losses))),
            max_steps=8,
            prefix_length=4,
            batch_size=4,
            progress=False,
        )
        losses.append([event["loss"] for event in run.events if event["event"] == "step"])
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
def test_causal_text_has_no_dense_mask(placed, random_prefix):
    """The peak of memory grows with the text, not with its square: 2 x, not 4 x."""
    backbone = placed("llama", "cuda", "bfloat16", hidden_size=64, max_position_embeddings=65_536)
    prefix = random_prefix(backbone, 16).detach().to(device="cuda")

    def peak(length, work):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work(length)
        return torch.cuda.max_memory_allocated() - before

    def compute(length, given):
        return backbone.hidden_states(torch.ones(1, length, dtype=torch.long, device="cuda"), prefixes=given)

    def read(length):
        with torch.inference_mode():
            compute(length, prefix)

    def learn(length):
        compute(length, prefix.leaves()).sum().backward()

    for work in (read, learn):
        work(1024)
        assert peak(32_768, work) <= 2.5 * peak(16_384, work)
