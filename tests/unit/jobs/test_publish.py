"""Publishing what a job has trained: whole, checked, once, under its name; and taking it back."""

import csv
import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import prefixtune as pt
from prefixtune.errors import CheckpointError, PrefixError
from prefixtune.jobs import publish as publishing
from prefixtune.jobs.files import FileStore
from prefixtune.jobs.folder import DataFolder, JobFolder
from prefixtune.jobs.job import Job, JobState, failure_of, pause_reason
from prefixtune.jobs.publish import checkpoints, publish, take_back
from prefixtune.jobs.trainer import Reporter
from prefixtune.jobs.worker import _clear, look_after
from prefixtune.prefix.header import job_origin
from prefixtune.prefix.prefix import Prefix, read_artifact, save_prefix
from prefixtune.training.config import TrainConfig
from prefixtune.training.train import train
from prefixtune.utils.locks import FolderBusyError, change_folder
from training_jobs import make_job

JOB = Job(id=f"ftjob-{'a' * 24}", owner="alice", created=1, model="tiny", name="support", training_file="file-1")
OTHER = JOB.model_copy(update={"id": f"ftjob-{'b' * 24}", "owner": "bob"})
METRICS = f"file-{'a' * 24}"


@pytest.fixture(scope="module")
def backbone(tiny_backbone):
    return tiny_backbone("llama")


@pytest.fixture(scope="module")
def finished(backbone, tmp_path_factory):
    """The folder of a job of ten steps, evaluated every second one."""
    folder = JobFolder(tmp_path_factory.mktemp("job"))
    examples = [pt.Example(f"word {number}", (f"text {number} .",)) for number in range(6)]
    config = TrainConfig(
        output=str(folder.run), prefix_length=2, max_steps=10, eval_every=2, batch_size=2, learning_rate=0.1
    )
    reporters = []

    def begin(loop):
        run = SimpleNamespace(loop=loop, events=[])
        reporters.append(Reporter(JOB, folder, run))

    train(
        config, backbone=backbone, examples=examples, dev_examples=examples[:2], progress=False, check=begin,
        on_event=lambda event: reporters[0].report(event),
    )  # fmt: skip
    return folder.root


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of that folder."""
    return JobFolder(Path(shutil.copytree(finished, tmp_path / "job")))


@pytest.fixture
def run(folder):
    return folder.run


@pytest.fixture
def prefixes(tmp_path):
    """The folder that is served from."""
    return tmp_path / "prefixes"


@pytest.fixture
def files(tmp_path):
    return FileStore(DataFolder(tmp_path / "data"))


def names(prefixes):
    """All that is in the folder, hidden files included."""
    return sorted(os.listdir(prefixes))


ALL = ["support.safetensors", *(f"support.step-{step}.safetensors" for step in (10, 6, 8))]


def test_a_result_is_the_runs_best_prefix_with_its_owner(folder, run, backbone, prefixes, files):
    publish(JOB, folder, backbone, prefixes, files)
    assert names(prefixes) == ALL
    best, served = read_artifact(run / "prefix.safetensors"), read_artifact(prefixes / "support.safetensors")
    assert served.equal(best)
    origin = job_origin(served.header)
    assert origin is not None
    assert (origin.id, origin.owner, origin.step) == (JOB.id, "alice", None)
    text = files.path(files.get("alice", METRICS)).read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert text.startswith("step,train_loss,valid_loss,learning_rate,seconds\n1,")
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 11)]
    assert [bool(row["valid_loss"]) for row in rows] == [False, True] * 5
    assert folder.progress().best_loss == min(float(row["valid_loss"]) for row in rows if row["valid_loss"])
    # Again, it changes nothing.
    before = {path.name: path.read_bytes() for path in prefixes.iterdir()}
    publish(JOB, folder, backbone, prefixes, files)
    assert {path.name: path.read_bytes() for path in prefixes.iterdir()} == before


def test_a_name_that_another_file_has_is_left_alone(folder, backbone, prefixes, files):
    publish(OTHER, folder, backbone, prefixes, files)
    for content in ((prefixes / "support.safetensors").read_bytes(), b"no prefix"):
        (prefixes / "support.safetensors").write_bytes(content)
        with pytest.raises(FolderBusyError, match="'support'"):
            publish(JOB, folder, backbone, prefixes, files)
        assert (prefixes / "support.safetensors").read_bytes() == content


def test_a_checkpoint_that_its_owner_left_without_its_result_is_replaced(folder, backbone, prefixes, files):
    publish(JOB, folder, backbone, prefixes, files)
    path = prefixes / "support.step-6.safetensors"
    left = read_artifact(path)
    for owner, is_replaced in (("alice", True), ("bob", False)):
        header = {**left.header, "job": {**left.header["job"], "id": OTHER.id, "owner": owner}}
        save_prefix(path, Prefix(left.layers, header))
        publish(JOB, folder, backbone, prefixes, files)
        assert (job_origin(read_artifact(path).header).id == JOB.id) is is_replaced


@pytest.mark.parametrize("damage", ["truncated", "other model"])
def test_what_cannot_be_served_is_not_published(folder, run, backbone, prefixes, files, tiny_backbone, damage):
    file = run / "prefix.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        backbone = tiny_backbone("llama", num_hidden_layers=1)
    with pytest.raises(CheckpointError) as failed:
        publish(JOB, folder, backbone, prefixes, files)
    told = failure_of(failed.value)
    assert told.code == "invalid_state"
    assert "/" not in told.message
    assert not prefixes.exists() or names(prefixes) == []


def test_a_folder_that_others_change_for_long_is_left_alone(folder, run, backbone, prefixes, files, monkeypatch):
    monkeypatch.setattr(publishing, "_LOCK_SECONDS", 0.1)
    with change_folder(prefixes, 0.0), pytest.raises(FolderBusyError) as busy:
        publish(JOB, folder, backbone, prefixes, files)
    assert pause_reason(busy.value)
    assert names(prefixes) == []
    publish(JOB, folder, backbone, prefixes, files)
    assert names(prefixes) == ALL


def test_files_appear_together_the_result_last(folder, run, backbone, prefixes, files, monkeypatch):
    replace, moved = os.replace, list[str]()

    def fail(source, target):
        if target.parent == prefixes:
            moved.append(target.name)
            if target.name == "support.safetensors":
                raise OSError(errno.EIO, "a bad block")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(PrefixError, match="a bad block") as failed:
            publish(JOB, folder, backbone, prefixes, files)
    assert pause_reason(failed.value)
    assert (sorted(moved), moved[-1]) == (ALL, ALL[0])
    publish(JOB, folder, backbone, prefixes, files)
    assert names(prefixes) == ALL


def test_a_cancelled_job_is_taken_back(folder, backbone, prefixes, files):
    publish(JOB, folder, backbone, prefixes, files)
    (prefixes / "support.step-4.safetensors").write_bytes(b"no prefix")
    (prefixes / "support-2.safetensors").write_bytes((prefixes / "support.safetensors").read_bytes())
    assert take_back(OTHER, prefixes) == []
    assert set(take_back(JOB, prefixes)) == set(ALL)
    assert names(prefixes) == ["support-2.safetensors", "support.step-4.safetensors"]


def left(data, job):
    root = data.job(job.id).root
    # The lock of the folder itself may stay; nobody holds it.
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} - {".lock"}


def test_jobs_that_have_ended_keep_neither_inputs_nor_states_nor_what_they_published(
    folder, backbone, prefixes, data, queue
):
    queued, paused, cancelled, held = (make_job(data, name) for name in ("queued", "paused", "cancelled", "held"))
    for job in (queued, paused, cancelled, held):
        queue.add(job)
        shutil.copytree(folder.root, data.job(job.id).root, dirs_exist_ok=True)
    publish(cancelled, data.job(cancelled.id), backbone, prefixes, FileStore(data))
    abandoned = prefixes / ".support.safetensors.x1_y.tmp"
    abandoned.mkdir()
    (abandoned / ".lock").touch()
    assert "cancelled.safetensors" in names(prefixes)
    queue.pause(paused.id)
    queue.cancel(cancelled.id)
    queue.cancel(held.id)
    unknown, whole = make_job(data, "unknown"), left(data, queued)
    with data.job(held.id).hold():
        # A worker still saves there.
        look_after(data, queue, "", prefixes)
    assert names(prefixes) == []
    assert {"run/events.jsonl"} <= left(data, cancelled)
    assert not [name for name in left(data, cancelled) if name.startswith("inputs") or "safetensors" in name]
    for job in (queued, paused, held):
        assert left(data, job) == whole
    assert data.job(unknown.id).find_input("train") is not None
    look_after(data, queue, "", prefixes)
    assert not data.job(held.id).inputs.exists()


def test_a_job_that_has_succeeded_keeps_only_what_it_published(folder, run, backbone, prefixes, files):
    folder.inputs.mkdir()
    for left_by_a_kill in (".lock", ".state.safetensors.0123456789abcdef.lock"):
        (run / left_by_a_kill).touch()
    publish(JOB, folder, backbone, prefixes, files)
    served = checkpoints(JOB, prefixes)
    assert [(one.step, one.created, one.metrics) for one in served] == [
        (one.step, one.created, one.metrics) for one in checkpoints(JOB, folder.checkpoints)
    ]
    _clear(folder, JobState(JOB, "succeeded"), prefixes)
    assert names(prefixes) == ALL
    assert checkpoints(JOB, prefixes) == served
    assert not folder.inputs.exists()
    assert not [*run.rglob("*.safetensors"), *run.rglob(".*")]
    assert folder.events()


def test_only_old_folders_of_jobs_that_were_never_queued_are_removed(data, queue, prefixes):
    old, new, queued = (make_job(data, name) for name in ("old", "new", "queued"))
    queue.add(queued)
    for job in (old, queued):
        os.utime(data.job(job.id).inputs, (0, 0))
    look_after(data, queue, "", prefixes)
    assert {path.name for path in data.jobs.iterdir()} == {new.id, queued.id}


def test_the_last_evaluations_are_checkpoints(run):
    found = checkpoints(JOB, run / "checkpoints")
    assert [(one.step, one.path.stem) for one in found] == [(step, f"support.step-{step}") for step in (6, 8, 10)]
    for one in found:
        assert one.metrics.keys() == {"train_loss", "valid_loss"}
        assert one.created > 1_700_000_000
        origin = job_origin(read_artifact(one.path).header)
        assert origin is not None
        assert (origin.id, origin.owner, origin.step) == (JOB.id, "alice", one.step)
    (run / "checkpoints" / "support.step-8.safetensors").write_bytes(b"no prefix")
    (run / "checkpoints" / "support.step-x.safetensors").write_bytes(b"no prefix")
    assert [one.step for one in checkpoints(JOB, run / "checkpoints")] == [6, 10]
    assert checkpoints(OTHER, run / "checkpoints") == []


def test_the_start_is_called_what_its_owner_calls_it(folder, run, backbone, prefixes, files):
    prefix = read_artifact(run / "prefix.safetensors")
    start = {"kind": "prefix", "file": "start.safetensors", "hash": "sha256:0"}
    save_prefix(run / "prefix.safetensors", Prefix(prefix.layers, {**prefix.header, "initialization": start}))
    publish(JOB.model_copy(update={"model": "first"}), folder, backbone, prefixes, files)
    header = read_artifact(prefixes / "support.safetensors").header
    assert header["initialization"] == {**start, "file": "first"}
