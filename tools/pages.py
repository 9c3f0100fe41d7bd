"""Write a generated page of docs/, or check that it is current."""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def page_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a program that writes a page; `description` is its module's docstring."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    return parser


def write_or_check(path: Path, text: str, *, check: bool) -> int:
    """Write a page, or only compare it. Returns the exit code."""
    name = path.relative_to(ROOT)
    if not check:
        path.write_text(text, encoding="utf-8")
        return 0
    is_current = path.exists() and path.read_text(encoding="utf-8") == text
    print(f"{name} is current" if is_current else f"{name} is out of date: run `make docs`")
    return 0 if is_current else 1
