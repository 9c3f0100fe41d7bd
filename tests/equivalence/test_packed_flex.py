"""Attention of a packed row by flex_attention against group by group: outputs, gradients, and models."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from patching import replace_everywhere
from prefixtune.attention import kernels
from prefixtune.attention.kernels import AttentionKernel, ScoreOptions, flex_attention_on, packed_attention
from prefixtune.attention.packed_flex import packed_block_mask, packed_mask_mod
from prefixtune.attention.packing import Group, Packing
from prefixtune.attention.registry import ATTENTIONS
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import pack
from prefixtune.data.encoding import TokenizedExample
from prefixtune.prefix.geometry import Site

HEADS, KV_HEADS, DIM = 4, 2, 16
SITES: tuple[Site, ...] = ("decoder", "cross", "encoder")


def make_packing(draw: random.Random, site: Site, num_prefixes: int) -> Packing:
    groups: list[Group] = []
    for _ in range(draw.randint(1, 5)):
        source = draw.choice([0, 1, 7, 30]) if site == "decoder" else 0
        targets = [draw.choice([1, 3, 17]) for _ in range(draw.randint(0 if source else 1, 4))]
        hidden = draw.choice([(), (), (0, 3)])
        groups.append(Group(groups[-1].stop if groups else 0, source, tuple(targets), hidden))
    index = tuple(draw.randrange(num_prefixes) for _ in groups) if num_prefixes > 1 else None
    sources = None if site == "decoder" else tuple(draw.choice([1, 5, 40]) for _ in groups)
    return Packing(tuple(groups), sources, index)


class Case:
    """A row with random groups, prefixes and rules."""

    def __init__(self, seed: int, site: Site) -> None:
        draw, self.generator = random.Random(f"{seed} {site}"), torch.Generator().manual_seed(seed)
        self.site: Site = site
        lengths = draw.sample([4, 5, 10, 33], draw.choice([0, 1, 1, 3]))
        self.packing = make_packing(draw, site, len(lengths))
        queries, keys = (sum(counts) for counts in self.packing.sizes(site))
        bias = self.numbers(1, HEADS, queries, keys) if seed % 4 == 1 else None
        self.rules: dict[str, Any] = {
            "window": draw.choice([None, 4, 20]) if site == "decoder" else None,
            "softcap": draw.choice([None, 2.0]),
            "position_bias": bias,
        }
        self.row = [self.numbers(1, heads, n, DIM) for heads, n in ((HEADS, queries), (KV_HEADS, keys))]
        self.row.append(self.numbers(1, KV_HEADS, keys, DIM))
        self.prefixes = [(self.numbers(1, KV_HEADS, n, DIM), self.numbers(1, KV_HEADS, n, DIM)) for n in lengths]

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def compute(self, kernel: Any, row: list[Tensor], prefixes: list[tuple[Tensor, Tensor]]) -> Tensor:
        owners = self.packing.prefix_index or (0,) * len(self.packing.groups)
        by_group: Any = [prefixes[owner] if prefixes else None for owner in owners]
        scores = ScoreOptions(0.3, kernel=kernel, **self.rules)
        return packed_attention(self.packing, self.site, by_group, *row, scores)

    def gradients(self, kernel: Any) -> list[Tensor]:
        row = [tensor.clone().requires_grad_() for tensor in self.row]
        prefixes = [(key.clone().requires_grad_(), value.clone().requires_grad_()) for key, value in self.prefixes]
        out = self.compute(kernel, row, prefixes)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        inputs = [*row, *(tensor for pair in prefixes for tensor in pair)]
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs, materialize_grads=True)]


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What stands in for flex_attention on a GPU: the same functions of scores and masks, with gradients."""
    calls: list[int] = []
    real = flex_attention_on("cpu")

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        # Without a block mask it is the model's own call, when it is loaded.
        if options.get("block_mask") is None:
            return real(query, key, value, **options)
        calls.append(1)
        block_mask, score_mod = options["block_mask"], options["score_mod"]
        heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
        key, value = (tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (key, value))
        scores = query @ key.transpose(2, 3) * options["scale"]
        places = torch.meshgrid(*map(torch.arange, (1, heads, queries, keys)), indexing="ij")
        if score_mod is not None:
            scores = score_mod(scores, *places)
        visible = block_mask.mask_mod(*places)
        # Blocks that are left out are those that nobody sees.
        blocks = F.interpolate(block_mask.to_dense().float(), scale_factor=128)[..., :queries, :keys].bool()
        assert not bool((visible & ~blocks).any())
        return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value

    replace_everywhere(monkeypatch, flex_attention_on, lambda device_type: attend)
    # With gradients, too.
    monkeypatch.setattr(kernels, "supports_flex", lambda scores, *inputs: scores.sinks is None)
    return calls


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("seed", [1])
def test_the_row_at_once_is_group_by_group(seed: int, site: Site, assert_same: Any):
    case = Case(seed, site)
    with torch.no_grad():
        found = case.compute("flex", case.row, case.prefixes)
        assert_same(found, case.compute("eager", case.row, case.prefixes))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("seed", range(6))
def test_gradients_are_those_of_group_by_group(seed: int, site: Site, dense: list[int]):
    case = Case(seed, site)
    found = case.gradients("flex")
    assert len(dense) == 1
    # Of a single key, the softmax has no gradient.
    for one, other in zip(found, case.gradients("eager"), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_each_position_sees_what_it_should():
    packing = Packing((Group(0, 2, (2, 1)), Group(5, 1, (2,), hidden=(0,))), prefix_index=(0, 1))
    sees = packed_mask_mod(packing, "decoder", (1, 2), (0, 1), 3, torch.device("cpu"))
    zero = torch.tensor(0)
    found = [
        "".join(".x"[bool(sees(zero, zero, torch.tensor(q), torch.tensor(k)))] for k in range(11)) for q in range(8)
    ]
    assert found == [
        "x..x.......",
        "x..xx......",
        "x..xxx.....",
        "x...xxx....",
        "x..xx..x...",
        "..x.....x..",
        "..x.....xx.",
        "..x.....xxx",
    ]


def test_blocks_that_nobody_sees_are_left_out():
    groups = tuple(Group(256 * index, 100, (100, 56)) for index in range(4))
    packing, device = Packing(groups), torch.device("cpu")
    mask = packed_block_mask(packing, "decoder", (128,), (0,) * 4, None, device)
    # Of 8 x 9 blocks: the prefix, one's own, and the one before it in the same group.
    assert int(mask.to_dense().sum()) == 8 + 8 + 4
    assert packed_block_mask(packing, "decoder", (128,), (0,) * 4, None, device) is mask


@pytest.mark.parametrize("name", ["llama", "gemma2", "bart", "t5"])
def test_a_model_learns_the_same(
    name: str,
    tiny_models: Callable[..., Any],
    tiny_tokenizer: Any,
    random_prefix: Any,
    random_ids: Any,
    dense: list[int],
    assert_same: Any,
):
    losses = []
    kinds: tuple[AttentionKernel, ...] = ("eager", "flex")
    for attention in kinds:
        backbone = Backbone.from_model(tiny_models(name), tiny_tokenizer, name, attention="eager")
        backbone.model.set_attn_implementation(ATTENTIONS[attention])
        prefix = random_prefix(backbone, 5)
        batch = pack(
            [
                TokenizedExample(
                    tuple(random_ids(source, seed=source)),
                    tuple(tuple(random_ids(count, seed=100 * source + count)) for count in targets),
                )
                for source, targets in ((7, (3, 6, 1)), (1, (4,)), (12, (5, 2)))
            ],
            decoder_start_id=backbone.decoder_start_id if backbone.layout.kind == "encoder-decoder" else None,
        )
        dense.clear()
        loss = batch_loss(backbone, prefix, batch)
        assert bool(dense) == (attention == "flex")
        losses.append([loss.detach(), *torch.autograd.grad(loss.mean(), prefix.tensors())])
    assert_same(*losses)
