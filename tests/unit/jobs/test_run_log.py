"""The log of a job's run: a full disk leaves no gap in it, and no part of a line."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from prefixtune.errors import PrefixError
from prefixtune.jobs import run_log
from prefixtune.jobs.run_log import RunLog


def test_lines_that_a_full_disk_cuts_off_come_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("earlier\n")
    log = RunLog(path)

    def cut_off(*arguments: Any) -> Any:
        with open(*arguments) as file:
            file.seek(0, 2)
            file.write(b"fir")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(run_log, "open", cut_off, raising=False)
        for line in ("first", "second"):
            with pytest.raises(PrefixError, match="No space left"):
                log.append(line)
        with pytest.raises(PrefixError):
            log.flush()
    assert path.read_text().startswith("earlier\nfir")
    log.append("third")
    log.flush()
    assert path.read_text() == "earlier\nfirst\nsecond\nthird\n"
