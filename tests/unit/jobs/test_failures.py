"""What a job's owner is told of an error."""

from __future__ import annotations

import errno
from pathlib import Path

from prefixtune.errors import ConfigError, DataError, PrefixError
from prefixtune.jobs.failures import describe_failure, is_temporary
from prefixtune.jobs.folder import JobFolder


def test_what_is_gone_for_good_does_not_pass(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "jobs" / "ftjob-1")
    gone = PrefixError("cannot read.")
    gone.__cause__ = FileNotFoundError(errno.ENOENT, "no such file", str(folder.run / "events.jsonl"))
    # All jobs are away, such as a disk that is not mounted.
    assert is_temporary(gone, folder)
    folder.root.mkdir(parents=True)
    assert not is_temporary(gone, folder)
    for kind in (IsADirectoryError, NotADirectoryError):
        assert not is_temporary(kind(errno.EISDIR, "a folder"), folder)
    assert is_temporary(FileNotFoundError(errno.ENOENT, "no such folder", str(tmp_path / "prefixes")), folder)
    assert is_temporary(OSError(errno.ENOSPC, "full"), folder)


def test_an_error_that_hides_another_has_no_other_cause(tmp_path: Path) -> None:
    error = PrefixError("something else.")
    error.__context__ = OSError(errno.ENOSPC, "full")
    assert is_temporary(error, JobFolder(tmp_path))
    # As `raise ... from None` does.
    error.__suppress_context__ = True
    assert not is_temporary(error, JobFolder(tmp_path))


def test_the_way_out_is_told_and_no_path(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "ftjob-1")
    told = describe_failure(DataError(f"{folder.inputs / 'train.jsonl'}: line 3 is empty.", hint="remove it."), folder)
    assert told.message == "train.jsonl: line 3 is empty. Remove it."
    assert describe_failure(ConfigError("patience is 3."), folder).message == "patience is 3."
