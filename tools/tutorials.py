"""Follow a tutorial as its reader does: run its `bash` blocks in order, in an empty folder and with an empty home.

    python -m tools.tutorials docs/tutorials/quickstart.md

prints every block and what it printed. A block below the line `<!-- not run -->` is left out: it needs something that
the tutorial says. The program is this checkout's; the backbone is fetched anew, unless `--home` names a home that
has it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.pages import ROOT

__all__ = ["blocks"]

BLOCK = re.compile(r"^(<!-- not run -->\n)?```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[str]:
    r"""The commands of a page.

    >>> blocks("Look:\n\n```bash\nls\n```\n\n<!-- not run -->\n```bash\nssh host\n```\n")
    ['ls\n']
    """
    return [block for mark, block in BLOCK.findall(page) if not mark]


def main() -> int:
    """Run the blocks of one page in one shell each; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("page", type=Path, help="a page of docs/tutorials")
    parser.add_argument("--home", type=Path, help="a folder to use as home (default: an empty one)")
    parser.add_argument("--folder", type=Path, help="an empty folder to run in (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home, folder, programs = (
            args.home or Path(temporary, "home"),
            args.folder or Path(temporary, "work"),
            Path(temporary, "bin"),
        )
        for path in (home, folder, programs):
            path.mkdir(parents=True, exist_ok=True)
        for name, arguments in (("prefixtune", "-m prefixtune"), ("python", "")):
            script = f'#!/bin/sh\nexec env PYTHONPATH="{ROOT / "src"}" "{sys.executable}" {arguments} "$@"\n'
            (programs / name).write_text(script)
            (programs / name).chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "LANG"))}
        environment = {
            **kept,
            "HOME": str(home.resolve()),
            "PATH": f"{programs}:/usr/bin:/bin",
            "REPOSITORY": str(ROOT),
        }
        for block in blocks(args.page.read_text(encoding="utf-8")):
            print(f"--- {block}", flush=True)
            started = time.monotonic()
            done = subprocess.run(["bash", "-e", "-c", block], cwd=folder, env=environment, stderr=subprocess.STDOUT)
            print(f"--- {time.monotonic() - started:.0f} s", flush=True)
            if done.returncode:
                return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
