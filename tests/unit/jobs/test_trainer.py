"""The trainer: jobs come one after the other, and each ends once, by itself."""

from __future__ import annotations

import errno
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest

from prefixtune.errors import PrefixError
from prefixtune.jobs import active, trainer
from prefixtune.jobs.active import hold_folder
from prefixtune.jobs.events import JobEvents, Progress
from prefixtune.jobs.executor import ClaimLostError, JobFailedError, JobPausedError
from prefixtune.jobs.folder import DataFolder
from prefixtune.jobs.job import Job, JobResult, JobStatus
from prefixtune.jobs.queue import QueueUnavailableError, Standing
from prefixtune.jobs.trainer import MAX_ATTEMPTS, Trainer
from prefixtune.prefix.prefix import read_artifact
from prefixtune.training.folder import PREFIX_FILE, STATE_FILE, read_events
from prefixtune.training.loop import TrainLoop
from small_document import DOCUMENT
from small_document import ROWS as QUESTIONS
from training_jobs import ROWS, make_job, wait_until

LONG = {"max_steps": 100_000}
"""Steps of a job that does not end by itself."""


class Service:
    """A trainer in a thread, what it hears of the database, and what it publishes."""

    def __init__(self, data: DataFolder, backbone: Any) -> None:
        self.data, self.stop = data, threading.Event()
        self.says: dict[str, JobStatus | None] = {}
        self.is_away = False
        self.tokens: dict[str, str] = {}
        self.published: list[str] = []
        self.on_publish: Callable[[], object] = lambda: None
        self.trainer = Trainer(data, load=lambda: backbone, publish=self._publish, standing=self._standing)
        self._thread = threading.Thread(target=self.trainer.work, args=(self.stop,))
        self._thread.start()

    def end(self) -> None:
        self.stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def submit(self, job: Job) -> Future[JobResult]:
        """Claim a job, as a thread of an executor does."""
        future: Future[JobResult] = Future()
        token = self.tokens[job.id] = secrets.token_hex(4)

        def wait() -> None:
            try:
                future.set_result(self.trainer.submit(job, token))
            except (JobFailedError, JobPausedError, ClaimLostError) as error:
                future.set_exception(error)

        threading.Thread(target=wait, daemon=True).start()
        return future

    def step(self, job: Job) -> int:
        progress = JobEvents(self.data.job(job.id)).progress()
        return (progress or Progress(step=0, total_steps=0)).step

    def _standing(self, job_id: str) -> Standing | None:
        if self.is_away:
            raise QueueUnavailableError("the database of jobs cannot be reached.")
        status = self.says.get(job_id, "running")
        return None if status is None else Standing(status, self.tokens[job_id] if status == "running" else "")

    def _publish(self, job: Job, run: Path, backbone: Any) -> JobResult:
        self.on_publish()
        read_artifact(run / PREFIX_FILE)
        self.published.append(job.name)
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
def serve(data: DataFolder, backbone: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Service]]:
    """A factory of services that ask the database before each step."""
    for name in ("_ASK_SECONDS", "_AWAY_SECONDS", "_WAIT_SECONDS"):
        monkeypatch.setattr(trainer, name, 0.01 if name == "_WAIT_SECONDS" else 0.0)
    monkeypatch.setattr(active, "_PROGRESS_SECONDS", 0.0)
    services: list[Service] = []

    def start() -> Service:
        services.append(Service(data, backbone))
        return services[-1]

    yield start
    for service in services:
        service.end()


def messages(data: DataFolder, job: Job) -> list[str]:
    return [event.message for event in JobEvents(data.job(job.id)).read().events]


def prefix_of(data: DataFolder, job: Job) -> bytes:
    return (data.job(job.id).run / PREFIX_FILE).read_bytes()


def is_lost(future: Future[JobResult]) -> bool:
    return isinstance(future.exception(30), ClaimLostError)


def failure(future: Future[JobResult]) -> Any:
    error = future.exception(30)
    assert isinstance(error, JobFailedError)
    return error.error


# --- ending -----------------------------------------------------------------------------------------------------------


def test_jobs_train_one_after_the_other_and_one_that_fails_stops_no_other(
    serve: Callable[[], Service], data: DataFolder, backbone: Any
) -> None:
    service = serve()
    other = service.submit(make_job(data, "other", fingerprint="x:AAAA"))
    job = make_job(data, "one", dev=ROWS[:2], config={"eval_every": 3}, fingerprint=backbone.fingerprint)
    result = service.submit(job).result(60)
    error = failure(other)
    assert (error.code, error.param) == ("unsupported_model", "model")
    assert (result.name, result.steps, service.published) == ("one", 6, ["one"])
    told = JobEvents(data.job(job.id)).read().events
    assert [event.message.partition(":")[0] for event in told] == [
        "Training has started.",
        *(f"Step {step}/6" for step in (1, 2, 3, 3, 4, 5, 6, 6)),
        "The new model is served as 'one'.",
        "The job has succeeded.",
    ]
    assert len([event for event in told if "valid_loss" in event.data]) == 2
    assert [event.data["train_loss"] > 0 for event in told if "train_loss" in event.data] == [True] * 6
    progress = JobEvents(data.job(job.id)).progress()
    assert progress is not None
    assert (progress.step, progress.total_steps, progress.seconds_left) == (6, 6, 0)
    assert progress.trained_tokens > 0


def test_documents_are_prepared_and_trained(serve: Callable[[], Service], data: DataFolder) -> None:
    service = serve()
    config = {"prefix_length": 4, "num_questions": 5, "answer_length": 3, "initialization": "text"}
    made = make_job(data, "made", document=DOCUMENT, rows=None, config=config)
    del config["num_questions"], config["answer_length"]
    given = make_job(data, "given", document=DOCUMENT, rows=QUESTIONS, config=config)
    for job in (made, given):
        assert service.submit(job).result(60).steps == 6
    assert "Preparing questions: 0/5" in messages(data, made)


def test_an_error_that_was_not_foreseen_fails(
    serve: Callable[[], Service], data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("/secret/path")

    service, job = serve(), make_job(data)
    monkeypatch.setattr(TrainLoop, "apply", broken)
    error = failure(service.submit(job))
    assert error.code == "internal_error"
    assert "/secret" not in error.message
    assert messages(data, job)[-1].startswith("The job has failed")


def test_what_is_trained_is_kept_whatever_goes_wrong_at_its_end(serve: Callable[[], Service], data: DataFolder) -> None:
    service, job = serve(), make_job(data)
    service.on_publish = lambda: [][0]
    assert isinstance(service.submit(job).exception(30), JobPausedError)
    service.on_publish = lambda: None
    assert service.submit(job).result(60).steps == 6


# --- leaving ----------------------------------------------------------------------------------------------------------


def test_a_paused_job_goes_on_bit_for_bit_where_it_was(serve: Callable[[], Service], data: DataFolder) -> None:
    service, config = serve(), {"max_steps": 60}
    whole, paused = make_job(data, "whole", config=config), make_job(data, "paused", config=config)
    assert service.submit(whole).result(60)
    future = service.submit(paused)
    wait_until(lambda: service.step(paused) > 2)
    service.says[paused.id] = "paused"
    assert is_lost(future)
    reached = service.step(paused)
    assert 2 < reached < 60
    assert f"Training is paused at step {reached}/60." in messages(data, paused)
    with hold_folder(data.job(paused.id)) as held:
        assert held
    service.says[paused.id] = "running"
    assert service.submit(paused).result(60).steps == 60
    assert prefix_of(data, paused) == prefix_of(data, whole)


@pytest.mark.parametrize("status", ["cancelled", None])
def test_a_job_that_is_cancelled_or_deleted_is_left(
    status: JobStatus | None, serve: Callable[[], Service], data: DataFolder
) -> None:
    service, job = serve(), make_job(data, config=LONG)
    future = service.submit(job)
    wait_until(lambda: service.step(job) > 2)
    service.says[job.id] = status
    assert is_lost(future)
    assert service.submit(make_job(data, "next")).result(60)


def test_a_job_that_was_cancelled_before_its_turn_is_left_without_a_word(
    serve: Callable[[], Service], data: DataFolder
) -> None:
    service, job = serve(), make_job(data)
    shutil.rmtree(data.job(job.id).inputs)
    service.says[job.id] = "cancelled"
    assert is_lost(service.submit(job))
    assert messages(data, job) == []


def test_a_claim_that_another_one_followed_is_left(serve: Callable[[], Service], data: DataFolder) -> None:
    service, job = serve(), make_job(data, config={"max_steps": 300})
    first = service.submit(job)
    wait_until(lambda: service.step(job) > 2)
    # Paused and resumed before anybody here noticed.
    second = service.submit(job)
    assert is_lost(first)
    assert second.result(60).steps == 300


def test_what_is_cancelled_at_its_last_step_is_not_published(serve: Callable[[], Service], data: DataFolder) -> None:
    service, job = serve(), make_job(data, config={"max_steps": 300})
    future = service.submit(job)
    wait_until(lambda: service.step(job) > 2)
    # Nothing is heard before the end.
    service.is_away = True
    wait_until(lambda: service.step(job) == 300)
    assert not future.done()
    service.says[job.id] = "cancelled"
    service.is_away = False
    assert is_lost(future)
    assert service.published == []


def test_a_job_that_another_worker_still_holds_is_waited_for(serve: Callable[[], Service], data: DataFolder) -> None:
    service, job = serve(), make_job(data)
    with hold_folder(data.job(job.id)):
        future = service.submit(job)
        with pytest.raises(TimeoutError):
            future.result(0.3)
    assert future.result(60)


# --- what is in the way -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["save", "publish"])
def test_a_full_disk_pauses_and_what_is_trained_is_kept(
    place: str, serve: Callable[[], Service], data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    service, job = serve(), make_job(data)
    with monkeypatch.context() as patch:
        if place == "save":
            patch.setattr(TrainLoop, "save", full)
        service.on_publish = full
        assert isinstance(service.submit(job).exception(30), JobPausedError)
    assert "disk" in messages(data, job)[-1]
    service.on_publish = lambda: None
    assert service.submit(job).result(60).steps == 6


def test_a_worker_without_the_folder_of_jobs_ends_and_pauses_none(data: DataFolder) -> None:
    job, never = make_job(data), cast(Any, None)
    data.jobs.rename(data.root / "elsewhere")
    worker = Trainer(data, load=never, publish=never, standing=never)
    threading.Thread(target=worker.submit, args=(job, "1"), daemon=True).start()
    with pytest.raises(PrefixError, match="folder of jobs"):
        worker.work(threading.Event())


def test_a_job_that_kills_its_worker_each_time_ends(serve: Callable[[], Service], data: DataFolder) -> None:
    job, good = make_job(data, "deadly"), make_job(data, "good")
    for folder in (data.job(job.id), data.job(good.id)):
        for _ in range(MAX_ATTEMPTS - (folder.root.name == good.id)):
            trainer._count_attempt(folder)
    service = serve()
    assert failure(service.submit(job)).code == "worker_died"
    # One that gets further is counted from 0 again.
    assert service.submit(good).result(60)
    assert not (data.job(good.id).root / "attempts.json").exists()
    assert (data.job(good.id).run / STATE_FILE).exists()
