"""The real command line on a tiny model folder, with the hub switched off.

Slow, once: the process that others are forked from imports everything (seconds, for the first test that asks for it).
"""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from command_line import run
from forked_command import ForkedCommand
from restaurant_tables import TABLES
from zoo import store_model


@pytest.fixture(scope="module")
def model(folder):
    return store_model(folder / "model", "llama", max_position_embeddings=256)


@pytest.fixture(scope="module")
def data(folder):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TABLES))
    return str(path)


@pytest.fixture(scope="module")
def train_flags(model, data):
    def flags(output, *more):
        return [
            *("train", "--backbone", model, "--train", data, "--source", "{name} is {food}", "--target", "text"),
            *("--prefix-length", "4", "--init-text", "a place", "--dtype", "float32", "--output", str(output), *more),
        ]

    return flags


def losses(folder):
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "step"]


def test_a_run_is_evaluated_as_it_was_trained(folder, model, data):
    options = ("--source", "{name} is {food}", "--target", "{name} has {food} END", "--max-length", "32")
    output = str(folder / "templates")
    run(
        *("train", "--backbone", model, "--train", data, *options, "--output", output, "--max-steps", "1"),
        *("--prefix-length", "2", "--reparameterization", "none", "--dtype", "float32", "--quiet"),
    )
    shared = ("--prefix", f"{output}/prefix.safetensors", "--dtype", "float32", "--max-new-tokens", "4")
    rows, cut = [], []
    for target in ((), ("--target", "text")):
        place = folder / f"evaluated{len(target)}"
        _, err = run("evaluate", *shared, *target, "--data", data, "--output", str(place), "--metrics", "bleu")
        rows.append([json.loads(line) for line in (place / "outputs.jsonl").read_text().splitlines()])
        cut.append(json.loads((place / "evaluation.json").read_text())["num_cut"])
        assert f"{cut[-1]} of 12 sources were truncated to fit" in err
    assert rows[0][0]["source"] == "Aromi is soup"
    assert rows[0][0]["references"] == ["Aromi has soup END"]
    assert rows[1][0]["references"] == ["Aromi has soup.", "Eat soup at Aromi."]
    # The longest target, `Aromi has soup END`, leaves 11 of 32 positions; its source takes 16 with the text around it.
    assert cut == [12, 12]
    _, err = run("evaluate", *shared, "--data", data, "--on-too-long", "error", code=2)
    assert "max_length" in err
    wrote = [json.loads(line) for line in run("generate", *shared, "--json", "Aromi", "Aromi is soup")[0].splitlines()]
    assert [each["cut"] for each in wrote] == [False, True]
    _, err = run("generate", *shared, "Aromi", "Aromi is soup")
    assert "1 of 2 sources were truncated to fit" in err
    assert "truncated to fit" not in run("generate", *shared, "--max-length", "99", "Aromi is soup")[1]
    _, err = run("generate", *shared, "--on-too-long", "ignore", "Aromi", code=2)
    assert "--on-too-long" in err


def test_resuming_on_other_data_is_refused(folder, train_flags, data):
    changing = folder / "changing.jsonl"
    changing.write_text(Path(data).read_text())
    flags = [str(changing) if word == data else word for word in train_flags(folder / "other", "--max-steps", "3")]
    run(*flags)
    changing.write_text(changing.read_text().replace("soup", "stew"))
    _, err = run(*flags, "--resume", code=2)
    assert "data" in err


def test_ctrl_c_saves_and_says_how_to_resume(folder, train_flags):
    output = folder / "stopped"
    more = ("--max-steps", "60", "--save-every", "1000")
    process = ForkedCommand(*train_flags(output, *more), env={**os.environ, "HF_HUB_OFFLINE": "1"})
    log = output / "events.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count('"event": "step"') >= 20):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in err
    assert "Traceback" not in err
    done = len(losses(output))
    assert 20 <= done < 60
    run("train", "--resume", "--output", str(output))
    assert len(losses(output)) == 60


def test_doctor_passes_on_a_good_backbone(model):
    out, _ = run("doctor", model, "--json")
    report = json.loads(out)
    assert report["passed"] is True
    assert len(report["checks"]) == 4
