"""`prefixtune worker` in processes of its own: killed, asked to end, and gone with its parent.

Slow: workers start again and again.
"""

import subprocess
import time

import pytest

import live_server
from prefixtune.backbone.identity import backbone_identity
from prefixtune.prefix.prefix import read_artifact
from training_jobs import ROWS, make_job, start_worker, wait_for, wait_until

STEPS = 250
"""So many that a fast machine's worker is still at work when it looks for what was asked of it."""
KILLED_STEPS = 50


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return live_server.make_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def start(data, model, tmp_path):
    """A factory of workers, which are killed when the test ends."""
    workers = []

    def make(*options, **settings):
        settings = {"stdout": subprocess.DEVNULL, **settings}
        (tmp_path / "prefixes").mkdir(exist_ok=True)
        workers.append(start_worker(data, model, tmp_path / "prefixes", *options, **settings))
        return workers[-1]

    yield make
    for worker in workers:
        worker.kill()
        worker.wait()


@pytest.fixture
def add(data, model, queue):
    """A function that queues a job of `STEPS` steps."""

    def make(name, **fields):
        fields = {"backbone": backbone_identity(str(model)), **fields}
        job = make_job(data, name, **{**fields, "config": {"max_steps": STEPS, **fields.get("config", {})}})
        queue.add(job)
        return job

    return make


def step(data, job):
    progress = data.job(job.id).progress()
    return progress.step if progress else 0


def logged_steps(data, job):
    """The steps that the job's owner was told of: each as soon as it is taken, where progress is told now and then."""
    events = data.job(job.id).events()
    return [event.data["step"] for event in events if "train_loss" in event.data]


def wait_for_step(data, job, reached):
    wait_until(lambda: max(logged_steps(data, job), default=0) >= reached)


def result(tmp_path, name):
    """The tensors of what is served, as bytes, and its header without whose it is."""
    prefix = read_artifact(tmp_path / "prefixes" / f"{name}.safetensors")
    header = {key: value for key, value in prefix.header.items() if key != "job"}
    return [tensor.numpy().tobytes() for tensor in prefix.stored_tensors()], header


def test_a_job_that_is_killed_again_and_again_ends_bit_for_bit_the_same(start, add, data, queue, tmp_path):
    fields = {"dev": ROWS[:2], "config": {"max_steps": KILLED_STEPS, "eval_every": 10}}
    whole = add("whole", **fields)
    worker = start()
    wait_for(queue, whole, "succeeded")

    job = add("killed", **fields)
    for reached in (1, KILLED_STEPS // 2):
        wait_for_step(data, job, reached)
        worker.kill()
        worker.wait()
        assert queue.get(job.id).status in ("queued", "running")
        worker = start()
    state = wait_for(queue, job, "succeeded", "failed")
    assert (state.status, step(data, job)) == ("succeeded", KILLED_STEPS)
    assert result(tmp_path, "killed") == result(tmp_path, "whole")
    assert sorted(logged_steps(data, job)) == list(range(1, KILLED_STEPS + 1))


def test_a_worker_that_is_asked_to_end_or_loses_its_parent_leaves_its_job_to_the_next(start, add, data, queue):
    worker = start("--name", "first", stdout=subprocess.PIPE)
    job = add("left")
    wait_until(lambda: step(data, job) > 2)
    assert queue.get(job.id).worker == "first"
    began = time.monotonic()
    worker.terminate()
    output, _ = worker.communicate(timeout=20)
    assert worker.returncode == 0
    assert time.monotonic() - began < 10
    assert "Traceback" not in output
    # Given back to whichever worker comes next.
    assert queue.get(job.id).status == "queued"
    reached = [step(data, job)]

    child = start("--with-parent", stdin=subprocess.PIPE)
    wait_until(lambda: step(data, job) > reached[0] + 2)
    assert child.poll() is None
    child.stdin.close()
    assert child.wait(20) == 0
    reached.append(step(data, job))

    assert start("--idle-seconds", "2").wait(180) == 0
    assert queue.get(job.id).status == "succeeded"
    told = [event.message for event in data.job(job.id).events()]
    assert {f"Training goes on at step {one}/{STEPS}." for one in reached} <= {*told}


def test_what_is_wrong_is_said_in_one_line_and_leaves_jobs_for_others(start, add, queue, model, tmp_path):
    # Of the same name, which makes it the same backbone.
    broken = tmp_path / "broken" / model.name
    broken.mkdir(parents=True)
    for path in model.iterdir():
        content = path.read_bytes()
        (broken / path.name).write_bytes(content[:100] if path.suffix == ".safetensors" else content)
    job = add("left")
    for options in (("--backbone", str(broken)), ("--data-folder", "/proc/data")):
        worker = start(*options, stdout=subprocess.PIPE)
        output, _ = worker.communicate(timeout=180)
        assert worker.returncode == 2, output
        assert "error: " in output
        assert "Traceback" not in output
    assert queue.get(job.id).status in ("queued", "running")
