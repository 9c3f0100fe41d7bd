"""A job's events: appended once each, read whole, whatever a kill left of the last line."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefixtune.jobs import events as events_module
from prefixtune.jobs.events import JobEvents, Progress
from prefixtune.jobs.folder import DataFolder, JobFolder
from prefixtune.jobs.job import new_job_id


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    made = DataFolder(tmp_path).job(new_job_id())
    made.root.mkdir(parents=True)
    return made


def _messages(folder: JobFolder) -> list[str]:
    return [event.message for event in JobEvents(folder).read().events]


def test_events_come_in_order_with_their_figures(folder: JobFolder) -> None:
    writer = JobEvents(folder)
    writer.add("The job is queued.")
    writer.add("Step 1/2: training loss=1.50", data={"step": 1, "train_loss": 1.5}, key="step/1")

    first, second = JobEvents(folder).read().events
    assert (first.type, first.level, first.data) == ("message", "info", {})
    assert (second.type, second.data) == ("metrics", {"step": 1, "train_loss": 1.5})
    assert first.id.startswith("ftevent-")
    assert first.id != second.id


def test_what_happens_once_is_written_once(folder: JobFolder) -> None:
    JobEvents(folder).add("Step 1/2", key="step/1")
    # Another worker goes on from an earlier state.
    resumed = JobEvents(folder)
    resumed.add("Step 1/2", key="step/1")
    resumed.add("Step 2/2", key="step/2")
    resumed.add("Step 2/2", key="step/2")
    resumed.add("Paused.")
    resumed.add("Paused.")
    assert _messages(folder) == ["Step 1/2", "Step 2/2", "Paused.", "Paused."]


def test_a_line_that_a_kill_cut_off_is_left_out_and_written_again(folder: JobFolder) -> None:
    JobEvents(folder).add("Step 1/2", key="step/1")
    JobEvents(folder).add("Step 2/2", key="step/2")
    whole = folder.events.read_bytes()
    folder.events.write_bytes(whole[:-10])
    assert _messages(folder) == ["Step 1/2"]

    JobEvents(folder).add("Step 2/2", key="step/2")
    assert _messages(folder) == ["Step 1/2", "Step 2/2"]
    assert JobEvents(folder).read().events[1].id in whole.decode()


def test_a_page_goes_on_where_the_last_one_ended(folder: JobFolder) -> None:
    writer, reader = JobEvents(folder), JobEvents(folder)
    writer.add("one")
    page = reader.read()
    assert reader.read(page.position).events == []
    with folder.events.open("ab") as file:
        file.write(b'{"id": "half')
    assert reader.read(page.position).events == []
    writer.add("two")
    assert [event.message for event in reader.read(page.position).events] == ["two"]


def test_of_a_very_long_log_the_last_events_are_read(folder: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "MAX_LOG_BYTES", 500)
    for step in range(20):
        JobEvents(folder).add(f"Step {step}", key=f"step/{step}")
    last = _messages(folder)
    assert 0 < len(last) < 20
    assert last[-1] == "Step 19"


@pytest.mark.parametrize("line", [b"[]", b"null", b'{"id": 1}', b"\xff\xfe", b"[" * 100_000])
def test_lines_that_are_no_events_are_left_out(folder: JobFolder, line: bytes) -> None:
    folder.events.write_bytes(line + b"\n")
    JobEvents(folder).add("fine")
    assert _messages(folder) == ["fine"]


def test_progress_is_the_last_that_was_written(folder: JobFolder) -> None:
    writer = JobEvents(folder)
    writer.write_progress(Progress(step=1, total_steps=8))
    writer.write_progress(Progress(step=2, total_steps=8, loss=1.5, seconds_left=3.0, trained_tokens=99))
    assert JobEvents(folder).progress() == Progress(
        step=2, total_steps=8, loss=1.5, seconds_left=3.0, trained_tokens=99
    )
    folder.progress.write_text('{"step": -1}')
    assert JobEvents(folder).progress() is None
