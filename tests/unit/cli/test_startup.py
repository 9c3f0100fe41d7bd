"""What a command imports before it works: seconds of every start hang on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

WATCH = """
import contextlib, io, json, sys
from prefixtune.cli.main import main
codes = []
for words in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            codes.append(main(words))
        except SystemExit as stopped:
            codes.append(stopped.code or 0)
print(json.dumps([codes, list(sys.modules)]))
"""


def run_commands(*commands: list[str]) -> tuple[list[int], set[str]]:
    """The exit codes of commands in one new process, and the modules that they imported."""
    done = subprocess.run([sys.executable, "-c", WATCH, json.dumps(commands)], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    codes, modules = json.loads(done.stdout)
    return codes, set(modules)


def test_help_and_mistakes_need_neither_torch_nor_transformers(tmp_path: Path) -> None:
    missing = ["--prefix", str(tmp_path / "missing")]
    mistakes = (["generate", "--max-tokenz", "1", "hello"], ["generate", *missing, "hello"], ["chat", *missing])
    codes, modules = run_commands(["--help"], ["generate", "--help"], *mistakes)
    assert codes == [0, 0, 2, 2, 2]
    assert modules.isdisjoint({"torch", "transformers", "accelerate", "scipy", "pandas", "sklearn", "matplotlib"})


def test_generate_imports_no_part_that_it_does_not_need(tmp_path: Path, tiny_models: Any, tiny_tokenizer: Any) -> None:
    folder = tmp_path / "model"
    tiny_models("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    codes, modules = run_commands(["generate", "--backbone", str(folder), "--max-new-tokens", "1", "hello"])
    assert codes == [0]
    own = {name.split(".")[1] for name in modules if name.startswith("prefixtune.")}
    assert own.isdisjoint({"engine", "training", "evaluation", "server", "report", "jobs", "doctor"})
    other = {"torch._inductor.compile_fx", "transformers.trainer", "peft", "onnx", "pandas", "sklearn", "matplotlib"}
    assert modules.isdisjoint({*other, "sacrebleu", "fastapi", "datasets", "wandb", "tensorboard", "llguidance"})
