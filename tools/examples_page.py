"""Run the scripts of examples/, keep what they printed, and make a page of both for the site.

    python -m tools.examples_page                  run all, keep their outputs
    python -m tools.examples_page joined classify  run these; the others' outputs stay as they were

Every script runs in an empty folder of its own. With `PREFIXTUNE_EXAMPLES=short` they take two training steps, and
nothing is kept.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.pages import ROOT

EXAMPLES = ROOT / "examples"
OUTPUTS = EXAMPLES / "output"
FIRST = (
    "first_prefix",
    "own_chats",
    "memory_of_a_document",
    "joined",
    "serve_and_ask",
    "fine_tuning_job",
    "compare_with_lora",
    "classify",
)
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
NAMES.sort(key=lambda name: (*FIRST, name).index(name))
"""The scripts, in the order of the page."""
SHORT = "2"
MOST_SECONDS = 900
INTRODUCTION = """\
Each script is at most 60 lines and runs from a checkout (some read `examples/data`), in minutes on two cores, with the
backbone that `prefixtune prepare` fetches, SmolLM2-135M. What it needs besides prefixtune is said before it.
`make examples` installs all of that, and runs them all. Two variables change
a script without an edit: `STEPS` (training steps) and `BACKBONE` (another model).

[examples/retrieval](../examples/retrieval/README.md) is a larger one: three of a hundred memories, chosen by words."""


def run_example(name: str, folder: Path, **variables: str) -> str:
    """What a script prints when it runs in `folder`.

    Args:
        name: Of the script, without its suffix.
        folder: Empty; what the script writes is left there.
        **variables: Environment variables, such as `STEPS` and `BACKBONE`.

    Raises:
        RuntimeError: The script failed; the message has the end of its stderr.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "ignore", **variables}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=MOST_SECONDS
    )
    if done.returncode:
        raise RuntimeError(f"examples/{name}.py failed:\n{done.stderr[-3000:]}")
    return done.stdout


def examples_page() -> str:
    """The page, of the scripts whose outputs are kept."""
    parts = ["# Examples", INTRODUCTION]
    for name in (name for name in NAMES if (OUTPUTS / f"{name}.txt").exists()):
        path = EXAMPLES / f"{name}.py"
        script = path.read_text(encoding="utf-8")
        output = (OUTPUTS / f"{name}.txt").read_text(encoding="utf-8")
        tree = ast.parse(script)
        code = "".join(script.splitlines(keepends=True)[tree.body[0].end_lineno or 1 :]).strip()
        parts += [
            f"## {path.name}",
            *(" ".join(paragraph.split()) for paragraph in (ast.get_docstring(tree) or "").split("\n\n")),
            f"```python\n{code}\n```",
            f"It printed:\n\n```text\n{output.rstrip()}\n```",
        ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Run what the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="scripts to run (default: all)")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"there is no example {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    short = os.environ.get("PREFIXTUNE_EXAMPLES") == "short"
    for name in args.names or NAMES:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            output = run_example(name, Path(folder), **({"STEPS": SHORT} if short else {}))
        print(f"examples/{name}.py: {time.monotonic() - started:.0f} s", flush=True)
        if not short:
            OUTPUTS.mkdir(exist_ok=True)
            lines = [line.rstrip() for line in output.splitlines()]
            (OUTPUTS / f"{name}.txt").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
