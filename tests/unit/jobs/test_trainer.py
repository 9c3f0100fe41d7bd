"""A worker's training: jobs come one after the other, and each ends once, by itself."""

import errno
import shutil
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from dbos import PortableWorkflowError

from prefixtune.jobs import trainer
from prefixtune.jobs.folder import DataFolder
from prefixtune.jobs.job import JobError
from prefixtune.jobs.queue import JobQueue, QueueUnavailableError
from prefixtune.jobs.trainer import MAX_ATTEMPTS, LeftError, Trainer
from prefixtune.prefix.prefix import read_artifact
from prefixtune.training.loop import TrainLoop
from prefixtune.training.run_folder import PREFIX_FILE, STATE_FILE
from small_document import DOCUMENT
from small_document import ROWS as QUESTIONS
from training_jobs import ROWS, make_job, wait_until

LONG = {"max_steps": 100_000}
"""Steps of a job that does not end by itself."""


class Statuses(JobQueue):
    """A queue that says what the test wants."""

    def __init__(self):
        self.says = {}
        self.is_away = False

    def states(self, job_ids):
        if self.is_away:
            raise QueueUnavailableError("the database of jobs cannot be reached.")
        found = {job_id: self.says.get(job_id, "running") for job_id in job_ids}
        return {
            job_id: SimpleNamespace(status=status, worker="w" if status == "running" else "")
            for job_id, status in found.items()
            if status
        }

    def pause(self, job_id):
        self.says[job_id] = "paused"

    def cancel(self, job_id):
        self.says[job_id] = "cancelled"


class Service:
    """A trainer, and what it hears of the database and does to publish."""

    def __init__(self, data, backbone, prefixes):
        self.data, self.queue, self.stop = data, Statuses(), threading.Event()
        self.trainer = Trainer(data, self.queue, backbone, prefixes, worker="w", stop=self.stop)
        self.done = {}

    def submit(self, job):
        """Claim a job, as a thread of DBOS does; its steps are the result."""
        future = Future()

        def step(name, work):
            result = work()
            self.done.setdefault(job.id, []).append(name)
            return result

        def run():
            try:
                self.trainer.run(job, step)
                future.set_result(self.step(job))
            except (PortableWorkflowError, LeftError) as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    def step(self, job):
        progress = self.data.job(job.id).progress()
        return progress.step if progress else 0


@pytest.fixture(scope="module")
def backbone(tiny_backbone):
    return tiny_backbone("llama", max_position_embeddings=512)


@pytest.fixture
def data(tmp_path):
    # The path is part of the database's address.
    return DataFolder(tmp_path / "data 9%25?#")


@pytest.fixture
def service(data, backbone, tmp_path, monkeypatch):
    """A service that asks the database after each step."""
    monkeypatch.setattr(trainer, "_ASK_SECONDS", 0.0)
    monkeypatch.setattr(trainer, "_AWAY_SECONDS", 0.01)
    made = Service(data, backbone, tmp_path / "prefixes")
    yield made
    made.stop.set()
    wait_until(lambda: not made.trainer.is_busy, 30)


def messages(data, job):
    return [event.message for event in data.job(job.id).events()]


def prefix_of(data, job):
    return (data.job(job.id).run / PREFIX_FILE).read_bytes()


def is_left(future):
    return isinstance(future.exception(30), LeftError)


def failure(future):
    error = future.exception(30)
    assert isinstance(error, PortableWorkflowError)
    return JobError.model_validate(error.data)


# --- ending -----------------------------------------------------------------------------------------------------------


def test_jobs_train_one_after_the_other_and_one_that_fails_stops_no_other(service, data, backbone, tmp_path):
    long = make_job(data, "long", dev=[{**ROWS[0], "completion": "x" * 600}])
    error = failure(service.submit(long))
    assert (error.code, error.param) == ("invalid_validation_file", "validation_file")
    other = service.submit(make_job(data, "other", fingerprint="x:AAAA"))
    job = make_job(data, "one", dev=ROWS[:2], config={"eval_every": 3}, fingerprint=backbone.fingerprint)
    assert service.submit(job).result(60) == 6
    error = failure(other)
    assert (error.code, error.param) == ("unsupported_model", "model")
    assert service.done[job.id] == ["train", "publish"]
    assert read_artifact(tmp_path / "prefixes" / "one.safetensors").header["job"]["id"] == job.id
    told = data.job(job.id).events()
    assert [event.message.partition(":")[0] for event in told] == [
        "Training has started.",
        *(f"Step {step}/6" for step in (1, 2, 3, 3, 4, 5, 6, 6)),
        "The new model is served as 'one'.",
        "The job has succeeded.",
    ]
    assert len([event for event in told if "valid_loss" in event.data]) == 2
    assert [event.data["train_loss"] > 0 for event in told if "train_loss" in event.data] == [True] * 6
    progress = data.job(job.id).progress()
    assert progress is not None
    assert (progress.step, progress.total_steps, progress.seconds_left) == (6, 6, 0)
    assert progress.trained_tokens > 10
    assert progress.best_loss == min(event.data["valid_loss"] for event in told if "valid_loss" in event.data)


def test_documents_are_prepared_and_trained(service, data):
    config = {"prefix_length": 4, "num_questions": 5, "answer_length": 3, "initialization": "text"}
    made = make_job(data, "made", document=DOCUMENT, rows=None, config=config)
    del config["num_questions"], config["answer_length"]
    given = make_job(data, "given", document=DOCUMENT, rows=QUESTIONS, config=config)
    for job in (made, given):
        assert service.submit(job).result(60) == 6
    assert "Preparing questions: 0/5" in messages(data, made)


def test_an_error_that_was_not_foreseen_fails(service, data, monkeypatch):
    def broken(*_):
        raise KeyError("/secret/path")

    job = make_job(data)
    monkeypatch.setattr(TrainLoop, "apply", broken)
    error = failure(service.submit(job))
    assert error.code == "internal_error"
    assert "/secret" not in error.message
    assert messages(data, job)[-1].startswith("The job has failed")


# --- leaving ----------------------------------------------------------------------------------------------------------


def test_a_paused_job_goes_on_bit_for_bit_where_it_was(service, data):
    config = {"max_steps": 30}
    whole, paused = make_job(data, "whole", config=config), make_job(data, "paused", config=config)
    assert service.submit(whole).result(60)
    future = service.submit(paused)
    wait_until(lambda: service.step(paused) > 2)
    service.queue.says[paused.id] = "paused"
    assert is_left(future)
    reached = service.step(paused)
    assert 2 < reached < 30
    assert f"Training is paused at step {reached}/30." in messages(data, paused)
    with data.job(paused.id).hold() as held:
        assert held
    service.queue.says[paused.id] = "running"
    assert service.submit(paused).result(60) == 30
    assert prefix_of(data, paused) == prefix_of(data, whole)


@pytest.mark.parametrize("status", ["cancelled", None])
def test_a_job_that_is_cancelled_or_deleted_is_left(status, service, data):
    job = make_job(data, config=LONG)
    future = service.submit(job)
    wait_until(lambda: service.step(job) > 2)
    service.queue.says[job.id] = status
    assert is_left(future)
    assert service.submit(make_job(data, "next")).result(60)
    # Before its turn it is left without a word.
    waiting = make_job(data)
    shutil.rmtree(data.job(waiting.id).inputs)
    service.queue.says[waiting.id] = status
    assert is_left(service.submit(waiting))
    assert messages(data, waiting) == []


def test_a_job_that_is_claimed_again_before_it_is_left_is_trained_once(service, data):
    config = {"max_steps": 30}
    whole, job = make_job(data, "whole", config=config), make_job(data, "twice", config=config)
    assert service.submit(whole).result(60)
    first = service.submit(job)
    wait_until(lambda: service.step(job) > 2)
    # Paused and resumed before anybody here noticed.
    second = service.submit(job)
    assert first.result(60) == second.result(60)
    assert prefix_of(data, job) == prefix_of(data, whole)
    steps = [event.data["step"] for event in data.job(job.id).events() if event.data]
    assert steps == list(range(1, 31))


def test_nothing_goes_on_while_the_database_is_away(service, data, tmp_path):
    job = make_job(data, config=LONG)
    future = service.submit(job)
    wait_until(lambda: service.step(job) > 2)
    service.queue.is_away = True
    time.sleep(0.1)
    reached = service.step(job)
    time.sleep(0.1)
    assert service.step(job) == reached
    service.queue.says[job.id] = "cancelled"
    service.queue.is_away = False
    assert is_left(future)
    assert not (tmp_path / "prefixes").exists()


def test_a_job_that_another_worker_still_holds_is_waited_for(service, data):
    job = make_job(data)
    with data.job(job.id).hold():
        future = service.submit(job)
        with pytest.raises(TimeoutError):
            future.result(0.3)
    assert future.result(60)


# --- what is in the way -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["save", "publish"])
def test_a_full_disk_pauses_and_what_is_trained_is_kept(place, service, data, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    job = make_job(data)
    with monkeypatch.context() as patch:
        patch.setattr(TrainLoop, "save", full) if place == "save" else patch.setattr(trainer, "publish", full)
        assert is_left(service.submit(job))
    assert service.queue.says[job.id] == "paused"
    assert "disk" in messages(data, job)[-1]
    service.queue.says[job.id] = "running"
    assert service.submit(job).result(60) == 6


def test_a_job_whose_files_are_gone_is_paused(service, data):
    job = make_job(data)
    data.jobs.rename(data.root / "elsewhere")
    assert is_left(service.submit(job))
    assert service.queue.says[job.id] == "paused"


def test_a_job_that_kills_its_worker_each_time_ends(service, data):
    job, good = make_job(data, "deadly"), make_job(data, "good")
    (data.job(job.id).root / "attempts").write_bytes(b"." * MAX_ATTEMPTS)
    (data.job(good.id).root / "attempts").write_bytes(b"." * (MAX_ATTEMPTS - 1))
    assert failure(service.submit(job)).code == "training_failed"
    # One that gets further is counted from 0 again.
    assert service.submit(good).result(60)
    assert not (data.job(good.id).root / "attempts").exists()
    assert (data.job(good.id).run / STATE_FILE).exists()
