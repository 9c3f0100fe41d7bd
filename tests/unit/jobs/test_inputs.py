"""The folder of a job and its links to uploaded files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prefixtune.errors import PrefixError
from prefixtune.jobs import inputs
from prefixtune.jobs.folder import DataFolder
from prefixtune.jobs.inputs import find_input, has_inputs, make_job_folder, remove_job_folder
from prefixtune.jobs.job import new_job_id


def test_inputs_stay_when_the_upload_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("row")
    data, job_id = DataFolder(tmp_path / "root"), new_job_id()
    make_job_folder(data, job_id, {"train": (tmp_path / "data", ".jsonl.gz")})
    (tmp_path / "data").unlink()
    path = find_input(data.job(job_id), "train")
    assert path is not None
    assert (path.name, path.read_text()) == ("train.jsonl.gz", "row")
    assert find_input(data.job(job_id), "dev") is None
    assert [path.name for path in data.jobs.iterdir()] == [job_id]
    with pytest.raises(FileExistsError):
        make_job_folder(data, job_id, {})
    remove_job_folder(data, job_id)
    assert not list(data.jobs.iterdir())
    assert find_input(data.job(job_id), "train") is None


def test_a_file_is_copied_where_links_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "other disk")

    (tmp_path / "data").write_text("row")
    monkeypatch.setattr(os, "link", refuse)
    data, job_id = DataFolder(tmp_path / "root"), new_job_id()
    make_job_folder(data, job_id, {"document": (tmp_path / "data", ".md")})
    path = find_input(data.job(job_id), "document")
    assert path is not None
    assert path.read_text() == "row"


def test_the_prefix_to_go_on_from_stays_when_its_file_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(inputs, "fsync", lambda path: flushed.append(path.name))
    served, rows = tmp_path / "served.safetensors", tmp_path / "rows"
    served.write_text("old")
    rows.write_text("row")
    data, job_id = DataFolder(tmp_path / "root"), new_job_id()
    files: dict[inputs.InputName, tuple[Path, str]] = {"start": (served, ".safetensors"), "train": (rows, ".jsonl")}
    make_job_folder(data, job_id, files)
    folder = data.job(job_id)
    assert has_inputs(folder, files)
    # As `cp new served.safetensors` does.
    served.write_text("new")
    start, train = find_input(folder, "start"), find_input(folder, "train")
    assert start is not None
    assert start.read_text() == "old"
    assert "start.safetensors" in flushed
    # An upload never changes, and takes no room twice.
    assert train is not None
    assert train.samefile(rows)
    # So the folder is still the one of the same request.
    assert has_inputs(folder, files)
    (tmp_path / "more").write_text("rows")
    assert not has_inputs(folder, {**files, "train": (tmp_path / "more", ".jsonl")})
    assert not has_inputs(folder, {"train": (rows, ".jsonl")})


def test_nothing_is_left_of_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    data = DataFolder(tmp_path / "root")
    with pytest.raises(FileNotFoundError):
        make_job_folder(data, new_job_id(), {"train": (tmp_path / "gone", ".jsonl")})
    assert not list(data.jobs.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(PrefixError, match="cannot write"):
        make_job_folder(DataFolder(tmp_path / "file"), new_job_id(), {})
