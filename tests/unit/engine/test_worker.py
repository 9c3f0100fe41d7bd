"""The engine in a thread of its own: news in order, deadlines, failures, slow callers, and an orderly end."""

import threading
import time

import pytest
import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import Engine
from prefixtune.engine.request import EngineFull, Request, SamplingParams
from prefixtune.engine.worker import EngineWorker
from prefixtune.errors import BackboneError, RequestError

PATIENCE = 20.0
LONG = SamplingParams(max_new_tokens=100, min_new_tokens=100)
SHORT = SamplingParams(max_new_tokens=4, min_new_tokens=4)


@pytest.fixture(scope="module")
def llama(tiny_backbone):
    return tiny_backbone("llama")


@pytest.fixture
def worker(llama):
    with EngineWorker(Engine(llama, EngineConfig(num_slots=4))) as made:
        yield made


class Ear:
    """Hears the news of one request, and knows when it has ended."""

    def __init__(self, texts=1):
        self.outputs = []
        self.open = texts
        self.ended = threading.Event()
        self.began = threading.Event()
        self.threads = set()

    def __call__(self, output):
        assert not self.ended.is_set(), "nothing is reported after the end"
        self.threads.add(threading.get_ident())
        self.outputs.append(output)
        self.began.set()
        if output.finish_reason is not None:
            self.open -= 1
            if not self.open:
                self.ended.set()

    def wait(self):
        assert self.ended.wait(PATIENCE)
        return self.outputs

    @property
    def reason(self):
        return self.wait()[-1].finish_reason


def tokens(outputs, index=0):
    return [token.id for output in outputs if output.index == index for token in output.tokens]


def wait_until(holds):
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


# --- news ------------------------------------------------------------------------------------------------------------


def test_news_is_what_the_engine_says_in_order(worker, llama, random_ids, random_prefix):
    prefix = random_prefix(llama, 3).detach()
    asked = [Request(tuple(random_ids(5, n)), prefix if n % 2 else None, SHORT, n=1 + n % 2) for n in range(12)]
    expected = Engine(llama).run([Request(r.prompt, r.prefix, r.sampling, n=r.n) for r in asked])
    ears = [Ear(request.n) for request in asked]
    for request, ear in zip(asked, ears, strict=True):
        worker.submit(request, ear)
    for request, ear, texts in zip(asked, ears, expected, strict=True):
        outputs = ear.wait()
        assert {output.request_id for output in outputs} == {request.id}
        for index, text in enumerate(texts):
            assert tokens(outputs, index) == [token.id for token in text.tokens]
            assert "".join(output.text for output in outputs if output.index == index) == text.text
        assert threading.get_ident() not in ear.threads
    assert worker.num_unfinished == 0


def test_what_the_engine_refuses_is_raised_at_once(worker, tiny_backbone, random_prefix):
    ear = Ear()
    with pytest.raises(RequestError):
        worker.submit(Request((10_000,), sampling=SHORT), ear)
    with pytest.raises(BackboneError):
        worker.submit(Request((1,), random_prefix(tiny_backbone("gpt2"), 2), SHORT), ear)
    first = Ear()
    worker.submit(Request((1,), sampling=LONG, id="same"), first)
    with pytest.raises(RequestError, match="same"):
        worker.submit(Request((1,), sampling=LONG, id="same"), ear)
    worker.cancel("same")
    assert first.reason == "cancelled"
    assert ear.outputs == []


def test_a_deadline_ends_what_runs_and_what_waits(llama):
    with EngineWorker(Engine(llama, EngineConfig(num_slots=1, max_length=160))) as worker:
        endless = SamplingParams(max_new_tokens=150, min_new_tokens=150)
        running, waiting, free, late = Ear(), Ear(), Ear(), Ear()
        worker.submit(Request((1,), sampling=endless), running, deadline=0.05)
        worker.submit(Request((1,), sampling=endless), waiting, deadline=0.02)
        worker.submit(Request((1,), sampling=SHORT), free, deadline=PATIENCE)
        worker.submit(Request((1,), sampling=SHORT), late, deadline=0.0)
        assert (running.reason, waiting.reason, late.reason) == ("timeout", "timeout", "timeout")
        assert free.reason == "length"
        assert running.outputs
        assert tokens(waiting.outputs) == tokens(late.outputs) == []


# --- callers ---------------------------------------------------------------------------------------------------------


def test_a_callback_that_raises_gets_no_more_outputs_and_harms_no_other(worker):
    received = []

    def bad(output):
        received.append(output)
        raise SystemExit("the caller is broken")

    good = Ear()
    worker.submit(Request((1,), sampling=LONG, id="bad"), bad)
    worker.submit(Request((2,), sampling=SHORT), good)
    assert good.reason == "length"
    wait_until(lambda: worker.num_unfinished == 0)
    assert len(received) == 1
    assert worker.healthy


# --- failures ---------------------------------------------------------------------------------------------------------


def test_an_engine_that_fails_ends_all_requests_and_takes_no_more(llama):
    with EngineWorker(Engine(llama, EngineConfig(num_slots=2))) as worker:
        told = threading.Event()
        worker.on_failure = told.set
        ears = [Ear(2) for _ in range(3)]
        step = worker.engine.step
        steps = 0

        def crash():
            nonlocal steps
            steps += 1
            if steps > 3:
                raise SystemExit("broken")
            return step()

        worker.engine.step = crash
        for number, ear in enumerate(ears):
            worker.submit(Request((1, number), sampling=LONG, n=2), ear)
        for ear in ears:
            ends = [output for output in ear.wait() if output.finish_reason]
            assert [(output.finish_reason, output.engine_crashed) for output in ends] == [("error", True)] * 2
            assert sorted(output.index for output in ends) == [0, 1]
        assert told.wait(PATIENCE)
        assert worker.failed
        assert not worker.healthy
        with pytest.raises(EngineFull):
            worker.submit(Request((1,), sampling=SHORT), Ear())
        with pytest.raises(EngineFull):
            worker.call(lambda backbone: backbone)


def test_a_model_that_fails_on_a_cpu_ends_the_running_texts_alone(llama, monkeypatch):
    with EngineWorker(Engine(llama, EngineConfig(num_slots=2))) as worker:
        forward, broken = worker.engine.runner.forward, threading.Event()

        def failing(scheduled):
            if broken.is_set():
                broken.clear()
                raise RuntimeError("broken")
            return forward(scheduled)

        monkeypatch.setattr(worker.engine.runner, "forward", failing)
        broken.set()
        ears = [Ear() for _ in range(3)]
        with worker._changed:
            for number, ear in enumerate(ears):
                worker.submit(Request((1, number), sampling=SHORT), ear)
        assert [ear.reason for ear in ears] == ["error", "error", "length"]
        assert not ears[0].outputs[-1].engine_crashed
        assert worker.healthy


@pytest.mark.parametrize(
    ("by_call", "kind", "survives"),
    [(False, RuntimeError, False), (True, RuntimeError, False), (False, torch.OutOfMemoryError, True)],
)
def test_what_fails_on_a_gpu_ends_the_engine_but_for_want_of_memory(
    by_call, kind, survives, tiny_models, tiny_tokenizer, monkeypatch
):
    backbone = Backbone.from_model(tiny_models("llama"), tiny_tokenizer, "tiny")
    with EngineWorker(Engine(backbone)) as worker:
        ended = threading.Event()
        worker.on_failure = ended.set

        def failing(_):
            raise kind("device-side assert")

        monkeypatch.setattr(worker.engine.runner, "forward", failing)
        monkeypatch.setattr(Backbone, "device", torch.device("cuda"))
        if by_call:
            with pytest.raises(kind):
                worker.call(failing).result(PATIENCE)
        else:
            ear = Ear()
            worker.submit(Request((1,), sampling=SHORT), ear)
            assert ear.reason == "error"
            assert ear.outputs[-1].engine_crashed == (not survives)
        assert ended.wait(0.5 if survives else PATIENCE) == worker.failed == (not survives)


# --- the end ---------------------------------------------------------------------------------------------------------


def test_closing_ends_everything_and_reports_it(llama):
    worker = EngineWorker(Engine(llama, EngineConfig(num_slots=2)))
    ears = [Ear() for _ in range(5)]
    for ear in ears:
        worker.submit(Request((1,), sampling=LONG), ear)
    assert ears[0].began.wait(PATIENCE)
    worker.close()
    assert [ear.reason for ear in ears] == ["cancelled"] * 5
    assert not worker._thread.is_alive()
    assert not worker.healthy
    worker.close()
    with pytest.raises(EngineFull):
        worker.submit(Request((1,), sampling=SHORT), Ear())


# --- the live view ---------------------------------------------------------------------------------------------------


def test_a_snapshot_shows_who_shares_the_batch(llama, random_prefix):
    with EngineWorker(Engine(llama, EngineConfig(num_slots=2))) as worker:
        prefix = random_prefix(llama, 3).detach()
        hold, go = threading.Event(), threading.Event()
        step = worker.engine.step
        count = 0

        def slow():
            nonlocal count
            count += 1
            if count == 6:
                hold.set()
                assert go.wait(PATIENCE)
            return step()

        worker.engine.step = slow
        ears = [Ear() for _ in range(4)]
        requests = [
            Request((1, 2, 3), prefix, LONG, tenant="one", prefix_name="e2e", id="a"),
            Request((1, 2), None, LONG, tenant="two", id="b"),
            Request((1,), prefix, SHORT, prefix_name="webnlg", id="c"),
            Request((1,), prefix, SHORT, prefix_name="webnlg", id="d"),
        ]
        # All before the first step, so that counts are certain.
        with worker._changed:
            for request, ear in zip(requests, ears, strict=True):
                worker.submit(request, ear)
        assert hold.wait(PATIENCE)
        now = worker.snapshot()
        shown = [(t.slot, t.request.id, t.new_tokens) for t in now.running]
        assert shown == [(0, "a", 5), (1, "b", 5)]
        assert (now.waiting, now.steps, now.tokens) == (2, 5, 10)
        assert now.texts == 10
        go.set()
        for ear in ears:
            ear.wait()
        now = worker.snapshot()
        assert (now.running, now.waiting, now.tokens) == ((), 0, 208)
        assert now.steps < now.texts <= 2 * now.steps
