"""The folder of a job and its links to uploaded files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prefixtune.errors import PrefixError
from prefixtune.jobs.folder import DataFolder
from prefixtune.jobs.inputs import find_input, make_job_folder, remove_job_folder
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


def test_the_file_behind_a_symbolic_link_is_kept(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("row")
    (tmp_path / "link").symlink_to("data")
    data, job_id = DataFolder(tmp_path / "root"), new_job_id()
    make_job_folder(data, job_id, {"start": (tmp_path / "link", ".safetensors")})
    (tmp_path / "link").unlink()
    path = find_input(data.job(job_id), "start")
    assert path is not None
    assert not path.is_symlink()
    assert path.samefile(tmp_path / "data")


def test_nothing_is_left_of_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    data = DataFolder(tmp_path / "root")
    with pytest.raises(FileNotFoundError):
        make_job_folder(data, new_job_id(), {"train": (tmp_path / "gone", ".jsonl")})
    assert not list(data.jobs.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(PrefixError, match="cannot write"):
        make_job_folder(DataFolder(tmp_path / "file"), new_job_id(), {})
