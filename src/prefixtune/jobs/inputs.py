"""A job's own links to the files that it reads: they stay when their owner deletes the uploads.

An upload never changes. The prefix that training goes on from may be overwritten in its place, and so it is copied.

In `inputs/` a file's name says what it is for, and its ending how it is read:

    train.jsonl  dev.csv         examples to train on, and to choose the best prefix by
    document.md  questions.tsv   a document, and questions about it
    start.NAME.safetensors       the prefix NAME, which training goes on from
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from prefixtune.errors import PrefixError
from prefixtune.jobs.folder import DataFolder, JobFolder
from prefixtune.utils.files import fsync, reporting_write_errors, work_folder

__all__ = ["InputName", "find_input", "has_inputs", "make_job_folder", "remove_job_folder"]


InputName = Literal["train", "dev", "document", "questions", "start"]
_WORK = "new"
"""Name of the hidden folders in which the folders of jobs are made."""


def find_input(folder: JobFolder, name: InputName) -> Path | None:
    """The file of that name, whatever its ending; None: the job has none."""
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(folder.inputs.iterdir()):
            if path.name.partition(".")[0] == name:
                return path
    return None


def make_job_folder(
    data: DataFolder,
    job_id: str,
    inputs: Mapping[InputName, tuple[Path, str]],
    *,
    check: Callable[[JobFolder], object] | None = None,
) -> None:
    """Make the folder of a job with its inputs: all of it, or nothing.

    Args:
        data: Where.
        job_id: Whose.
        inputs: Name -> the file, and the ending of its name, as in `.jsonl`.
        check: Called with the complete folder before anybody sees it; what it raises leaves nothing behind.

    Raises:
        FileExistsError: There is a job with this id.
        FileNotFoundError: One of the files is gone.
        PrefixError: The folder cannot be written.
    """
    folder = data.job(job_id)
    if folder.root.exists():
        raise FileExistsError(job_id)
    try:
        with reporting_write_errors(data.jobs):
            data.jobs.mkdir(parents=True, exist_ok=True)
            with work_folder(data.jobs, _WORK) as made:
                new = JobFolder(made / "job")
                new.inputs.mkdir(parents=True)
                for name, (source, ending) in inputs.items():
                    put = _copy if name == "start" else _link
                    put(source, new.inputs / f"{name}{ending}")
                fsync(new.inputs)
                if check is not None:
                    check(new)
                os.rename(new.root, folder.root)
                fsync(data.jobs)
    except PrefixError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise error.__cause__ from None
        if folder.root.exists():
            raise FileExistsError(job_id) from None
        raise


def has_inputs(folder: JobFolder, inputs: Mapping[InputName, tuple[Path, str]]) -> bool:
    """Whether a job's folder has exactly these inputs, as `make_job_folder` makes them.

    Of the prefix to go on from only that it is there: its file may have been overwritten since it was copied.

    Raises:
        OSError: A file is gone.
    """
    wanted = {f"{name}{ending}": None if name == "start" else source for name, (source, ending) in inputs.items()}
    there = {path.name: path for path in folder.inputs.iterdir()}
    return wanted.keys() == there.keys() and all(
        source is None or _is_same(there[name], source) for name, source in wanted.items()
    )


def _is_same(path: Path, other: Path) -> bool:
    return os.path.samefile(path, other) or filecmp.cmp(path, other, shallow=False)


def remove_job_folder(data: DataFolder, job_id: str) -> None:
    """Remove the folder of a job that was not queued."""
    shutil.rmtree(data.job(job_id).root, ignore_errors=True)


def _link(source: Path, path: Path) -> None:
    """A second name of a file or, on another disk, a copy; of a symbolic link's file, not of the link."""
    try:
        os.link(source.resolve(strict=True), path)
    except FileNotFoundError:
        raise
    except OSError:
        _copy(source, path)


def _copy(source: Path, path: Path) -> None:
    shutil.copyfile(source, path)
    fsync(path)
