"""`prefixtune lm-eval` on tasks made here: tables, JSON, lm-eval's files, and mistakes named before a model loads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest

from command_line import call, run
from live_server import make_model, make_prefix
from lm_eval_tasks import make_tasks
from prefixtune.backbone.load import load_backbone
from prefixtune.errors import ConfigError, DataError, PrefixError

# Raised within lm-eval and what it imports.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning", "default::UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    make_tasks(folder / "tasks", count=5)
    backbone = load_backbone(make_model(folder / "model"), dtype="float32", device="cpu")
    make_prefix(backbone, folder / "one.safetensors", 1, text_format={"prompt": "Q {source} =", "target": " {target}"})
    (folder / "two").mkdir()
    make_prefix(backbone, folder / "two" / "prefix.safetensors", 2, length=7)
    return folder


@pytest.fixture
def arguments(folder: Path) -> list[str]:
    return [
        "lm-eval",
        "--backbone",
        f"{folder / 'model'}",
        "--dtype",
        "float32",
        "--include-path",
        f"{folder / 'tasks'}",
    ]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test."""

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("prefixtune.cli.loading.load", load)


def test_a_table_for_people_json_for_programs_and_lm_evals_files(
    folder: Path, arguments: list[str], tmp_path: Path
) -> None:
    one, tasks = str(folder / "one.safetensors"), "made_choices,made_rolling"
    out, err = run(*arguments, "--prefix", one, "--tasks", tasks, "--output", f"{tmp_path}", "--log-samples")
    assert [line.split()[:4] for line in out.splitlines()[2:]] == [
        ["made_choices", "none", "0", "acc"],
        ["made_choices", "none", "0", "acc_norm"],
        ["made_rolling", "none", "0", "bits_per_byte"],
        ["made_rolling", "none", "0", "word_perplexity"],
    ]
    assert "loglikelihood: 25/25 (100 %)" in err
    assert "loglikelihood rolling: 5/5 (100 %)" in err
    written = {path.name.partition("_2")[0]: path for path in (tmp_path / "model+one").iterdir()}
    assert sorted(written) == ["results", "samples_made_choices", "samples_made_rolling"]
    stored = json.loads(written["results"].read_text())
    samples = [json.loads(line) for line in written["samples_made_choices"].read_text().splitlines()]
    assert len(samples) == 5
    # A second time nothing is computed, and --json says the same on one line.
    out, err = run(*arguments, "--prefix", one, "--tasks", tasks, "--output", f"{tmp_path}", "--json")
    assert err == ""
    results = json.loads(out)
    assert results["results"] == stored["results"]
    assert results["config"]["prefix_length"] == 4
    assert "samples" not in results


def test_prefixes_by_task_group_and_for_all(folder: Path, arguments: list[str]) -> None:
    def scores(*options: str) -> dict[str, Any]:
        out, _ = run(*arguments, "--limit", "4", "--json", *options)
        return dict(json.loads(out)["results"])

    one, two = str(folder / "one.safetensors"), str(folder / "two")
    names = ["--tasks", "made_choices,made_rolling"]
    mixed = scores(*names, "--prefix", one, "--prefix", f"made_rolling={two}")
    assert mixed["made_rolling"] == scores("--tasks", "made_rolling", "--prefix", two)["made_rolling"]
    assert mixed["made_choices"] == scores("--tasks", "made_choices", "--prefix", one)["made_choices"]
    assert mixed["made_rolling"] != scores("--tasks", "made_rolling", "--prefix", one)["made_rolling"]
    formatted = scores(*names, "--prefix", one, "--format", "prefix")
    assert formatted["made_rolling"] == scores("--tasks", "made_rolling", "--prefix", one)["made_rolling"]


def test_groups_patterns_and_files_of_tasks(folder: Path, arguments: list[str]) -> None:
    two = str(folder / "two")
    out, _ = run(*arguments, "--tasks", "made", "--prefix", f"made={two}", "--limit", "2")
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["made", *["made_choices"] * 2, "made_texts"]
    out, _ = run(*arguments, "--tasks", "made_r*", "--limit", "2", "--json")
    assert list(json.loads(out)["results"]) == ["made_rolling"]
    out, _ = run(*arguments[:-2], "--tasks", str(folder / "tasks" / "made_rolling.yaml"), "--limit", "2", "--json")
    assert list(json.loads(out)["results"]) == ["made_rolling"]


@pytest.mark.usefixtures("no_model")
def test_an_unknown_task_is_named_with_the_nearest(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        call(*arguments, "--tasks", "made_choises,hellaswagg", "--prefix", f"{tmp_path / 'none.safetensors'}")
    message = str(caught.value)
    assert "lm-eval has no task 'made_choises', 'hellaswagg'" in message
    assert "did you mean 'made_choices'?" in message
    assert "did you mean 'hellaswag'?" in message
    assert "none.safetensors" in message, "all faults at once"


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--include-path", "nowhere"], r"'nowhere', with further tasks, is no folder"),
        (["--prefix", "made_text={two}"], r"a prefix is given for 'made_text', which is not among the tasks"),
        (["--prefix", "{two}", "--prefix", "{one}"], r"--prefix names two for all tasks"),
        (["--prefix", "made_choices="], r"--prefix is 'made_choices=', but FILE or TASK=FILE is needed"),
        (["--output", "{one}"], r"cannot write"),
    ],
)
def test_mistakes_are_named_before_a_model_loads(
    folder: Path, arguments: list[str], options: list[str], message: str
) -> None:
    filled = [option.format(one=folder / "one.safetensors", two=folder / "two") for option in options]
    with pytest.raises(PrefixError, match=message):
        call(*arguments, "--tasks", "made_choices", *filled)


@pytest.mark.usefixtures("no_model")
def test_tasks_that_cannot_be_run_are_named_before_a_model_loads(arguments: list[str], tmp_path: Path) -> None:
    tasks = make_tasks(tmp_path, count=2)

    def change(task: str, **settings: Any) -> None:
        file = tasks / f"{task}.yaml"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    change("made_choices", dataset_kwargs={"data_files": {"test": str(tmp_path / "gone.jsonl")}})
    change("made_texts", generation_kwargs={"until": ["\n"], "typical_p": 0.5})
    change("made_rolling", unsafe_code=True)
    command = [*arguments[:-1], str(tasks)]
    with pytest.raises(DataError, match=r"lm-eval cannot load the task 'made_choices': .*gone\.jsonl"):
        call(*command, "--tasks", "made_choices")
    with pytest.raises(PrefixError, match=r"decodes with 'typical_p'"):
        call(*command, "--tasks", "made_texts")
    with pytest.raises(ConfigError, match=r"'made_rolling' runs the code that the model writes"):
        call(*command, "--tasks", "made_rolling")


def test_a_stopped_command_says_that_its_answers_are_kept(
    folder: Path, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import prefixtune.interop.lm_eval.likelihood as likelihood

    score_batch: Callable[..., Any] = likelihood._score_batch
    calls: list[int] = []

    def stopping(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score_batch(*given)

    monkeypatch.setattr(likelihood, "_score_batch", stopping)
    command = [*arguments, "--tasks", "made_choices", "--batch-size", "5", "--output", f"{tmp_path}"]
    _, err = run(*command, code=130)
    assert "error: interrupted.\nhint: the answers so far are kept; the same command goes on with them." in err
    calls[:] = [1, 1]
    _, err = run(*command)
    # The first of five questions is answered.
    assert len(calls) == 2 + 4
    assert "loglikelihood: 20/20" in err


def test_a_model_without_a_chat_template_is_refused(folder: Path, tmp_path: Path, arguments: list[str]) -> None:
    plain = make_model(tmp_path / "plain", template=False)
    with pytest.raises(ConfigError, match="has no chat template"):
        call(*arguments, "--tasks", "made_texts", "--apply-chat-template", "--backbone", f"{plain}")
    run(*arguments, "--tasks", "made_texts", "--apply-chat-template", "--limit", "1")
