"""Draw docs/before_after.svg from the figures of `prefixtune demo`, if it was run in runs/demo.

python -m tools.demo_picture
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.pages import DOCS, ROOT

FIGURES = ROOT / "runs" / "demo" / "demo.json"


def picture(figures: Mapping[str, Any]) -> str:
    """The demo's tables before and after, as an SVG of the terminal."""
    console = Console(record=True, width=118, file=io.StringIO())
    table = Table(title="The same frozen model, without and with a trained prefix", show_lines=True)
    table.add_column("held-out table", style="cyan", ratio=3)
    table.add_column(f"before (BLEU {figures['bleu_before']:.1f})", style="red", ratio=4)
    table.add_column(f"after (BLEU {figures['bleu_after']:.1f})", style="green", ratio=4)
    for example in figures["examples"]:
        before = " ".join(example["before"].split())
        table.add_row(example["table"], before if len(before) < 160 else before[:157] + "...", example["after"])
    console.print(table)
    # The export loads a font from a server: use the reader's monospace font.
    svg = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="prefixtune demo"), flags=re.S)
    return svg.replace("Fira Code, monospace", "monospace")


if __name__ == "__main__":
    if FIGURES.exists():
        figures = json.loads(FIGURES.read_text(encoding="utf-8"))
        (DOCS / "before_after.svg").write_text(picture(figures), encoding="utf-8")
