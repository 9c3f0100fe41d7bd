"""Every script of examples/ runs on a tiny model with two steps."""

import sys

import pytest

from forked_command import forking_python
from live_server import MODEL, make_model
from tools.examples_page import EXAMPLES, NAMES, run_example

EXPECTED = {
    "first_prefix": ("runs/first_prefix/prefix.safetensors", "numbers, "),
    "own_chats": ("runs/own_chats/prefix.safetensors", "conversations that it was not trained on:"),
    "memory_of_a_document": ("runs/guide/prefix.safetensors", "32 positions"),
    "joined": ("runs/Plover/prefix.safetensors", "all three joined"),
    "serve_and_ask": ("prefixes/opposites.safetensors", ", capitals, opposites\n"),
    "fine_tuning_job": ("prefixes/till.safetensors", "succeeded till"),
    "compare_with_lora": ("runs/compare-2/weights.safetensors", " of 8"),
    "classify": ("runs/classify/prefix.safetensors", "cancel"),
    "trainer": ("runs/trainer/prefix.safetensors", " bytes"),
    "sft_trainer": ("runs/sft_trainer/prefix.safetensors", "with the prefix: "),
    "to_onnx": ("exported-onnx/model.onnx", "from the graph: "),
    "to_llama_cpp": ("exported/capitals.bin", "placeholder tokens stand for the prefix"),
}
"""Script -> a file that it leaves, and what it prints."""
CAPITALS = ("serve_and_ask", "to_llama_cpp", "to_onnx")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / MODEL
    make_model(folder)
    return folder


# One folder is enough for two that learn capitals.
@pytest.mark.parametrize("names", [(name,) for name in EXPECTED if name not in CAPITALS] + [CAPITALS], ids="-".join)
def test_they_run(names, model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", forking_python())
    for name in names:
        file, words = EXPECTED[name]
        assert words in run_example(name, tmp_path, STEPS="2", BACKBONE=str(model))
        assert (tmp_path / file).stat().st_size > 0


def test_every_script_is_short_and_tested():
    for name in NAMES:
        script = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert len(script.splitlines()) <= 60, name
    assert set(EXPECTED) == set(NAMES)
