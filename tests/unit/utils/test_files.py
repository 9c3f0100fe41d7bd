"""Writing files: old or new and never between, locks that end with their process, and what cannot be written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from prefixtune.errors import PrefixError
from prefixtune.utils import files
from prefixtune.utils.files import (
    appending,
    atomic_files,
    atomic_path,
    check_folder_writable,
    check_writable,
    claim_folder,
    locked,
    remove_abandoned,
    work_folder,
    write_text,
    writing,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def child(code: str, *words: object) -> subprocess.Popen[str]:
    """A process that does something with this project's files, says so, and waits to be killed."""
    program = f"import sys, time\nfrom pathlib import Path\nfrom prefixtune.utils.files import *\n{code}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


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
        with pytest.raises(PrefixError, match=r"cannot write '.*a': No space left on device\.") as told:
            write_half(tmp_path / "a", error)
        cause = told.value.__cause__
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
    killed, living = child(code, path), child(code, path)
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


def test_lines_are_appended(tmp_path: Path) -> None:
    with appending(tmp_path / "log") as append:
        append("1")
        assert (tmp_path / "log").read_text() == "1\n"
        append("2")
    assert (tmp_path / "log").read_text() == "1\n2\n"
    with pytest.raises(PrefixError, match="cannot write"), appending(tmp_path / "none" / "log"):
        pass
    if Path("/dev/full").exists():
        with (
            pytest.raises(PrefixError, match="cannot write '/dev/full': No space left"),
            appending(Path("/dev/full")) as append,
        ):
            append("1")


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


# --- locks ------------------------------------------------------------------------------------------------------------


def test_a_folder_is_one_process_s(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = 'with claim_folder(Path(sys.argv[1])):\n    print("ready", flush=True)\n    time.sleep(600)\n'
    other = child(code, folder)
    with pytest.raises(PrefixError, match=rf"run' is in use by process {other.pid} \(") as told, claim_folder(folder):
        pass
    assert "choose another folder" in told.value.hint
    kill(other)
    # The lock ended with its process.
    with claim_folder(folder), claim_folder(tmp_path / "new"):
        with pytest.raises(PrefixError, match=rf"in use by process {os.getpid()} "), claim_folder(folder):
            pass
        assert (tmp_path / "new").is_dir()
    # Nothing was written to the one that was made.
    assert (names(tmp_path), names(folder)) == (["run"], [])
    (folder / "mine").touch()
    with claim_folder(folder):
        pass
    assert names(folder) == ["mine"]


def test_another_process_of_the_same_number_is_not_named(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path) as mine:
        assert mine
        path.write_text(f"{os.getpid()}\n{files.platform.node()}\n12.5\n")
        assert files._holder(path) == "another process"
        path.write_text(f"{os.getpid()}\nelsewhere\n12.5\n")
        assert files._holder(path) == "another process (on elsewhere)"
        path.write_bytes(b"\xff\xfe")
        assert files._holder(path) == "another process"


def test_a_folder_that_was_made_goes_again_with_its_parents(tmp_path: Path) -> None:
    with claim_folder(tmp_path / "a" / "b" / "c"):
        assert (tmp_path / "a" / "b" / "c").is_dir()
    assert names(tmp_path) == []
    with claim_folder(tmp_path / "a" / "b" / "c"):
        (tmp_path / "a" / "mine").touch()
    assert names(tmp_path / "a") == ["mine"]


def test_a_lock_of_another_user_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has it, but it cannot be opened, and so it would block the folder for ever."""

    def denied(path: Path, timeout: float) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(files, "_acquire", denied)
    (tmp_path / ".lock").touch()
    with (
        pytest.raises(PrefixError, match=r"the lock '.*\.lock' belongs to another user") as told,
        claim_folder(tmp_path),
    ):
        pass
    assert "delete it if nobody works there" in told.value.hint
    assert names(tmp_path) == [".lock"]
    # Where none can be made, whoever writes there meets the error.
    (tmp_path / ".lock").unlink()
    with locked(tmp_path / ".lock") as mine:
        assert mine


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="only root becomes another user")
def test_a_lock_that_root_left_is_named() -> None:
    code = """
import os, sys
from pathlib import Path
import filelock, psutil
from prefixtune.utils.files import claim_folder
os.setuid(12345)
try:
    with claim_folder(Path(sys.argv[1])):
        print("claimed")
except Exception as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # Not in pytest's own folder, into which root alone may look.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / ".lock").touch(0o644)
        done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, env=environment)
    assert "belongs to another user" in done.stdout, done.stdout + done.stderr


def test_what_stands_in_a_lock_is_left_alone(tmp_path: Path) -> None:
    """Where a system lacks locks, the library keeps the holder in the file, and reads it again."""
    with claim_folder(tmp_path):
        assert (tmp_path / ".lock").read_bytes() == b""
        with pytest.raises(PrefixError, match=rf"in use by process {os.getpid()} "), claim_folder(tmp_path):
            pass
    assert names(tmp_path) == []


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


def test_who_waits_for_a_lock_gets_it(tmp_path: Path) -> None:
    path, order = tmp_path / "lock", list[str]()

    def wait() -> None:
        with locked(path, timeout=-1.0) as mine:
            order.append(f"second {mine}")

    with locked(path) as mine:
        assert mine
        with locked(path) as too:
            assert not too
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second True"]
    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_run_that_is_killed_can_be_gone_on_with(tmp_path: Path) -> None:
    code = 'with claim_folder(Path(sys.argv[1])):\n    print("ready", flush=True)\n    time.sleep(600)\n'
    other = child(code, tmp_path)
    other.send_signal(signal.SIGKILL)
    other.communicate()
    with claim_folder(tmp_path):
        pass


# --- before the work --------------------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_said_before(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PrefixError, match=r"cannot write .*it is a folder"):
        check_writable(tmp_path)
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "a" / "b"):
        with pytest.raises(PrefixError, match="cannot write"):
            check_writable(path)
    with pytest.raises(PrefixError, match=r"cannot write .*file': it is a file"):
        check_folder_writable(tmp_path / "file")
    check_writable(tmp_path / "new" / "deep" / "a")
    check_folder_writable(tmp_path / "new" / "deep")
    # As it was.
    assert names(tmp_path) == ["file"]
    (tmp_path / "old").mkdir()
    check_writable(tmp_path / "old" / "deep" / "a")
    assert names(tmp_path / "old") == []


def test_errors_of_others_are_left_as_they_are(tmp_path: Path) -> None:
    for error in (ValueError("no"), PrefixError("mine"), RuntimeError("os error 28")):
        with pytest.raises(type(error)) as told, writing(tmp_path):
            raise error
        assert told.value is error
