"""Compiled attention over slots against torch's, and the texts of an engine with and without it."""

from __future__ import annotations

import copy
import errno
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_runs import ids
from prefixtune.attention.kernels import ScoreOptions
from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.attention import QuerySpan, SlotAttention
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import Engine
from prefixtune.engine.kv_cache import KVCache
from prefixtune.engine.native import AttentionKernel, load_kernel
from prefixtune.engine.native.kernel import SOURCE
from prefixtune.engine.request import Request, SamplingParams
from prefixtune.prefix.geometry import LayerShape
from prefixtune.utils.native.build import build, private_folder

KINDS = ("plain", "window", "softcap", "sinks", "bias", "all")


@pytest.fixture(scope="module")
def kernel() -> AttentionKernel:
    kernel = load_kernel(300.0)
    if kernel is None:
        pytest.skip("this machine compiles no attention")
    return kernel


def spans_of(draw: random.Random, num_slots: int) -> tuple[list[QuerySpan], list[QuerySpan]]:
    """Decodes by slot, then prefills, in any of the slots, with prefixes of several lengths."""
    slots = sorted(draw.sample(range(num_slots), draw.randint(1, num_slots)))
    cut = draw.randint(0, len(slots))
    decodes, prefills = [], []
    for slot in slots[:cut]:
        prefix = draw.choice([0, 1, 5, 70])
        decodes.append(QuerySpan(slot, prefix + draw.choice([0, 1, 30, 62, 63, 64, 140]), 1, prefix))
    for slot in slots[cut:]:
        prefix = draw.choice([0, 1, 5, 70])
        prefills.append(QuerySpan(slot, prefix + draw.choice([0, 0, 9, 100]), draw.choice([2, 3, 17, 64, 150]), prefix))
    return decodes, prefills


def random_case(
    seed: int, kind: str, dtype: torch.dtype
) -> tuple[KVCache, Any, tuple[torch.Tensor, ...], ScoreOptions, dict[int, torch.Tensor]]:
    draw, generator = random.Random(f"{seed} {kind}"), torch.Generator().manual_seed(seed)
    kv_heads, group = draw.choice([1, 2, 3]), draw.choice([1, 2, 3, 7, 70] if kind == "plain" else [1, 2, 3])
    key_dim, value_dim = draw.choice([(64, 64), (8, 8), (40, 24), (1, 5), (33, 80), (128, 128)])
    decodes, prefills = spans_of(draw, 6)
    cache = KVCache([LayerShape(kv_heads, key_dim, value_dim)], 6, 512, dtype, torch.device("cpu"))
    cache.reserve(400)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    # What no sequence has written must not be read.
    cache.keys[0].fill_(float("nan"))
    cache.values[0].fill_(float("nan"))
    for span in (*decodes, *prefills):
        cache.keys[0][span.slot, :, : span.start] = rand(kv_heads, span.start, key_dim).to(dtype)
        cache.values[0][span.slot, :, : span.start] = rand(kv_heads, span.start, value_dim).to(dtype)
    tokens = sum(span.count for span in (*decodes, *prefills))
    heads = kv_heads * group
    # As models make them: heads after tokens in memory; sometimes the other way round.
    row = [
        rand(1, tokens, h, d).transpose(1, 2) for h, d in ((heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim))
    ]
    if draw.random() < 0.3:
        row = [tensor.contiguous() for tensor in row]
    every = kind == "all"
    scores = ScoreOptions(
        key_dim**-0.5 * draw.choice([1, 3]),
        softcap=draw.choice([2.0, 30.0]) if kind == "softcap" or every else None,
        sinks=rand(heads) if kind == "sinks" or every else None,
        window=draw.choice([1, 4, 20, 90]) if kind == "window" or every else None,
    )
    bias = {0: rand(heads, draw.choice([3, 50, 500]))} if kind == "bias" or every else {}
    return cache, (decodes, prefills), tuple(tensor.to(dtype) for tensor in row), scores, bias


def attend(cache: KVCache, spans: Any, row: Any, scores: Any, bias: Any, kernel: Any) -> tuple[torch.Tensor, KVCache]:
    cache = copy.copy(cache)
    cache.keys, cache.values = [cache.keys[0].clone()], [cache.values[0].clone()]
    step = SlotAttention(cache, *spans, bias, kernel=kernel)
    return step.attend(("decoder", 0), *row, scores), cache


@pytest.mark.parametrize("kind", KINDS)
def test_any_step_in_float32_is_torch_s(kind: str, kernel: AttentionKernel):
    for seed in range(12):
        cache, spans, row, scores, bias = random_case(seed, kind, torch.float32)
        found, after = attend(cache, spans, row, scores, bias, kernel)
        # Torch's path multiplies weights of zero with what is unused: it must be finite there.
        for tensor in (cache.keys[0], cache.values[0]):
            tensor.nan_to_num_(0.0)
        expected, expected_after = attend(cache, spans, row, scores, bias, None)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        for left, right in zip(after.keys + after.values, expected_after.keys + expected_after.values, strict=True):
            assert torch.equal(left.nan_to_num(0.0), right)
        # The same again without writing.
        step = SlotAttention(after, *spans, bias, kernel=kernel)
        assert torch.equal(step.read(0, row[0], scores, scores.window), found)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_only_the_result_is_rounded(kind: str, kernel: AttentionKernel):
    for seed in range(100, 106):
        cache, spans, row, scores, bias = random_case(seed, kind, torch.bfloat16)
        found, _ = attend(cache, spans, row, scores, bias, kernel)
        wide = copy.copy(cache)
        wide.dtype = torch.float32
        wide.keys, wide.values = [cache.keys[0].float().nan_to_num(0.0)], [cache.values[0].float().nan_to_num(0.0)]
        expected, _ = attend(wide, spans, tuple(tensor.float() for tensor in row), scores, bias, None)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, atol=2e-5, rtol=2**-8)


def test_nan_of_a_sequence_stays_in_it(kernel: AttentionKernel):
    cache = KVCache([LayerShape(2, 16, 16)], 3, 256, torch.float32, torch.device("cpu"))
    cache.keys[0].normal_()
    cache.values[0].normal_()
    cache.keys[0][1, 0, 3] = float("nan")
    spans = [QuerySpan(slot, 20, 1, 0) for slot in range(3)]
    row = [torch.randn(1, heads, 3, 16) for heads in (4, 2, 2)]
    found = SlotAttention(cache, spans, (), kernel=kernel).attend(("decoder", 0), *row, ScoreOptions(0.25))
    assert found[0, 1, :2].isnan().all()
    assert found[0, [0, 2]].isfinite().all()
    assert found[0, 1, 2:].isfinite().all()


def test_any_number_of_threads_computes_the_same(kernel: AttentionKernel):
    case = random_case(3, "plain", torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(attend(*case, kernel)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_what_it_does_not_compute_is_left_to_torch(kernel: AttentionKernel):
    cache, _, row, scores, _ = random_case(0, "plain", torch.float32)
    keys, values, query = cache.keys[0], cache.values[0], row[0]
    assert kernel.supports(keys, values, query, scores)
    assert not kernel.supports(keys.half(), values.half(), query.half(), scores)
    assert not kernel.supports(keys, values, query.bfloat16(), scores)
    assert not kernel.supports(keys, values, query, replace(scores, kernel="eager"))


# --- the engine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2", "t5", "bart"])
def test_texts_are_those_of_torch(
    name: str, kernel: AttentionKernel, made: Callable[[str], Backbone], random_ids: Any, random_prefix: Any
):
    backbone = made(name)
    asked = [
        Request(
            tuple(random_ids(count, count)),
            random_prefix(backbone, length, length).detach() if length else None,
            SamplingParams(max_new_tokens=12, logprobs=0),
        )
        for length, count in ((0, 9), (3, 30), (6, 1), (6, 17))
    ]
    runs = []
    for native in (False, True):
        config = EngineConfig(num_slots=3, prefill_tokens=6, native_attention=native)
        runs.append([output[0] for output in Engine(backbone, config).run(asked)])
    for torch_output, output in zip(*runs, strict=True):
        assert ids(output) == ids(torch_output)
        assert output.finish_reason == torch_output.finish_reason != "error"
        for one, other in zip(output.tokens, torch_output.tokens, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


# --- compiling -------------------------------------------------------------------------------------------------------


def test_what_was_compiled_is_found_again(kernel: AttentionKernel, tmp_path: Path):
    path = build(SOURCE, tmp_path / "native")
    written = path.stat().st_mtime_ns
    assert (tmp_path / "native").stat().st_mode & 0o777 == 0o700
    assert build(SOURCE, tmp_path / "native") == path
    assert path.stat().st_mtime_ns == written
    assert AttentionKernel(path).supports(*[torch.zeros(1, 1, 1, 1)] * 3, ScoreOptions(1.0))


def test_where_the_cache_cannot_be_written_a_process_has_its_own(
    kernel: AttentionKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from prefixtune.utils.native import build as module

    def refuse(folder: Path) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    # Not by the folder's mode: root may write anywhere.
    monkeypatch.setattr(module, "private_folder", refuse)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    module._cache.cache_clear()
    try:
        path = build(SOURCE)
        assert path.parent.parent == tmp_path
        assert path.parent.stat().st_mode & 0o777 == 0o700
        AttentionKernel(path)
    finally:
        module._cache.cache_clear()


def test_a_folder_that_others_can_write_is_refused(tmp_path: Path):
    folder = tmp_path / "native"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(OSError, match="only its user can write"):
        private_folder(folder)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OSError, match="only its user can write"):
        private_folder(tmp_path / "link")


@pytest.mark.parametrize(
    ("compiler", "message"), [("no-such-compiler", "no C\\+\\+ compiler"), ("false", "failed: exit status 1")]
)
def test_without_a_working_compiler_there_is_a_reason(
    compiler: str, message: str, kernel: AttentionKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(OSError, match=message):
        build(SOURCE, tmp_path / "native")
