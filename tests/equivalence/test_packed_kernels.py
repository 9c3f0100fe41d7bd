"""Attention of a packed row, in one call and group by group, against a brute force: outputs, gradients, and models.

Slow: one test compiles.
"""

import importlib.util
import random
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from patching import replace_everywhere
from prefixtune.attention.injection import Injection
from prefixtune.attention.kernels import ScoreOptions, causal_attention, eager_attention, flex_functions_on
from prefixtune.attention.packed import block_mask, compiles_on, packed_attention, uses_flex
from prefixtune.attention.packing import Group, Packing
from prefixtune.attention.registry import ATTENTIONS
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import collate

HEADS, KV_HEADS, DIM = 4, 2, 16
SITES = ("decoder", "cross", "encoder")


def make_packing(draw, site, num_prefixes):
    groups = []
    for _ in range(draw.randint(1, 5)):
        source = draw.choice([0, 1, 7, 30]) if site == "decoder" else 0
        targets = [draw.choice([1, 3, 17]) for _ in range(draw.randint(0 if source else 1, 4))]
        hidden = draw.choice([(), (), (0, 3)])
        groups.append(Group(groups[-1].stop if groups else 0, source, tuple(targets), hidden))
    index = tuple(draw.randrange(num_prefixes) for _ in groups) if num_prefixes > 1 else None
    sources = None if site == "decoder" else tuple(draw.choice([1, 5, 40]) for _ in groups)
    return Packing(tuple(groups), sources, index)


def brute_visibility(packing, site, lengths, window):
    """Which query of a row sees which key, as the groups' own descriptions say it."""
    owners = packing.prefix_index or (0,) * len(packing.groups)
    hides = site in (("decoder",) if packing.sources is None else ("encoder", "cross"))
    prefix_keys = [(number, place) for number, length in enumerate(lengths) for place in range(length)]

    def positions(of_keys):
        """Group, part and text position of each place."""
        if site == "encoder" or (site == "cross" and of_keys):
            return [
                (number, 0, place) for number, length in enumerate(packing.sources or ()) for place in range(length)
            ]
        return [
            (number, part, place + (group.source_length if part else 0))
            for number, group in enumerate(packing.groups)
            for part, length in enumerate((group.source_length, *group.target_lengths))
            for place in range(length)
        ]

    def sees_text(query, key):
        if query[0] != key[0] or site != "decoder":
            return query[0] == key[0]
        distance = query[2] - key[2]
        return key[1] in (0, query[1]) and distance >= 0 and (window is None or distance < window)

    return [
        [
            owners[query[0]] == number and not (hides and place in packing.groups[query[0]].hidden)
            for number, place in prefix_keys
        ]
        + [sees_text(query, key) for key in positions(True)]
        for query in positions(False)
    ]


class Case:
    """A row with random groups, prefixes and rules."""

    def __init__(self, seed, site):
        draw, self.generator = random.Random(f"{seed} {site}"), torch.Generator().manual_seed(seed)
        self.site = site
        lengths = draw.sample([4, 5, 10, 33], draw.choice([0, 1, 1, 3]))
        self.packing = make_packing(draw, site, len(lengths))
        queries, keys = (sum(counts) for counts in self.packing.sizes(site))
        bias = self.numbers(1, HEADS, queries, keys) if seed % 4 == 1 else None
        self.rules = {
            "window": draw.choice([None, 4, 20]) if site == "decoder" else None,
            "softcap": draw.choice([None, 2.0]),
            "position_bias": bias,
        }
        self.row = [self.numbers(1, heads, n, DIM) for heads, n in ((HEADS, queries), (KV_HEADS, keys))]
        self.row.append(self.numbers(1, KV_HEADS, keys, DIM))
        self.prefixes = [(self.numbers(1, KV_HEADS, n, DIM), self.numbers(1, KV_HEADS, n, DIM)) for n in lengths]

    def numbers(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def compute(self, kernel, row, prefixes):
        if kernel == "brute":
            return self.brute_force(row, prefixes, ScoreOptions(0.3, kernel="eager", **self.rules))
        scores = ScoreOptions(0.3, kernel=kernel, **self.rules)
        return packed_attention(self.packing, self.site, prefixes or [None], *row, scores)

    def brute_force(self, row, prefixes, scores):
        """All keys for all queries, hidden one by one."""
        key, value = (torch.cat([*(pair[n] for pair in prefixes), row[n + 1]], dim=2) for n in range(2))
        lengths = [pair[0].shape[2] for pair in prefixes]
        mask = torch.tensor(brute_visibility(self.packing, self.site, lengths, scores.window))
        if scores.position_bias is not None:
            scores = replace(scores, position_bias=F.pad(scores.position_bias, (sum(lengths), 0)))
        return eager_attention(row[0], key, value, mask[None, None], scores).transpose(1, 2)

    def gradients(self, kernel):
        row = [tensor.clone().requires_grad_() for tensor in self.row]
        prefixes = [(key.clone().requires_grad_(), value.clone().requires_grad_()) for key, value in self.prefixes]
        out = self.compute(kernel, row, prefixes)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        inputs = [*row, *(tensor for pair in prefixes for tensor in pair)]
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs, materialize_grads=True)]


@pytest.fixture
def dense(monkeypatch):
    """What stands in for flex_attention on a GPU: the same functions of scores and masks, with gradients."""
    calls = []
    _, create = flex_functions_on("cpu")

    def attend(query, key, value, **options):
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

    replace_everywhere(monkeypatch, flex_functions_on, lambda device_type: (attend, create))
    # With gradients, too.
    replace_everywhere(monkeypatch, uses_flex, lambda scores, *inputs: scores.kernel == "flex")
    return calls


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_row_at_once_is_the_brute_force(seed, site, assert_same):
    case = Case(seed, site)
    with torch.no_grad():
        found = case.compute("flex", case.row, case.prefixes)
        assert_same(found, case.compute("brute", case.row, case.prefixes))


@pytest.mark.parametrize("kernel", ["flex", "eager", "sdpa"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_the_brute_force(seed, site, kernel, dense):
    case = Case(seed, site)
    found = case.gradients(kernel)
    assert len(dense) == (kernel == "flex")
    # Of a single key, the softmax has no gradient.
    for one, other in zip(found, case.gradients("brute"), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rows_of_any_length_are_not_compiled_again(monkeypatch):
    """As on a GPU, but that what torch makes of the functions is run as it is."""
    counters = [CompileCounter(), CompileCounter()]
    compiled = [
        torch.compile(function, dynamic=True, backend=counter)
        for function, counter in zip(flex_functions_on("cpu"), counters, strict=True)
    ]
    replace_everywhere(monkeypatch, flex_functions_on, lambda device_type: compiled)
    with torch.no_grad():
        for length in (200, 520, 300):
            prefix = torch.randn(1, KV_HEADS, 5 + length // 10, DIM)
            groups = (Group(0, length, (7, 9)), Group(length + 16, 3, (length,)))
            row = [torch.randn(1, heads, groups[-1].stop, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
            packed_attention(Packing(groups), "decoder", [(prefix, prefix)], *row, ScoreOptions(0.3, kernel="flex"))
    # Twice: a single block is a case of its own.
    assert max(counter.frame_count for counter in counters) <= 2


def test_on_an_accelerator_a_row_is_one_call_without_a_mask(monkeypatch):
    calls = []

    def attend(query, key, value, **options):
        calls.append({"keys": key.shape[2], **options})
        return query

    replace_everywhere(monkeypatch, flex_functions_on, lambda device_type: (attend, lambda *args, **kwargs: "blocks"))
    row = [torch.empty(1, heads, 12, DIM, device="meta") for heads in (HEADS, KV_HEADS, KV_HEADS)]
    prefix = torch.empty(1, KV_HEADS, 5, DIM, device="meta")
    packing = Packing((Group(0, 2, (3,)), Group(5, 7, ())))
    packed_attention(packing, "decoder", [(prefix, prefix)], *row, ScoreOptions(0.3))
    (call,) = calls
    assert call["keys"] == 12 + 5
    assert call["block_mask"] == "blocks"
    assert call["score_mod"] is None


def test_on_an_accelerator_causal_text_behind_a_prefix_has_no_mask():
    query, key = (torch.empty(2, heads, 12, DIM, device="meta") for heads in (HEADS, KV_HEADS))
    prefix, module = torch.empty(1, KV_HEADS, 5, DIM, device="meta"), nn.Linear(1, 1)
    injection = Injection({module: ("decoder", 0)}, {"decoder": [(prefix, prefix)]})
    keys, _, mask, _ = injection.prepend(module, query, key, key, None, ScoreOptions(0.3))
    assert keys.shape[2] == 12 + 5
    assert mask is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_attention_behind_a_prefix_is_the_brute_force(dtype):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, length, DIM, generator=generator).to(dtype)
        for heads, length in ((HEADS, 9), (KV_HEADS, 14), (KV_HEADS, 14))
    )
    mask = torch.tensor([[column <= row + 5 for column in range(14)] for row in range(9)])[None, None]
    expected = eager_attention(query.float(), key.float(), value.float(), mask, ScoreOptions(0.3))
    found = causal_attention(query, key, value, 0.3)
    assert torch.allclose(found.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("lacking", [None, "triton", "compiler", "capability"])
def test_where_torch_compiles_nothing_groups_are_used(lacking, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: (lacking != "triton" or None) if name == "triton" else find(name)
    )
    monkeypatch.setattr(shutil, "which", lambda name: None if lacking == "compiler" else name)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (6, 1) if lacking == "capability" else (7, 0)
    )
    assert compiles_on.__wrapped__(torch.device("cuda")) is (lacking is None)


def test_blocks_that_nobody_sees_are_left_out():
    groups = tuple(Group(256 * index, 100, (100, 56)) for index in range(4))
    packing, device = Packing(groups), torch.device("cpu")
    mask = block_mask(packing, "decoder", [128], None, device)
    # Of 8 x 9 blocks: the prefix, one's own, and the one before it in the same group.
    assert int(mask.to_dense().sum()) == 8 + 8 + 4
    assert block_mask(packing, "decoder", [128], None, device) is mask


@pytest.mark.parametrize("name", ["llama", "gemma2", "bart", "t5"])
def test_a_model_learns_the_same(name, tiny_models, tiny_tokenizer, random_prefix, examples, dense, assert_same):
    losses = []
    kinds = ("sdpa", "flex")
    for attention in kinds:
        backbone = Backbone.from_model(tiny_models(name), tiny_tokenizer, name, attention="eager")
        backbone.model.set_attn_implementation(ATTENTIONS[attention])
        prefix = random_prefix(backbone, 5)
        batch = collate(backbone, examples)
        dense.clear()
        loss = batch_loss(backbone, prefix, batch)
        assert bool(dense) == (attention == "flex")
        losses.append([loss.detach(), *torch.autograd.grad(loss.mean(), prefix.tensors())])
    assert_same(*losses)
