"""Paths that cannot be written are reported before the work, in one line."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from prefixtune.errors import PrefixError
from prefixtune.utils.files import write_text
from prefixtune.utils.writable import check_writable, reporting_write_errors, writable_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_cannot_be_written_is_said_before(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PrefixError, match=r"cannot write .*it is a folder"):
        check_writable(tmp_path)
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "a" / "b"):
        with pytest.raises(PrefixError, match="cannot write"):
            check_writable(path)
    with (
        pytest.raises(PrefixError, match=r"cannot write .*file': it is a file"),
        writable_folder(tmp_path / "file", tmp_path / "file"),
    ):
        pass
    check_writable(tmp_path / "new" / "deep" / "a")
    with writable_folder(tmp_path / "new" / "deep", tmp_path / "new" / "deep"):
        pass
    # As it was.
    assert names(tmp_path) == ["file"]
    (tmp_path / "old").mkdir()
    check_writable(tmp_path / "old" / "deep" / "a")
    assert names(tmp_path / "old") == []


def test_a_new_folder_that_another_process_takes_away_again_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has made the folder, too, and has only looked whether it can be written."""
    real, times = tempfile.TemporaryFile, [1]

    def take_away(dir: Path) -> Any:
        if times:
            times.pop()
            dir.rmdir()
        return real(dir=dir)

    monkeypatch.setattr("prefixtune.utils.writable.tempfile.TemporaryFile", take_away)
    with writable_folder(tmp_path / "new", tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    times += [1] * 9
    with pytest.raises(PrefixError, match=r"cannot write .*new/a': No such file or directory"):
        check_writable(tmp_path / "new" / "a")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in folders here")
def test_a_pipe_or_a_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(PrefixError, match="it is a device or a pipe"):
            check_writable(tmp_path / name)
        with pytest.raises(PrefixError, match="it is a device or a pipe"):
            write_text(tmp_path / name, "text")
    assert (tmp_path / "pipe").is_fifo()
    assert names(tmp_path) == ["link", "pipe"]


def test_errors_of_others_are_left_as_they_are(tmp_path: Path) -> None:
    for error in (ValueError("no"), PrefixError("mine"), RuntimeError("os error 28")):
        with pytest.raises(type(error)) as raised, reporting_write_errors(tmp_path):
            raise error
        assert raised.value is error
