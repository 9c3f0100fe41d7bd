"""Whether a study in a folder is the one that its settings say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefixtune.errors import ConfigError
from prefixtune.studies import StudyConfig, plan, run_study
from prefixtune.studies.config import training_defaults
from prefixtune.studies.data import SharedBackbone
from prefixtune.studies.records import (
    Provenance,
    check_same_dtype,
    check_same_study,
    make_folders,
    write_cell,
    write_study,
)


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


def finish(config: StudyConfig, dtype: str) -> None:
    """Let all runs of a study be done in a dtype."""
    make_folders(config)
    for cell in plan(config):
        path = config.folder / "cells" / cell.id / "evaluation.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"settings": {"dtype": dtype}}), encoding="utf-8")
        write_cell(config, cell, "done", {})


def test_two_dtypes_are_mixed_only_on_request_and_named(tmp_path: Path) -> None:
    config = StudyConfig(output=str(tmp_path / "study"), methods=("zero-shot",))
    finish(config, "bfloat16")
    check_same_dtype(config, plan(config), "bfloat16")
    with pytest.raises(
        ConfigError, match="were computed in bfloat16, but this machine would compute in float32"
    ) as error:
        check_same_dtype(config, plan(config), "float32")
    assert "--dtype bfloat16" in error.value.hint
    named = config.replace(dtype="float32", methods=("zero-shot", "few-shot"), sizes=(9,))
    check_same_dtype(named, plan(named), "float32")
    check_same_study(named, {"config": config.replace(sizes=(9,)).to_dict(), "train_defaults": training_defaults()})
    (few_shot,) = [cell for cell in plan(named) if cell.method == "few-shot"]
    path = named.folder / "cells" / few_shot.id / "evaluation.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"settings": {"dtype": "float32"}}), encoding="utf-8")
    write_cell(named, few_shot, "done", {})
    write_study(named, plan(named), Provenance("a command"))
    cut = json.loads((named.folder / "study.json").read_text(encoding="utf-8"))["cut"]
    assert "computed in bfloat16 (1 runs) and float32 (1 runs)" in cut or (
        "computed in float32 (1 runs) and bfloat16 (1 runs)" in cut
    )


def test_a_finished_study_is_shown_on_any_machine_and_says_where_it_was_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = StudyConfig(output=str(tmp_path / "study"), methods=("zero-shot",))
    other = {"float32": "bfloat16", "bfloat16": "float32"}[SharedBackbone(config).dtype_name]
    finish(config, other)
    write_study(config, plan(config), Provenance("first", dtype=other))
    stored = (config.folder / "study.json").read_text(encoding="utf-8")
    monkeypatch.setattr("prefixtune.studies.records.describe_machine", lambda: {"processor": "another"})
    outcome = run_study(config, command="second")
    assert (len(outcome.done), outcome.left) == (1, ())
    assert (config.folder / "study.json").read_text(encoding="utf-8") == stored
    with pytest.raises(ConfigError, match=f"were computed in {other}"):
        run_study(config.replace(methods=("zero-shot", "few-shot")), command="third")


def test_a_folder_is_the_same_backbone_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    config = StudyConfig(output=str(tmp_path / "study"), backbone=str(tmp_path / "model"))
    stored = {"config": config.to_dict(), "train_defaults": training_defaults()}
    check_same_study(config.replace(backbone="model"), stored)
    with pytest.raises(ConfigError, match="backbone was"):
        check_same_study(config.replace(backbone="other"), stored)
