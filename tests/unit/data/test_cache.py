"""The cache of data: found again, built again where it is broken, bounded, safe for two processes, one-line errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefixtune.data import cache
from prefixtune.data.cache import ColumnWriter, Stored, content_key, stored
from prefixtune.errors import ConfigError, DataError, PrefixError, PrefixWarning
from prefixtune.utils.locks import file_lock


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREFIXTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(cache.SWITCH, raising=False)
    return tmp_path / "home"


class Builder:
    """Builds an entry of two columns, and counts how often."""

    def __init__(self, size: int = 5, seconds: float = 0) -> None:
        self.size, self.seconds, self.times = size, seconds, 0

    def __call__(self, writer: ColumnWriter) -> Mapping[str, Any]:
        self.times += 1
        for number in range(self.size):
            writer.append("a", np.array([number, number], np.int64))
        writer.append("none", np.empty(0, np.int32))
        writer.append("dropped", np.zeros(3, np.int32))
        writer.drop("dropped")
        time.sleep(self.seconds)
        return {"size": self.size}


def check(entry: Stored, size: int = 5) -> None:
    assert entry.columns["a"].tolist() == [number for number in range(size) for _ in range(2)]
    assert set(entry.columns) == {"a", "none"}
    assert not len(entry.columns["none"])
    assert entry.facts == {"size": size}


def test_an_entry_is_built_once():
    build, key = Builder(), content_key(x=1)
    first, again = stored(key, build), stored(key, build)
    check(first)
    check(again)
    assert build.times == 1
    again.release()
    check(again)
    assert content_key(x=1) == key != content_key(x=2)


def test_an_entry_of_another_user_is_used(monkeypatch: pytest.MonkeyPatch):
    build, key = Builder(), content_key(x=1)
    check(stored(key, build))

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "not yours")

    monkeypatch.setattr(os, "utime", refuse)
    check(stored(key, build))
    assert build.times == 1


@pytest.mark.parametrize("damage", ["number", "size", "missing", "index", "facts", "no json"])
def test_a_broken_entry_is_built_again(damage: str):
    build, key = Builder(), content_key(x=1)
    check(stored(key, build))
    folder = cache.data_folder() / key
    column, index = folder / "a.bin", folder / "index.json"
    if damage == "number":
        column.write_bytes(b"\1" + column.read_bytes()[1:])
    elif damage == "size":
        column.write_bytes(column.read_bytes()[:-1])
    elif damage == "missing":
        column.unlink()
    elif damage == "index":
        index.unlink()
    elif damage == "facts":
        index.write_text(json.dumps({**json.loads(index.read_text()), "facts": {"size": 6}}))
    else:
        index.write_text("[" * 5000)
    check(stored(key, build))
    assert build.times == 2
    check(stored(key, build))
    assert build.times == 2


def test_a_failed_entry_leaves_nothing():
    def build(writer: ColumnWriter) -> Mapping[str, Any]:
        writer.append("a", np.zeros(3))
        raise DataError("row 3 is wrong.") from OSError(5, "no")

    for key in (content_key(x=1), None):
        with pytest.raises(DataError, match="row 3"):
            stored(key, build)
    assert list(cache.data_folder().iterdir()) == []


def test_two_builders_at_once_build_once():
    build, key = Builder(seconds=0.2), content_key(x=1)
    entries: list[Stored] = []
    threads = [threading.Thread(target=lambda: entries.append(stored(key, build))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entries) == 3
    for entry in entries:
        check(entry)
    assert build.times == 1


def test_two_processes_at_once_build_once(tmp_path: Path):
    program = """
import pathlib, sys, time
import numpy as np
from prefixtune.data.cache import content_key, stored
def build(writer):
    pathlib.Path(sys.argv[1]).open("a").write("built\\n")
    time.sleep(0.5)
    writer.append("a", np.arange(9))
    return {}
print(int(stored(content_key(x=1), build).columns["a"].sum()))
"""
    children = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [child.communicate()[0] for child in children] == ["36\n"] * 2
    assert (tmp_path / "log").read_text() == "built\n"


def test_another_builder_that_stands_still_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "_LOOK", 0.1)
    monkeypatch.setattr(cache, "_PATIENCE", 0.3)
    key = content_key(x=1)
    cache.data_folder().mkdir(parents=True)
    with file_lock(cache.data_folder() / f"{key}.lock") as mine:
        assert mine
        with pytest.warns(PrefixWarning) as caught:
            check(stored(key, Builder()))
    said = [str(warning.message) for warning in caught]
    assert said[0].startswith("another process prepares the same data in")
    assert "has written nothing for" in said[1]
    assert list(cache.data_folder().iterdir()) == []


def test_another_builder_that_goes_on_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "_LOOK", 0.1)
    # Less than all of it takes, and more than a slow disk takes to flush it.
    monkeypatch.setattr(cache, "_PATIENCE", 1.2)
    monkeypatch.setattr(cache, "_BLOCK", 16)
    key = content_key(x=1)
    started = threading.Event()

    class Slow(Builder):
        def __call__(self, writer: ColumnWriter) -> Mapping[str, Any]:
            self.times += 1
            for number in range(self.size):
                writer.append("a", np.array([number, number], np.int64))
                started.set()
                time.sleep(0.15)
            writer.append("none", np.empty(0, np.int32))
            return {"size": self.size}

    first, second = Slow(20), Builder(20)
    thread = threading.Thread(target=lambda: stored(key, first))
    thread.start()
    started.wait()
    with pytest.warns(PrefixWarning, match="another process prepares the same data"):
        check(stored(key, second), 20)
    thread.join()
    assert (first.times, second.times) == (1, 0)


def test_what_a_killed_builder_left_is_removed(home: Path):
    program = """
import sys, time
import numpy as np
from prefixtune.data.cache import content_key, stored
def build(writer):
    writer.append("a", np.arange(9))
    print("ready", flush=True)
    time.sleep(600)
stored(content_key(x=1), build)
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    assert len(list(cache.data_folder().glob(".*.tmp"))) == 1
    # While that one works, it keeps its folder.
    stored(content_key(x=2), Builder())
    assert len(list(cache.data_folder().glob(".*.tmp"))) == 1
    child.kill()
    child.communicate()
    stored(content_key(x=3), Builder())
    assert list(cache.data_folder().glob(".*.tmp")) == []


def test_an_entry_that_another_process_removes_at_once_is_built_for_this_run(monkeypatch: pytest.MonkeyPatch):
    build, key = Builder(), content_key(x=1)
    # What is called between making the entry and opening it.
    monkeypatch.setattr(cache, "fsync", lambda folder: shutil.rmtree(folder / key))
    check(stored(key, build))
    assert build.times == 2


def test_what_was_not_used_for_longest_is_removed(monkeypatch: pytest.MonkeyPatch):
    keys = [content_key(x=number) for number in range(4)]
    first = stored(keys[0], Builder(100))
    stored(keys[1], Builder(100))
    for age, key in enumerate(keys[:2]):
        os.utime(cache.data_folder() / key / "index.json", (1000 + age, 1000 + age))
    stored(keys[0], Builder(100))  # used now
    size = sum(file.stat().st_size for file in (cache.data_folder() / keys[0]).iterdir())
    monkeypatch.setenv(cache.SWITCH, str(2.5 * size / 1e9))
    stored(keys[2], Builder(100))
    assert {folder.name for folder in cache.data_folder().iterdir()} == {keys[0], keys[2]}
    # The newest is kept, even where it alone is too large; what is open stays readable.
    monkeypatch.setenv(cache.SWITCH, str(0.5 * size / 1e9))
    check(stored(keys[3], Builder(100)), 100)
    assert [folder.name for folder in cache.data_folder().iterdir()] == [keys[3]]
    check(first, 100)


@pytest.mark.parametrize("key", [None, "off"])
def test_a_temporary_entry_leaves_no_file(key: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path):
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    if key:
        monkeypatch.setenv(cache.SWITCH, "0")
    before = set(tmp_path.iterdir())
    check(stored(key, Builder()))
    assert set(tmp_path.iterdir()) == before
    assert not home.exists()


def test_a_folder_that_cannot_be_written_is_done_without(home: Path):
    home.write_text("no folder")
    check(stored(content_key(x=1), Builder()))


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "flush_to_disk", full)
    for key in (content_key(x=1), None):
        with pytest.raises(PrefixError, match="No space left") as caught:
            stored(key, Builder())
        assert "PREFIXTUNE_HOME" in caught.value.hint
    assert list(cache.data_folder().iterdir()) == []


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_is_refused(text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(cache.SWITCH, text)
    with pytest.raises(ConfigError, match=cache.SWITCH):
        stored(content_key(x=1), Builder())
