"""A job's folder: its events, appended once each and read whole whatever a kill left, and its links to uploads."""

import os

import pytest

from prefixtune.errors import PrefixError
from prefixtune.jobs.folder import DataFolder
from training_jobs import new_job_id


@pytest.fixture
def folder(tmp_path):
    made = DataFolder(tmp_path).job(new_job_id())
    made.root.mkdir(parents=True)
    return made


def messages(folder):
    return [event.message for event in folder.events()]


def test_events_come_in_order_with_their_figures_and_once(folder):
    folder.add_event("The job is queued.")
    folder.add_event("Step 1/2", data={"step": 1, "train_loss": 1.5}, key="step/1")
    # Another worker goes on from an earlier state.
    for step in (1, 2, 2):
        folder.add_event(f"Step {step}/2", key=f"step/{step}")
    folder.add_event("Paused.")
    folder.add_event("Paused.")
    assert messages(folder) == ["The job is queued.", "Step 1/2", "Step 2/2", "Paused.", "Paused."]
    first, second, *_ = folder.events()
    assert (first.level, first.data) == ("info", {})
    assert second.data == {"step": 1, "train_loss": 1.5}


def test_a_line_that_a_kill_cut_off_is_left_out_and_written_again(folder):
    for step in (1, 2):
        folder.add_event(f"Step {step}/2", key=f"step/{step}")
    path = folder.root / "events.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    assert messages(folder) == ["Step 1/2"]
    folder.add_event("Step 2/2", key="step/2")
    assert messages(folder) == ["Step 1/2", "Step 2/2"]


def test_the_progress_is_that_of_the_last_step(folder):
    assert (folder.progress(), folder.events()) == (None, [])
    folder.add_event("Training has started.")
    assert folder.progress() is None
    for step in (1, 2):
        data = {"step": step, "total_steps": 3, "train_loss": 1.5, "seconds_left": 4.0, "trained_tokens": 7}
        folder.add_event(f"Step {step}/3", data=data)
    folder.add_event("Step 2/3", data={"step": 2, "total_steps": 3, "valid_loss": 9.0})
    found = folder.progress()
    assert found is not None
    assert (found.step, found.total_steps, found.loss, found.seconds_left, found.trained_tokens) == (2, 3, 1.5, 4.0, 7)


def test_inputs_stay_when_the_upload_is_deleted_and_the_start_when_it_is_overwritten(tmp_path):
    rows, served = tmp_path / "rows", tmp_path / "served.safetensors"
    rows.write_text("row")
    served.write_text("old")
    data, job_id = DataFolder(tmp_path / "root"), new_job_id()
    folder = data.make_job(job_id, {"train": (rows, ".jsonl.gz"), "init_prefix": (served, ".safetensors")})
    train, start = folder.find_input("train"), folder.find_input("init_prefix")
    assert train is not None
    # It takes no room twice.
    assert train.samefile(rows)
    rows.unlink()
    # As `cp new served.safetensors` does.
    served.write_text("new")
    assert (train.name, train.read_text()) == ("train.jsonl.gz", "row")
    assert start is not None
    assert start.read_text() == "old"
    assert folder.find_input("dev") is None
    # One that is there already stays as it is.
    data.make_job(job_id, {})
    assert [path.name for path in data.jobs.iterdir()] == [job_id]
    assert len(list(folder.inputs.iterdir())) == 2


def test_a_file_is_copied_where_links_fail(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "other disk")

    (tmp_path / "data").write_text("row")
    monkeypatch.setattr(os, "link", refuse)
    folder = DataFolder(tmp_path / "root").make_job(new_job_id(), {"document": (tmp_path / "data", ".md")})
    path = folder.find_input("document")
    assert path is not None
    assert path.read_text() == "row"


def test_nothing_is_left_of_a_folder_that_cannot_be_made(tmp_path):
    data = DataFolder(tmp_path / "root")
    with pytest.raises(PrefixError):
        data.make_job(new_job_id(), {"train": (tmp_path / "gone", ".jsonl")})
    assert not list(data.jobs.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(PrefixError):
        DataFolder(tmp_path / "file").make_job(new_job_id(), {})
