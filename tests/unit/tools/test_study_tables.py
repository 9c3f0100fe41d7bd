"""The tables of docs/RESULTS.md: for every study of the project, a row for each point that no other row is like."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from sacrebleu.metrics.bleu import BLEU

from prefixtune.evaluation.metrics.student import t_quantile
from prefixtune.report.results import Cell, Comparisons, Difference, Evaluation, Pair, Run, Score, Study
from prefixtune.studies import StudyConfig, plan
from tools.outputs import Kept
from tools.pages import ROOT
from tools.study_tables import differences_table, metrics_table, scores_table

FILES = sorted((ROOT / "studies").glob("**/*.toml"))


def finished(config: StudyConfig, scores: Sequence[Mapping[str, float]] = ({"bleu": 50.0},)) -> Study:
    """A study whose runs are done, with these scores one after the other."""
    cells = []
    for index, cell in enumerate(plan(config)):
        measured = {name: Score(score=score) for name, score in scores[index % len(scores)].items()}
        run = Run(path=Path(cell.id), config={}, events=(), evaluation=Evaluation(scores=measured))
        cells.append(Cell(id=cell.id, factors=cell.factors(), status="done", run=run))
    return Study(
        path=Path("study"),
        name=config.name,
        factors=config.kind.factors,
        axis=config.kind.axis or "",
        metric="bleu",
        cells=tuple(cells),
    )


def rows_of(table: str) -> list[list[str]]:
    """The cells of each line: the head, and the rows."""
    head, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return [head, *rows]


def factors_of(path: Path) -> tuple[list[str], list[tuple[str, ...]]]:
    """The factors in the table of a study that is done, and their values in each row."""
    name = tomllib.loads(path.read_text(encoding="utf-8")).get("name", path.stem.replace("_", "-"))
    config = StudyConfig.from_file(path, name=name)
    head, *rows = rows_of(scores_table(finished(config)))
    count = head.index("runs")
    assert len(rows) == len({cell.group for cell in plan(config)})
    return head[:count], [tuple(row[:count]) for row in rows]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT / "studies").as_posix())
def test_every_study_has_a_table_whose_rows_differ(path: Path) -> None:
    factors, rows = factors_of(path)
    assert len(set(rows)) == len(rows), factors


def test_rows_are_in_the_order_of_numbers_then_of_words() -> None:
    studies = ROOT / "studies"
    factors, rows = factors_of(studies / "ceiling.toml")
    assert factors[:2] == ["method", "prefix_length"]
    # Methods without a prefix come first.
    assert [row[:2] for row in rows] == [
        *(("full", ""), ("lora:4", ""), ("lora:64", "")),
        *(("prefix-words", "10"), ("prefix-examples", "106"), ("prefix-examples", "500")),
    ]
    factors, rows = factors_of(studies / "length.toml")
    assert factors == ["prefix_length", "method", "initialization"]
    assert [row[:2] for row in rows if row[0] == "106"] == [("106", "prefix-examples"), ("106", "prefix-words")]
    assert [int(row[0]) for row in rows] == [1, 2, 5, 10, 50, 106, 106, 211]


def test_a_figure_that_some_runs_lack_says_how_many_have_it() -> None:
    config = StudyConfig(methods=["full"], sizes=[9], repetitions=3)
    scores = [{"bleu": 50.0, "meteor": 0.4}, {"bleu": 52.0, "meteor": 0.5}, {"bleu": 54.0}]
    head, row = rows_of(scores_table(finished(config, scores)))
    assert row[head.index("runs")] == "3"
    assert row[head.index("BLEU")] == "52.0 ± 2.0 (50.0 to 54.0)"
    assert row[head.index("METEOR")] == "0.450 ± 0.071 (0.400 to 0.500), 2 of 3 runs"


def test_the_words_of_texts_stand_beside_the_scores() -> None:
    config = StudyConfig(methods=["prefix", "full"], sizes=[100], repetitions=2, once=["full"])
    study = finished(config)
    ids = {cell.id: ["a b c", "a"] if "subset0" in cell.id else ["a b c d e", "a b c"] for cell in study.cells}
    head, *rows = rows_of(scores_table(study, Kept({"metric": "rouge_1"}, ["item"] * 2, [], ids)))
    words = {row[0]: row[head.index("words")] for row in rows}
    assert words == {"prefix": "3.0 (2.0 to 4.0)", "full": "2.0"}
    # Other metrics have no such factors, and what is not kept has no words.
    assert "brevity" not in head
    assert "words" not in rows_of(scores_table(study))[0]


def test_bleu_is_shown_by_its_brevity_penalty_and_its_precision() -> None:
    """Beside the whole text: a short one, all of whose words are right, and a long one of which half are."""
    reference = "one two three four five six seven eight"
    texts = {"prefix": reference, "full": "one two three four", "lora:4": f"{reference} a b c d e f g h"}
    study = finished(StudyConfig(methods=list(texts), sizes=[100], repetitions=1))
    statistics = {}
    for cell in study.cells:
        counts = BLEU(tokenize="none")._extract_corpus_statistics([texts[cell.factors["method"]]], [[reference]])
        statistics[cell.id] = counts
    kept = Kept({"metric": "bleu"}, ["item"], [], {cell.id: [""] for cell in study.cells}, statistics)
    head, *rows = rows_of(scores_table(study, kept))
    found = {row[0]: (row[head.index("brevity")], row[head.index("precision")]) for row in rows}
    expected = {name: BLEU(tokenize="none").corpus_score([text], [[reference]]) for name, text in texts.items()}
    assert found == {name: (f"{bleu.bp:.3f}", f"{bleu.score / bleu.bp:.1f}") for name, bleu in expected.items()}
    assert (found["full"], found["prefix"]) == (("0.368", "100.0"), ("1.000", "100.0"))


def compared(losses: Mapping[str, Sequence[float]]) -> Study:
    """A study of a prefix and other methods, a run of each on every sample, whose losses these are."""
    repetitions = len(losses["prefix"])
    config = StudyConfig(methods=list(losses), sizes=[100], repetitions=repetitions)
    study = finished(config, [{"bleu": 50.0, "meteor": 0.5}])
    cells = [
        cell.model_copy(update={"figures": {"dev_loss": losses[cell.factors["method"]][cell.factors["subset"]]}})
        for cell in study.cells
    ]
    ids = {(cell.factors["method"], cell.factors["subset"]): cell.id for cell in cells}
    points = {cell.factors["method"]: cell.point for cell in cells}
    pairs, rows = [], []
    for method in [name for name in losses if name != "prefix"]:
        pairs += [
            Pair(run=ids[method, sample], reference=ids["prefix", sample], difference=1.0)
            for sample in range(repetitions)
        ]
        rows.append(
            Difference(
                point=points[method],
                reference=points["prefix"],
                differences=(1.0,) * repetitions,
                p_values=(None,) * repetitions,
                mean=1.0,
                interval=(0.5, 1.5) if repetitions > 1 else None,
            )
        )
    comparisons = Comparisons(pairs=tuple(pairs), points=tuple(rows))
    return study.model_copy(update={"cells": tuple(cells), "comparisons": comparisons, "train_targets": 400})


def test_losses_are_compared_on_the_same_samples() -> None:
    study = compared({"prefix": [1.2, 1.3, 1.4], "full": [1.1, 1.1, 1.1]})
    head, row = rows_of(differences_table(study))
    # Differences of -0.1, -0.2 and -0.3; two samples share a quarter of their targets.
    half = t_quantile(0.975, 2) * 0.1 / math.sqrt(3) * math.sqrt(1 + 3 * 0.25 / 0.75)
    assert row[head.index("development loss (95 % interval)")] == f"-0.200 ({-0.2 - half:+.3f} to {-0.2 + half:+.3f})"
    assert "test items" not in head
    head, row = rows_of(differences_table(compared({"prefix": [1.2], "full": [1.1]})))
    assert row[head.index("development loss (95 % interval)")] == "-0.100"


def test_every_metric_has_its_difference() -> None:
    study = compared({"prefix": [1.2, 1.3], "full": [1.1, 1.1]})
    head, row = rows_of(metrics_table(study))
    assert head == ["score of", "less that of", "BLEU", "METEOR"]
    assert row[2:] == ["+0.0 (+0.0 to +0.0)", "+0.000 (+0.000 to +0.000)"]
