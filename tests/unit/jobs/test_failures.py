"""What a job's owner is told of an error."""

from __future__ import annotations

from pathlib import Path

from prefixtune.errors import ConfigError, DataError
from prefixtune.jobs.failures import describe_failure
from prefixtune.jobs.folder import JobFolder


def test_the_way_out_is_told_and_no_path(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "ftjob-1")
    told = describe_failure(DataError(f"{folder.inputs / 'train.jsonl'}: line 3 is empty.", hint="remove it."), folder)
    assert told.message == "train.jsonl: line 3 is empty. Remove it."
    assert describe_failure(ConfigError("patience is 3."), folder).message == "patience is 3."
