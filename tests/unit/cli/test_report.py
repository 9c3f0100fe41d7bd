"""`prefixtune report`: the files that it writes, what it prints, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import call
from made_up_runs import evaluation, low_data_study
from prefixtune.errors import ConfigError, DataError, PrefixError


def run(*arguments: object) -> int:
    return call("report", *arguments)


def test_writes_the_page_and_markdown_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "new" / "out.html"
    assert run(evaluation(tmp_path / "run"), "--output", page, "--title", "Notices & more") == 0
    assert "<h1>Notices &amp; more</h1>" in page.read_text(encoding="utf-8")
    assert page.with_suffix(".md").read_text(encoding="utf-8").startswith("# Notices \\& more\n")
    assert sorted(path.name for path in page.parent.iterdir()) == ["out.html", "out.md"]
    assert capsys.readouterr().out == f"{page} ({page.stat().st_size:,} bytes) and {page.with_suffix('.md')}\n"


def test_warns_of_an_unfinished_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, page = low_data_study(tmp_path / "study"), tmp_path / "out.html"
    run(study, "--output", page)
    assert "warning: This study is unfinished" in capsys.readouterr().err
    run(study, "--output", page, "--quiet", "--json")
    shown = capsys.readouterr()
    assert shown.err == ""
    result = json.loads(shown.out)
    assert (result["html"], result["markdown"]) == (str(page), str(page.with_suffix(".md")))
    assert "unfinished" in result["warnings"][0]


def test_figures_go_into_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, page, figures = low_data_study(tmp_path / "study"), tmp_path / "out.html", tmp_path / "new" / "figures"
    run(study, "--output", page, "--figures", figures, "--quiet")
    assert capsys.readouterr().out.endswith(f"; 7 figures in {figures}\n")
    assert len(list(figures.glob("*.pdf"))) == len(list(figures.glob("*.csv"))) == 7
    run(study, "--output", page, "--figures", figures, "--quiet", "--json")
    assert "bleu-over-number-of-targets" in json.loads(capsys.readouterr().out)["figures"]


def test_warns_of_figures_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixtune.pages.page.MOST_FIGURES", 5)
    evaluations, page, figures = low_data_study(tmp_path / "study"), tmp_path / "out.html", tmp_path / "figures"
    run(evaluations, "--output", page)
    assert "not written" not in capsys.readouterr().err
    run(evaluations, "--output", page, "--figures", figures)
    assert "warning: 2 of 7 figures are not written; report fewer runs." in capsys.readouterr().err
    run(evaluations, "--output", page, "--figures", figures, "--json", "--quiet")
    assert "2 of 7 figures are not written" in json.loads(capsys.readouterr().out)["warnings"][-1]
    assert len(list(figures.glob("*.pdf"))) == 5


def test_a_folder_of_figures_that_cannot_be_made_stops_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(PrefixError, match=r"cannot write .*file': it is a file"):
        run(evaluation(tmp_path / "run"), "--output", tmp_path / "out.html", "--figures", tmp_path / "file")
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize("name", ["out.md", "out", "folder.html"])
def test_refuses_an_output_that_is_no_page(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ConfigError, match=r"must be the name of an \.html file"):
        run(evaluation(tmp_path / "run"), "--output", tmp_path / name)


def test_notes_that_somebody_wrote_are_not_replaced(tmp_path: Path) -> None:
    run_folder, page, notes = evaluation(tmp_path / "run"), tmp_path / "notes.html", tmp_path / "notes.md"
    notes.write_text("# Notes\n\n## Summary\n\nMine.\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"notes\.md' exists and is not known as a report") as caught:
        run(run_folder, "--output", page)
    assert "--output" in caught.value.hint
    assert not page.exists()
    assert notes.read_text(encoding="utf-8").endswith("Mine.\n")
    notes.unlink()
    run(run_folder, "--output", page, "--title", "First")
    run(run_folder, "--output", page, "--title", "Second")
    text = notes.read_text(encoding="utf-8")
    assert text.startswith("# Second\n")
    notes.write_text(f"{text}\nI add: it is slow.\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not known as a report"):
        run(run_folder, "--output", page)


def test_a_page_that_somebody_wrote_is_not_replaced_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder, page = evaluation(tmp_path / "run"), tmp_path / "report.html"
    page.write_text("<p>Mine.</p>")
    with pytest.raises(ConfigError, match=r"report\.html' exists and is not known as a report"):
        run(run_folder)
    assert page.read_text() == "<p>Mine.</p>"
    page.unlink()
    run(run_folder, "--title", "First")
    run(run_folder, "--title", "Second")
    assert "<h1>Second</h1>" in page.read_text(encoding="utf-8")


def test_a_broken_folder_leaves_the_old_report(tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    page.write_text("old")
    with pytest.raises(DataError):
        run(tmp_path / "nowhere", "--output", page)
    assert page.read_text() == "old"
