"""List sentences that are too long, and phrases that a reader stumbles over, in the documentation and the docstrings.

    python -m tools.english

Tables, code, headings and the record in `research/` are not read.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator

from tools.pages import ROOT

MOST_WORDS = 35
PHRASES = re.compile(
    r"\b(?:expected was|not so the|(?:is|was|are|were) said|belongs? into|the own|sums in a new base|what that gives"
    r"|, too(?=[.;])|of which the)\b",
    re.IGNORECASE,
)
"""Word orders of another language, and words that the field does not use."""
_GENERATED = {"cli.md", "configuration.md", "http.md", "deploy.md", "examples.md", "models.md", "LOG.md", "results.md"}


def pages() -> Iterator[tuple[str, str]]:
    """Where a text is, and its paragraphs in Markdown."""
    named = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
    for path in [*named, *sorted((ROOT / "docs").rglob("*.md"))]:
        if path.name not in _GENERATED:
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def docstrings() -> Iterator[tuple[str, str]]:
    """Where a docstring is, and its text."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            value = node.value if isinstance(node, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield f"{path.relative_to(ROOT)}:{value.lineno}", value.value


def sentences(text: str) -> Iterator[str]:
    """The sentences of the prose in a text: one paragraph or list item after the other."""
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S)
    text = re.sub(r"^\s*(?:\||#|>|\$\$|!\[|    ).*$", "", text, flags=re.M)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    for paragraph in re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.)\s+|^\s*[\w*, ]+:$|^ +\w+: ", text, flags=re.M):
        yield from re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split()))


def faults() -> Iterator[str]:
    """One line for each sentence or phrase to mend."""
    for where, text in (*pages(), *docstrings()):
        for sentence in sentences(text):
            count = len(sentence.split())
            if count > MOST_WORDS:
                yield f"{where}: {count} words: {sentence}"
            for found in PHRASES.findall(sentence):
                yield f"{where}: {found!r}: {sentence}"


def main() -> int:
    """Print the list. Returns the exit code: 1 unless it is empty."""
    found = list(faults())
    print("\n".join(found))
    print(f"{len(found)} to mend", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
