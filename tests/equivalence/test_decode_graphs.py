"""Steps that are recorded and replayed against steps that are computed: the same texts, whatever comes and goes.

On a CPU, where `recorded_graph` stands in for CUDA's graphs.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_runs import ids
from prefixtune.backbone.backbone import Backbone
from prefixtune.engine import decode_graphs
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.decode_graphs import RefuseWaits
from prefixtune.engine.engine import Engine
from prefixtune.engine.request import Request, SamplingParams
from recorded_graph import record

Sizes = list[tuple[int, int]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Sizes:
    """Engines on this CPU replay their steps; which sizes were recorded, in order."""
    sizes: Sizes = []
    original = decode_graphs.DecodeGraphs._compute

    def capture(compute: Callable[[], Tensor], *where: Any) -> Callable[[], Tensor]:
        before = len(sizes)
        replay = record(compute, *where)
        # Once as a trial and once recorded.
        del sizes[before + 1 :]
        return replay

    def compute(graphs: Any, rows: int, length: int) -> Tensor:
        sizes.append((rows, length))
        return original(graphs, rows, length)

    monkeypatch.setattr(decode_graphs.DecodeGraphs, "_compute", compute)
    monkeypatch.setattr(decode_graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr("prefixtune.engine.model_runner.can_capture", lambda backbone: True)
    return sizes


def make_requests(backbone: Backbone, random_ids: Any, random_prefix: Any, count: int = 9) -> list[Request]:
    """Prompts of many lengths, a prefix each or none, texts of many lengths."""
    draw = random.Random(3)
    made = []
    for index in range(count):
        length = draw.choice([0, 3, 6, 11])
        made.append(
            Request(
                tuple(random_ids(draw.randrange(1, 30), index)),
                random_prefix(backbone, length, index).detach() if length else None,
                SamplingParams(max_new_tokens=draw.randrange(1, 14), logprobs=0),
                id=f"graph-{index}",
            )
        )
    return made


def run(backbone: Backbone, asked: list[Request], **options: Any) -> list[Any]:
    config = EngineConfig(native_attention=False, prefill_tokens=6, **options)
    return [output[0] for output in Engine(backbone, config).run(asked)]


def assert_same_texts(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert ids(one) == ids(other)
        assert one.text == other.text
        assert one.finish_reason == other.finish_reason != "error"
        for a, b in zip(one.tokens, other.tokens, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


@pytest.mark.parametrize("slots", [1, 3, 6])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2", "qwen3", "gpt_oss"])
def test_texts_that_come_and_go_are_those_of_computed_steps(
    name: str, slots: int, recorded: Sizes, made: Any, random_ids: Any, random_prefix: Any
):
    backbone = made(name)
    asked = make_requests(backbone, random_ids, random_prefix)
    expected = run(backbone, asked, num_slots=slots)
    assert not recorded
    found = run(backbone, asked, num_slots=slots, cuda_graphs=True)
    assert_same_texts(found, expected)
    assert len(recorded) == len(set(recorded)) > 0
    assert {rows for rows, _ in recorded} <= {1, 2, 4, min(slots, 8)}


def test_slots_that_grow_are_recorded_anew(
    recorded: Sizes, made: Any, random_ids: Any, random_prefix: Any, monkeypatch: pytest.MonkeyPatch
):
    for module in ("kv_cache", "decode_graphs"):
        monkeypatch.setattr(f"prefixtune.engine.{module}.INITIAL_CAPACITY", 8)
    backbone = made("llama")
    asked = make_requests(backbone, random_ids, random_prefix)
    expected = run(backbone, asked, num_slots=3)
    assert_same_texts(run(backbone, asked, num_slots=3, cuda_graphs=True), expected)
    assert len({length for _, length in recorded}) > 1


def test_few_graphs_are_kept(
    recorded: Sizes, made: Any, random_ids: Any, random_prefix: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decode_graphs, "_MOST_GRAPHS", 1)
    monkeypatch.setattr(decode_graphs, "INITIAL_CAPACITY", 8)
    backbone = made("llama")
    asked = make_requests(backbone, random_ids, random_prefix)
    engine = Engine(backbone, EngineConfig(native_attention=False, num_slots=4, cuda_graphs=True))
    found = [output[0] for output in engine.run(asked)]
    assert engine.runner._graphs is not None
    assert len(engine.runner._graphs._graphs) == 1
    assert_same_texts(found, run(backbone, asked, num_slots=4))
    # Some size came again.
    assert len(recorded) > len(set(recorded))


def test_other_slots_keep_what_they_hold(recorded: Sizes, made: Any, random_ids: Any, random_prefix: Any):
    """Rows without a token write to the idle slot alone, also where a slot waits for its prompt's turn."""
    backbone = made("llama")
    engine = Engine(backbone, EngineConfig(native_attention=False, num_slots=4, cuda_graphs=True))
    texts = make_requests(backbone, random_ids, random_prefix, 4)
    for request in texts:
        engine.add(Request(request.prompt, request.prefix, SamplingParams(max_new_tokens=30), id=request.id))
    cache = engine.runner.kv_cache
    assert cache.num_slots == 5
    while any(sequence.num_uncomputed > 1 or sequence.slot < 0 for sequence in engine.scheduler.running) or (
        len(engine.scheduler.running) < 4
    ):
        engine.step()
    engine.cancel(texts[1].id)
    engine.step()
    assert recorded[-1][0] == 4
    assert all(not buffer[1].any() for buffer in (*cache.keys, *cache.values))
    before = [buffer[1:2].clone() for buffer in cache.keys]
    cache.keys[0][1] = torch.nan
    outputs = engine.step()
    assert all(not output.error for output in outputs)
    assert cache.keys[0][1].isnan().all()
    assert all(torch.equal(buffer[1:2], old) for buffer, old in list(zip(cache.keys, before, strict=True))[1:])


def test_steps_that_cannot_be_recorded_are_computed(
    recorded: Sizes,
    made: Any,
    random_ids: Any,
    random_prefix: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    original = decode_graphs.slot_mask

    def waits(positions: Tensor, *rest: Any) -> Tensor:
        assert positions.max().item() >= 0
        return original(positions, *rest)

    monkeypatch.setattr(decode_graphs, "slot_mask", waits)
    backbone = made("llama")
    asked = make_requests(backbone, random_ids, random_prefix)
    with caplog.at_level(logging.WARNING):
        found = run(backbone, asked, num_slots=3, cuda_graphs=True)
    assert_same_texts(found, run(backbone, asked, num_slots=3))
    told = [entry.getMessage() for entry in caplog.records if "CUDA graphs" in entry.getMessage()]
    assert len(told) == 1
    assert told[0].startswith(f"steps of {backbone.name} run without CUDA graphs: ")


def test_what_cannot_be_recorded_is_said_once(made: Any, caplog: pytest.LogCaptureFixture, random_ids: Any):
    for name in ("llama", "bart"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            engine = Engine(made(name), EngineConfig(num_slots=2, cuda_graphs=True, native_attention=False))
        assert "one CUDA device" in caplog.text
        assert engine.runner.kv_cache.num_slots == 2
        outputs = engine.run([Request(tuple(random_ids(4, 1)), None, SamplingParams(max_new_tokens=2))])
        assert not outputs[0][0].error


def test_the_stand_in_refuses_what_a_graph_refuses():
    def waits() -> Tensor:
        return torch.ones(2) * torch.arange(3).sum().item()

    def copies() -> Tensor:
        return torch.ones(2) * torch.tensor([1.0, 2.0])

    for compute in (waits, copies):
        with pytest.raises(RuntimeError, match="capturing"):
            record(compute, torch.device("cpu"), None)


def test_a_step_that_waits_is_not_recorded_at_all():
    def waits() -> Tensor:
        return torch.arange(3).nonzero()

    def goes_on() -> Tensor:
        return torch.arange(3).to(torch.float32) * 2

    with RefuseWaits():
        found = goes_on()
        with pytest.raises(RuntimeError, match=r"nonzero.* waits for the device"):
            waits()
    assert found.tolist() == [0, 2, 4]
