"""The results of studies in docs/: the tables come from them, and a study goes on from its file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from made_up_runs import low_data_study, write
from prefixtune.errors import DataError
from prefixtune.report import compose, read_results, to_markdown
from prefixtune.report.results import Cell, Study
from prefixtune.studies import StudyConfig, plan
from prefixtune.studies.records import check_same_study, read_outcome, read_study
from prefixtune.utils.files import write_text
from tools import nested_length, results
from tools.nested_length import METHOD, nested_table
from tools.study_tables import costs_table, scores_table

FILES = results.study_files()


def test_the_tables_are_those_of_the_results() -> None:
    for path in results.PAGES:
        text = path.read_text(encoding="utf-8")
        assert results.with_tables(text, FILES) == text, "run `python -m tools.results`"
    page = results.PAGES[0].read_text(encoding="utf-8")
    assert [
        name for name in map(results.study_name, FILES) if f"<!-- {name} -->" not in page and "toy" not in name
    ] == []
    assert results.with_tables(page.replace("| adapter:115 | 1 | 0.009 ", "| adapter:115 | 1 | 0.1 "), FILES) == page


def test_a_table_of_what_is_no_longer_kept_goes() -> None:
    page = "<!-- methods -->\n\n**Not run yet: 0 of 66 runs are done.**\n\n<!-- end -->\n\nProse, {}.\n\n"
    page += "<!-- no-study: differences -->\n\n| old |\n|---|\n\n<!-- end -->\n"
    nothing = "Not run yet."
    expected = f"<!-- methods -->\n\n{nothing}\n\n<!-- end -->\n\nProse, {{}}.\n\n"
    expected += f"<!-- no-study: differences -->\n\n{nothing}\n\n<!-- end -->\n"
    assert results.with_tables(page, []) == expected == results.with_tables(expected, [])


@pytest.mark.parametrize("path", FILES, ids=results.study_name)
def test_a_study_goes_on_from_its_file(path: Path, tmp_path: Path) -> None:
    results.unpack(path, tmp_path)
    # One file for all toy tasks.
    name = re.sub("^ceiling-toy-.*", "ceiling-toys", results.study_name(path))
    toml = results.ROOT / "studies" / f"{name.replace('-', '_')}.toml"
    facts = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    values = {"name": facts["name"], "task": facts["task"], "output": str(tmp_path)}
    if facts["name"] == "scale":
        # Named on the command line, as they are where the user has them.
        values["backbones"] = facts["config"]["backbones"]
    config = StudyConfig.from_file(toml, **values)
    stored = read_study(config)
    assert stored is not None
    check_same_study(config, stored)
    outcome = read_outcome(config, plan(config))
    assert outcome.failed == {}
    if results.study_name(path).startswith("first/"):
        assert (outcome.done, outcome.left) == (tuple(cell.id for cell in plan(config)), ())
    results.pack(tmp_path, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_a_file_reads_as_the_folder_that_it_was_packed_from(tmp_path: Path) -> None:
    folder, path = tmp_path / "study", tmp_path / "study.json"
    low_data_study(folder)
    points = [{"point": "a", "reference": "b", "differences": [1.5], "p_values": [0.01], "mean": 1.5}]
    write(folder / "comparisons.json", {"metric": "bleu", "test": "a test", "points": points})
    # What is not packed.
    for name in ("outputs.jsonl", "events.jsonl", "config.toml", "prefix.safetensors"):
        for file in folder.rglob(name):
            file.unlink()
    results.pack(folder, path)
    packed, whole = read_results(path), read_results(folder)
    assert isinstance(packed, Study)
    assert isinstance(whole, Study)
    assert packed.differences == whole.differences != ()
    assert [(c.id, c.status, c.figures) for c in packed.cells] == [(c.id, c.status, c.figures) for c in whole.cells]
    assert to_markdown(compose([packed])).replace(path.name, folder.name) == to_markdown(compose([whole]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "study.json' is not JSON"),
        ("[]", "must be an object"),
        ("{}", "holds no study"),
        ('{"study.json": 3, "cells/a/cell.json": {}}', "must be an object"),
        ('{"study.json": {}}', "has no cells"),
        ('{"study.json": {}, "cells/a/evaluation.json": {}}', "'scores' in .*evaluation.json' is missing"),
        ('{"study.json": {}, "cells/a/config.toml": {}}', "cannot read .*config.toml"),
    ],
)
def test_a_broken_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        read_results(path)
    assert str(path) in error.value.message


@pytest.mark.parametrize("name", ["../study.json", "cells/../../cell.json", "/study.json", "cells/a/b/cell.json", "x"])
def test_nothing_is_unpacked_elsewhere(name: str, tmp_path: Path) -> None:
    path = tmp_path / "packed.json"
    path.write_text(json.dumps({"study.json": {}, name: {}}))
    with pytest.raises(ValueError, match="belongs to no study"):
        results.unpack(path, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_the_cost_of_a_step_names_its_machine() -> None:
    assert "Not measured yet" in costs_table(None)
    rows = {
        name: {"step_seconds": seconds, "peak_memory_mib": 1000.4, "trained": 979_200}
        for name, seconds in (("prefix-examples", 0.5), ("full", 0.9))
    }
    measured = {
        "command": "python -m bench.training.methods",
        "date": "2026-11-27T12:00:00+00:00",
        "machine": {"processor": "A processor", "cores": 2},
        "threads": 2,
        "cores_used_by_others": 0.014,
        "versions": {"torch": "2.13.0"},
        "batch_size": 16,
        "methods": rows,
    }
    text = costs_table(measured)
    assert "2026-11-27: A processor, 2 cores, 2 threads, 0.01 cores busy with other work; torch 2.13.0." in text
    assert text.endswith(
        "| prefix-examples | 979,200 | 0.50 | 1.00 | 1,000 |\n| full | 979,200 | 0.90 | 1.80 | 1,000 |"
    )


def test_a_nested_run_stands_beside_the_runs_of_each_length() -> None:
    cells = [
        Cell(
            id=f"{method}-n6-P{length}-task-subset0-seed0",
            factors={"method": method, "prefix_length": length},
            **figures,
        )
        for method, length, figures in (
            (METHOD, 2, {"figures": {"dev_loss": 1.5}}),
            (METHOD, 5, {}),
            ("prefix-examples", 4, {"figures": {"dev_loss": 9.0}}),
        )
    ]
    measured = {
        "lengths": [
            {"prefix_length": 2, "loss": 1.6, "interval": [1.4, 1.8]},
            {"prefix_length": 5, "loss": 1.25, "interval": [1.0, 1.3]},
        ],
        "best": 5,
        "chosen": 2,
        "significance": 0.05,
    }
    study = Study(path=Path("study"), cells=tuple(cells))
    rows = nested_table(study, measured).splitlines()
    assert rows[2:4] == ["| 2 | 1.500 | 1.600 (1.400 to 1.800) |", "| 5 |  | 1.250 (1.000 to 1.300) |"]
    assert "best length is 5; the shortest that is not significantly worse is 2 " in rows[-1]
    assert "Not run yet" in nested_table(study, None)


def test_the_nested_run_takes_the_rate_that_the_study_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = "".join(f'"name[Place {n}], near[Place {n % 7}]",Place {n}.\n' for n in range(600))
    for split in ("train", "dev"):
        write_text(tmp_path / "e2e" / f"{split}set.csv", f"mr,ref\n{table}")
    group = f"{METHOD}-n600-P106-task"
    facts = {"group": group, "learning_rate": {"0.0067": 1.3, "0.02": 1.2, "0.06": 1.4}, "chosen": 0.02}
    write(tmp_path / "runs" / "length" / "tuning" / f"{group}.json", facts)
    given: dict[str, Any] = {}

    def study(run: Any, **options: Any) -> None:
        given.update(rate=run.learning_rate, folder=run.output, **options)
        figures = {"backbone": "", "best": 5, "chosen": 2, "significance": 0.05, "test": "", "num_sources": 3}
        write(tmp_path / run.output / "length.json", {**figures, "lengths": []})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["nested_length", str(tmp_path / "e2e")])
    monkeypatch.setattr(nested_length, "study_lengths", study)
    monkeypatch.setattr(nested_length, "NESTED", tmp_path / "nested.json")
    nested_length.main()
    assert (given["rate"], given["folder"]) == (0.02, str(Path("runs/length-nested")))
    assert given["lengths"] == [1, 2, 5, 10, 50, 106]
    assert json.loads((tmp_path / "nested.json").read_text())["learning_rate"] == 0.02


def test_a_run_without_one_of_the_metrics_has_the_others(tmp_path: Path) -> None:
    study = read_results(low_data_study(tmp_path))
    assert isinstance(study, Study)
    done = next(cell for cell in study.cells if cell.run is not None)
    assert done.run is not None
    assert done.run.evaluation is not None
    fewer = {name: score for name, score in done.run.evaluation.scores.items() if name != "meteor"}
    run = done.run.model_copy(update={"evaluation": done.run.evaluation.model_copy(update={"scores": fewer})})
    cells = [
        done.model_copy(update={"id": f"{name}-n9-subset0-seed0", "factors": {"method": name}, "run": each})
        for name, each in (("first", run), ("second", done.run))
    ]
    made = study.model_copy(update={"cells": tuple(cells), "factors": ("method",)})
    head, _, first, second = scores_table(made).splitlines()
    column = head.split(" | ").index("METEOR")
    assert first.split(" | ")[column] == "not measured"
    assert second.split(" | ")[column].startswith("0.")


def test_what_is_kept_names_no_path_of_the_machine() -> None:
    inside, beside = results.ROOT / "runs" / "methods", results.ROOT.parent / "shared" / "e2e"
    given = {
        "output": str(inside),
        "lists": [str(beside), 3],
        "command": f"study --data {beside} --output={inside} a/b",
    }
    assert results.portable(given) == {
        "output": "runs/methods",
        "lists": ["../shared/e2e", 3],
        "command": "study --data ../shared/e2e --output=runs/methods a/b",
    }
    assert results.portable({"data": "/somewhere/else/e2e"}) == {"data": "e2e"}
