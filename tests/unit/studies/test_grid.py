"""A study's cells: which there are, in which order, under which names."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from prefixtune.studies import STUDIES, Cell, StudyConfig, plan
from prefixtune.studies.cell import build_train_config
from prefixtune.studies.compare import counterparts


def cells(name: str, **values: object) -> list[Cell]:
    return plan(StudyConfig(name=name, **values))


@pytest.mark.parametrize("name", STUDIES)
def test_names_are_unique_and_good_for_any_file_system(name: str):
    planned = cells(
        name, methods="prefix,adapter:8,adapter:32,adapter,lora:2,top:1,full,few-shot,zero-shot", sizes="0,7"
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
    planned = cells(name, **({"backbones": "a,b"} if name == "scale" else {}))
    kind = STUDIES[name]
    assert all(any(factor in cell.factors() for cell in planned) for factor in kind.factors)
    assert kind.axis is None or kind.axis in kind.factors
    for factor in kind.factors:
        assert len({cell.factors().get(factor) for cell in planned}) > 1


def test_counterparts_are_of_the_same_sample_seed_and_size():
    study = StudyConfig(name="low-data", methods=["prefix", "full"], sizes=[50, 100], subsets=2, seeds=2)
    pairs = {run.id: other.id for run, other in counterparts(study)}
    assert len(pairs) == 2 * 2 * 2
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


def test_what_is_not_trained_is_compared_with_every_sample_and_size():
    study = StudyConfig(name="low-data", methods=["prefix", "full", "few-shot"], sizes=[50, 100], repetitions=3)
    pairs = [(run.id, other.id) for run, other in counterparts(study) if not run.trains]
    assert pairs == [
        ("few-shot-all-subset0-seed0", f"prefix-n{size}-P10-task-subset{index}-seed{index}")
        for size in (50, 100)
        for index in range(3)
    ]


def test_a_sample_comes_with_its_own_seed():
    planned = cells("low-data", methods="full", sizes="9,0", repetitions=3)
    assert [(cell.num_targets, cell.subset, cell.seed) for cell in planned] == [
        *((9, 0, 0), (0, 0, 0), (9, 1, 1), (0, 0, 1), (9, 2, 2), (0, 0, 2)),
    ]
    # The first two of a grid's diagonal have the names that they had there.
    grid = {cell.id for cell in cells("low-data", methods="full", sizes="9", subsets=3, seeds=3)}
    assert {cell.id for cell in planned if cell.num_targets} <= grid


def test_what_is_run_once_has_the_first_sample_alone():
    planned = cells("low-data", methods="full,prefix", once="full", sizes="9,5", repetitions=3)
    assert [(c.num_targets, c.subset) for c in planned if c.method == "full"] == [(9, 0), (5, 0)]
    assert len(planned) == 2 + 2 * 3


def test_variants_stand_side_by_side():
    variants = {
        "words": {"method": "prefix", "prefix_length": 10},
        "shown": {"method": "prefix", "prefix_length": [106, 211], "initialization": "examples"},
        "slow": {"method": "lora:8", "warmup_steps": 90},
    }
    study = StudyConfig(methods=[*variants, "lora:4"], variants=variants, sizes=[9])
    assert [cell.group for cell in plan(study)] == [
        *("words-n9-P10-task", "shown-n9-P106-examples", "shown-n9-P211-examples", "slow-n9", "lora4-n9"),
    ]
    assert [cell.base_method for cell in plan(study)] == ["prefix", "prefix", "prefix", "lora", "lora"]
    assert plan(study)[1].factors()["method"] == "shown"
    assert {other.group for _, other in counterparts(study)} == {"words-n9-P10-task"}


def test_each_backbone_has_all_runs_and_counterparts_of_its_own():
    study = StudyConfig(name="scale", backbones=["o/GPT2", "smollm2-135m"], methods=["prefix", "full"], sizes=[9])
    assert [cell.group for cell in plan(study)] == [
        *("gpt2-prefix-n9-P10-task", "gpt2-full-n9"),
        *("smollm2-135m-prefix-n9-P10-task", "smollm2-135m-full-n9"),
    ]
    assert {run.group: other.group for run, other in counterparts(study)} == {
        "gpt2-full-n9": "gpt2-prefix-n9-P10-task",
        "smollm2-135m-full-n9": "smollm2-135m-prefix-n9-P10-task",
    }


def test_every_length_is_compared_with_full_fine_tuning():
    study = StudyConfig(name="ceiling", methods=["full", "prefix", "lora:4"], lengths=[1, 5], sizes=[9])
    pairs = {run.group: other.group for run, other in counterparts(study)}
    assert pairs == dict.fromkeys(("prefix-n9-P1-task", "prefix-n9-P5-task", "lora4-n9"), "full-n9")


def test_steps_are_those_of_the_variant_then_of_the_size(tmp_path: Path):
    variants = {"longer": {"method": "prefix", "max_steps": 777}, "usual": {"method": "prefix", "batch_size": 2}}
    study = StudyConfig(
        methods=[*variants, "full"],
        variants=variants,
        sizes=[50, 500, 0],
        steps_by_size={"0": 300, "50": 20},
        train_settings={"max_steps": 9, "full": {"max_steps": 8}},
    )
    counts = {50: 50, 500: 500, 0: 42061}
    found = {
        (cell.method, cell.num_targets): build_train_config(
            study, cell, 1e-2, tmp_path, counts[cell.num_targets]
        ).max_steps
        for cell in plan(study)
    }
    assert found == {
        **{("longer", size): 777 for size in (50, 500, 0)},
        **{("usual", size): steps for size, steps in ((50, 20), (500, 9), (0, 300))},
        **{("full", size): steps for size, steps in ((50, 20), (500, 8), (0, 300))},
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"train_settings": {"full": {"max_steps": 400}}},
            {"prefix": (200, 5.0), "full": (400, 5.0), "short": (0, 3.0)},
        ),
        ({"train_settings": {"full": {"epochs": 10}}}, {"prefix": (200, 5.0), "full": (0, 10.0), "short": (0, 3.0)}),
        ({"train_settings": {"max_steps": 60}}, {"prefix": (60, 5.0), "full": (60, 5.0), "short": (0, 3.0)}),
        ({"steps_by_size": {"50": 20}}, {"prefix": (20, 5.0), "full": (20, 5.0), "short": (0, 3.0)}),
        (
            {"train_settings": {"max_steps": 60, "full": {"epochs": 10}}},
            {"prefix": (60, 5.0), "full": (0, 10.0), "short": (0, 3.0)},
        ),
    ],
)
def test_the_length_of_a_run_is_that_of_the_narrowest_table(
    tmp_path: Path, settings: dict[str, Any], expected: dict[str, tuple[int, float]]
):
    variants = {"short": {"method": "prefix", "epochs": 3.0}}
    study = StudyConfig(name="low-data", methods=["prefix", "full", "short"], variants=variants, sizes=[50], **settings)
    configs = {cell.method: build_train_config(study, cell, 1e-2, tmp_path, 50) for cell in plan(study)}
    assert {method: (config.max_steps, config.epochs) for method, config in configs.items()} == expected


def test_a_start_from_a_prompt_is_one_from_its_text(tmp_path: Path):
    (cell,) = cells("initialization", starts="prompt", subsets=1)
    study = StudyConfig(name="initialization", prompt_text="Say it.")
    config = build_train_config(study, cell, 1e-2, tmp_path, 5)
    assert (config.initialization, config.init_text, config.prefix_length) == ("text", "Say it.", 10)


@pytest.mark.parametrize(("start", "words"), [("task", "Describe it."), ("unrelated", "elephant keyboard")])
def test_a_start_from_words_is_one_from_its_own(start: str, words: str, tmp_path: Path):
    (cell,) = cells("initialization", starts=start, subsets=1)
    study = StudyConfig(name="initialization", task_words="Describe it.", unrelated_words="elephant keyboard")
    config = build_train_config(study, cell, 1e-2, tmp_path, 5)
    assert (config.initialization, config.init_text) == ("words", words)


def test_all_targets_are_not_taken_for_none():
    low = StudyConfig(name="low-data", methods=["zero-shot", "prefix", "full"], sizes=[0], subsets=2, seeds=2)
    assert [(run.id, other.id) for run, other in counterparts(low)] == [
        ("zero-shot-all-subset0-seed0", "prefix-all-P10-task-subset0-seed0"),
        ("zero-shot-all-subset0-seed0", "prefix-all-P10-task-subset0-seed1"),
        ("full-all-subset0-seed0", "prefix-all-P10-task-subset0-seed0"),
        ("full-all-subset0-seed1", "prefix-all-P10-task-subset0-seed1"),
    ]


def test_a_cell_that_starts_from_examples_takes_as_many_as_fit_its_length(tmp_path: Path):
    (cell,) = cells("length", lengths="40", starts="examples", sizes="5")
    config = build_train_config(StudyConfig(name="length"), cell, 1e-2, tmp_path, 5)
    assert (config.initialization, config.prefix_length, config.init_examples) == ("examples", 40, 0)
