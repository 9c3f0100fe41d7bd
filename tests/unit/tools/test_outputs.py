"""The outputs of studies in docs/results/: small, the same bytes each time, put back together, and recomputed."""

from __future__ import annotations

import gzip
import json
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

from prefixtune.evaluation.evaluate import Evaluation
from prefixtune.evaluation.metrics import compute
from prefixtune.evaluation.records import write_evaluation
from prefixtune.report import read_results
from prefixtune.report.results import Study
from prefixtune.studies import StudyConfig, plan
from prefixtune.studies.compare import write_comparisons
from prefixtune.studies.data import StudyData
from prefixtune.studies.records import (
    Provenance,
    RateChoice,
    as_stored,
    make_folders,
    read_outcome,
    write_cell,
    write_rate_choice,
    write_study,
)
from tools import outputs, results
from tools.study_tables import scores_table

E2E = results.DATA / "e2e"
SCRIPT = results.PACKED / "recompute.py"
MARKS = ("methods", "methods: differences")


def make_study(
    folder: Path, task: str = "toy", data: str = "held_out", done: Collection[str] | None = None, **values: object
) -> StudyConfig:
    """A study of which some runs are done, or all: they wrote references, some of them cut."""
    usual = {"methods": ("full", "lora:4"), "sizes": (9,), "test_limit": 5}
    config = StudyConfig(**{**usual, "task": task, "test": data, "output": str(folder), **values})
    make_folders(config)
    examples, rng = StudyData(config).test, random.Random(0)
    protocol = "e2e" if task == "e2e" else "plain"
    for cell in [cell for cell in plan(config) if done is None or cell.id in done]:
        texts = [" ".join(rng.choice(e.targets).split()[: rng.randint(3, 60)]) for e in examples]
        scores = compute(texts, [e.targets for e in examples], protocol=protocol, metrics=["bleu"])
        facts = {"title": cell.id, "task": task}
        path = config.folder / "cells" / cell.id
        write_evaluation(path, Evaluation(scores, tuple(texts)), examples, facts, protocol=protocol)
        rates = config.rates(cell.method) if cell.trains else (1e-3,)
        figures = {"learning_rate": as_stored(rates[0]), "trained_parameters": 3, "stored_parameters": 3 + cell.seed}
        write_cell(config, cell, "done", figures)
        if cell.trains:
            write_rate_choice(config, cell, RateChoice(dict.fromkeys(rates, 1.0), as_stored(rates[0])))
    write_study(config, plan(config), Provenance("a command"))
    if done is None:
        write_comparisons(config, plan(config))
    return config


def test_outputs_come_back_with_the_data(tmp_path: Path) -> None:
    config, path = make_study(tmp_path / "study"), tmp_path / "study.outputs.json.gz"
    results.pack(config.folder, tmp_path / "study.json")
    outputs.pack_outputs(config.folder, path)
    first = path.read_bytes()
    whole = {file.parent.name: file.read_bytes() for file in config.folder.glob("cells/*/outputs.jsonl")}
    assert len(whole) == 2
    text = gzip.decompress(first).decode()
    assert all(example.source not in text for example in StudyData(config).test)
    again = tmp_path / "again"
    results.unpack(tmp_path / "study.json", again)
    # Without the outputs in its folder, a study keeps those of its file.
    outputs.pack_outputs(again, path)
    assert path.read_bytes() == first
    assert outputs.restore_outputs(path, again, tmp_path) == ""
    assert {file.parent.name: file.read_bytes() for file in again.glob("cells/*/outputs.jsonl")} == whole
    path.unlink()
    outputs.pack_outputs(again, path)
    assert path.read_bytes() == first
    # Comparisons are computed again from the restored outputs, to the same p-values.
    comparisons = (config.folder / "comparisons.json").read_bytes()
    (again / "comparisons.json").unlink()
    moved = config.replace(output=str(again))
    write_comparisons(moved, plan(moved))
    assert (again / "comparisons.json").read_bytes() == comparisons
    (pair,) = json.loads(comparisons)["pairs"]
    assert 0 < pair["p_value"] <= 1


def test_the_sums_of_the_items_numbers_give_the_score(tmp_path: Path) -> None:
    config, path = make_study(tmp_path / "study"), tmp_path / "study.outputs.json.gz"
    outputs.pack_outputs(config.folder, path)
    kept = outputs.read_kept(path)
    assert kept is not None
    for cell, rows in kept.statistics.items():
        facts = json.loads((config.folder / "cells" / cell / "evaluation.json").read_text(encoding="utf-8"))
        assert len(rows) == facts["num_examples"] == 5
        words, wanted, *counts = (sum(column) for column in zip(*rows, strict=True))
        precisions = [right / total for right, total in zip(counts[:4], counts[4:], strict=True)]
        brevity = min(1.0, math.exp(1 - wanted / words))
        assert facts["scores"]["bleu"]["score"] == pytest.approx(100 * brevity * math.prod(precisions) ** 0.25)


def test_a_study_that_is_run_in_part_is_shown_as_such_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = [f"{name}-subset{n}-seed{n}" for name, n in (("prefix-n9-P10-task", 0), ("prefix-n9-P10-task", 1))]
    done += ["full-n9-subset0-seed0"]
    values = {"methods": ("prefix", "full", "lora:4"), "repetitions": 3}
    runs, packed, page = tmp_path / "runs", tmp_path / "packed", tmp_path / "RESULTS.md"
    packed.mkdir()
    page.write_text("".join(f"<!-- {mark} -->\n\nold\n\n<!-- end -->\n" for mark in ("claims", *MARKS)))
    for name, value in {"RUNS": runs, "PACKED": packed, "PAGES": (page,)}.items():
        monkeypatch.setattr(results, name, value)
    monkeypatch.setattr(sys, "argv", ["results"])
    config = make_study(runs / "methods", done=done, **values)
    results.main()
    text = page.read_text()
    assert "**Partly run: 3 of 9 runs are done.** Without any run: lora4-n9." in text
    assert "| prefix | 2 of 3 | " in text
    assert "| full | 1 of 3 | " in text
    assert "1 of 3 runs |" in text
    assert "| 3 | 3 to 4 |" in text
    assert "|  | partly run | 1 of 3 samples |" in text
    # The pair's p-value is one of two that the study will have.
    (point,) = json.loads((config.folder / "comparisons.json").read_text())["points"]
    assert point["corrected_p_value"] == pytest.approx(min(1.0, 2 * point["p_value"]))
    first = {file.name: file.read_bytes() for file in packed.iterdir()}
    assert set(first) == {"methods.json", "methods.outputs.json.gz"}
    # From the files alone the study goes on where it was.
    for path in sorted(runs.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    runs.rmdir()
    results.restore(packed / "methods.json", runs / "methods", tmp_path)
    outcome = read_outcome(config, plan(config))
    assert sorted(outcome.done) == sorted(done)
    assert len(outcome.left) == 6
    results.main()
    assert {file.name: file.read_bytes() for file in packed.iterdir()} == first
    assert page.read_text() == text


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for kept studies, beside runs/ with the study `methods`, which the page names, and `mine`."""
    packed, page = tmp_path / "packed", tmp_path / "RESULTS.md"
    packed.mkdir()
    page.write_text("".join(f"<!-- {mark} -->\n\nold\n\n<!-- end -->\n" for mark in MARKS))
    for name, value in {"RUNS": tmp_path / "runs", "PACKED": packed, "PAGES": (page,), "DATA": tmp_path}.items():
        monkeypatch.setattr(results, name, value)
    for name in ("methods", "mine"):
        make_study(tmp_path / "runs" / name)
    return packed


def pack_or_restore(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["results", *words])
    try:
        results.main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_studies_that_the_page_does_not_name_are_left_out(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack_or_restore(monkeypatch) == 0
    assert {file.name for file in kept.iterdir()} == {"methods.json", "methods.outputs.json.gz"}
    assert "mine: left out, as RESULTS.md has no mark <!-- mine -->" in capsys.readouterr().out


def test_a_study_with_fewer_runs_replaces_none(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack_or_restore(monkeypatch) == 0
    whole = (kept / "methods.json").read_bytes()
    shutil.rmtree(results.RUNS / "methods")
    make_study(results.RUNS / "methods", done=["full-n9-subset0-seed0"])
    make_study(results.RUNS / "second")
    results.PAGES[0].write_text(results.PAGES[0].read_text() + "<!-- second -->\n\nold\n\n<!-- end -->\n")
    assert pack_or_restore(monkeypatch) == 1
    assert "methods: 1 runs are done" in capsys.readouterr().err
    assert (kept / "methods.json").read_bytes() == whole
    assert (kept / "second.json").exists(), "the others go on"
    assert pack_or_restore(monkeypatch, "--force") == 0
    assert (kept / "methods.json").read_bytes() != whole


def test_outputs_come_back_later_and_only_where_they_are_missing(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pack_or_restore(monkeypatch) == 0
    files = sorted((results.RUNS / "methods").glob("cells/*/outputs.jsonl"))
    missing = files[0].read_bytes()
    files[0].unlink()
    files[1].write_text("one's own")
    assert pack_or_restore(monkeypatch, "--restore") == 0
    assert (files[0].read_bytes(), files[1].read_text()) == (missing, "one's own")


def test_a_restored_study_is_there_as_a_whole_or_not_at_all(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_study(results.RUNS / "second")
    results.PAGES[0].write_text(results.PAGES[0].read_text() + "<!-- second -->\n\nold\n\n<!-- end -->\n")
    assert pack_or_restore(monkeypatch) == 0
    shutil.rmtree(results.RUNS)
    unpack, written = results.unpack, results.write_text

    def stop(path: Path, text: str) -> None:
        if path.name == "evaluation.json":
            raise KeyboardInterrupt
        written(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(results, "write_text", stop)
        with pytest.raises(KeyboardInterrupt):
            pack_or_restore(monkeypatch, "--restore")
    assert [*results.RUNS.iterdir()] == []

    def broken(path: Path, folder: Path) -> None:
        if path.stem == "methods":
            raise ValueError("it is broken")
        unpack(path, folder)

    with monkeypatch.context() as patch:
        patch.setattr(results, "unpack", broken)
        assert pack_or_restore(monkeypatch, "--restore") == 1
    assert "error: it is broken" in capsys.readouterr().err
    assert [path.name for path in results.RUNS.iterdir()] == ["second"], "the others go on"
    assert pack_or_restore(monkeypatch, "--restore") == 0
    assert len(sorted(results.RUNS.glob("*/cells/*/outputs.jsonl"))) == 4


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, path = make_study(tmp_path / "study"), tmp_path / "study.outputs.json.gz"
    monkeypatch.setattr(outputs, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match=r"would have [\d,]+ bytes, but at most 100 .* lower test_limit below 5"):
        outputs.pack_outputs(config.folder, path)
    assert not path.exists()


def test_outputs_of_other_items_or_scores_are_refused(tmp_path: Path) -> None:
    config, path = make_study(tmp_path / "study"), tmp_path / "study.outputs.json.gz"
    outputs.pack_outputs(config.folder, path)
    other = make_study(tmp_path / "other", test_limit=4).folder
    assert outputs.restore_outputs(path, other, tmp_path) == "", "nothing is missing"
    next(other.glob("cells/*/outputs.jsonl")).unlink()
    assert "has other test items" in outputs.restore_outputs(path, other, tmp_path)
    file = next(config.folder.glob("cells/*/outputs.jsonl"))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    file.write_text("".join(json.dumps({**row, "output": "x"}) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(ValueError, match="are not those that were scored"):
        outputs.pack_outputs(config.folder, path)


def test_a_set_that_is_missing_is_said(tmp_path: Path) -> None:
    config, path = make_study(tmp_path / "study"), tmp_path / "study.outputs.json.gz"
    assert outputs.restore_outputs(path, config.folder, tmp_path) == "no outputs are kept"
    outputs.pack_outputs(config.folder, path)
    file = config.folder / "study.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"task": "toy"', '"task": "e2e"'), encoding="utf-8")
    next(config.folder.glob("cells/*/outputs.jsonl")).unlink()
    assert "does not exist" in outputs.restore_outputs(path, config.folder, tmp_path / "nowhere")


@pytest.mark.skipif(not E2E.exists(), reason="E2E is not there")
def test_a_readers_script_gets_the_digits_of_the_tables(tmp_path: Path) -> None:
    config = make_study(tmp_path / "methods", "e2e", str(E2E), methods=("full", "lora:4", "zero-shot"), repetitions=3)
    outputs.pack_outputs(config.folder, tmp_path / "methods.outputs.json.gz")
    script = tmp_path / "recompute.py"
    script.write_bytes(SCRIPT.read_bytes())
    command = [sys.executable, "-I", str(script), str(E2E / "test.jsonl.gz")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    study = read_results(config.folder)
    assert isinstance(study, Study)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in scores_table(study).splitlines()]
    column = table[0].index("BLEU")
    shown = {row[0].replace(":", ""): row[column] for row in table[2:]}
    assert f"full-n9: {shown['full']}\n" in printed
    assert f"lora4-n9: {shown['lora4']}\n" in printed
    assert f"zero-shot-all: {shown['zero-shot'].partition(' ')[0]}\n" in printed
    assert "low-data.outputs.json.gz is not there" in printed


@pytest.mark.skipif(not E2E.exists(), reason="E2E is not there")
def test_three_hundred_items_of_sixty_runs_fit(tmp_path: Path) -> None:
    from prefixtune.data import read_task

    examples, rng = read_task("e2e", E2E, split="test")[:300], random.Random(0)
    kept = outputs.Kept({"study": "s", "task": "e2e", "protocol": "e2e", "metric": "bleu"}, ["0" * 12] * 300)
    for run in range(60):
        # People's own texts differ more than models' do.
        kept.outputs[str(run)] = [rng.choice(example.targets) for example in examples]
        kept.statistics[str(run)] = [[rng.randint(0, 30) for _ in range(10)] for _ in examples]
    assert len(kept.to_bytes()) < outputs.MAX_BYTES


@pytest.mark.skipif(not E2E.exists(), reason="E2E is not there")
@pytest.mark.parametrize("name", ["methods", "low-data"])
def test_the_kept_studies_recompute_to_the_page(name: str) -> None:
    path = results.PACKED / f"{name}.json"
    if not results.outputs_file(path).exists():
        pytest.skip("the study has not run yet")
    command = [sys.executable, "-I", str(SCRIPT), str(E2E / "test.jsonl.gz"), name]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    page = results.PAGES[0].read_text(encoding="utf-8")
    part = page.partition(f"<!-- {name} -->")[2].partition("<!-- end -->")[0]
    for line in lines[2:]:
        assert line.rpartition(": ")[2] in part, line
