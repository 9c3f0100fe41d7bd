"""What a study leaves out, in words."""

from __future__ import annotations

import pytest

from prefixtune.studies import STUDIES, StudyConfig
from prefixtune.studies.reductions import describe_reductions, idle_patience


def without(config: StudyConfig) -> list[str]:
    return [text for text in describe_reductions(config, [], 9) if " without " in text]


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_as_it_is_leaves_nothing_out(name: str) -> None:
    assert without(StudyConfig(name=name)) == []


def test_a_method_counts_with_its_size_where_the_study_names_one() -> None:
    variants = {"slow": {"method": "lora:64", "warmup_steps": 90}}
    ceiling = StudyConfig(name="ceiling", methods=["full", "prefix", "lora:4", "slow"], variants=variants)
    assert without(ceiling) == ["methods without lora:1, lora:16"]
    # Where it names none, any size will do.
    assert without(StudyConfig(name="scale", methods=["prefix", "lora:4", "full"])) == []


def test_patience_that_no_run_is_long_enough_for_is_named() -> None:
    # By default it can act.
    assert idle_patience(StudyConfig(name="low-data")) == []
    late = StudyConfig(name="low-data", train_settings={"eval_every": 100})
    assert idle_patience(late) == [
        "patience 5 stops no run of 200 steps, which is evaluated every 100 steps",
        "patience 5 stops no run of 400 steps, which is evaluated every 100 steps",
    ]
    assert set(idle_patience(late)) <= set(describe_reductions(late, [], 9))
    epochs = {"epochs": 2.0, "batch_size": 5, "eval_every": 10}
    assert idle_patience(StudyConfig(sizes=[100], patience=4, train_settings=epochs)) == [
        "patience 4 stops no run of 40 steps, which is evaluated every 10 steps"
    ]
    # How long it is, is known only with the data.
    assert idle_patience(StudyConfig(sizes=[0], patience=4, train_settings=epochs)) == []
