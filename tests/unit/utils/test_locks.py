"""Locks end with their process, whatever ends it."""

import threading
import time

import pytest

from child_process import kill, start_child
from prefixtune.errors import PrefixError
from prefixtune.utils.files import claim_folder
from prefixtune.utils.locks import file_lock


def names(folder):
    return sorted(path.name for path in folder.iterdir())


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
