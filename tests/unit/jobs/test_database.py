"""A data folder is used with one database."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prefixtune.errors import ConfigError, PrefixError
from prefixtune.jobs import database
from prefixtune.jobs import queue as queue_module
from prefixtune.jobs.database import check_database, claim_database, claim_folder
from prefixtune.jobs.folder import DataFolder
from prefixtune.jobs.queue import JobQueue, migrate
from training_jobs import make_job

POSTGRES = "postgresql://me:secret@DB/jobs"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataFolder:
    monkeypatch.delenv("PGHOST", raising=False)
    monkeypatch.delenv("PGPORT", raising=False)
    made = DataFolder(tmp_path / "data")
    made.root.mkdir()
    return made


def test_a_folder_that_was_not_used_yet_fits_any_database_and_is_left_as_it_is(data: DataFolder) -> None:
    for url in (POSTGRES, data.database_url):
        check_database(data, url)
    assert list(data.root.iterdir()) == []
    check_database(DataFolder(data.root / "missing"), POSTGRES)


def test_another_database_is_refused_without_secrets(data: DataFolder) -> None:
    claim_folder(data, POSTGRES)
    (marker,) = data.root.iterdir()
    assert len(bytes.fromhex(marker.read_text().strip())) == 32
    for same in ("postgresql+psycopg://you@db:5432/jobs", "postgresql:///jobs?host=db"):
        claim_folder(data, same)
    for other in (data.database_url, "postgresql://me:secret@other/jobs", "postgresql://db:5433/jobs"):
        for use in (check_database, claim_folder):
            with pytest.raises(ConfigError, match="another database") as caught:
                use(data, other)
            assert "secret" not in str(caught.value)
            assert marker.name in str(caught.value.hint)
    check_database(data, POSTGRES)


def test_a_folder_with_its_own_database_may_move(data: DataFolder, tmp_path: Path) -> None:
    claim_folder(data, data.database_url)
    moved = DataFolder(Path(shutil.move(data.root, tmp_path / "moved")))
    check_database(moved, moved.database_url)
    with pytest.raises(ConfigError):
        check_database(moved, f"sqlite:///{tmp_path / 'other.sqlite'}")


def test_a_folder_that_cannot_be_written_is_said(data: DataFolder) -> None:
    with pytest.raises(PrefixError, match="cannot be written"):
        claim_folder(DataFolder(data.root / "missing"), POSTGRES)


def test_without_hard_links_the_first_one_names_a_file(data: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, count, replaced = list("abcdefgh"), threading.Barrier(8), list[str]()
    replace = os.replace

    def refuse(*_: object) -> None:
        # All of them have seen that there is no such file.
        count.wait(20)
        raise OSError(errno.EPERM, "no links")

    def replace_slowly(source: Path, target: Path) -> None:
        time.sleep(0.05)
        replaced.append(source.read_text().strip())
        replace(source, target)

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "replace", replace_slowly)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: database._make_once(data, data.id_file, text), texts))
    assert len(replaced) == 1
    assert data.id_file.read_text() == f"{replaced[0]}\n"
    assert [path.name for path in data.root.iterdir()] == [data.id_file.name]


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[JobQueue]:
    url = f"sqlite:///{tmp_path / 'shared.sqlite'}"
    migrate(url)
    made = JobQueue(url)
    yield made
    made.close()


def test_a_folder_that_is_not_that_of_the_jobs_is_refused(data: DataFolder, queue: JobQueue, tmp_path: Path) -> None:
    claim_database(data, queue)
    # As where the disk with the data folder is not mounted, or on a machine with a folder of its own.
    other = DataFolder(tmp_path / "other")
    other.root.mkdir()
    for _ in range(2):
        with pytest.raises(ConfigError, match="belong to another data folder") as caught:
            claim_database(other, queue)
        assert "mounted" in caught.value.hint
    # Wherever the folder lies, it is the same one; and its id is no job.
    claim_database(DataFolder(Path(shutil.move(data.root, tmp_path / "moved"))), queue)
    assert [*queue.iterate()] == []
    assert queue.unfinished() == []
    # A folder that was restored without its id gets it.
    assert queue.folder() in caught.value.hint
    other.id_file.write_text(queue.folder())
    claim_database(other, queue)


def test_a_folder_without_jobs_is_not_that_of_a_database_with_some(
    data: DataFolder, queue: JobQueue, tmp_path: Path
) -> None:
    queue.add(make_job(data))
    empty = DataFolder(tmp_path / "empty")
    empty.root.mkdir()
    with pytest.raises(ConfigError, match="belong to another data folder"):
        claim_database(empty, queue)
    # Whoever comes next is not refused, and nothing is left under a disk that is not mounted.
    assert (list(empty.root.iterdir()), queue.folder()) == ([], "")
    claim_database(data, queue)
    assert queue.folder() == data.id_file.read_text().strip()


def test_a_database_that_another_server_claims_at_the_same_time_is_used(
    data: DataFolder, queue: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_jobs = JobQueue.has_jobs

    def look(asked: JobQueue) -> bool:
        # Between the first look of this server and its second, another one has claimed the database and added a job.
        monkeypatch.undo()
        other = JobQueue(f"sqlite:///{tmp_path / 'shared.sqlite'}")
        claim_database(data, other)
        other.add(make_job(data))
        other.close()
        return has_jobs(asked)

    monkeypatch.setattr(JobQueue, "has_jobs", look)
    claim_database(data, queue)
    assert queue.folder() == data.id_file.read_text().strip()


def test_a_database_of_another_program_is_named(
    data: DataFolder, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim_database(data, queue)
    taken = {"workflow_name": "other", "queue_name": "other", "workflow_id": queue_module._FOLDER}
    queue._client.delete_workflow(queue_module._FOLDER)
    queue._client.enqueue(taken, "text")  # type: ignore[arg-type]
    with pytest.raises(PrefixError, match="of another program"):
        claim_database(data, queue)
