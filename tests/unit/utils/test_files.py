"""Files are the old ones or the new ones, never a part; locks end with their process, and its work folders go."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from child_process import kill, start_child
from prefixtune.errors import PrefixError
from prefixtune.utils.files import (
    append_line,
    atomic_files,
    atomic_path,
    check_writable,
    claim_folder,
    remove_abandoned,
    write_text,
)
from prefixtune.utils.locks import file_lock


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- one file ---------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_at_once(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        temporary.chmod(0o600)
        assert path.read_text() == "old"
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert (names(path.parent), path.read_text()) == (["a.txt"], "new")


def write_half(path, error):
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error


def test_any_error_leaves_the_old_file(tmp_path):
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


def test_many_writers_of_one_file(tmp_path):
    """In two processes with one number, as in two containers, they would have overwritten each other's file."""
    path, faults = tmp_path / "a", list[Exception]()
    texts = [letter * 200_000 for letter in "abcdefgh"]

    def write(text):
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


def test_what_a_killed_process_left_goes_and_what_another_writes_stays(tmp_path):
    code = """
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""
    path = tmp_path / "a"
    killed, living = start_child(code, path), start_child(code, path)
    kill(killed)
    assert len(list(tmp_path.glob(".a.*.tmp"))) == 2
    write_text(path, "whole")
    # The other one's is locked.
    assert len(list(tmp_path.glob(".a.*.tmp"))) == 1
    assert remove_abandoned(tmp_path, "a") == 0
    kill(living)
    # Of one that was killed between the two: its folder is gone already.
    (tmp_path / ".a.0123456789abcdef.lock").touch()
    write_text(path, "again")
    assert names(tmp_path) == ["a"]


def test_processes_that_append_together_lose_and_divide_no_line(tmp_path):
    path, count = tmp_path / "log", 400
    code = (
        "print('ready', flush=True)\n"
        "for number in range(int(sys.argv[2])):\n"
        "    append_line(Path(sys.argv[1]), f'{sys.argv[3]} {number}')\n"
    )
    children = [start_child(code, path, count, name) for name in "ab"]
    for child in children:
        child.communicate(timeout=60)
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(path.read_text().splitlines()) == sorted(f"{name} {n}" for name in "ab" for n in range(count))


def test_a_line_that_was_cut_off_does_not_spoil_the_next_one(tmp_path):
    path = tmp_path / "log"
    path.write_text("cut o")
    append_line(path, "whole")
    assert path.read_text() == "cut o\nwhole\n"
    with pytest.raises(PrefixError, match="cannot write '/dev/full': No space left"):
        append_line(Path("/dev/full"), "1")


# --- several files ----------------------------------------------------------------------------------------------------


def test_files_are_moved_together(tmp_path):
    folder = tmp_path / "out"
    for text in ("old", "new"):
        with atomic_files(folder) as made:
            for name in ("a", "b", "c/d"):
                (made / name).parent.mkdir(exist_ok=True)
                (made / name).write_text(text)
            assert not (folder / "a").exists() or (folder / "a").read_text() == "old"
        assert {(folder / name).read_text() for name in ("a", "b", "c/d")} == {text}
    assert names(folder) == ["a", "b", "c"]


def test_a_new_folder_is_there_as_a_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "deep" / "out"

    def write():
        with atomic_files(folder) as made:
            (made / "a").write_text("new")
            assert not folder.exists()
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(PrefixError):
        write()
    assert names(tmp_path / "deep") == []
    with atomic_files(folder) as made:
        (made / "a").write_text("new")
    assert names(folder) == ["a"]
    (tmp_path / "usual").mkdir()
    assert folder.stat().st_mode == (tmp_path / "usual").stat().st_mode


# --- can it be written? -----------------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_said_before(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "a" / "b"):
        with pytest.raises(PrefixError):
            check_writable(path)
    check_writable(tmp_path / "new" / "deep" / "a")
    check_writable(tmp_path / "file")
    assert names(tmp_path) == ["file"]


def test_a_pipe_or_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(PrefixError):
            check_writable(tmp_path / name)
        with pytest.raises(PrefixError):
            write_text(tmp_path / name, "text")
    assert (tmp_path / "pipe").is_fifo()
    assert names(tmp_path) == ["link", "pipe"]


def test_a_folder_is_one_process_s(tmp_path):
    folder = tmp_path / "run"
    code = 'with claim_folder(Path(sys.argv[1])):\n    print("ready", flush=True)\n    time.sleep(600)\n'
    other = start_child(code, folder)
    with pytest.raises(PrefixError, match="run"), claim_folder(folder):
        pass
    kill(other)
    # The lock ended with its process.
    with claim_folder(folder), claim_folder(tmp_path / "new"):
        with pytest.raises(PrefixError, match="run"), claim_folder(folder):
            pass
        assert (tmp_path / "new").is_dir()
    # Nothing was written to the one that was made.
    assert (names(tmp_path), names(folder)) == (["run"], [])
    (folder / "mine").touch()
    with claim_folder(folder):
        pass
    assert names(folder) == ["mine"]


def test_who_waits_for_a_lock_gets_it(tmp_path):
    path, order = tmp_path / "lock", list[str]()

    def wait():
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
