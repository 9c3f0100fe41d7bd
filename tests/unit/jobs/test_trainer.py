"""The trainer: jobs join and leave one running group, and each ends once, by itself."""

from __future__ import annotations

import errno
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from patching import replace_everywhere
from prefixtune.backbone.backbone import Backbone
from prefixtune.data import encoding, stored_tokens
from prefixtune.errors import PrefixError
from prefixtune.jobs import active, checkpoints, events, run_log, statuses, trainer
from prefixtune.jobs import turns as turns_module
from prefixtune.jobs.active import hold_folder
from prefixtune.jobs.attempts import MAX_ATTEMPTS, SUSPICIOUS_ATTEMPTS, count_attempt, num_attempts
from prefixtune.jobs.events import JobEvents, Progress
from prefixtune.jobs.executor import ClaimLostError, JobFailedError, JobPausedError
from prefixtune.jobs.folder import DataFolder
from prefixtune.jobs.job import Job, JobError, JobResult, JobStatus
from prefixtune.jobs.opening import open_job
from prefixtune.jobs.queue import QueueUnavailableError, Standing
from prefixtune.jobs.statuses import StatusWatch
from prefixtune.jobs.trainer import Trainer
from prefixtune.prefix.artifact import read_artifact
from prefixtune.prefix.folder import FolderBusyError
from prefixtune.training import group as group_module
from prefixtune.training.folder import EVENTS_FILE, PREFIX_FILE, STATE_FILE, read_events
from prefixtune.training.loop import TrainLoop, forward_backward
from prefixtune.training.runs import Run
from small_document import DOCUMENT
from small_document import ROWS as QUESTIONS
from training_jobs import ROWS, make_job, wait_until

LONG = {"max_steps": 100_000}
"""Steps of a job that does not end by itself."""


class Service:
    """A trainer in a thread, what it hears of the database, and what it publishes."""

    def __init__(self, data: DataFolder, backbone: Any, **options: Any) -> None:
        self.data, self.stop = data, threading.Event()
        self.says: dict[str, JobStatus | None] = {}
        self.is_away = False
        self._tokens: dict[str, str] = {}
        self.published: list[str] = []
        self.unpublished: list[str] = []
        self.on_publish: Callable[[Job], object] = lambda job: None
        self._watch = StatusWatch(self._ask)
        self.trainer = Trainer(
            data,
            load=lambda: backbone,
            publish=self._publish,
            unpublish=lambda job: self.unpublished.append(job.name),
            statuses=self._watch,
            **{"capacity": 8, **options},
        )
        self._thread = threading.Thread(target=self.trainer.work, args=(self.stop,))
        self._watch.start()
        self._thread.start()

    def end(self) -> None:
        self.stop.set()
        self._thread.join(30)
        self._watch.stop()

    def submit(self, job: Job) -> Future[JobResult]:
        """Claim a job, as a thread of an executor does."""
        future: Future[JobResult] = Future()
        token = self._tokens[job.id] = secrets.token_hex(4)

        def wait() -> None:
            try:
                future.set_result(self.trainer.submit(job, token))
            except (JobFailedError, JobPausedError, ClaimLostError) as error:
                future.set_exception(error)

        threading.Thread(target=wait, daemon=True).start()
        return future

    def announce(self, job: Job, status: JobStatus) -> None:
        """Say where a job stands; called by the trainer's thread, it is known before the next step."""
        self.says[job.id] = status
        wait_until(lambda: self._watch.latest.status(job.id) == status, 20)

    def step(self, job: Job) -> int:
        progress = JobEvents(self.data.job(job.id)).progress()
        return (progress or Progress(step=0, total_steps=0)).step

    def _ask(self, job_ids: Sequence[str]) -> dict[str, Standing]:
        if self.is_away:
            raise QueueUnavailableError("the database of jobs cannot be reached.")
        said = {job_id: self.says.get(job_id, "running") for job_id in job_ids}
        return {
            job_id: Standing(status, self._tokens[job_id] if status == "running" else "")
            for job_id, status in said.items()
            if status is not None
        }

    def _publish(self, job: Job, run: Path, backbone: Any) -> JobResult:
        read_artifact(run / PREFIX_FILE)
        self.published.append(job.name)
        self.on_publish(job)
        steps = [event["step"] for event in read_events(run / "events.jsonl") if event["event"] == "step"]
        assert steps == list(range(1, len(steps) + 1))
        return JobResult(name=job.name, trained_tokens=1, steps=len(steps))


@pytest.fixture(scope="module")
def backbone(tiny_backbone: Callable[..., Any]) -> Any:
    return tiny_backbone("llama", max_position_embeddings=512)


@pytest.fixture
def data(tmp_path: Path) -> DataFolder:
    return DataFolder(tmp_path / "data")


@pytest.fixture
def serve(data: DataFolder, backbone: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Service]]:
    """A factory of services that look for news all the time."""
    monkeypatch.setattr(statuses, "_POLLING_SECONDS", 0.02)
    monkeypatch.setattr(active, "_PROGRESS_SECONDS", 0.0)
    services: list[Service] = []

    def start(**options: Any) -> Service:
        services.append(Service(data, **{"backbone": backbone, **options}))
        return services[-1]

    yield start
    for service in services:
        service.end()


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[Job, int, Callable[[], object]], None]:
    """A function: what the trainer's thread does once a job has taken so many steps, before it takes another one."""
    own = active.ActiveJob.record
    planned: dict[str, tuple[int, Callable[[], object]]] = {}

    def record(self: Any, event: Any) -> None:
        own(self, event)
        if event["event"] == "step" and self.job.id in planned and event["step"] == planned[self.job.id][0]:
            planned.pop(self.job.id)[1]()

    monkeypatch.setattr(active.ActiveJob, "record", record)

    def plan(job: Job, step: int, act: Callable[[], object]) -> None:
        planned[job.id] = step, act

    return plan


def messages(data: DataFolder, job: Job) -> list[str]:
    return [event.message for event in JobEvents(data.job(job.id)).read().events]


def prefix_of(data: DataFolder, job: Job) -> bytes:
    return (data.job(job.id).run / PREFIX_FILE).read_bytes()


def failure(future: Future[JobResult]) -> Any:
    error = future.exception(30)
    assert isinstance(error, JobFailedError)
    return error.error


def is_paused(future: Future[JobResult]) -> bool:
    return isinstance(future.exception(30), JobPausedError)


def is_lost(future: Future[JobResult]) -> bool:
    return isinstance(future.exception(30), ClaimLostError)


# --- coming and ending ------------------------------------------------------------------------------------------------


def test_a_job_for_other_weights_fails_and_others_train(
    serve: Callable[..., Service], data: DataFolder, backbone: Any
) -> None:
    service = serve()
    other, same = make_job(data, "other", fingerprint="x:AAAA"), make_job(data, fingerprint=backbone.fingerprint)
    error = failure(service.submit(other))
    assert (error.code, error.param) == ("unsupported_model", "model")
    assert "other weights" in error.message
    assert service.submit(same).result(60).steps == 6


def test_jobs_train_together_and_are_published(serve: Callable[..., Service], data: DataFolder) -> None:
    service = serve()
    jobs = [make_job(data, "one", dev=ROWS[:2], config={"eval_every": 3}), make_job(data, "two", seed=1)]
    results = [future.result(60) for future in [service.submit(job) for job in jobs]]

    assert [(result.name, result.steps) for result in results] == [("one", 6), ("two", 6)]
    assert sorted(service.published) == ["one", "two"]
    told = JobEvents(data.job(jobs[0].id)).read().events
    assert [event.message.partition(":")[0] for event in told] == [
        "Training has started.",
        *(f"Step {step}/6" for step in (1, 2, 3, 3, 4, 5, 6, 6)),
        "The new model is served as 'one'.",
        "The job has succeeded.",
    ]
    losses = [event.data["valid_loss"] for event in told if "valid_loss" in event.data]
    assert len(losses) == 2
    assert [event.data["train_loss"] > 0 for event in told if "train_loss" in event.data] == [True] * 6
    progress = JobEvents(data.job(jobs[0].id)).progress()
    assert progress is not None
    assert (progress.step, progress.total_steps, progress.seconds_left) == (6, 6, 0)
    assert progress.trained_tokens > 0


def test_the_time_left_is_that_of_its_own_steps_and_unknown_where_nobody_trains(
    serve: Callable[..., Service], data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_job(data, "first", config=LONG), make_job(data, "second")
    write_progress = JobEvents.write_progress
    written: list[Progress] = []

    def open_slowly(job: Job, *parts: Any) -> Any:
        # As where a document is prepared, for which the others wait.
        time.sleep(2.0 if job == second else 0.0)
        return open_job(job, *parts)

    def note(events: JobEvents, progress: Progress) -> None:
        if progress.total_steps == LONG["max_steps"]:
            written.append(progress)
        write_progress(events, progress)

    monkeypatch.setattr("prefixtune.jobs.trainer.open_job", open_slowly)
    monkeypatch.setattr(JobEvents, "write_progress", note)
    service = serve()
    service.submit(first)
    wait_until(lambda: service.step(first) >= 20)
    written[1:20] = []
    service.submit(second).result(60)
    service.says[first.id] = "paused"
    wait_until(lambda: written[-1].seconds_left is None)
    started, *steps, left = written
    assert (started.step, started.seconds_left, started.loss) == (0, None, None)
    # By the clock, the first step after the wait took two seconds, so that each of the others seemed to take 0.4.
    assert max((one.seconds_left or 0.0) / (one.total_steps - one.step) for one in steps) < 0.3
    assert left.loss == steps[-1].loss


def test_a_document_is_prepared_and_trains_beside_others(serve: Callable[..., Service], data: DataFolder) -> None:
    service = serve()
    config = {"prefix_length": 4, "num_questions": 5, "answer_length": 3, "initialization": "text"}
    made = make_job(data, "made", document=DOCUMENT, rows=None, config=config)
    del config["num_questions"], config["answer_length"]
    given = make_job(data, "given", document=DOCUMENT, rows=QUESTIONS, config=config)
    for future in [service.submit(job) for job in (made, given, make_job(data, "plain"))]:
        assert future.result(60).steps == 6
    assert "Preparing questions: 0/5" in messages(data, made)


MADE = {"prefix_length": 4, "num_questions": 5, "answer_length": 3, "initialization": "text"}
"""Of a document whose questions and answers the model makes."""


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is prepared at each turn of the others, which come at each layer; each run has passes of its own."""
    monkeypatch.setattr(turns_module, "_SHORTEST", 0.0)
    monkeypatch.setattr(turns_module, "_LONGEST", 0.0)
    monkeypatch.setattr(group_module, "_positions_at_once", lambda backbone: 1)
    seen: list[str] = []
    own = Trainer._take_turn

    def take_turn(trainer: Any, stop: threading.Event) -> bool:
        if trainer._preparing is not None:
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            # A step that draws numbers would change those of the preparation.
            torch.rand(1)
            seen.append(trainer._preparing.job.name)
        return own(trainer, stop)

    monkeypatch.setattr(Trainer, "_take_turn", take_turn)
    return seen


def test_others_go_on_while_a_document_is_prepared_with_the_same_results(
    serve: Callable[..., Service], data: DataFolder, turns: list[str]
) -> None:
    def ask(kind: str, name: str) -> Job:
        if kind == "document":
            return make_job(data, name, document=DOCUMENT, rows=None, config=MADE)
        return make_job(data, name, config={"max_steps": 12}, seed=3)

    service, alone = serve(), {kind: ask(kind, f"{kind}-alone") for kind in ("document", "examples")}
    for job in alone.values():
        assert service.submit(job).result(60)
    turns.clear()

    running, document, later = ask("examples", "running"), ask("document", "document"), ask("examples", "later")
    futures = [service.submit(running)]
    wait_until(lambda: service.step(running) > 0)
    futures += [service.submit(document), service.submit(later)]
    for future in futures:
        future.result(60)
    assert "document" in turns
    # Both were trained and published before the document's first step.
    assert service.published[-3:] == ["running", "later", "document"]
    for job in (running, later):
        assert prefix_of(data, job) == prefix_of(data, alone["examples"])
    assert prefix_of(data, document) == prefix_of(data, alone["document"])
    for name in ("questions.jsonl", "teacher.safetensors"):
        made = [(data.job(job.id).run / name).read_bytes() for job in (document, alone["document"])]
        assert made[0] == made[1]


def test_one_document_is_prepared_at_a_time(serve: Callable[..., Service], data: DataFolder, turns: list[str]) -> None:
    service = serve()
    jobs = [make_job(data, name, document=DOCUMENT, rows=None, config=MADE) for name in ("first", "second")]
    for future in [service.submit(job) for job in jobs]:
        assert future.result(60).steps == 6
    order = list(dict.fromkeys(turns))
    assert len(order) == 2
    assert turns == sorted(turns, key=order.index)


@pytest.mark.parametrize("news", ["cancelled", "paused", "stop"])
def test_a_document_that_is_left_while_it_is_prepared(
    serve: Callable[..., Service], data: DataFolder, turns: list[str], news: Any
) -> None:
    service = serve()
    config = {**MADE, "num_questions": 2000, "answer_length": 64}
    long, document = (
        make_job(data, "long", config=LONG),
        make_job(data, "doc", document=DOCUMENT, rows=None, config=config),
    )
    service.submit(long)
    future = service.submit(document)
    wait_until(lambda: "doc" in turns)
    if news == "stop":
        service.end()
        assert not future.done()
    else:
        service.says[document.id] = news
        assert is_lost(future)
        before = service.step(long)
        wait_until(lambda: service.step(long) > before)
    assert num_attempts(data.job(document.id)) == 0


@pytest.mark.parametrize("where", ["memory", "files"])
@pytest.mark.parametrize("news", ["cancelled", "paused", "stop"])
def test_others_go_on_while_a_large_file_is_tokenized_which_can_be_left(
    serve: Callable[..., Service],
    data: DataFolder,
    turns: list[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    news: Any,
) -> None:
    """As large as it is, or with so many examples that they are tokenized in another thread."""
    monkeypatch.setattr(encoding, "_PART", 1)
    if where == "files":
        monkeypatch.setattr(stored_tokens, "FEW", 100)
        monkeypatch.setattr(stored_tokens, "_PART", 20)
    encode_targets = Backbone.encode_targets

    def slowly(backbone: Backbone, texts: Sequence[str]) -> list[list[int]]:
        time.sleep(0.01 if texts[0].endswith("large ") else 0.0)
        return encode_targets(backbone, texts)

    monkeypatch.setattr(Backbone, "encode_targets", slowly)
    rows = [{"prompt": f"n : {number}", "completion": " large"} for number in range(2000)]
    long, large = make_job(data, "long", config=LONG), make_job(data, "large", rows=rows)
    service = serve()
    service.submit(long)
    wait_until(lambda: service.step(long) > 0)
    future = service.submit(large)
    wait_until(lambda: "large" in turns)
    before = service.step(long)
    wait_until(lambda: service.step(long) > before)
    began = time.monotonic()
    if news == "stop":
        service.end()
        assert not future.done()
    else:
        service.says[large.id] = news
        assert is_lost(future)
    # All of it takes twenty seconds.
    assert time.monotonic() - began < 10
    assert num_attempts(data.job(large.id)) == 0


def test_more_jobs_than_there_is_room_for_wait(serve: Callable[..., Service], data: DataFolder) -> None:
    service = serve(capacity=1)
    jobs = [make_job(data, name) for name in ("one", "two", "three")]
    for future in [service.submit(job) for job in jobs]:
        future.result(60)
    assert sorted(service.published) == ["one", "three", "two"]


def test_jobs_of_a_model_whose_rows_cannot_be_packed_train_one_by_one(
    serve: Callable[..., Service], data: DataFolder, tiny_backbone: Callable[..., Any], at_step: Callable[..., None]
) -> None:
    service = serve(backbone=tiny_backbone("m2m_100"))
    first, second = (make_job(data, name, config={"max_steps": 40}) for name in ("first", "second"))
    seen: list[tuple[Job, Job, int]] = []

    def pause_the_first_to_run(running: Job, waits: Job) -> None:
        if not seen:
            seen.append((running, waits, service.step(waits)))
            service.announce(running, "paused")

    for jobs in ((first, second), (second, first)):
        at_step(jobs[0], 3, partial(pause_the_first_to_run, *jobs))
    futures = {job.id: service.submit(job) for job in (first, second)}
    wait_until(lambda: seen)
    running, waits, steps_of_other = seen[0]
    assert steps_of_other == 0
    assert is_lost(futures[running.id])
    assert service.step(running) == 3
    assert futures[waits.id].result(60).steps == 40
    service.says[running.id] = "running"
    assert service.submit(running).result(60).steps == 40


def test_one_that_comes_later_joins(serve: Callable[..., Service], data: DataFolder) -> None:
    service = serve()
    long = make_job(data, "long", config=LONG)
    waits = service.submit(long)
    wait_until(lambda: service.step(long) > 2)
    assert service.submit(make_job(data, "short")).result(60).steps == 6
    assert not waits.done()


def test_a_trainer_without_jobs_ends_after_a_while(data: DataFolder, backbone: Any) -> None:
    def load() -> Any:
        raise AssertionError("the backbone is loaded")

    none: Any = lambda *_: None  # noqa: E731
    idle = Trainer(data, load=load, publish=none, unpublish=none, statuses=StatusWatch(none), capacity=8)
    began = time.monotonic()
    idle.work(threading.Event(), idle_seconds=0.3)
    assert 0.3 <= time.monotonic() - began < 10


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_a_paused_job_goes_on_as_if_it_had_not_been(
    serve: Callable[..., Service], data: DataFolder, at_step: Callable[..., None]
) -> None:
    service = serve()
    config = {"max_steps": 60}
    whole = make_job(data, "whole", config=config)
    service.submit(whole).result(60)

    job = make_job(data, "paused", config=config)
    at_step(job, 3, lambda: service.announce(job, "paused"))
    assert is_lost(service.submit(job))
    assert service.published == ["whole"]
    assert service.step(job) == 3

    service.says[job.id] = "running"
    assert service.submit(job).result(60).steps == 60
    assert prefix_of(data, job) == prefix_of(data, whole)
    told = messages(data, job)
    assert "Training is paused at step 3/60." in told
    assert sum(text.startswith("Step ") for text in told) == 60


@pytest.mark.parametrize("status", ["cancelled", None])
def test_a_cancelled_or_deleted_job_is_not_published(
    serve: Callable[..., Service], data: DataFolder, status: JobStatus | None
) -> None:
    service = serve()
    job = make_job(data, config=LONG)
    future = service.submit(job)
    wait_until(lambda: service.step(job) > 2)
    service.says[job.id] = status
    assert is_lost(future)
    assert service.published == []
    # Others go on.
    service.submit(make_job(data, "other")).result(60)


def test_one_that_is_cancelled_before_it_begins(serve: Callable[..., Service], data: DataFolder) -> None:
    service = serve(capacity=1)
    first = make_job(data, "first", config=LONG)
    service.submit(first)
    wait_until(lambda: service.step(first) > 1)
    job = make_job(data, "waits")
    future = service.submit(job)
    service.says[job.id] = "cancelled"
    assert is_lost(future)
    assert not data.job(job.id).run.exists()


def test_what_is_cancelled_while_it_is_published_is_taken_back(serve: Callable[..., Service], data: DataFolder) -> None:
    service = serve()
    job = make_job(data)
    service.on_publish = lambda job: service.says.update({job.id: "cancelled"})
    service.submit(job).result(60)
    wait_until(lambda: service.unpublished == ["answers"])


def test_a_job_that_is_paused_and_resumed_unseen_is_the_last_claims(
    serve: Callable[..., Service], data: DataFolder
) -> None:
    service = serve()
    job = make_job(data, config=LONG)
    claims = [service.submit(job)]
    wait_until(lambda: service.step(job) > 1)
    for _ in range(20):
        claims.append(service.submit(job))
    # They would keep threads, and room of other jobs, until this one has ended.
    assert all(is_lost(claim) for claim in claims[:-1])
    reached = service.step(job)
    wait_until(lambda: service.step(job) > reached)
    assert not claims[-1].done()
    service.says[job.id] = "cancelled"
    assert is_lost(claims[-1])


def test_a_worker_that_ends_leaves_jobs_to_the_next_one(
    serve: Callable[..., Service], data: DataFolder, at_step: Callable[..., None]
) -> None:
    config = {"max_steps": 60}
    whole = make_job(data, "whole", config=config)
    job = make_job(data, "left", config=config)
    first = serve()
    first.submit(whole).result(60)
    at_step(job, 3, first.stop.set)
    future = first.submit(job)
    assert first.stop.wait(60)
    first.end()
    assert not future.done()
    assert first.step(job) == 3

    serve().submit(job).result(60)
    assert prefix_of(data, job) == prefix_of(data, whole)


def test_a_job_that_somebody_else_still_holds_waits(serve: Callable[..., Service], data: DataFolder) -> None:
    service = serve()
    job = make_job(data)
    with hold_folder(data.job(job.id)) as held:
        assert held
        future = service.submit(job)
        service.submit(make_job(data, "other")).result(60)
        assert not future.done()
    assert future.result(60).steps == 6


def test_training_goes_on_while_the_database_is_away(serve: Callable[..., Service], data: DataFolder) -> None:
    service = serve()
    service.is_away = True
    job = make_job(data)
    future = service.submit(job)
    wait_until(lambda: service.step(job) == 6)
    time.sleep(0.2)
    assert not future.done()
    # Whether somebody still wants the result is not known.
    assert service.published == []
    service.is_away = False
    assert future.result(60).steps == 6


# --- failing ----------------------------------------------------------------------------------------------------------


def test_a_job_with_bad_data_fails_beside_good_ones(serve: Callable[..., Service], data: DataFolder) -> None:
    service = serve()
    good, bad = make_job(data, "good"), make_job(data, "bad", rows=[{"nothing": "known"}])
    futures = [service.submit(job) for job in (bad, good)]
    told = failure(futures[0])
    assert (told.code, told.param) == ("invalid_training_file", "training_file")
    assert "train.jsonl, line 1" in told.message
    assert str(data.root) not in told.message
    assert messages(data, bad) == [f"The job has failed: {told.message}"]
    assert futures[1].result(60).steps == 6


def test_a_configuration_that_contradicts_itself(serve: Callable[..., Service], data: DataFolder) -> None:
    told = failure(serve().submit(make_job(data, config={"initialization": "prefix"})))
    assert told.code == "invalid_hyperparameters"


def test_a_loss_that_is_not_finite(
    serve: Callable[..., Service], data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = TrainLoop.apply

    def spoil(loop: TrainLoop, step: Any, stop: Any) -> Any:
        step.loss = float("nan") if loop.config.seed == 7 and loop.state.step == 2 else step.loss
        return apply(loop, step, stop)

    monkeypatch.setattr(TrainLoop, "apply", spoil)
    service = serve()
    good, bad = service.submit(make_job(data, "good")), service.submit(make_job(data, "bad", seed=7))
    told = failure(bad)
    assert told.code == "training_failed"
    assert told.message.startswith("the loss is nan")
    assert "learning_rate_multiplier" in told.message
    assert str(data.root) not in told.message
    assert good.result(60).steps == 6


def test_an_error_that_was_not_foreseen_is_in_the_log(
    serve: Callable[..., Service], data: DataFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    apply = TrainLoop.apply

    def fail(loop: TrainLoop, *arguments: Any) -> Any:
        if loop.config.seed == 7:
            raise ZeroDivisionError("a bug")
        return apply(loop, *arguments)

    monkeypatch.setattr(TrainLoop, "apply", fail)
    service = serve()
    futures = [service.submit(make_job(data, "bad", seed=7)), service.submit(make_job(data, "good"))]
    told = failure(futures[0])
    assert told.code == "internal_error"
    assert "a bug" not in told.message
    assert futures[1].result(60).steps == 6
    assert any(record.exc_info and "a bug" in str(record.exc_info[1]) for record in caplog.records)


def test_a_step_that_takes_too_much_memory(
    serve: Callable[..., Service], data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limited(backbone: Any, steps: Any) -> None:
        if sum(len(batch.labels) for step in steps for batch in step.batches) > 50:
            raise MemoryError
        forward_backward(backbone, steps)

    replace_everywhere(monkeypatch, forward_backward, limited)
    service = serve()
    large = make_job(data, "large", rows=[{"prompt": "n : a", "completion": " a" * 40}])
    futures = [service.submit(job) for job in (large, make_job(data, "small"), make_job(data, "other", seed=1))]
    told = failure(futures[0])
    assert (told.code, told.param) == ("out_of_memory", "hyperparameters.batch_size")
    assert [future.result(60).steps for future in futures[1:]] == [6, 6]


def full(*_: Any, **__: Any) -> None:
    raise PrefixError("cannot write.") from OSError(errno.ENOSPC, "full")


def test_a_disk_that_is_full_for_a_while_costs_nothing(
    serve: Callable[..., Service],
    data: DataFolder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    at_step: Callable[..., None],
) -> None:
    service, config = serve(), {"max_steps": 200, "eval_every": 10}
    reached, has_room = threading.Event(), threading.Event()

    def wait_for_room() -> None:
        reached.set()
        assert has_room.wait(20)

    whole, job = (make_job(data, name, dev=ROWS[:2], config=config) for name in ("whole", "job"))
    service.submit(whole).result(60)
    monkeypatch.setattr(active, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(active, "_SAVE_SHARE", 0)
    with monkeypatch.context() as patched:
        patched.setattr(run_log, "open", full, raising=False)
        patched.setattr(JobEvents, "add", full)
        patched.setattr(JobEvents, "write_progress", full)
        patched.setattr(checkpoints, "save_prefix", full)
        at_step(job, 21, wait_for_room)
        future = service.submit(job)
        assert reached.wait(60)
    has_room.set()
    assert future.result(60).steps == 200
    assert prefix_of(data, job) == prefix_of(data, whole)
    # The log has all events, in their order: the same as that of the other job.
    logs = [read_events(data.job(one.id).run / EVENTS_FILE) for one in (whole, job)]
    kinds = [[(event["event"], event.get("step")) for event in one if event["event"] != "save"] for one in logs]
    assert kinds[0] == kinds[1]
    # Not at each step.
    failing = [record.fields["what"] for record in caplog.records if record.message == "not_written"]
    assert set(failing) == {"checkpoint", "events", "log", "state"}
    assert len(failing) < 10


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_job_whose_run_cannot_be_written_is_paused_and_goes_on_later(
    serve: Callable[..., Service], data: DataFolder, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    record = Run.record

    def fail(run: Run, event: Any) -> Any:
        if run.loop.config.seed == 7 and event.get("step") == 20:
            raise PrefixError("cannot write 'events.jsonl'.") from OSError(number, "refused")
        return record(run, event)

    service, config = serve(), {"max_steps": 60}
    whole, job = (make_job(data, name, seed=7, config=config) for name in ("whole", "job"))
    service.submit(whole).result(60)
    with monkeypatch.context() as patched:
        patched.setattr(Run, "record", fail)
        futures = [service.submit(job), service.submit(make_job(data, "good"))]
        assert is_paused(futures[0])
        assert futures[1].result(60).steps == 6
    assert num_attempts(data.job(job.id)) == 0
    told = messages(data, job)[-1]
    assert told.startswith("The job is paused: ")
    assert "full" in told or number == errno.EIO
    assert service.submit(job).result(60).steps == 60
    assert prefix_of(data, job) == prefix_of(data, whole)


def test_the_reason_of_a_pause_is_told_once_it_can_be_written(
    serve: Callable[..., Service], data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, job = serve(), make_job(data)
    with monkeypatch.context() as patched:
        patched.setattr(Run, "record", full)
        patched.setattr(events, "append_line", full)
        assert is_paused(service.submit(job))
        assert messages(data, job) == []
    wait_until(lambda: messages(data, job))
    assert messages(data, job)[-1].startswith("The job is paused: ")


def test_a_broken_result_fails(serve: Callable[..., Service], data: DataFolder) -> None:
    service, job = serve(), make_job(data)

    def fail(job: Job) -> None:
        raise JobFailedError(JobError(code="invalid_prefix", message="the trained prefix cannot be served."))

    service.on_publish = fail
    assert failure(service.submit(job)).code == "invalid_prefix"


NAME_TAKEN = JobFailedError(JobError(code="name_taken", message="another model is served as 'answers' now."))


@pytest.mark.parametrize("problem", ["full", "name taken", "a bug"])
def test_a_result_that_cannot_be_published_is_kept(
    serve: Callable[..., Service], data: DataFolder, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    monkeypatch.setattr(trainer, "_PUBLISH_PAUSE", 0.05)
    monkeypatch.setattr(trainer, "_PUBLISH_SECONDS", 0.5)
    errors = {"name taken": NAME_TAKEN, "a bug": ZeroDivisionError("a bug")}
    service = serve()

    def fail(job: Job) -> None:
        if problem == "full":
            full()
        raise errors[problem]

    service.on_publish = fail
    job = make_job(data)
    assert is_paused(service.submit(job))
    # Only what may pass by itself is tried again by itself.
    assert (len(service.published) > 1) == (problem == "full")
    reason = {"full": "the disk", "name taken": "another model is served as 'answers' now", "a bug": "the new model"}
    assert messages(data, job)[-1].startswith(f"The job is paused: {reason[problem]}")
    trained = prefix_of(data, job)

    service.on_publish = lambda job: None
    assert service.submit(job).result(60).steps == 6
    assert prefix_of(data, job) == trained


@pytest.mark.parametrize(
    "problem",
    [FolderBusyError("others change the folder."), PrefixError("cannot write."), PrefixError("the lock is held.")],
    ids=["busy", "read-only", "lock"],
)
def test_a_result_that_cannot_be_published_now_is_published_later(
    serve: Callable[..., Service], data: DataFolder, monkeypatch: pytest.MonkeyPatch, problem: PrefixError
) -> None:
    monkeypatch.setattr(trainer, "_PUBLISH_PAUSE", 0.1)
    service, tries = serve(), list[str]()

    def fail(job: Job) -> None:
        if job.name != "answers":
            return
        tries.append(job.name)
        if len(tries) <= 2:
            raise problem from PermissionError(errno.EACCES, "not permitted")

    service.on_publish = fail
    job = make_job(data)
    future = service.submit(job)
    # Others go on meanwhile.
    assert service.submit(make_job(data, "other")).result(60).steps == 6
    assert future.result(60).steps == 6
    assert len(tries) == 3
    told = messages(data, job)
    assert [text for text in told if "cannot be stored now" in text] == [told[-3]]
    assert told[-1] == "The job has succeeded."


def test_a_result_that_waits_to_be_published_can_be_cancelled(serve: Callable[..., Service], data: DataFolder) -> None:
    service = serve()

    def fail(job: Job) -> None:
        raise FolderBusyError("others change the folder.")

    service.on_publish = fail
    job = make_job(data)
    future = service.submit(job)
    wait_until(lambda: service.published)
    assert not future.done()
    service.says[job.id] = "cancelled"
    assert is_lost(future)


def test_a_job_whose_files_are_gone(serve: Callable[..., Service], data: DataFolder) -> None:
    job = make_job(data)
    data.job(job.id).root.rename(data.root / "elsewhere")
    assert failure(serve().submit(job)).code == "files_gone"
    assert not data.job(job.id).root.exists()


def test_jobs_wait_for_a_data_folder_that_is_away(
    serve: Callable[..., Service],
    data: DataFolder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = make_job(data)
    data.root.rename(data.root.with_name("elsewhere"))
    monkeypatch.setattr(trainer, "_RETRY_SECONDS", 0.05)
    future = serve().submit(job)
    time.sleep(0.4)
    assert not future.done()
    assert [record.message for record in caplog.records].count("data_folder_away") == 1
    data.root.with_name("elsewhere").rename(data.root)
    assert future.result(60).steps == 6


def test_a_job_that_kills_its_worker_each_time_ends(serve: Callable[..., Service], data: DataFolder) -> None:
    service, job = serve(), make_job(data)
    for _ in range(MAX_ATTEMPTS):
        count_attempt(data.job(job.id))
    assert failure(service.submit(job)).code == "worker_died"
    # One that gets any further is counted anew.
    other = make_job(data, "other")
    for _ in range(MAX_ATTEMPTS - 1):
        count_attempt(data.job(other.id))
    assert service.submit(other).result(60).steps == 6
    count_attempt(data.job(other.id))


def test_a_job_that_may_kill_its_worker_waits_until_the_others_have_saved(
    serve: Callable[..., Service], data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(active, "_SAVE_SECONDS", 0.0)
    own = active.ActiveJob.record

    def record(self: Any, event: Any) -> None:
        order.append(f"{self.job.name} {event['event']}")
        own(self, event)

    monkeypatch.setattr(active.ActiveJob, "record", record)
    first, second = make_job(data, "first"), make_job(data, "second")
    for job in (first, second):
        for _ in range(SUSPICIOUS_ATTEMPTS):
            count_attempt(data.job(job.id))
    service = serve()
    for future in [service.submit(job) for job in (first, second)]:
        future.result(60)
    one, other = order[0].split()[0], ({"first", "second"} - {order[0].split()[0]}).pop()
    assert order.index(f"{one} step") < order.index(f"{other} start")
    assert num_attempts(data.job(first.id)) == 0


def test_the_state_of_a_job_that_succeeded_is_removed(serve: Callable[..., Service], data: DataFolder) -> None:
    service, job = serve(), make_job(data)
    service.submit(job).result(60)
    state = data.job(job.id).run / STATE_FILE
    assert state.exists()
    service.says[job.id] = "succeeded"
    wait_until(lambda: not state.exists())
