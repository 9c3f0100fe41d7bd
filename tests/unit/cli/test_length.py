"""`prefixtune length`: the table, JSON, and going on."""

import json

import pytest

from command_line import run
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.evaluation.length import LENGTH_FILE


@pytest.fixture
def arguments(tmp_path, save_model):
    save_model(tmp_path / "model")
    rows = [{"name": name, "text": f"{name} eats."} for name in ("Ann", "Bo", "Cy", "Di")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("length", "--backbone", str(tmp_path / "model"), "--device", "cpu"),
        *("--init-text", "ab", "--prefix-length", "5"),
        *("--train", str(tmp_path / "rows.jsonl"), "--dev", str(tmp_path / "rows.jsonl")),
        *("--source", "name", "--target", "text", "--max-steps", "3"),
        *("--output", str(tmp_path / "run")),
    ]


def test_a_table_the_cut_prefix_and_the_curve_again(arguments, tmp_path):
    out, _ = run(*arguments)
    stored = json.loads((tmp_path / "run" / LENGTH_FILE).read_text())
    rows = [line.split() for line in out.splitlines()[1:-1]]
    assert [int(row[0]) for row in rows] == [each["prefix_length"] for each in stored["lengths"]] == [1, 2, 3, 4, 5]
    (chosen,) = [int(row[0]) for row in rows if row[-1] == "chosen"]
    file = tmp_path / "run" / f"prefix-{chosen}.safetensors"
    assert out.splitlines()[-1] == f"{file}: {file.stat().st_size:,} bytes"
    assert load_prefix(file).prefix_length == chosen == stored["chosen"]
    # A finished run gives its curve again.
    again, _ = run("length", "--resume", "--output", str(tmp_path / "run"), "--json", "--lengths", "2,4")
    curve = [event for event in map(json.loads, again.splitlines()) if event["event"] == "length"]
    assert [event["prefix_length"] for event in curve] == [2, 4, 5]
    assert curve[-1]["loss"] == stored["lengths"][-1]["loss"]
