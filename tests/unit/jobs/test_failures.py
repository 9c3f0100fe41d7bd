"""What a job's owner is told of an error, and which errors pause a job."""

from __future__ import annotations

import errno
from pathlib import Path

from prefixtune.errors import ConfigError, DataError, PrefixError
from prefixtune.jobs.failures import describe_failure, pause_reason
from prefixtune.jobs.folder import JobFolder


def test_what_the_disk_refuses_pauses() -> None:
    error = PrefixError("something else.")
    error.__context__ = OSError(errno.ENOSPC, "full")
    assert "full" in pause_reason(error)
    assert pause_reason(OSError(errno.EIO, "a bad block"))
    # As `raise ... from None` does.
    error.__suppress_context__ = True
    assert pause_reason(error) == ""
    wrong = DataError("it cannot be read.")
    wrong.__cause__ = OSError(errno.EIO, "a bad block")
    assert pause_reason(wrong) == ""


def test_the_way_out_is_told_and_no_path(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "ftjob-1")
    told = describe_failure(DataError(f"{folder.inputs / 'train.jsonl'}: line 3 is empty.", hint="remove it."), folder)
    assert told.message == "train.jsonl: line 3 is empty. Remove it."
    assert (told.code, told.param) == ("invalid_training_file", "training_file")
    assert describe_failure(ConfigError("patience is 3."), folder).message == "patience is 3."
