"""Locks end with their process, whatever ends it."""

from __future__ import annotations

import errno
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from child_process import kill, start_child
from patching import replace_everywhere
from prefixtune.errors import PrefixError
from prefixtune.utils.locks import acquire_lock, claim_folder, describe_owner, file_lock


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_one_process_s(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = 'with claim_folder(Path(sys.argv[1])):\n    print("ready", flush=True)\n    time.sleep(600)\n'
    other = start_child(code, folder)
    with pytest.raises(PrefixError, match=rf"run' is in use by process {other.pid} \(") as raised, claim_folder(folder):
        pass
    assert "choose another folder" in raised.value.hint
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
    with file_lock(path) as mine:
        assert mine
        path.write_text(f"{os.getpid()}\n{platform.node()}\n12.5\n")
        assert describe_owner(path) == "another process"
        path.write_text(f"{os.getpid()}\nelsewhere\n12.5\n")
        assert describe_owner(path) == "another process (on elsewhere)"
        path.write_bytes(b"\xff\xfe")
        assert describe_owner(path) == "another process"


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

    replace_everywhere(monkeypatch, acquire_lock, denied)
    (tmp_path / ".lock").touch()
    with (
        pytest.raises(PrefixError, match=r"the lock '.*\.lock' belongs to another user") as raised,
        claim_folder(tmp_path),
    ):
        pass
    assert "delete it if nobody works there" in raised.value.hint
    assert names(tmp_path) == [".lock"]
    # Where none can be made, whoever writes there meets the error.
    (tmp_path / ".lock").unlink()
    with file_lock(tmp_path / ".lock") as mine:
        assert mine


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="only root becomes another user")
def test_a_lock_that_root_left_is_named() -> None:
    code = """
import os, sys
from pathlib import Path
import filelock, psutil
from prefixtune.utils.locks import claim_folder
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


def test_the_content_of_a_lock_is_left_alone(tmp_path: Path) -> None:
    """Where a system lacks locks, the library keeps the holder in the file, and reads it again."""
    with claim_folder(tmp_path):
        assert (tmp_path / ".lock").read_bytes() == b""
        with pytest.raises(PrefixError, match=rf"in use by process {os.getpid()} "), claim_folder(tmp_path):
            pass
    assert names(tmp_path) == []


def test_who_waits_for_a_lock_gets_it(tmp_path: Path) -> None:
    path, order = tmp_path / "lock", list[str]()

    def wait() -> None:
        with file_lock(path, timeout=-1.0) as mine:
            order.append(f"second {mine}")

    with file_lock(path) as mine:
        assert mine
        with file_lock(path) as too:
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
    other = start_child(code, tmp_path)
    other.send_signal(signal.SIGKILL)
    other.communicate()
    with claim_folder(tmp_path):
        pass
