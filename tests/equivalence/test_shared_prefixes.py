"""A prefix that stands outside the slots, once for all that have it, against one that is copied into each slot."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_runs import alone, ids
from prefixtune.attention.kernels import ScoreOptions
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.native.norm import norm_kernel
from prefixtune.backbone.native.panels import panel_kernel
from prefixtune.engine.attention import SlotAttention
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import Engine
from prefixtune.engine.kv_cache import KVCache
from prefixtune.engine.model_runner import ModelRunner
from prefixtune.engine.native import AttentionKernel, load_kernel
from prefixtune.engine.native.decoder import decoder_kernel
from prefixtune.engine.request import Request, SamplingParams
from prefixtune.engine.shared_prefix import SharedPrefix
from prefixtune.engine.span import QuerySpan
from prefixtune.prefix.artifact import save_prefix
from prefixtune.prefix.compose import concatenate
from prefixtune.prefix.geometry import LayerShape
from prefixtune.prefix.prefix import Prefix
from prefixtune.server.models.store import PrefixStore
from zoo import make_model

KINDS = ("plain", "window", "softcap", "sinks", "bias", "all")
SLOTS = 32


@pytest.fixture(scope="module")
def kernel() -> AttentionKernel:
    kernel = load_kernel(300.0)
    if kernel is None:
        pytest.skip("this machine compiles no attention")
    return kernel


# --- attention -------------------------------------------------------------------------------------------------------


class Case:
    """A step of decodes and pieces of prompts, some with one of a few prefixes: in the slots, and outside."""

    def __init__(self, seed: int, kind: str, dtype: torch.dtype) -> None:
        draw, generator = random.Random(f"{seed} {kind}"), torch.Generator().manual_seed(seed)
        kv_heads, group = draw.choice([1, 2, 3]), draw.choice([1, 3, 4, 7, 70] if kind == "plain" else [1, 2, 3])
        key_dim, value_dim = draw.choice([(64, 64), (8, 8), (40, 24), (33, 80), (128, 128)])
        every = kind == "all"

        def rand(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        def pair(length: int) -> tuple[torch.Tensor, torch.Tensor]:
            return rand(kv_heads, length, key_dim).to(dtype), rand(kv_heads, length, value_dim).to(dtype)

        prefixes = [SharedPrefix([pair(length), pair(length)]) for length in draw.sample([1, 10, 63, 64, 65, 130], 3)]
        shapes = [LayerShape(kv_heads, key_dim, value_dim)] * 2
        # The second layer's is the step.
        caches = [KVCache(shapes, SLOTS, 512, dtype, torch.device("cpu")) for _ in range(2)]
        self.outside, self.inside = caches
        self.spans: tuple[list[QuerySpan], list[QuerySpan]] = ([], [])
        self.inside_spans: tuple[list[QuerySpan], list[QuerySpan]] = ([], [])
        slots = sorted(draw.sample(range(SLOTS), draw.choice([3, 12, SLOTS])))
        num_decodes = draw.randint(0, len(slots)) if draw.random() < 0.5 else len(slots)
        for cache in caches:
            cache.reserve(400)
            cache.keys[1].fill_(float("nan"))
            cache.values[1].fill_(float("nan"))
        for index, slot in enumerate(slots):
            shared = draw.choice([None, prefixes[0], prefixes[0], *prefixes])
            length = 0 if shared is None else shared.length
            text, count = draw.choice([0, 1, 40, 64, 90]), 1 if index < num_decodes else draw.choice([2, 17, 80])
            decodes = count > 1
            self.spans[decodes].append(QuerySpan(slot, length + text, count, length, shared))
            self.inside_spans[decodes].append(QuerySpan(slot, length + text, count, length))
            for buffers, inside, own in zip(
                ("keys", "values"), shared.layers[1] if shared else (None, None), pair(text), strict=True
            ):
                getattr(self.outside, buffers)[1][slot, :, :text] = own
                whole = own if inside is None else torch.cat([inside, own], 1)
                getattr(self.inside, buffers)[1][slot, :, : length + text] = whole
        tokens = sum(span.count for spans in self.spans for span in spans)
        heads = kv_heads * group
        sizes = ((heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim))
        self.row = [rand(1, tokens, h, d).transpose(1, 2).to(dtype) for h, d in sizes]
        self.scores = ScoreOptions(
            key_dim**-0.5 * 2,
            softcap=2.0 if kind == "softcap" or every else None,
            sinks=rand(heads) if kind == "sinks" or every else None,
            window=draw.choice([1, 4, 20, 90]) if kind == "window" or every else None,
        )
        self.bias = {1: rand(heads, draw.choice([3, 50, 500]))} if kind == "bias" or every else {}

    def attend(
        self, kernel: AttentionKernel | None, *, outside: bool, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, KVCache]:
        """The result, and the slots after it."""
        cache = copy.copy(self.outside if outside else self.inside)
        cache.dtype = dtype or cache.dtype
        for name in ("keys", "values"):
            buffers = [buffer.to(cache.dtype, copy=True) for buffer in getattr(cache, name)]
            # Torch's products take unused positions as well: they must be finite.
            setattr(cache, name, buffers if kernel else [buffer.nan_to_num_(0.0) for buffer in buffers])
        step = SlotAttention(cache, *(self.spans if outside else self.inside_spans), self.bias, kernel=kernel)
        row = [tensor.to(cache.dtype) for tensor in self.row]
        found = step.attend(("decoder", 1), *row, self.scores)
        assert torch.equal(step.read(1, row[0], self.scores, self.scores.window), found)
        return found, cache


@pytest.mark.parametrize("kind", KINDS)
def test_any_step_in_float32_is_that_of_copies_in_the_slots(kind: str, kernel: AttentionKernel):
    for seed in range(6):
        case = Case(seed, kind, torch.float32)
        expected, _ = case.attend(None, outside=False)
        results = {each: case.attend(each, outside=True) for each in (None, kernel)}
        for found, after in results.values():
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            for left, right in zip(
                after.keys + after.values, results[None][1].keys + results[None][1].values, strict=True
            ):
                assert torch.equal(left.nan_to_num(0.0), right)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_only_the_result_is_rounded(kind: str, kernel: AttentionKernel):
    for seed in range(50, 54):
        case = Case(seed, kind, torch.bfloat16)
        found, _ = case.attend(kernel, outside=True)
        expected, _ = case.attend(None, outside=False, dtype=torch.float32)
        torch.testing.assert_close(found.float(), expected, atol=2e-5, rtol=2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_s_result_does_not_depend_on_those_that_share_its_prefix(dtype: torch.dtype, kernel: AttentionKernel):
    before = torch.get_num_threads()
    for seed in range(10):
        case = Case(seed, "plain", dtype)
        found, cache = case.attend(kernel, outside=True)
        try:
            for threads in (2, 5):
                torch.set_num_threads(threads)
                assert torch.equal(case.attend(kernel, outside=True)[0], found)
        finally:
            torch.set_num_threads(before)
        first = 0
        for span in (*case.spans[0], *case.spans[1]):
            row = slice(first, first + span.count)
            one = SlotAttention(
                cache, [span] if span.count == 1 else [], [span] if span.count > 1 else [], kernel=kernel
            )
            assert torch.equal(one.read(1, case.row[0][:, :, row], case.scores, None), found[:, row])
            first = row.stop


def test_nan_of_a_prefix_stays_in_its_texts(kernel: AttentionKernel):
    pair = torch.randn(2, 70, 16), torch.randn(2, 70, 16)
    broken = pair[0].index_fill(1, torch.tensor([69]), float("nan")), pair[1]
    cache = KVCache([LayerShape(2, 16, 16)], 4, 256, torch.float32, torch.device("cpu"))
    prefixes = [SharedPrefix([layer]) for layer in (pair, broken)]
    spans = [QuerySpan(slot, 75, 1, 70, prefixes[slot % 2]) for slot in range(4)]
    row = [torch.randn(1, heads, 4, 16) for heads in (4, 2, 2)]
    found = SlotAttention(cache, spans, (), kernel=kernel).attend(("decoder", 0), *row, ScoreOptions(0.25))
    assert found[0, [1, 3]].isnan().all()
    assert found[0, [0, 2]].isfinite().all()


# --- the engine ------------------------------------------------------------------------------------------------------


@pytest.fixture
def any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short prefixes are shared as well."""
    monkeypatch.setattr("prefixtune.engine.shared_prefix.MIN_LENGTH", 1)


def asked(backbone: Backbone, random_ids: Any, random_prefix: Any, **rules: Any) -> list[Request]:
    """Requests with none, one of two long prefixes, one of a single position, and joined ones."""
    one, two, tiny = (random_prefix(backbone, length, length, 0.5).detach() for length in (70, 20, 1))
    try:
        joined = concatenate([two, tiny], backbone.rotation)
    except Exception:
        joined = two
    sampling = SamplingParams(**{"max_new_tokens": 10, **rules})
    prefixes = (one, one, None, two, one, tiny, joined, two)
    return [
        Request(tuple(random_ids(count, count)), prefix, sampling, n=3 if count == 9 else 1)
        for prefix, count in zip(prefixes, (9, 30, 7, 2, 1, 14, 5, 18), strict=True)
    ]


@pytest.mark.usefixtures("any_length")
@pytest.mark.parametrize("copies", ["none", "all", "at first"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma2", "gpt_oss", "t5", "bart"])
def test_texts_are_those_of_generate(
    name: str,
    copies: str,
    kernel: AttentionKernel,
    made: Callable[[str], Backbone],
    random_ids: Any,
    random_prefix: Any,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("prefixtune.engine.kv_cache.INITIAL_CAPACITY", 4)
    backbone = made(name)
    requests = asked(backbone, random_ids, random_prefix)
    engine = Engine(backbone, EngineConfig(num_slots=5, prefill_tokens=6))
    # Where matrix products are chosen instead of fused attention, torch computes it, with copies unless told otherwise.
    assert engine.runner.shares_prefixes == (name not in ("gemma2", "gpt_oss"))
    calls = iter(range(10_000))
    # The compiled code may become ready between two texts of one request.
    monkeypatch.setattr(
        ModelRunner, "shares_prefixes", property(lambda _: {"none": True, "all": False}.get(copies, next(calls) >= 2))
    )
    found = engine.run(requests)
    for request, outputs in zip(requests, found, strict=True):
        assert [ids(output) for output in outputs] == [alone(backbone, request)] * request.n
    caches = [engine.runner.kv_cache] + [cache.kv_cache for cache in [engine.runner.encoder_cache] if cache]
    assert not any(buffer.any() for cache in caches for buffer in (*cache.keys, *cache.values))


@pytest.mark.usefixtures("any_length")
def test_without_compiled_code_a_shared_prefix_is_read_as_well(
    kernel: AttentionKernel,
    made: Callable[[str], Backbone],
    random_ids: Any,
    random_prefix: Any,
    monkeypatch: pytest.MonkeyPatch,
):
    backbone = made("mistral")
    requests = asked(backbone, random_ids, random_prefix)
    expected = [[alone(backbone, request)] * request.n for request in requests]
    engine = Engine(backbone, EngineConfig(num_slots=5, prefill_tokens=6))
    monkeypatch.setattr(AttentionKernel, "supports", lambda *_: False)
    assert [[ids(output) for output in outputs] for outputs in engine.run(requests)] == expected


@pytest.mark.usefixtures("any_length")
def test_a_step_by_one_call_reads_shared_prefixes(
    kernel: AttentionKernel, tiny_tokenizer: Any, random_ids: Any, random_prefix: Any
):
    if panel_kernel(300.0) is None or decoder_kernel().result(300.0) is None or norm_kernel().result(300.0) is None:
        pytest.skip("this machine compiles no step")
    backbone = Backbone.from_model(make_model("llama", tiny_tokenizer).to(torch.bfloat16), tiny_tokenizer, "tiny")
    requests = asked(backbone, random_ids, random_prefix, min_new_tokens=10)
    engine = Engine(backbone, EngineConfig(num_slots=12))
    assert engine.runner._step is not None
    found = [[ids(output) for output in outputs] for outputs in engine.run(requests)]
    assert found == [[ids(output) for output in Engine(backbone).run([request])[0]] for request in requests]
    # Of the copies, keys and values are the same, and sums are rounded otherwise.
    for request, texts in zip(requests, found, strict=True):
        with torch.inference_mode():
            row = torch.tensor([[*request.prompt, *texts[0]]])
            logits = backbone.forward(row, prefixes=[request.prefix]).logits[0, len(request.prompt) - 1 : -1].float()
            logits[:, backbone.eos_id] = float("-inf")
        chosen = logits.gather(1, torch.tensor(texts[0])[:, None])[:, 0]
        assert (logits.amax(1) - chosen).max() <= 0.03 * float(logits.amax())


def test_memory_does_not_grow_with_the_texts_of_a_prefix(
    kernel: AttentionKernel,
    made: Callable[[str], Backbone],
    random_ids: Any,
    random_prefix: Any,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("prefixtune.engine.kv_cache.INITIAL_CAPACITY", 32)
    backbone = made("llama")
    prefix = random_prefix(backbone, 100, 1).detach()
    sizes = []
    for count in (1, 8):
        engine = Engine(backbone, EngineConfig(num_slots=8))
        for seed in range(count):
            engine.add(Request(tuple(random_ids(20, seed)), prefix, SamplingParams(max_new_tokens=30)))
        engine.step()
        assert engine.num_running == count
        cache = engine.runner.kv_cache
        assert cache.capacity == 32
        sizes.append((cache.num_bytes, cache.prefixes.num_bytes))
        (shared,) = {sequence.shared_prefix for sequence in engine.scheduler.running}
        assert shared is not None
        pairs = zip(shared.layers, prefix.layers["decoder"], strict=True)
        assert all(one.data_ptr() == other.data_ptr() for pair in pairs for one, other in zip(*pair, strict=True))
    assert sizes[0] == sizes[1]
    assert sizes[0][1] == prefix.num_bytes
    # A short one is copied.
    while engine.busy:
        engine.step()
    engine.run([Request(tuple(random_ids(2)), prefix[:63], SamplingParams(max_new_tokens=3))])
    assert cache.capacity > 63


@pytest.mark.usefixtures("any_length")
def test_a_converted_prefix_is_gone_with_its_last_text(
    kernel: AttentionKernel, made: Callable[[str], Backbone], random_ids: Any, random_prefix: Any
):
    backbone = made("llama")
    prefix = random_prefix(backbone, 30, 1).detach().to(torch.float64)
    engine = Engine(backbone)
    prefixes = engine.runner.kv_cache.prefixes
    for count in (3, 5):
        engine.add(
            Request(tuple(random_ids(4, count)), prefix, SamplingParams(max_new_tokens=count, min_new_tokens=count))
        )
    engine.step()
    assert prefixes.num_bytes == prefix.num_bytes // 2
    while engine.num_running:
        assert prefixes.num_bytes == prefix.num_bytes // 2
        engine.step()
    gc.collect()
    assert prefixes.num_bytes == 0


@pytest.mark.usefixtures("any_length")
def test_a_prefix_that_is_replaced_or_deleted_stays_with_its_running_texts(
    kernel: AttentionKernel, made: Callable[[str], Backbone], random_ids: Any, random_prefix: Any, tmp_path: Path
):
    backbone = made("llama")
    first, second = (random_prefix(backbone, 40, seed).detach() for seed in (1, 2))
    header = {"backbone": {"name": backbone.name, "fingerprint": backbone.fingerprint, "kind": backbone.kind}}
    path = tmp_path / "one.safetensors"
    prompt, few = tuple(random_ids(6)), SamplingParams(max_new_tokens=8)
    expected = [alone(backbone, Request(prompt, prefix, few)) for prefix in (first, second)]
    assert expected[0] != expected[1]
    save_prefix(path, Prefix(first.layers, header))
    store = PrefixStore(tmp_path, backbone)
    engine = Engine(backbone)
    found: dict[str, list[int]] = {}

    def start(name: str) -> None:
        engine.add(Request(prompt, store.get("one"), few, id=name))
        step()
        shared = engine.scheduler.running[-1].shared_prefix
        assert shared is not None
        # Read from the file once, in the slots' layout: nothing is copied again.
        assert shared.layers[0][0].data_ptr() == store.get("one").layers["decoder"][0][0].data_ptr()

    def step() -> None:
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(ids(output))

    start("before")
    save_prefix(path, Prefix(second.layers, header))
    store.reload()
    start("replaced")
    path.unlink()
    store.reload()
    assert "one" not in store
    gc.collect()
    while engine.busy:
        step()
    assert found == {"before": expected[0], "replaced": expected[1]}
