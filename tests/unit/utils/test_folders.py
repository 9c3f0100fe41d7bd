"""Paths with a `~`, also of a user who does not exist; and the cache's folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prefixtune.utils.folders import cache_folder, expand_home

NO_USER = "~no-such-user/prefixes"

pytestmark = pytest.mark.skipif(os.name == "nt", reason="on Windows every user has a home beside the own one")


def test_a_user_who_does_not_exist_has_no_home() -> None:
    assert expand_home("~/prefixes") == Path.home() / "prefixes"
    assert expand_home(NO_USER) == Path(NO_USER)


@pytest.mark.parametrize(("variable", "below"), [("PREFIXTUNE_HOME", ""), ("XDG_CACHE_HOME", "prefixtune")])
def test_the_cache_may_be_below_any_home(variable: str, below: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFIXTUNE_HOME", raising=False)
    monkeypatch.setenv(variable, "~/caches")
    assert cache_folder() == Path.home() / "caches" / below
