"""A database of jobs that the tests of a module share."""

from __future__ import annotations

import pytest

from prefixtune.jobs.queue import migrate


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a database with its tables."""
    made = f"sqlite:///{tmp_path_factory.mktemp('queue') / 'jobs.sqlite'}"
    migrate(made)
    return made
