"""Systems that are not Linux: importing, training and generating without what only POSIX has.

Slow: a process of its own imports every module.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

PROGRAM = """
import importlib, os, pkgutil, signal, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
# Others' modules first: they have parts of their own for each system, and take this for Linux.
import psutil, torch, transformers, safetensors.torch
from live_server import make_model
folder = Path(sys.argv[1])
make_model(folder / "model")
transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
transformers.AutoTokenizer.from_pretrained(folder / "model")
for name in ("fcntl", "pwd", "grp", "resource", "termios", "tty", "pty", "posix", "syslog"):
    sys.modules[name] = None
for name in [name for name in sys.modules if name.partition(".")[0] == "filelock"]:
    # It takes what there is when it is imported.
    del sys.modules[name]
for name in ("kill", "killpg", "fork", "getuid", "geteuid", "getgid", "getpgid", "umask", "sched_getaffinity",
             "sysconf", "fchmod", "mkfifo", "getloadavg", "posix_fadvise", "O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGHUP", "SIGUSR1", "SIGALRM", "alarm", "pthread_kill", "setitimer"):
    if hasattr(signal, name):
        delattr(signal, name)

import prefixtune
optional, missing = ("vllm",), []
for module in pkgutil.walk_packages(prefixtune.__path__, "prefixtune."):
    # lm-eval itself needs POSIX in places.
    if module.name.endswith("__main__") or module.name.startswith("prefixtune.interop.lm_eval."):
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        if not str(error.name).startswith(optional):
            missing.append((module.name, str(error)))
assert missing == [], missing
print("imported", flush=True)

import filelock
assert filelock.FileLock is filelock.SoftFileLock
backbone = prefixtune.load_backbone(folder / "model", device="cpu")
examples = [prefixtune.Example(f"n : {c}", (f"{c}{c} it is",)) for c in "abcd"]
config = prefixtune.TrainConfig(prefix_length=2, init_text="ab", max_steps=2, output=str(folder / "run"))
result = prefixtune.train(config, backbone=backbone, examples=examples)
print("trained", flush=True)
print(repr(prefixtune.generate(backbone, ["n : a"], prefixtune.load_prefix(result.path, backbone), max_new_tokens=3)))
from prefixtune.cli.main import main
assert main(["inspect", str(result.path), "--json"]) == 0
print(sorted(path.name for path in (folder / "run").iterdir()))
"""


def test_nothing_of_posix_is_needed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[:2] == ["imported", "trained"]
    assert lines[2].startswith("['")
    assert lines[-1] == "['config.toml', 'events.jsonl', 'prefix.safetensors', 'state.safetensors']"
