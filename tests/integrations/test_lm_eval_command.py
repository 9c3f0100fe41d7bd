"""`prefixtune lm-eval` on tasks made here: tables, JSON, lm-eval's files, and mistakes named before a model loads."""

import functools
import json
import os

os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
from lm_eval.tasks import TaskManager

from command_line import call, run
from live_server import make_model, make_prefix
from lm_eval_tasks import make_tasks
from prefixtune.backbone.load import load_backbone
from prefixtune.errors import CheckpointError, ConfigError, PrefixError

# Raised within lm-eval and what it imports.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning", "default::UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    make_tasks(folder / "tasks", count=5)
    backbone = load_backbone(make_model(folder / "model"), dtype="float32", device="cpu")
    make_prefix(backbone, folder / "one.safetensors", 1, text_format={"prompt": "Q {source} =", "target": " {target}"})
    (folder / "two").mkdir()
    make_prefix(backbone, folder / "two" / "prefix.safetensors", 2, length=7)
    return folder


@pytest.fixture
def arguments(folder, monkeypatch):
    """Without lm-eval's own tasks, whose files it reads for ten seconds."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    return ["lm-eval", "--backbone", f"{folder / 'model'}", "--dtype", "float32", "--include-path", f"{folder}/tasks"]


def test_a_table_for_people_and_json_for_programs(folder, arguments):
    prefix, tasks = str(folder / "two"), "made_choices,made_rolling"
    out, _ = run(*arguments, "--prefix", prefix, "--tasks", tasks)
    assert "made_choices" in out
    assert "word_perplexity" in out
    out, _ = run(*arguments, "--prefix", prefix, "--tasks", tasks, "--json")
    results = json.loads(out.splitlines()[-1])
    assert results["config"]["prefix_length"] == 7
    bare, _ = run(*arguments, "--tasks", tasks, "--json")
    assert json.loads(bare.splitlines()[-1])["results"] != results["results"]


def test_groups_patterns_formats_and_files_of_tasks(folder, arguments):
    def tasks_of(*options):
        out, _ = run(*arguments, *options, "--limit", "2", "--json")
        return set(json.loads(out.splitlines()[-1])["results"])

    assert tasks_of("--tasks", "made") == {"made", "made_choices", "made_texts"}
    formatted = ("--prefix", str(folder / "one.safetensors"), "--format", "prefix")
    assert tasks_of("--tasks", "made_r*", *formatted) == {"made_rolling"}
    assert tasks_of("--tasks", str(folder / "tasks" / "made_rolling.yaml")) == {"made_rolling"}


def test_mistakes(folder, arguments, tmp_path):
    task = (folder / "tasks" / "made_rolling.yaml").read_text()
    (tmp_path / "lost.yaml").write_text(task.replace("made_rolling.jsonl", "nowhere.jsonl"))
    for options in (
        ["--tasks", "made_choises"],
        ["--tasks", str(tmp_path / "lost.yaml")],
        ["--tasks", "made_texts", "--num-fewshot", "99"],
        ["--tasks", "made_texts", "--prefix", f"{tmp_path / 'none.safetensors'}"],
        ["--tasks", "made_texts", "--format", "prefix"],
    ):
        with pytest.raises(PrefixError):
            call(*arguments, *options)
    plain = make_model(tmp_path / "plain", template=False)
    with pytest.raises(ConfigError):
        call(*arguments, "--tasks", "made_texts", "--apply-chat-template", "--backbone", f"{plain}")
    run(*arguments, "--tasks", "made_texts", "--apply-chat-template", "--limit", "1")


def test_own_tasks_stand_beside_those_of_lm_eval(folder, arguments, monkeypatch):
    """Both are known: what is wrong is the prefix."""
    monkeypatch.undo()
    with pytest.raises(CheckpointError):
        call(*arguments, "--tasks", "hellaswag,made_texts", "--prefix", f"{folder}/none.safetensors")
