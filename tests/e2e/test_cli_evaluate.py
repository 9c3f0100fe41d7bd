"""The real command line: evaluation of runs on a tiny model folder, the hub switched off."""

import json
from pathlib import Path

import pytest

from command_line import run
from prefixtune.report import read_results
from zoo import store_model

ROWS = [
    {"mr": f"name[{name}], food[{food}]", "references": [f"{name} has {food}.", f"Eat {food} at {name}."]}
    for name in ("Aromi", "Bibi", "Cotto")
    for food in ("soup", "cake")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate") / "model"
    return store_model(path, "llama", num_hidden_layers=1, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def data(model):
    """E2E's data set in small: a folder with all three parts."""
    folder = Path(model).parent / "e2e"
    folder.mkdir()
    for part in ("train", "dev", "test"):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(folder)


def test_a_run_of_another_method_is_evaluated_into_a_folder(model, data, tmp_path):
    output, scored = tmp_path / "full", tmp_path / "scored"
    train = ("train", "--task", "e2e", "--train", data, "--backbone", model, "--dtype", "float32", "--method", "full")
    out, err = run(*train, "--max-steps", "3", "--output", str(output))
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


def test_few_shots_and_an_instruction(model, data, tmp_path):
    short = ("--metrics", "bleu", "--num-beams", "1", "--max-new-tokens", "6")
    flags = ("evaluate", "--backbone", model, "--task", "e2e", "--data", data, "--split", "test", *short)
    words, shots = ("--instruction", "Describe it:"), ("--train", data, "--shots")
    shown = " name : Aromi | food : soup <s> Aromi has soup. </s>"
    second = " name : Aromi | food : cake <s> Aromi has cake. </s>"
    for number, (more, method, prompt) in enumerate(
        (
            ((*shots, "2"), "few-shot", f"{shown}{second} {{source}} {{separator}}"),
            (words, "zero-shot", "Describe it:\n {source} {separator}"),
            ((*words, *shots, "1"), "few-shot", f"Describe it:\n{shown} {{source}} {{separator}}"),
        )
    ):
        run(*flags, *more, "--output", str(tmp_path / str(number)))
        evaluation = read_results(tmp_path / str(number)).evaluation
        assert (evaluation.method, evaluation.settings["text_format"]["prompt"]) == (method, prompt)
    # What is decoded otherwise must not join what the folder keeps; nor are there seven examples to show.
    run(*flags, *words, "--output", str(tmp_path / "1"), "--min-new-tokens", "1", code=2)
    run(*flags, *shots, "7", code=2)
    run(*flags, *words, "--prefix", "any.safetensors", code=2)
