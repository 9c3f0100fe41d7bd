"""Files are the old ones or the new ones, never a part; work folders of killed processes are removed."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from child_process import kill, start_child
from prefixtune.errors import PrefixError
from prefixtune.utils import files
from prefixtune.utils.files import (
    append_line,
    atomic_files,
    atomic_path,
    flush_to_disk,
    line_writer,
    remove_abandoned,
    work_folder,
    write_text,
)
from prefixtune.utils.locks import acquire_lock


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- one file ---------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        temporary.chmod(0o600)
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert names(path.parent) == ["a.txt"]


def write_half(path: Path, error: Exception) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error


def test_any_error_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    for error in (OSError(errno.ENOSPC, "No space left on device"), Exception("I/O error: full (os error 28)")):
        with pytest.raises(PrefixError, match=r"cannot write '.*a': No space left on device\.") as raised:
            write_half(tmp_path / "a", error)
        cause = raised.value.__cause__
        assert isinstance(cause, OSError)
        assert cause.errno == errno.ENOSPC
    with pytest.raises(ZeroDivisionError):
        write_half(tmp_path / "a", ZeroDivisionError())
    assert (names(tmp_path), (tmp_path / "a").read_text()) == (["a"], "old")


def test_many_writers_of_one_file(tmp_path: Path) -> None:
    """In two processes with one number, as in two containers, they would have overwritten each other's file."""
    path, faults = tmp_path / "a", list[Exception]()
    texts = [letter * 200_000 for letter in "abcdefgh"]

    def write(text: str) -> None:
        try:
            for _ in range(10):
                write_text(path, text)
                assert path.read_text() in texts
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert names(tmp_path) == ["a"]


def test_many_flush_their_files_in_one_folder(tmp_path: Path) -> None:
    """As servers do that share a data folder; each file gets the permissions of any new one, and no other is left."""
    (tmp_path / "usual").touch()

    def flush(name: str) -> None:
        for number in range(50):
            path = tmp_path / f"{name}{number}"
            path.touch(mode=0o600)
            flush_to_disk(path)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(flush, "abcdefgh"))
    made = list(tmp_path.iterdir())
    assert len(made) == 1 + 8 * 50
    assert {path.stat().st_mode for path in made} == {(tmp_path / "usual").stat().st_mode}


def test_a_temporary_file_does_not_depend_on_the_process(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a") as one, atomic_path(tmp_path / "a") as other:
        assert one != other
        one.write_text("1")
        other.write_text("2")
    assert (tmp_path / "a").read_text() == "1"


def test_what_a_killed_process_left_goes_and_what_another_writes_stays(tmp_path: Path) -> None:
    code = """
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""
    path = tmp_path / "a"
    killed, living = start_child(code, path), start_child(code, path)
    kill(killed)
    assert len(names(tmp_path)) == 2
    write_text(path, "whole")
    # The other one's is locked.
    assert len([name for name in names(tmp_path) if name.startswith(".a.")]) == 1
    assert remove_abandoned(tmp_path, "a") == 0
    kill(living)
    write_text(path, "again")
    assert names(tmp_path) == ["a"]


def test_a_folder_that_is_taken_for_abandoned_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = [], files.tempfile.mkdtemp

    def and_removed(**options: Any) -> str:
        made.append(make(**options))
        if len(made) == 1:
            # Between its making and its locking.
            assert remove_abandoned(tmp_path, "a") == 1
        return made[-1]

    monkeypatch.setattr("prefixtune.utils.files.tempfile.mkdtemp", and_removed)
    with work_folder(tmp_path, "a") as folder:
        assert folder.is_dir()
        # Now it is locked.
        assert remove_abandoned(tmp_path, "a") == 0
    assert names(tmp_path) == []


def test_a_folder_that_others_removed_and_made_again_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[Path] = []

    def lose_first(path: Path, timeout: float) -> object:
        if not lost:
            lost.append(path.parent)
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return acquire_lock(path, timeout)

    monkeypatch.setattr("prefixtune.utils.locks.acquire_lock", lose_first)
    with work_folder(tmp_path, "a") as folder:
        assert lost
        assert folder != lost[0]


def test_lines_are_appended(tmp_path: Path) -> None:
    with line_writer(tmp_path / "log") as append:
        append("1")
        assert (tmp_path / "log").read_text() == "1\n"
        append("2")
    assert (tmp_path / "log").read_text() == "1\n2\n"
    with pytest.raises(PrefixError, match="cannot write"), line_writer(tmp_path / "none" / "log"):
        pass
    if Path("/dev/full").exists():
        with (
            pytest.raises(PrefixError, match="cannot write '/dev/full': No space left"),
            line_writer(Path("/dev/full")) as append,
        ):
            append("1")


def test_a_file_of_lines_is_renamed_when_it_is_full_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for number in range(9):
        append_line(path, f"line {number}", max_bytes=14, max_old=2)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "log": "line 8\n",
        "log.1": "line 6\nline 7\n",
        "log.2": "line 4\nline 5\n",
    }


def test_processes_that_append_and_rename_together_lose_and_divide_no_line(tmp_path: Path) -> None:
    path, count = tmp_path / "log", 400
    code = (
        "def append(name):\n"
        "    for number in range(int(sys.argv[2])):\n"
        "        append_line(Path(sys.argv[1]), f'{name} {number}', max_bytes=200, max_old=2000)\n"
        "from threading import Thread\n"
        "threads = [Thread(target=append, args=(f'{sys.argv[3]}{name}',)) for name in 'xy']\n"
        "[thread.start() for thread in threads]\n"
        "print('ready', flush=True)\n"
        "[thread.join() for thread in threads]\n"
    )
    children = [start_child(code, path, count, name) for name in "ab"]
    for child in children:
        child.communicate(timeout=60)
    assert [child.returncode for child in children] == [0, 0]
    lines = [line for file in tmp_path.iterdir() for line in file.read_text().splitlines()]
    assert sorted(lines) == sorted(f"{name} {number}" for name in ("ax", "ay", "bx", "by") for number in range(count))
    assert len(list(tmp_path.iterdir())) > 20


def test_a_line_that_was_cut_off_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("cut o")
    append_line(path, "whole")
    assert path.read_text() == "cut o\nwhole\n"
    if Path("/dev/full").exists():
        with pytest.raises(PrefixError, match="cannot write '/dev/full': No space left"):
            append_line(Path("/dev/full"), "1")


# --- several files ----------------------------------------------------------------------------------------------------


def write_files(folder: Path, text: str) -> None:
    with atomic_files(folder) as made:
        for name in ("a", "b", "e"):
            (made / name).write_text(text)


def test_files_are_moved_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    for text in ("old", "new"):
        with atomic_files(folder) as made:
            for name in ("a", "b", "c/d"):
                (made / name).parent.mkdir(exist_ok=True)
                (made / name).write_text(text)
            assert not (folder / "a").exists() or (folder / "a").read_text() == "old"
        assert {(folder / name).read_text() for name in ("a", "b", "c/d")} == {text}
    assert names(folder) == ["a", "b", "c"]
    (folder / "mine").touch()
    replace, calls = os.replace, []

    def broken(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 3:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr("prefixtune.utils.files.os.replace", broken)
    with pytest.raises(PrefixError, match="Input/output error"):
        write_files(folder, "newer")
    # One that was moved is put back, and one that was not there before is gone.
    assert names(folder) == ["a", "b", "c", "mine"]
    assert {(folder / name).read_text() for name in ("a", "b", "c/d")} == {"new"}


def test_what_is_open_cannot_be_removed_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_on_windows(path: Path, ignore_errors: bool) -> None:
        for inner in path.iterdir():
            if inner.name != ".lock":
                inner.unlink()

    (tmp_path / ".a.left.tmp").mkdir()
    (tmp_path / ".a.left.tmp" / "half").touch()
    monkeypatch.setattr(files, "_KEEPS_OPEN_FILES", True)
    monkeypatch.setattr(files.shutil, "rmtree", as_on_windows)
    assert remove_abandoned(tmp_path, "a") == 1
    assert names(tmp_path) == []
