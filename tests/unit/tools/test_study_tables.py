"""The tables of docs/RESULTS.md: for every study of the project, a row for each point that no other row is like."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from prefixtune.report.results import Cell, Evaluation, Run, Score, Study
from prefixtune.studies import StudyConfig, plan
from tools.pages import ROOT
from tools.study_tables import scores_table

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
    head, *rows = rows_of(scores_table(study, ids))
    words = {row[0]: row[head.index("words")] for row in rows}
    assert words == {"prefix": "3.0 (2.0 to 4.0)", "full": "2.0"}
    assert "words" not in rows_of(scores_table(study))[0]
