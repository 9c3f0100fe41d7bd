"""Paths with a `~`, also of a user who does not exist; and the user's folders."""

from pathlib import Path

from prefixtune.jobs.config import jobs_folder
from prefixtune.utils.folders import cache_folder, data_folder, expand_home

NO_USER = "~no-such-user/prefixes"


def test_a_user_who_does_not_exist_has_no_home():
    assert expand_home("~/prefixes") == Path.home() / "prefixes"
    assert expand_home(NO_USER) == Path(NO_USER)


def test_the_users_folders_may_be_below_any_home(monkeypatch):
    monkeypatch.delenv("PREFIXTUNE_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "~/caches")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert cache_folder() == Path.home() / "caches" / "prefixtune"
    assert data_folder() == Path.home() / ".local" / "share" / "prefixtune"
    monkeypatch.setenv("PREFIXTUNE_HOME", "~/all")
    assert (cache_folder(), data_folder()) == (Path.home() / "all", Path.home() / "all" / "data")


def test_each_folder_of_prefixes_has_jobs_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFIXTUNE_HOME", str(tmp_path))
    assert jobs_folder("mine", "a/prefixes") == Path.cwd() / "mine"
    one, other = jobs_folder("", "a/prefixes"), jobs_folder("", "b/prefixes")
    assert one != other
    assert one == jobs_folder("", str(Path.cwd() / "a" / "prefixes"))
    assert one.parent == tmp_path / "data" / "jobs"
