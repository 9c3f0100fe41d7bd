"""Compiled attention of a packed row against torch's, group by group: outputs, all gradients, and trained prefixes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixtune.attention import kernels
from prefixtune.attention.forward import gradient_checkpointing
from prefixtune.attention.kernels import ScoreOptions, packed_attention
from prefixtune.attention.native import packed
from prefixtune.attention.packing import Group, Packing
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import pack
from prefixtune.data.encoding import TokenizedExample
from prefixtune.prefix.geometry import Site

HEADS = ((1, 4), (2, 7), (3, 1), (3, 3))
"""KV heads, and query heads of each."""
DIMS = ((16, 16), (24, 24), (64, 64), (80, 80), (128, 128), (5, 5), (40, 24))


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> packed.PackedKernel:
    kernel = packed.packed_kernel().result(150.0)
    if kernel is None:
        pytest.skip("this machine compiles no attention")
    monkeypatch.setattr(packed, "SMALLEST", 0)
    return kernel


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call a function while no attention is compiled."""

    def call(function: Any, *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "compiled_attention", lambda *_: None)
            return function(*args)

    return call


class Case:
    """A row with random groups, prefixes and numbers, in float64."""

    def __init__(self, seed: int, site: Site = "decoder", **sizes: Any) -> None:
        draw, self.generator = random.Random(f"{seed} {site}"), torch.Generator().manual_seed(seed)
        self.site: Site = site
        kv_heads, per_head = sizes.get("heads") or draw.choice(HEADS)
        key_dim, value_dim = sizes.get("dims") or draw.choice(DIMS)
        groups: list[Group] = []
        for _ in range(draw.randint(1, 5)):
            source = draw.choice([0, 1, 7, 30, 70])
            targets = [draw.choice([1, 3, 17, 40]) for _ in range(draw.randint(0 if source else 1, 4))]
            hidden = draw.choice([(), (), (0, 3)])
            groups.append(Group(groups[-1].stop if groups else 0, source, tuple(targets), hidden))
        num_prefixes = draw.choice([0, 1, 1, 3])
        index = tuple(draw.randrange(num_prefixes) for _ in groups) if num_prefixes > 1 else None
        sources = None if site == "decoder" else tuple(draw.choice([1, 5, 40]) for _ in groups)
        self.packing = Packing(tuple(groups), sources, index)
        self.infix = site == "decoder" and draw.random() < 0.3
        self.scores = ScoreOptions(0.3, window=draw.choice([None, None, 4, 20]) if site == "decoder" else None)
        queries, keys = (sum(counts) for counts in self.packing.sizes(site))
        self.row = [
            self.numbers(1, queries, kv_heads * per_head, key_dim).transpose(1, 2),
            self.numbers(1, keys, kv_heads, key_dim).transpose(1, 2),
            self.numbers(1, kv_heads, keys, value_dim),
        ]
        self.prefixes = [
            (self.numbers(1, kv_heads, length, key_dim), self.numbers(1, length, kv_heads, value_dim).transpose(1, 2))
            for length in draw.sample([1, 5, 10, 33], num_prefixes)
        ]
        self.gradient = self.numbers(1, queries, kv_heads * per_head, value_dim)

    def numbers(self, *shape: int) -> Tensor:
        # As bfloat16 holds them, so that both dtypes start from the same ones.
        drawn = torch.randn(shape, generator=self.generator)
        return drawn.to(torch.bfloat16).double()

    def compute(self, dtype: torch.dtype, prefix_dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """The output, and gradients of queries, keys, values and prefixes."""
        row = [tensor.to(dtype).requires_grad_() for tensor in self.row]
        prefixes = [tuple(tensor.to(prefix_dtype).requires_grad_() for tensor in pair) for pair in self.prefixes]
        owners = self.packing.prefix_index or (0,) * len(self.packing.groups)
        by_group: Any = [prefixes[owner] if prefixes else None for owner in owners]
        out = packed_attention(self.packing, self.site, by_group, *row, self.scores, self.infix)
        inputs = [*row, *(tensor for pair in prefixes for tensor in pair)]
        gradients = torch.autograd.grad(out, inputs, self.gradient.to(dtype), allow_unused=True)
        zeros = torch.zeros(())
        return [out.detach(), *(zeros if gradient is None else gradient for gradient in gradients)]


def distances(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """How far each tensor is, in units of what is exact."""
    return [float((a - b).norm() / b.norm().clamp_min(3)) for a, b in zip(found, exact, strict=True)]


def exact(case: Case) -> list[Tensor]:
    return case.compute(torch.float64, torch.float64)


@pytest.mark.parametrize("site", ["decoder", "cross", "encoder"])
@pytest.mark.parametrize("seed", range(10))
def test_it_computes_what_torch_does(seed: int, site: Site, plain: Any):
    case = Case(seed, site)
    expected = plain(exact, case)
    assert max(distances(case.compute(torch.float32), expected)) < 1e-5
    # Rounded to bfloat16: the nearest number is up to 2^-9 away.
    ours, torchs = (
        distances(found, expected) for found in (case.compute(torch.bfloat16), plain(case.compute, torch.bfloat16))
    )
    for one, other in zip(ours, torchs, strict=True):
        assert one < max(1.3 * other, 2**-9)


@pytest.mark.parametrize("dims", DIMS)
def test_heads_of_all_sizes(dims: tuple[int, int], plain: Any):
    case = Case(11, dims=dims, heads=(2, 3))
    assert max(distances(case.compute(torch.float32), plain(exact, case))) < 1e-5


def test_groups_of_more_than_a_tile(plain: Any):
    case = Case(3, dims=(24, 16), heads=(1, 3))
    case.packing = Packing((Group(0, 700, (90, 40)), Group(830, 0, (300,))))
    case.row = [case.numbers(1, heads, 1130, dim) for heads, dim in ((3, 24), (1, 24), (1, 16))]
    case.prefixes, case.gradient = (
        [(case.numbers(1, 1, 70, 24), case.numbers(1, 1, 70, 16))],
        case.numbers(1, 1130, 3, 16),
    )
    assert max(distances(case.compute(torch.float32), plain(exact, case))) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(dtype: torch.dtype):
    case, threads = Case(5, dims=(64, 64), heads=(3, 3)), torch.get_num_threads()
    case.packing = Packing(tuple(Group(200 * i, 120, (50, 30)) for i in range(4)))
    case.row = [case.numbers(1, heads, 800, 64) for heads in (9, 3, 3)]
    case.prefixes = [(case.numbers(1, 3, 40, 64), case.numbers(1, 3, 40, 64))]
    case.gradient = case.numbers(1, 800, 9, 64)
    try:
        torch.set_num_threads(1)
        first = case.compute(dtype)
        for count in (2, 3, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, first, case.compute(dtype)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_alone_has_the_numbers_of_one_among_others(dtype: torch.dtype):
    both, alone = Case(5, dims=(64, 64), heads=(3, 3)), Case(5, dims=(64, 64), heads=(3, 3))
    groups = Group(0, 30, (9, 20)), Group(59, 17, (40,))
    both.packing, alone.packing = Packing(groups, prefix_index=(0, 1)), Packing((Group(0, 17, (40,)),))
    both.row = [both.numbers(1, heads, 116, 64) for heads in (9, 3, 3)]
    both.prefixes = [(both.numbers(1, 3, length, 64), both.numbers(1, 3, length, 64)) for length in (7, 12)]
    both.gradient = both.numbers(1, 116, 9, 64)
    alone.row, alone.prefixes = [tensor[:, :, 59:] for tensor in both.row], both.prefixes[1:]
    alone.gradient, alone.scores, alone.infix = both.gradient[:, 59:], both.scores, both.infix
    out, *rows, _, _, key, value = both.compute(dtype)
    expected = [out[:, 59:], *(tensor[:, :, 59:] for tensor in rows), key, value]
    assert all(map(torch.equal, alone.compute(dtype), expected))


def test_what_it_does_not_compute_is_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    case = Case(2, dims=(8, 8), heads=(2, 2))
    row = [tensor.float() for tensor in case.row]
    groups: Any = [None] * len(case.packing.groups)

    def computed(scores: ScoreOptions, rows: list[Tensor], observe: Any = None) -> bool:
        calls: list[int] = []
        run = packed._BoundCall.run
        with monkeypatch.context() as patch:
            patch.setattr(packed._BoundCall, "run", lambda *args: (calls.append(1), run(*args)))
            packed_attention(case.packing, "decoder", groups, *rows, scores, False, observe)
        return bool(calls)

    assert computed(ScoreOptions(0.3), row)
    assert not computed(ScoreOptions(0.3), [tensor.double() for tensor in row])
    assert not computed(ScoreOptions(0.3), [tensor.half() for tensor in row])
    assert not computed(ScoreOptions(0.3, softcap=5.0), row)
    assert not computed(ScoreOptions(0.3, sinks=torch.zeros(4)), row)
    assert not computed(ScoreOptions(0.3, kernel="eager"), row)
    bias = torch.zeros(1, 4, row[0].shape[2], row[0].shape[2])
    assert not computed(ScoreOptions(0.3, position_bias=bias), row)
    assert not computed(ScoreOptions(0.3), row, lambda *_: None)
    monkeypatch.setattr(packed, "SMALLEST", 1000)
    assert not computed(ScoreOptions(0.3), row)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_changes_nothing(dtype: torch.dtype, kernel: packed.PackedKernel):
    case, default = Case(4), torch.get_default_dtype()
    expected = case.compute(torch.float32)
    torch.set_default_dtype(dtype)
    try:
        assert all(map(torch.equal, expected, case.compute(torch.float32)))
        assert kernel.computes()
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context: Any):
    case = Case(4)
    row, groups = [tensor.float() for tensor in case.row], [None] * len(case.packing.groups)
    expected = packed_attention(case.packing, "decoder", groups, *row, case.scores)
    with context():
        inside = [tensor.clone() for tensor in row]
        prefix = torch.ones(1, row[1].shape[1], 3, row[1].shape[3]), torch.ones(1, row[1].shape[1], 3, row[2].shape[3])
        assert torch.equal(packed_attention(case.packing, "decoder", groups, *inside, case.scores), expected)
    # With gradients, prefixes of inference mode are torch's business.
    row[1].requires_grad_()
    packed_attention(case.packing, "decoder", [prefix] * len(groups), *row, case.scores).sum().backward()
    assert row[1].grad is not None


def test_without_a_compiler_torch_computes_it(monkeypatch: pytest.MonkeyPatch, plain: Any):
    nothing: Future[None] = Future()
    monkeypatch.setattr(packed, "packed_kernel", lambda: nothing)
    monkeypatch.setattr(packed, "_SECONDS", 0.01)
    packed._kernel.cache_clear()
    try:
        case = Case(4)
        assert all(map(torch.equal, case.compute(torch.float32), plain(case.compute, torch.float32)))
    finally:
        packed._kernel.cache_clear()


def test_gradients_of_gradients_are_refused():
    case = Case(2, dims=(8, 8), heads=(2, 2))
    row = [tensor.float().requires_grad_() for tensor in case.row]
    groups: Any = [None] * len(case.packing.groups)
    out = packed_attention(case.packing, "decoder", groups, *row, case.scores)
    (gradient,) = torch.autograd.grad(out.square().sum(), row[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "bart"])
def test_a_model_learns_the_same(
    name: str,
    checkpointing: bool,
    tiny_backbone: Any,
    random_prefix: Any,
    random_ids: Any,
    plain: Any,
    assert_same: Any,
):
    backbone = tiny_backbone(name)
    prefix = random_prefix(backbone, 5)
    batch = pack(
        [
            TokenizedExample(
                tuple(random_ids(source, seed=source)),
                tuple(tuple(random_ids(count, seed=100 * source + count)) for count in targets),
            )
            for source, targets in ((7, (3, 6, 1)), (1, (4,)), (12, (5, 2)), (3, (9,)))
        ],
        decoder_start_id=backbone.decoder_start_id if backbone.layout.kind == "encoder-decoder" else None,
    )

    def learn() -> list[Tensor]:
        with gradient_checkpointing(backbone.model, checkpointing):
            losses = batch_loss(backbone, prefix, batch)
            return [losses.detach(), *torch.autograd.grad(losses.mean(), prefix.tensors())]

    assert_same(learn(), plain(learn))
