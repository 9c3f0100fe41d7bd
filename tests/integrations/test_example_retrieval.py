"""examples/retrieval runs from an empty folder: three of four memories are found, joined, and answered over."""

import os
import subprocess
from pathlib import Path

import pytest

from forked_command import forking_python
from live_server import MODEL, LiveServer, make_model

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["amber-curlew", "black-curlew", "blue-curlew", "crimson-curlew"]
QUESTION = "At what time must I be on the Blue Curlew?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the example has made four memories with a tiny model."""
    folder = tmp_path_factory.mktemp("retrieval")
    make_model(folder / MODEL)
    made = run(folder, "make", "--count", "4", "--steps", "2", "--prefix-length", "8")
    assert made.count("made memories") == 4
    return folder


def run(folder, script, *arguments):
    path = ROOT / "examples" / "retrieval" / f"{script}.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    command = [forking_python(), str(path), "--backbone", MODEL, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_memories_are_made_once(folder):
    assert sorted(path.stem for path in (folder / "memories").glob("*.safetensors")) == NAMES
    assert (folder / "memories" / "blue-curlew.txt").read_text().startswith("The Blue Curlew goes to ")
    assert run(folder, "make", "--count", "4") == ""


def test_answers_in_process_and_over_http_are_the_same(folder):
    names, _, answer = run(folder, "ask", QUESTION).partition("\n")
    assert names.startswith("blue-curlew + ")
    assert len(set(names.split(" + ")) & set(NAMES)) == 3
    server = LiveServer(folder / MODEL, folder / "memories").wait()
    try:
        assert run(folder, "ask", "--server", server.url, QUESTION) == f"{names}\n{answer}"
    finally:
        server.stop()
