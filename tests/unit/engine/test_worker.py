"""The engine in a thread of its own: news in order, deadlines, failures, slow callers, and an orderly end."""

import threading
import time

import pytest
import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import TorchEngine
from prefixtune.engine.request import Request, SamplingParams

PATIENCE = 20.0
LONG = SamplingParams(max_new_tokens=100, min_new_tokens=100)
SHORT = SamplingParams(max_new_tokens=4, min_new_tokens=4)


@pytest.fixture
def worker(llama):
    with TorchEngine(llama, EngineConfig(num_slots=4)) as made:
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


def test_a_deadline_ends_what_runs_and_what_waits(llama):
    with TorchEngine(llama, EngineConfig(num_slots=1, max_length=160)) as worker:
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


@pytest.mark.parametrize(
    ("by_call", "kind", "survives"),
    [(False, RuntimeError, False), (True, RuntimeError, False), (False, torch.OutOfMemoryError, True)],
)
def test_what_fails_on_a_gpu_ends_the_engine_but_for_want_of_memory(
    by_call, kind, survives, tiny_models, tiny_tokenizer, monkeypatch
):
    backbone = Backbone.from_model(tiny_models("llama"), tiny_tokenizer, "tiny")
    with TorchEngine(backbone) as worker:
        ended = threading.Event()
        worker.on_failure = ended.set

        def failing(_):
            raise kind("device-side assert")

        # The thread runs already.
        worker.call(lambda _: None).result(PATIENCE)
        monkeypatch.setattr(worker.runner, "forward", failing)
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


def test_a_snapshot_counts_steps_texts_and_tokens(worker):
    ears = [Ear() for _ in range(6)]
    for ear in ears:
        worker.submit(Request((1,), sampling=SHORT), ear)
    assert [ear.reason for ear in ears] == ["length"] * 6
    wait_until(lambda: not worker.snapshot().running)
    now = worker.snapshot()
    assert (now.waiting, now.tokens, now.texts) == (0, 6 * 4, 6 * 4)
    assert 8 <= now.steps <= 6 * 4


def test_requests_that_are_submitted_together_are_in_the_first_step(llama, monkeypatch):
    """However long each takes to be checked: their texts are then the same every time, to the last bit."""
    check, counts = TorchEngine.check, []

    def slow(self, request):
        time.sleep(0.05)
        check(self, request)

    monkeypatch.setattr(TorchEngine, "check", slow)
    with TorchEngine(llama, EngineConfig(num_slots=4)) as engine:
        forward = engine.runner.forward
        monkeypatch.setattr(engine.runner, "forward", lambda work: counts.append(len(work)) or forward(work))
        ear = Ear(4)
        engine.submit_all([Request((number + 1,), sampling=SHORT) for number in range(4)], ear)
        ear.wait()
    assert counts[0] == 4
