"""The real command line: evaluation of runs, and presets, on a tiny model folder, the hub switched off."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from command_line import run
from prefixtune.cli.main import main
from prefixtune.report import read_results
from zoo import make_model, make_tokenizer

ROWS = [
    {"mr": f"name[{name}], food[{food}]", "references": [f"{name} has {food}.", f"Eat {food} at {name}."]}
    for name in ("Aromi", "Bibi", "Cotto")
    for food in ("soup", "cake")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path, tokenizer = tmp_path_factory.mktemp("evaluate") / "model", make_tokenizer()
    make_model("llama", tokenizer, num_hidden_layers=1, max_position_embeddings=1024).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def data(model: str) -> str:
    """E2E's data set in small: a folder with all three parts."""
    folder = Path(model).parent / "e2e"
    folder.mkdir()
    for part in ("train", "dev", "test"):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(folder)


def test_a_run_of_another_method_is_evaluated_into_a_folder(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, scored = tmp_path / "full", tmp_path / "scored"
    train = ("train", "--task", "e2e", "--train", data, "--backbone", model, "--dtype", "float32", "--method", "full")
    # Within this process, which is quicker.
    assert main([*train, "--max-steps", "3", "--preset", "paper", "--output", str(output)]) == 0
    out, err = capsys.readouterr()
    assert papers_values(output) == (5e-5, 5.0, 10)
    assert str(output / "weights.safetensors") in out
    assert f"prefixtune evaluate --run {output}" in err
    more = ("--split", "test", "--metrics", "bleu, ter", "--intervals", "--max-new-tokens", "8", "--num-beams", "2")
    evaluate = ("evaluate", "--run", str(output), "--data", data, *more, "--output", str(scored), "--json")
    printed = json.loads(run(*evaluate)[0])
    assert (printed["num_examples"], printed["task"], printed["run"]) == (6, "e2e", str(output))
    assert [*printed["scores"]] == ["bleu", "ter"]
    assert "protocol e2e" in printed["scores"]["bleu"]["implementation"]
    stored = read_results(scored).evaluation
    assert (stored.method, stored.task, stored.split, stored.num_examples) == ("full", "e2e", "test", 6)
    assert stored.scores["bleu"].score == printed["scores"]["bleu"]["score"]
    assert list(stored.scores["bleu"].interval) == printed["scores"]["bleu"]["interval"]
    assert stored.settings["decoding"]["num_beams"] == 2
    assert stored.groups["attributes"]["2"].num_examples == 6


def test_few_shots_of_the_training_file(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = ("--shots", "2", "--train", data, "--metrics", "bleu", "--num-beams", "1", "--max-new-tokens", "6")
    flags = ("evaluate", "--backbone", model, "--task", "e2e", "--data", data, "--split", "test", *shown)
    assert main([*flags, "--output", str(tmp_path)]) == 0
    assert "6 examples of" in capsys.readouterr().out
    evaluation = read_results(tmp_path).evaluation
    assert evaluation.method == "few-shot"
    prompt = evaluation.settings["text_format"]["prompt"]
    assert prompt == " name : Aromi | food : soup <s> Aromi has soup. </s> name : Aromi | food : cake <s> " + (
        "Aromi has cake. </s> {source} {separator}"
    )
    # What is decoded otherwise must not join what the folder keeps; nor are there seven examples to show.
    assert main([*flags, "--output", str(tmp_path), "--min-new-tokens", "1"]) == 2
    assert main([*flags, "--shots", "7"]) == 2


def test_the_bare_model_gets_an_instruction(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--instruction", "Describe it:", "--metrics", "bleu", "--num-beams", "1", "--max-new-tokens", "6")
    flags = ("evaluate", "--backbone", model, "--task", "e2e", "--data", data, "--split", "test", *words)
    assert main([*flags, "--output", str(tmp_path / "plain")]) == 0
    evaluation = read_results(tmp_path / "plain").evaluation
    assert (evaluation.method, evaluation.settings["text_format"]["prompt"]) == (
        "zero-shot",
        "Describe it:\n {source} {separator}",
    )
    shown = ("--shots", "1", "--train", data)
    assert main([*flags, *shown, "--output", str(tmp_path / "shown")]) == 0
    prompt = read_results(tmp_path / "shown").evaluation.settings["text_format"]["prompt"]
    assert prompt == ("Describe it:\n name : Aromi | food : soup <s> Aromi has soup. </s> {source} {separator}")
    assert main([*flags, "--prefix", "any.safetensors"]) == 2


def test_mistakes_are_reported_before_the_model_loads(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("evaluate", "--backbone", model, "--task", "e2e", "--data", data)
    (tmp_path / "file").write_text("")
    for more, says in (
        (("--split", "test", "--metrics", "blue"), "blue"),
        (("--split", "test", "--output", str(tmp_path / "file")), "file"),
        (("--split", "test", "--shots", "7", "--train", data), "--shots"),
    ):
        assert main([*flags, *more]) == 2
        stderr = capsys.readouterr().err
        assert says in " ".join(stderr.split())
        assert "loading" not in stderr
    monkeypatch.setenv("PATH", "/nowhere")
    assert main([*flags, "--split", "test", "--metrics", "meteor"]) == 2
    assert "java" in capsys.readouterr().err


def papers_values(folder: Path) -> tuple[float, float, int]:
    """Learning rate, epochs and batch size: columns of the paper's table 8."""
    stored = tomllib.loads((folder / "config.toml").read_text())
    assert stored["targets_per_source"] == 1, "the paper's batches are pairs"
    return stored["learning_rate"], stored["epochs"], stored["batch_size"]


def test_a_preset_takes_the_papers_values_and_flags_win(model: str, data: str, tmp_path: Path) -> None:
    train = ("train", "--task", "e2e", "--train", data, "--backbone", model, "--dtype", "float32")
    more = ("--preset", "paper", "--max-steps", "1", "--bottleneck-size", "16", "--output", str(tmp_path / "run"))
    assert main([*train, *more]) == 0
    assert papers_values(tmp_path / "run") == (8e-5, 5.0, 10)
    stored = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert (stored["prefix_length"], stored["reparameterization"]) == (5, "mlp")
    assert (stored["max_steps"], stored["bottleneck_size"]) == (1, 16)
