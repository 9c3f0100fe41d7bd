"""Whether a study in a folder is the one that its settings say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefixtune.errors import ConfigError
from prefixtune.studies import StudyConfig, plan
from prefixtune.studies.records import Provenance, check_same_study, make_folders, write_study


def test_smaller_samples_than_those_few_shot_shows_are_refused(tmp_path: Path) -> None:
    config = StudyConfig(output=str(tmp_path), methods=("prefix", "few-shot"), sizes=(100,))
    stored = {"config": config.to_dict(), "train_defaults": {"reparameterization": "scaled"}}
    with pytest.raises(ConfigError) as error:
        check_same_study(config.replace(sizes=(50, 100)), stored)
    assert "sizes was [100], is [50, 100] (few-shot shows examples of the smallest sample)" in error.value.message
    assert "no smaller sizes" in error.value.hint
    check_same_study(config.replace(sizes=(100, 200)), stored)


def test_growth_with_another_reparameterization_is_refused(tmp_path: Path) -> None:
    config = StudyConfig(
        output=str(tmp_path / "study"), methods=("zero-shot", "prefix"), train_settings={"max_steps": 2}
    )
    path = config.folder / "study.json"
    make_folders(config)
    facts = {"config": config.to_dict()}
    path.write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"reparameterization': 'residual'.*reparameterization': 'scaled'"):
        check_same_study(config, facts)
    residual = config.replace(train_settings={**config.train_settings, "reparameterization": "residual"})
    check_same_study(residual, facts)
    own = {**config.train_settings, "prefix": {"reparameterization": "residual"}}
    check_same_study(config.replace(train_settings=own), facts)
    write_study(residual, plan(residual), Provenance("a command"))
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["train_defaults"] == {"reparameterization": "scaled"}
    check_same_study(residual, stored)
    untouched = {"config": config.replace(methods=("full",)).to_dict()}
    check_same_study(config.replace(methods=("full", "prefix")), untouched)
