"""Training computes what it did when these results were recorded: losses, stored tensors and headers of small runs.

Losses are compared with a relative tolerance of 1e-4, stored numbers with 1e-3 of their tensor's mean size: AdamW turns
differences of rounding between processors into parts of a step where a gradient is almost zero. A run that was really
killed and resumed equals the undisturbed one on the same machine bit for bit.
"""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from forked_command import forking_python

TESTS = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).with_name("training.json")

_COMMON = {"batch_size": 4, "targets_per_source": 2, "max_steps": 20, "warmup_steps": 3, "save_every": 4, "seed": 3}
_HEAD = {"task": "classification", "classifier": "head", "targets_per_source": 1}

CASES = {
    "decoder": ("llama", {"init_text": "Say what they do", "prefix_length": 6, "prefix_dropout": 0.25}),
    "decoder-mlp": ("gpt2", {"reparameterization": "mlp", "initialization": "words", "init_text": "Say it"}),
    "decoder-text": ("qwen3", {"initialization": "text", "init_text": "A person eats. " * 4, "prefix_length": 8}),
    "decoder-examples": ("opt", {"init_examples": 2}),
    "decoder-random": ("gpt_neox", {"initialization": "random", "reparameterization": "none", "learning_rate": 0.01}),
    "decoder-nested": ("mistral", {"nested": True, "gradient_accumulation": 2, "weight_decay": 0.1}),
    "encoder-decoder": ("bart", {"sites": "encoder=3,decoder=5,cross=2", "init_text": "Say it"}),
    "encoder-decoder-text": ("t5", {"initialization": "text", "init_text": "A person eats. " * 2, "prefix_length": 5}),
    "encoder-decoder-mlp": ("m2m_100", {"reparameterization": "mlp", "init_text": "Say it"}),
    "classifier": ("bert", {**_HEAD, "init_text": "Is it long?"}),
    "classifier-decoder": ("llama", {**_HEAD, "initialization": "random"}),
    "classifier-words": ("gpt2", {**_HEAD, "classifier": "words", "label_words": "long=L,short=S"}),
    "lora": ("llama", {"method": "lora"}),
    "adapter": ("llama", {"method": "adapter"}),
    "full": ("gpt2", {"method": "full"}),
}
"""Name -> kind of model, and what its run has besides `_COMMON`."""

KILLED = ("decoder", "encoder-decoder", "classifier")
"""Whose runs are killed and resumed."""
_KINDS = ("llama", "bart", "bert")

_FORGOTTEN = {
    "": ("made_with", "license", "rotation"),
    "backbone": ("fingerprint", "hash"),
    "initialization": ("attention", "at_most", "choice", "compaction", "leave_one_out", "relative_fit_error"),
    "training": ("optimizer", "value_scale", "bottleneck_size", "loss_reduction", "backbone_dtype", "dev_loss"),
}
"""What a header says of versions, of choices that a run may come to lose, and what rounding changes; by part."""


def _inputs(name):
    """The model and the data of a case."""
    from prefixtune.backbone.backbone import Backbone
    from prefixtune.data import Example
    from short_sentences import HELD_OUT, NAMES, SHARED
    from zoo import make_model, make_tokenizer

    family, options = CASES[name]
    tokenizer = make_tokenizer(enclosing=family == "bert")
    backbone = Backbone.from_model(make_model(family, tokenizer), tokenizer, f"tiny-{family}")
    train, dev = SHARED, HELD_OUT
    if "classifier" in options:
        train = [Example(name, ("long" if len(name) > 2 else "short",)) for name in NAMES]
        dev = [Example("Kim", ("long",)), Example("Al", ("short",))]
    return {"backbone": backbone, "examples": train, "dev_examples": dev}


def _train(name, folder, **more):
    """The run of a case, in a folder of its own."""
    from prefixtune.training.config import TrainConfig
    from prefixtune.training.train import train

    config = TrainConfig(**{**_COMMON, "output": str(folder / name), **CASES[name][1]})
    return train(config, **_inputs(name), progress=False, **more)


def _of_kind(events, kind):
    return [event["loss"] for event in events if event["event"] == kind]


def _facts(path):
    """The header of a stored file, and a few numbers of each of its tensors."""
    import torch
    from safetensors import safe_open

    with safe_open(path, "pt") as handle:
        tensors = {name: handle.get_tensor(name).double() for name in sorted(handle.keys())}
        metadata = handle.metadata()
        header = json.loads(metadata.get("prefixtune") or metadata["prefixtune_weights"])
    for part, names in _FORGOTTEN.items():
        for name in names:
            (header[part] if part else header).pop(name, None)
    numbers = {}
    for name, tensor in tensors.items():
        flat = tensor.flatten()
        some = flat[torch.linspace(0, len(flat) - 1, 4).long()]
        numbers[name] = {
            "shape": list(tensor.shape),
            "sums": [round(float(flat.sum()), 6), round(float(flat.abs().sum()), 6)],
            "values": [round(float(value), 7) for value in some],
        }
    return {"header": header, "tensors": numbers}


def _result(result):
    losses = {kind: [round(loss, 7) for loss in _of_kind(result.events, kind)] for kind in ("step", "evaluation")}
    return {**losses, "num_trained": result.num_trained, **_facts(result.path)}


def compute():
    """The results of all cases."""
    with tempfile.TemporaryDirectory() as folder:
        return {name: _result(_train(name, Path(folder))) for name in CASES}


@pytest.fixture(scope="module")
def golden():
    return dict(json.loads(GOLDEN.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder of runs that were killed at step 11."""
    folder = tmp_path_factory.mktemp("killed")
    paths = os.pathsep.join([str(TESTS), str(TESTS / "golden"), os.environ.get("PYTHONPATH", "")])
    subprocess.run([forking_python(), __file__, str(folder)], check=True, env={**os.environ, "PYTHONPATH": paths})
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_as_it_was_recorded(name, golden, tmp_path):
    computed, recorded = _result(_train(name, tmp_path)), golden[name]
    for kind in ("step", "evaluation"):
        assert computed[kind] == pytest.approx(recorded[kind], rel=1e-4)
    assert computed["num_trained"] == recorded["num_trained"]
    assert computed["header"] == recorded["header"]
    assert computed["tensors"].keys() == recorded["tensors"].keys()
    for tensor, numbers in recorded["tensors"].items():
        now = computed["tensors"][tensor]
        assert now["shape"] == numbers["shape"]
        count = math.prod(numbers["shape"])
        size = numbers["sums"][1] / count
        assert now["values"] == pytest.approx(numbers["values"], abs=1e-3 * size), tensor
        assert now["sums"] == pytest.approx(numbers["sums"], abs=1e-3 * size * count), tensor


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_run_goes_on_as_if_nothing_had_been(name, killed, tmp_path):
    import torch
    from safetensors.torch import load_file

    whole, resumed = _train(name, tmp_path), _train(name, killed, resume=True)
    assert _of_kind(resumed.events, "step") == _of_kind(whole.events, "step")
    assert any(event["event"] == "resume" and event["step"] == 8 for event in resumed.events)
    for path in (whole.path.name, "state.safetensors"):
        one, other = load_file(tmp_path / name / path), load_file(killed / name / path)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def _kill_at_11(event):
    if event["event"] == "step" and event["step"] == 11:
        os.kill(os.getpid(), signal.SIGKILL)


def _train_and_be_killed(folder):
    """Start each run in a process of its own, which is killed."""
    # What takes most of the time of so short a run is done once.
    for name in ("prefixtune.training.train", *(f"transformers.models.{kind}.modeling_{kind}" for kind in _KINDS)):
        importlib.import_module(name)
    for name in KILLED:
        child = os.fork()
        if not child:
            _train(name, folder, on_event=_kill_at_11)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


if __name__ == "__main__":
    _train_and_be_killed(Path(sys.argv[1]))
