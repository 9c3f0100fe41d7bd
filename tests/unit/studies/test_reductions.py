"""What a study leaves out, in words."""

from __future__ import annotations

import pytest

from prefixtune.studies import STUDIES, StudyConfig
from prefixtune.studies.reductions import describe_reductions


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
