"""Print measures of the code in src/prefixtune: size of the root, files and functions, and the contracts of imports.

    python -m tools.measures

They are signs of where to look again; nothing fails here.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tools.pages import ROOT

PACKAGE = ROOT / "src" / "prefixtune"
LONG = 40
"""Lines of code from which on a function counts as long."""


@dataclass(frozen=True)
class Function:
    """A function: where it is, and its lines of code (without signature and docstring)."""

    file: Path
    name: str
    lines: int


def functions(file: Path) -> Iterator[Function]:
    """All functions and methods of a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body if ast.get_docstring(node) is None else node.body[1:]
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            yield Function(file, node.name, lines)


def contracts() -> list[str]:
    """The contracts of import-linter, kept or broken; empty if it is not installed."""
    program = Path(sys.executable).with_name("lint-imports")
    if not program.exists():
        return []
    # Wide enough that no name of a contract is broken over two lines.
    environment = {**os.environ, "COLUMNS": "300"}
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, env=environment, capture_output=True, text=True)
    return [line.strip() for line in done.stdout.splitlines() if line.rstrip().endswith((" KEPT", " BROKEN"))]


def main() -> None:
    """Print the measures."""
    files = sorted(PACKAGE.rglob("*.py"))
    sizes = {file: file.read_text(encoding="utf-8").count("\n") for file in files}
    # Most `__init__` files are a docstring.
    modules = {file: size for file, size in sizes.items() if file.name != "__init__.py"}
    largest = max(modules, key=lambda file: modules[file])
    long = sorted((f for file in files for f in functions(file) if f.lines > LONG), key=lambda f: -f.lines)
    names = sorted(path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists())
    print(f"names at the root: {len(names)} ({', '.join(names)})")
    for line in contracts():
        print(f"imports: {line}")
    print(f"files: {len(modules)}, median {median(modules.values()):.0f} lines, {sum(sizes.values()):,} lines in all")
    print(f"largest file: {largest.relative_to(PACKAGE)}, {modules[largest]} lines")
    print(f"functions over {LONG} lines of code: {len(long)}; the longest:")
    for function in long[:10]:
        print(f"  {function.lines:4} {function.file.relative_to(PACKAGE)}: {function.name}")


if __name__ == "__main__":
    main()
