"""Write a generated page of docs/, or check that it is current."""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def write_or_check(path: Path, text: str, description: str | None) -> int:
    """Write a page; with `--check` on the command line, compare only. Returns the exit code.

    Args:
        path: The page.
        text: What it must contain.
        description: The calling module's docstring.
    """
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    name = path.relative_to(ROOT)
    if not parser.parse_args().check:
        path.write_text(text, encoding="utf-8")
        return 0
    is_current = path.exists() and path.read_text(encoding="utf-8") == text
    print(f"{name} is current" if is_current else f"{name} is out of date: run `make docs`")
    return 0 if is_current else 1
