"""`prefixtune report`: the files that it writes, what it prints, what it refuses."""

import json

import pytest

from command_line import call
from made_up_runs import evaluation
from prefixtune.errors import ConfigError, DataError, PrefixError


def run(*arguments):
    return call("report", *arguments)


def test_figures_go_into_a_folder(tmp_path, capsys):
    folder, page, figures = evaluation(tmp_path / "run"), tmp_path / "out.html", tmp_path / "new" / "figures"
    run(folder, "--output", page, "--title", "Notices & more", "--figures", figures, "--quiet", "--json")
    assert "<h1>Notices &amp; more</h1>" in page.read_text(encoding="utf-8")
    names = json.loads(capsys.readouterr().out)["figures"]
    assert "bleu-by-type" in names
    assert {path.stem for path in figures.glob("*.pdf")} == {path.stem for path in figures.glob("*.csv")} == {*names}


def test_what_cannot_be_written_or_read_leaves_no_page(tmp_path):
    (tmp_path / "file").write_text("old")
    folder, page = evaluation(tmp_path / "run"), tmp_path / "run" / "report.html"
    with pytest.raises(PrefixError):
        run(folder, "--figures", tmp_path / "file")
    with pytest.raises(ConfigError):
        run(folder, "--output", tmp_path / "out.md")
    assert not page.exists()
    with pytest.raises(DataError):
        run(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    run(folder)
    assert page.exists()
