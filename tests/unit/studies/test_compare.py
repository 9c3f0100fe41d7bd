"""Differences between runs over several samples: means, intervals, p-values, and their correction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefixtune.evaluation.metrics import holm
from prefixtune.evaluation.metrics.student import t_p_value, t_quantile
from prefixtune.report import compose, read_results, to_markdown
from prefixtune.report.results import Study
from prefixtune.studies import StudyConfig, plan
from prefixtune.studies.compare import compare_runs
from prefixtune.studies.records import Provenance, make_folders, write_cell, write_study
from tools.study_tables import differences_table

SCORES = {"prefix": [60.0, 61.0, 62.0], "full": [61.0, 63.0, 64.0], "lora:4": [60.5, 60.0, 62.5]}


def make_study(folder: Path, repetitions: int = 3) -> StudyConfig:
    """A study whose cells have scores, seen and unseen ones too, but no outputs."""
    config = StudyConfig(output=str(folder), methods=tuple(SCORES), sizes=(9,), repetitions=repetitions)
    make_folders(config)
    for cell in plan(config):
        score = SCORES[cell.method][cell.seed]
        part = {"num_examples": 3, "scores": {"bleu": {"score": score + 1}}}
        facts: dict[str, Any] = {"num_examples": 6, "scores": {"bleu": {"score": score}}}
        facts |= {"groups": {"seen": {"seen": part, "unseen": part}}, "kind": "evaluation", "title": cell.id}
        path = config.folder / "cells" / cell.id / "evaluation.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(facts), encoding="utf-8")
        loss = 1.2 - 0.1 * (score - SCORES["prefix"][cell.seed])
        write_cell(config, cell, "done", {"learning_rate": 1e-3, "dev_loss": loss})
    return config


def compared(config: StudyConfig) -> dict[str, Any]:
    return compare_runs(config, "bleu", "e2e", [cell.id for cell in plan(config)])


def test_the_mean_difference_has_an_interval_over_the_samples(tmp_path: Path) -> None:
    points = compared(make_study(tmp_path / "study"))["points"]
    (full,) = [point for point in points if point["point"] == "full-n9" and not point["part"]]
    assert full["differences"] == [1.0, 2.0, 2.0]
    # Mean 5/3, standard deviation sqrt(1/3), so the error is 1/3 and t is 5 with 2 degrees of freedom.
    assert (full["mean"], full["standard_error"]) == pytest.approx((5 / 3, 1 / 3))
    half = t_quantile(0.975, 2) / 3
    assert full["interval"] == pytest.approx([5 / 3 - half, 5 / 3 + half])
    assert full["p_value"] == pytest.approx(t_p_value(5.0, 2)) == pytest.approx(0.0377, abs=1e-4)


def test_several_seeds_of_a_sample_count_once(tmp_path: Path) -> None:
    config = StudyConfig(output=str(tmp_path / "study"), methods=("prefix", "full"), sizes=(9,), subsets=2, seeds=2)
    make_folders(config)
    # Of the first sample full fine-tuning is 1 and 3 ahead, of the second 4 and 4.
    ahead = {("full", 0, 0): 1.0, ("full", 0, 1): 3.0, ("full", 1, 0): 4.0, ("full", 1, 1): 4.0}
    for cell in plan(config):
        score = 60.0 + ahead.get((cell.method, cell.subset, cell.seed), 0.0)
        path = config.folder / "cells" / cell.id / "evaluation.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"num_examples": 6, "scores": {"bleu": {"score": score}}}), encoding="utf-8")
        write_cell(config, cell, "done", {"learning_rate": 1e-3})
    (point,) = compared(config)["points"]
    assert sorted(point["differences"]) == [1.0, 3.0, 4.0, 4.0]
    assert point["num_runs"] == 4
    # Two samples, of means 2 and 4.
    assert (point["mean"], point["standard_error"]) == pytest.approx((3.0, 1.0))
    assert point["p_value"] == pytest.approx(t_p_value(3.0, 1))
    # Seeds alone are all that a single sample has.
    one = config.replace(subsets=1, output=str(tmp_path / "study"))
    (alone,) = compared(one)["points"]
    assert (alone["mean"], alone["standard_error"]) == pytest.approx((2.0, 1.0))


def test_holm_corrects_among_the_comparisons_on_the_same_items(tmp_path: Path) -> None:
    points = compared(make_study(tmp_path / "study"))["points"]
    assert [point["part"] for point in points] == ["", "seen", "unseen", "", "seen", "unseen"]
    for part in ("", "seen", "unseen"):
        family = [point for point in points if point["part"] == part]
        assert [point["corrected_p_value"] for point in family] == holm([point["p_value"] for point in family])
        assert max(point["corrected_p_value"] / point["p_value"] for point in family) == pytest.approx(2)


def test_rows_that_are_still_to_come_are_questions_too(tmp_path: Path) -> None:
    config = make_study(tmp_path / "study")
    done = [cell.id for cell in plan(config) if cell.method != "lora:4"]
    points = compare_runs(config, "bleu", "e2e", done)["points"]
    assert {point["point"] for point in points} == {"full-n9"}
    assert all(point["corrected_p_value"] == pytest.approx(2 * point["p_value"]) for point in points)


def test_a_single_run_has_the_p_value_of_its_items(tmp_path: Path) -> None:
    config = make_study(tmp_path / "study", 1)
    before = compared(config)
    assert [(point["interval"], point["p_value"]) for point in before["points"]] == [(None, None)] * 6
    # Kept from when the outputs were there.
    pairs = [{**pair, "p_value": 0.01} for pair in before["pairs"]]
    done = [cell.id for cell in plan(config)]
    points = compare_runs(config, "bleu", "e2e", done, {**before, "pairs": pairs})["points"]
    assert [(point["p_value"], point["corrected_p_value"]) for point in points] == [(0.01, 0.02)] * 6


def test_reports_show_intervals_and_corrected_p_values(tmp_path: Path) -> None:
    config = make_study(tmp_path / "study")
    write_study(config, plan(config), Provenance("a command"))
    (config.folder / "comparisons.json").write_text(json.dumps(compared(config)), encoding="utf-8")
    study = read_results(config.folder)
    assert isinstance(study, Study)
    text = to_markdown(compose([study]))
    assert "+0.23 to +3.10" in text
    assert "Corrected: by Holm, over all rows of this table with the same test items." in text
    row = next(line for line in differences_table(study).splitlines() if line.startswith("| full-n9 "))
    # The losses differ by -0.1, -0.2 and -0.2: a tenth of the scores, with as much of an interval.
    assert row.endswith("| +1.7 ± 0.3 | +0.2 to +3.1 | 0.038 | 0.075 | -0.167 (-0.310 to -0.023) |")
