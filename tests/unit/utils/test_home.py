"""Paths with a `~`, also of a user who does not exist."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prefixtune.cli.main import main
from prefixtune.distillation.distill import stored_distillation
from prefixtune.errors import ConfigError
from prefixtune.training.folder import stored_config
from prefixtune.utils.cache_folder import cache_folder
from prefixtune.utils.home import expand_home

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
    monkeypatch.setenv(variable, NO_USER)
    assert cache_folder() == Path(NO_USER) / below


def test_a_run_is_resumed_from_where_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    for name, find in (("config.toml", stored_config), ("distill.toml", stored_distillation)):
        (tmp_path / "run" / name).write_text("")
        assert find("~/run") == find(Path("~/run")) == tmp_path / "run" / name


def test_without_a_home_the_cache_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("PREFIXTUNE_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(ConfigError, match="no home folder") as caught:
        cache_folder()
    assert "PREFIXTUNE_HOME" in caught.value.hint
    assert main(["--install-completion", "--shell", "bash"]) == 2
    assert "no home folder" in capsys.readouterr().err
