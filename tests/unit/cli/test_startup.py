"""What a command imports before it works: seconds of every start hang on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WATCH = """
import contextlib, io, sys
from prefixtune.cli.main import main
out = io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
    try:
        code = main(sys.argv[1:])
    except SystemExit as stopped:
        code = stopped.code or 0
print(code, *sorted(sys.modules))
"""


def run_command(*words: str) -> tuple[int, set[str]]:
    """The exit code of a command, and the modules that it imported."""
    done = subprocess.run([sys.executable, "-c", WATCH, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    code, *modules = done.stdout.split()
    return int(code), set(modules)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--help", 0),
        ("generate --help", 0),
        ("generate --max-tokenz 1 hello", 2),
        ("generate --prefix MISSING hello", 2),
        ("chat --prefix MISSING", 2),
    ],
)
def test_help_and_mistakes_need_neither_torch_nor_transformers(words: str, code: int, tmp_path: Path) -> None:
    ended, modules = run_command(*words.replace("MISSING", str(tmp_path / "missing")).split())
    assert ended == code
    assert modules.isdisjoint({"torch", "transformers", "accelerate", "scipy", "pandas", "sklearn", "matplotlib"})


def test_generate_imports_no_part_that_it_does_not_need(tmp_path: Path, tiny_models: Any, tiny_tokenizer: Any) -> None:
    folder = tmp_path / "model"
    tiny_models("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    code, modules = run_command("generate", "--backbone", str(folder), "--max-new-tokens", "1", "hello")
    assert code == 0
    own = {name.split(".")[1] for name in modules if name.startswith("prefixtune.")}
    assert own.isdisjoint({"engine", "training", "evaluation", "server", "report", "jobs", "doctor"})
    other = {"torch._inductor.compile_fx", "transformers.trainer", "peft", "onnx", "pandas", "sklearn", "matplotlib"}
    assert modules.isdisjoint({*other, "sacrebleu", "fastapi", "datasets", "wandb", "tensorboard", "llguidance"})
