"""A write, an fsync or a rename fails, the first, the second, ... the last: on disk is old or new, never between.

`faults.py` does it, in a program of its own with a small C library preloaded, so that it fails whoever writes.
Slow: each of some forty writes of a run fails once, and the run goes on from what is left.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("cc") or shutil.which("gcc")


@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C compiler and LD_PRELOAD")
def test_whatever_fails_files_are_old_or_new_and_the_error_is_one_line(tmp_path):
    library, work = tmp_path / "faults.so", tmp_path / "work"
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-o", str(library), str(TESTS / "faults.c"), "-ldl"], check=True)
    work.mkdir()
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(TESTS / "faults.py"), str(work)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {result["operation"]: result for result in map(json.loads, done.stdout.splitlines())}
    assert list(results) == ["train", "upload", "convert --to prefixtune", "convert --to peft"]
    assert {name: result["wrong"] for name, result in results.items() if result["wrong"]} == {}
    # At the least a file's write, fsync and rename; training writes several.
    assert all(result["failures"] >= 3 for result in results.values())
    assert results["train"]["failures"] >= 20
