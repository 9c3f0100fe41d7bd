"""Print the size of the project beside its budgets, and fail where the package has grown.

    python -m tools.measures

A line of code is a line with a token of the language: docstrings, comments and blank lines are not counted.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from tools.pages import ROOT

GOAL = 26_000
"""Most lines of code in src. It is never raised."""

LONG = 60
"""Lines of code from which on a function counts as long."""

_BUDGETS: dict[str, tuple[tuple[str, ...], int]] = {
    "errors, utils": (("errors.py", "utils"), 550),
    "prefix": (("prefix",), 1_300),
    "attention": (("attention",), 1_200),
    "backbone": (("backbone",), 1_100),
    "data": (("data",), 1_900),
    "sampling, inference, engine": (("sampling", "inference", "engine"), 2_900),
    "training, distillation": (("training", "distillation"), 3_600),
    "evaluation, explain": (("results.py", "evaluation", "explain"), 1_700),
    "interop, doctor": (("interop", "doctor"), 1_700),
    "jobs": (("jobs",), 900),
    "server": (("server",), 2_900),
    "cli": (("cli",), 2_400),
    "report, pages": (("report", "pages"), 1_000),
}
"""Name: the parts of the package, and how many lines of code they may have together in the end."""

_OTHER_BUDGETS = {"research": 900, "bench tools": 2_200, "tests": 24_000}
_WORDS = 45_000
_GENERATED = ("deploy.md", "gallery.md", "models.md", "api")
"""Pages of docs that are made from the code."""
_OF_THE_SITE = ("cli.md", "configuration.md", "examples.md", "http.md")
"""Pages that `make site` makes, and that are not in the repository."""


def code_lines(source: str) -> set[int]:
    """The numbers of the lines of code in a Python file."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def files(*places: Path) -> list[Path]:
    """The files of Python in folders, and those that are named themselves."""
    found = [path for place in places for path in (sorted(place.rglob("*")) if place.is_dir() else [place])]
    return [path for path in found if path.suffix == ".py" and path.exists()]


def lines(paths: Iterable[Path]) -> int:
    """The lines of code of all files."""
    return sum(len(code_lines(path.read_text(encoding="utf-8"))) for path in paths)


def long_functions(path: Path) -> Iterator[tuple[int, str]]:
    """Functions and methods with more than `LONG` lines of code, with where they are."""
    source = path.read_text(encoding="utf-8")
    code = code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = len(code.intersection(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
            if size > LONG:
                yield size, f"{path.relative_to(ROOT)}: {node.name}"


def words() -> tuple[int, int]:
    """Words of the documentation: written by hand, and made from the code."""
    by_hand = generated = 0
    pages = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name not in _OF_THE_SITE]
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *pages]:
        count = len(path.read_text(encoding="utf-8").split())
        if path.relative_to(ROOT).parts[1:2] and path.relative_to(ROOT).parts[1] in _GENERATED:
            generated += count
        else:
            by_hand += count
    return by_hand, generated


def main() -> int:
    """Print the measures. Returns the exit code: 1 where src is larger than `GOAL`."""
    package = ROOT / "src" / "prefixtune"
    print(f"{'lines of code':32}{'now':>8}{'budget':>9}")
    for name, (parts, budget) in _BUDGETS.items():
        print(f"{name:32}{lines(files(*(package / part for part in parts))):8,}{budget:9,}")
    source = files(package)
    size = lines(source)
    print(f"{'src':32}{size:8,}{GOAL:9,}")
    for name, budget in _OTHER_BUDGETS.items():
        print(f"{name:32}{lines(files(*(ROOT / part for part in name.split()))):8,}{budget:9,}")
    by_hand, generated = words()
    print(f"{'words of docs, by hand':32}{by_hand:8,}{_WORDS:9,}")
    print(f"{'words of docs, generated':32}{generated:8,}")
    print(f"{'files of src':32}{len(source):8,}{280:9,}")
    long = sorted((found for path in source for found in long_functions(path)), reverse=True)
    print(f"functions over {LONG} lines of code: {len(long)}")
    for count, where in long:
        print(f"  {count:4} {where}")
    if size > GOAL:
        print(f"src has {size:,} lines of code, more than {GOAL:,}: take something out first", file=sys.stderr)
    return int(size > GOAL)


if __name__ == "__main__":
    sys.exit(main())
