"""The first minutes of a new user who installs by pip, and what is said where an extra is missing."""

import json
import re
from pathlib import Path

import pytest

from empty_machine import PLACES, ROOT
from every_machine import *  # noqa: F403 (its tests are this machine's, too)
from every_machine import DATA, EXTRAS, SCORE

pytestmark = pytest.mark.parametrize("machine", ["pip"], indirect=True, scope="session")


def test_train_generate_evaluate_inspect_report(machine, prefix):
    evaluate = ("evaluate", "--prefix", prefix, "--data", "places.jsonl", "--target", "text", "--max-new-tokens", "4")
    generated, evaluated, inspected, _ = machine.results(
        ("generate", "--prefix", prefix, "--max-new-tokens", "4", "--json", "Aromi is Italian"),
        (*evaluate, "--output", "runs/places/test", "--json"),
        ("inspect", prefix),
        ("report", "runs/places", "--output", "places.html"),
    )
    assert json.loads(generated)["output"]
    assert json.loads(evaluated)["num_examples"] == len(PLACES)
    written = (machine.work / "runs" / "places" / "test" / "outputs.jsonl").read_text(encoding="utf-8")
    assert len(written.splitlines()) == len(PLACES)
    assert "smollm2-135m" in inspected
    page = (machine.work / "places.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "<svg" in page


def test_commands_on_files(machine, prefix):
    """What converts, exports and scores needs no optional library either."""
    scored, tasks, *_ = machine.results(
        (*SCORE, "--metrics", "bleu,chrf", "--json"),
        ("data", "--tasks"),
        ("convert", prefix, "adapter", "--to", "peft"),
        ("convert", "adapter", "back.safetensors", "--to", "prefixtune", "--backbone", "smollm2-135m"),
        ("export", prefix, "--to", "llama.cpp", "--output", "exported-llama"),
    )
    assert json.loads(scored)["scores"]["bleu"]["score"] == pytest.approx(100)
    assert "webnlg" in tasks
    assert (machine.work / "adapter" / "adapter_config.json").exists()
    assert (machine.work / "back.safetensors").stat().st_size < 600_000
    assert (machine.work / "exported-llama" / "ask.json").exists()


def test_a_missing_extra_is_named(machine, prefix):
    (machine.work / "places.parquet").write_bytes(b"PAR1")
    commands = [(extra, command) for extra, several in EXTRAS.items() for command in several]
    words = [[prefix if word == "PREFIX" else word for word in command] for _, command in commands]
    for (extra, command), said in zip(commands, machine.mistakes(*words), strict=True):
        assert f"prefixtune[{extra}]" in said, f"{command}: {said}"
        assert "installed" in said


def test_the_python_of_the_readme(machine, first):
    block = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M | re.S)[0]
    assert "max_steps=20" in block
    (machine.work / "readme.py").write_text(block.replace("max_steps=20", "max_steps=2"), encoding="utf-8")
    out, _ = machine.run("python", "readme.py", **machine.offline)
    assert out.strip()
    assert (machine.work / "runs" / "trains" / "prefix.safetensors").stat().st_size < 600_000


def test_tokenizers_of_sentencepiece(machine):
    """transformers reads them with two packages that it does not require."""
    machine.run("python", Path(__file__).with_name("sentencepiece_models.py"), "models", **machine.offline)
    names = ("marian", "pegasus")
    train = ("train", "--train", "places.jsonl", *DATA[2:], "--max-steps", "1")
    machine.results(*((*train, "--backbone", f"models/{name}", "--output", f"runs/{name}") for name in names))
    assert all((machine.work / "runs" / name / "prefix.safetensors").exists() for name in names)
