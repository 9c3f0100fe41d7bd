"""The real command line: studies, evaluation of runs, and presets, on a tiny model folder, the hub switched off."""

from __future__ import annotations

import json
import signal
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from command_line import run, start, until
from prefixtune.cli.main import main
from prefixtune.report import read_results
from small_study import cells, scores_of, store_model, write_config

ROWS = [
    {"mr": f"name[{name}], food[{food}]", "references": [f"{name} has {food}.", f"Eat {food} at {name}."]}
    for name in ("Aromi", "Bibi", "Cotto")
    for food in ("soup", "cake")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(store_model(tmp_path_factory.mktemp("studies") / "model"))


@pytest.fixture(scope="module")
def config(model: str) -> str:
    """A study of the toy set as a file."""
    return str(write_config(Path(model).parent / "study.toml", Path(model)))


@pytest.fixture(scope="module")
def data(model: str) -> str:
    """E2E's data set in small: a folder with all three parts."""
    folder = Path(model).parent / "e2e"
    folder.mkdir()
    for part in ("train", "dev", "test"):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(folder)


def test_a_plan_is_printed_without_running_anything(config: str, tmp_path: Path) -> None:
    flags = ("study", "methods", "--config", config, "--methods", "prefix,adapter:8,zero-shot", "--plan")
    planned = json.loads(run(*flags, "--json", cwd=tmp_path)[0])
    assert planned["folder"] == "runs/methods"
    assert [cell["id"] for cell in planned["runs"]] == [
        "prefix-n8-P3-task-subset0-seed0",
        "adapter8-n8-subset0-seed0",
        "zero-shot-all-subset0-seed0",
    ]
    assert planned["runs"][1] == {**planned["runs"][1], "method": "adapter:8", "num_targets": 8, "subset": 0, "seed": 0}
    assert run(*flags, cwd=tmp_path)[0].split() == [cell["id"] for cell in planned["runs"]]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def flags(config: str) -> tuple[str, ...]:
    return ("study", "methods", "--config", config, "--methods", "zero-shot,prefix,full")


Shared = tuple[Path, list[list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def shared(flags: tuple[str, ...], config: str) -> Shared:
    """A study that two processes ran together, and the events of both."""
    folder = Path(config).parent / "shared"
    one, other = (start(*flags, "--seeds", "2", "--output", str(folder), "--json") for _ in range(2))
    # One is stopped in the middle of a cell, so that the other gets all other cells.
    logs = [until(one, lambda event: event["event"] == "step")]
    one.send_signal(signal.SIGSTOP)
    logs.append(until(other, lambda event: event["event"] == "cell" and event["status"] == "done"))
    one.send_signal(signal.SIGCONT)
    for process, events in zip((one, other), logs, strict=True):
        # Not by `communicate` alone: it misses the lines that are in the stream's buffer.
        events += until(process, lambda event: event["event"] == "result")
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    return folder, logs


def test_two_processes_share_a_study(shared: Shared) -> None:
    folder, logs = shared
    assert [len(events[-1]["done"]) for events in logs] == [5, 5]
    done = [cells(events, "done") for events in logs]
    assert done[0]
    assert done[1]
    assert len({*done[0], *done[1]}) == len(done[0]) + len(done[1]) == 5
    starts = Counter((e["cell"], e["learning_rate"]) for events in logs for e in events if e["event"] == "start")
    assert len(starts) == 2 * 2 + 2
    assert set(starts.values()) == {1}, "a cell was trained twice"
    assert len(scores_of(folder)) == 5


def test_a_study_has_a_report(shared: Shared, tmp_path: Path) -> None:
    stored = json.loads((shared[0] / "study.json").read_text())
    assert stored["command"].startswith("prefixtune study methods --config ")
    assert stored["config"]["tries"] == 2
    page = tmp_path / "page.html"
    files = json.loads(run("report", str(shared[0]), "--output", str(page), "--json")[0])
    assert files["html"] == str(page)
    text = Path(files["markdown"]).read_text()
    for method in ("zero-shot", "prefix", "full"):
        assert method in text
    assert "BLEU" in page.read_text()


def test_kill_minus_nine_then_the_same_scores(shared: Shared, flags: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "study"
    process = start(*flags, "--output", str(folder), "--json")
    # Its state is there, and nearly all of its steps are left.
    killed = until(process, lambda event: event["event"] == "save" and event["step"] == 1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert cells(killed, "done") == ["zero-shot-all-subset0-seed0"]
    out, err = run(*flags, "--output", str(folder))
    assert out == f"{folder}: 3 of 3 runs done\n"
    begun = [line.split()[1] for line in err.splitlines() if line.startswith("[")]
    assert begun == ["prefix-n8-P3-task-subset0-seed0", "full-n8-subset0-seed0"]
    assert err.count("learning rate 0.02: development loss") == 1
    assert f"prefixtune report {folder}" in err
    scores, whole = scores_of(folder), scores_of(shared[0])
    assert scores == {name: whole[name] for name in scores}


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
    assert "outputs of another evaluation" in capsys.readouterr().err
    assert main([*flags, "--shots", "7"]) == 2
    assert "has 6 examples with a target" in capsys.readouterr().err


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
    assert "a prefix needs none" in capsys.readouterr().err


def test_mistakes_are_reported_before_the_model_loads(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("evaluate", "--backbone", model, "--task", "e2e", "--data", data)
    (tmp_path / "file").write_text("")
    for more, says in (
        (("--split", "tset"), "tset"),
        (("--split", "test", "--metrics", "blue"), "no metric 'blue'"),
        (("--split", "test", "--metrics", "bertscore"), "bertscore needs the weights of a model"),
        (("--split", "test", "--outputs", str(tmp_path)), "it is a folder"),
        (("--split", "test", "--output", str(tmp_path / "file")), "cannot write"),
        (("--split", "test", "--batch-size", "0"), "--batch-size is 0"),
        (("--split", "test", "--shots", "7", "--train", data), "has 6 examples with a target"),
    ):
        assert main([*flags, *more]) == 2
        stderr = capsys.readouterr().err
        assert says in stderr
        assert "loading" not in stderr
    monkeypatch.setenv("PATH", "/nowhere")
    assert main([*flags, "--split", "test", "--metrics", "meteor"]) == 2
    assert "install one (Debian and Ubuntu: apt install default-jre-headless), or leave" in capsys.readouterr().err


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


MISTAKES = {
    "unknown study": (("study", "lenght"), "'lenght'", "did you mean 'length'?"),
    "no study": (("study",), "NAME is missing", "--help"),
    "unknown option": (("study", "methods", "--trys", "3"), "--trys", "did you mean '--tries'?"),
    "several wrong values": (
        ("study", "methods", "--tries", "0", "--methods", "lorra"),
        "(did you mean 'lora'?); --tries is 0",
        "--help",
    ),
    "no such file of a study": (("study", "methods", "--config", "/nowhere.toml"), "/nowhere.toml", "check the path"),
    "unknown preset": (("train", "--preset", "papper", "--task", "e2e"), "'papper'", "did you mean 'paper'?"),
    "no preset for a task": (("train", "--preset", "paper", "--task", "toy"), "nothing for the task 'toy'", ""),
    "a run and a prefix": (
        ("evaluate", "--run", "a", "--prefix", "b", "--data", "c"),
        "--prefix cannot go with --run",
        "--help",
    ),
    "an empty run": (("evaluate", "--run", ".", "--data", "c"), "holds neither", "that was finished"),
    "shots of nothing": (("evaluate", "--shots", "2", "--data", "c"), "of --train FILE", "give --train"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_with_a_hint(name: str, tmp_path: Path) -> None:
    arguments, message, hint = MISTAKES[name]
    out, err = run(*arguments, code=2, cwd=tmp_path)
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("error: ")
    assert message in err
    assert hint in err
    assert any(line.startswith("hint: ") for line in lines)
    assert list(tmp_path.iterdir()) == []
