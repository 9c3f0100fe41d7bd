"""Training in two processes, started as users start them: the same losses and the same prefix as in one.

Slow: each run starts a launcher and two processes.
"""

import json
import os
import signal
import subprocess

import pytest
import torch

from command_line import run
from forked_command import forking_python
from prefixtune.backbone.prefixes import load_prefix
from zoo import store_model

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.fixture
def folder(tmp_path):
    for name in ("llama", "bart"):
        store_model(tmp_path / name, name)
    # Targets of unequal length, and fewer hands in the last batch than there are processes.
    names = ("Ann", "Bo", "Cy", "Di", "Ed", "Flo", "Gus")
    for part, some in (("train", names), ("dev", names[:3])):
        lines = [{"s": f"name : {n}", "t": f"{n} eats" + " and eats" * (len(n) % 3) + "."} for n in some]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.fixture
def flags(folder):
    def make(output, *more, model="llama"):
        files = [f"--{part}={folder / part}.jsonl" for part in ("train", "dev")]
        return [
            *("train", "--backbone", str(folder / model), *files, "--output", str(folder / output)),
            *("--source", "s", "--target", "t", "--prefix-length", "4"),
            *("--init-text", "Say it", "--batch-size", "4", "--gradient-accumulation", "2", "--max-steps", "6"),
            *("--eval-every", "3", "--save-every", "2", "--bottleneck-size", "16", "--dtype", "float32", *more),
        ]

    return make


def launch(launcher, arguments):
    """The command in several processes."""
    python = forking_python()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python}
    command = [python, *launcher, "-m", "prefixtune", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    """What it printed."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def events(folder, output, kind):
    lines = (folder / output / "events.jsonl").read_text().splitlines()
    return [event["loss"] for event in map(json.loads, lines) if event["event"] == kind]


def same(folder, one, other):
    for kind in ("step", "evaluation"):
        assert events(folder, other, kind) == pytest.approx(events(folder, one, kind), rel=1e-5)
    first, second = (load_prefix(folder / name / "prefix.safetensors") for name in (one, other))
    for mine, theirs in zip(first.tensors(), second.tensors(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_two_processes_give_what_one_gives(folder, flags):
    run(*flags("one", model="bart"))
    out = finish(launch(TORCHRUN, flags("two", model="bart")))
    same(folder, "one", "two")
    assert out.count("prefix.safetensors") == 1, "one process speaks for all"


def test_a_decoder_is_split_and_accelerate_launch_needs_no_other_option(folder, flags):
    # What varies from step to step is drawn for all processes alike.
    varied = ("--nested", "--prefix-dropout", "0.4")
    run(*flags("one", *varied))
    finish(launch(TORCHRUN, flags("sharded", "--shard", *varied)))
    same(folder, "one", "sharded")
    out = finish(launch(ACCELERATE, flags("two", *varied)))
    same(folder, "one", "two")
    assert out.count("prefix.safetensors") == 1


def test_a_run_goes_on_with_another_number_of_processes(folder, flags):
    more = ("--max-steps", "16", "--reparameterization", "none")
    run(*flags("one", *more))
    started = launch(TORCHRUN, flags("two", *more, "--json"))
    assert any(event["event"] == "step" and event["step"] >= 3 for event in map(json.loads, started.stdout))
    started.send_signal(signal.SIGTERM)
    started.communicate(timeout=120)
    assert 3 <= len(events(folder, "two", "step")) < 16
    # Alone, where the two left off.
    run(*flags("two", *more, "--resume"))
    same(folder, "one", "two")
