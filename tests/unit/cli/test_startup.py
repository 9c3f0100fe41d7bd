"""What a command imports before it works: seconds of every start hang on it.

Slow: it needs a process that has imported nothing yet.
"""

import json
import subprocess
import sys

from prefixtune.cli.main import command_options

WATCH = """
import contextlib, io, json, sys
from prefixtune.cli.main import main
seen = []
for words in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = main(words)
        except SystemExit as stopped:
            code = stopped.code or 0
    seen.append([code, out.getvalue(), list(sys.modules)])
print(json.dumps(seen))
"""


def run_commands(*commands):
    """Commands in one new process: the exit code, what was printed, and the modules that are imported by then."""
    done = subprocess.run([sys.executable, "-c", WATCH, json.dumps(commands)], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [(code, printed, set(modules)) for code, printed, modules in json.loads(done.stdout)]


def test_help_and_mistakes_need_neither_torch_nor_transformers(tmp_path):
    missing, names = ["--prefix", str(tmp_path / "missing")], list(command_options())
    helped = [["--help"], *([name, "--help"] for name in names), []]
    mistakes = [["generate", "--max-tokenz", "1", "hello"], ["generate", *missing, "hello"], ["chat", *missing]]
    seen = run_commands(*helped, *mistakes)
    assert [code for code, _, _ in seen] == [0] * len(helped) + [2] * len(mistakes)
    for name, (_, printed, _) in zip(names, seen[1:], strict=False):
        assert f"usage: prefixtune {name} " in printed.lower()
    large = {"torch", "transformers", "accelerate", "scipy", "pandas", "sklearn", "matplotlib"}
    assert seen[len(helped) - 1][2].isdisjoint({*large, "fastapi", "jinja2", "numpy", "sacrebleu"})
    assert seen[-1][2].isdisjoint(large)


def test_generate_imports_no_part_that_it_does_not_need(tmp_path, save_model):
    folder = str(save_model(tmp_path / "model"))
    [(code, _, modules)] = run_commands(["generate", "--backbone", folder, "--max-new-tokens", "1", "hello"])
    assert code == 0
    own = {name.split(".")[1] for name in modules if name.startswith("prefixtune.")}
    assert own.isdisjoint({"training", "evaluation", "server", "report", "jobs"})
    other = {"torch._inductor.compile_fx", "transformers.trainer", "peft", "onnx", "pandas", "sklearn", "matplotlib"}
    assert modules.isdisjoint({*other, "sacrebleu", "fastapi", "datasets", "wandb", "tensorboard", "llguidance"})
