"""A study's cells: which there are, in which order, under which names."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from prefixtune.studies import STUDIES, Cell, StudyConfig, plan
from prefixtune.studies.cell import build_train_config
from prefixtune.studies.compare import counterparts


def cells(name: str, **values: object) -> list[Cell]:
    return plan(StudyConfig(name=name, **values))


@pytest.mark.parametrize("name", STUDIES)
def test_names_are_unique_and_good_for_any_file_system(name: str):
    planned = cells(
        name, methods="prefix,adapter:8,adapter:64,adapter,lora:2,top:1,full,few-shot,zero-shot", sizes="0,7"
    )
    names = [cell.id for cell in planned]
    assert len({name.lower() for name in names}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9-]+", name) for name in names)
    assert max(map(len, names)) < 100


def test_every_point_comes_once_before_one_comes_twice():
    planned = cells("low-data", methods="prefix,full", sizes="50,100", subsets=3, seeds=2)
    assert len(planned) == 2 * 2 * 3 * 2
    repetitions = [list(group) for _, group in itertools.groupby(planned, key=lambda cell: (cell.seed, cell.subset))]
    assert [(group[0].seed, group[0].subset) for group in repetitions] == [*itertools.product(range(2), range(3))]
    for group in repetitions:
        assert [(cell.num_targets, cell.method) for cell in group] == [
            *((size, method) for size in (50, 100) for method in ("prefix", "full"))
        ]
    assert [cell.is_first for cell in planned] == [True] * 4 + [False] * 20


def test_a_set_that_is_taken_whole_has_one_sample():
    planned = cells("methods", methods="full", sizes="0,9", subsets=3, seeds=2)
    assert [(cell.num_targets, cell.subset, cell.seed) for cell in planned] == [
        *((0, 0, 0), (9, 0, 0), (9, 1, 0), (9, 2, 0)),
        *((0, 0, 1), (9, 0, 1), (9, 1, 1), (9, 2, 1)),
    ]


def test_what_trains_nothing_is_done_once():
    planned = cells("methods", methods="zero-shot,few-shot,full", sizes="5,6", subsets=2, seeds=2)
    bare = [cell for cell in planned if not cell.trains]
    assert [cell.method for cell in bare] == ["zero-shot", "few-shot"]
    assert {cell.num_targets for cell in bare} == {0}


def test_lengths_and_starts_are_those_of_prefixes():
    planned = cells("position", methods="prefix,infix,full", lengths="1,10", starts="task,random", sizes="5")
    points = [(cell.method, cell.prefix_length, cell.initialization) for cell in planned]
    assert points == [
        *(("prefix", 1, "task"), ("prefix", 1, "random"), ("prefix", 10, "task"), ("prefix", 10, "random")),
        *(("infix", 1, "task"), ("infix", 1, "random"), ("infix", 10, "task"), ("infix", 10, "random")),
        ("full", 0, ""),
    ]
    assert "prefix_length" not in planned[-1].factors()
    assert planned[0].factors() == {
        "method": "prefix",
        "num_targets": 5,
        "prefix_length": 1,
        "initialization": "task",
        "subset": 0,
        "seed": 0,
    }


@pytest.mark.parametrize("name", STUDIES)
def test_what_a_study_varies_is_among_the_factors(name: str):
    planned = cells(name)
    kind = STUDIES[name]
    assert all(any(factor in cell.factors() for cell in planned) for factor in kind.factors)
    assert kind.axis is None or kind.axis in kind.factors
    for factor in kind.factors:
        assert len({cell.factors().get(factor) for cell in planned}) > 1


def test_counterparts_are_of_the_same_sample_seed_and_size():
    study = StudyConfig(name="low-data", methods=["prefix", "full", "zero-shot"], sizes=[50, 100], subsets=2, seeds=2)
    pairs = {run.id: other.id for run, other in counterparts(study)}
    assert len(pairs) == 2 * 2 * 2, "the bare model has no size to be compared at"
    assert pairs["full-n100-subset1-seed0"] == "prefix-n100-P10-task-subset1-seed0"
    methods = StudyConfig(name="methods", methods=["full", "zero-shot"], sizes=[50])
    assert [(run.id, other.method) for run, other in counterparts(methods)] == [("zero-shot-all-subset0-seed0", "full")]
    position = StudyConfig(name="position", lengths=[1, 5], sizes=[8])
    assert {run.id: other.id for run, other in counterparts(position)} == {
        f"{method}-n8-P{length}-task-subset0-seed0": f"prefix-n8-P{length}-task-subset0-seed0"
        for method in ("infix", "prompt")
        for length in (1, 5)
    }
    length = StudyConfig(name="length", lengths=[2, 5])
    assert [(run.prefix_length, other.prefix_length) for run, other in counterparts(length)] == [(5, 2)]


def test_all_targets_are_not_taken_for_none():
    low = StudyConfig(name="low-data", methods=["zero-shot", "prefix", "full"], sizes=[0], subsets=2, seeds=2)
    assert [(run.id, other.id) for run, other in counterparts(low)] == [
        ("zero-shot-all-subset0-seed0", "prefix-all-P10-task-subset0-seed0"),
        ("full-all-subset0-seed0", "prefix-all-P10-task-subset0-seed0"),
        ("full-all-subset0-seed1", "prefix-all-P10-task-subset0-seed1"),
    ]


def test_a_cell_that_starts_from_examples_takes_as_many_as_fit_its_length(tmp_path: Path):
    (cell,) = cells("length", lengths="40", starts="examples", sizes="5")
    config = build_train_config(StudyConfig(name="length"), cell, 1e-2, tmp_path, 5)
    assert (config.initialization, config.prefix_length, config.init_examples) == ("examples", 40, 0)
