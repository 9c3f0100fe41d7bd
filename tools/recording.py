"""Record commands as a picture of a terminal whose lines appear as they came: docs/pictures/terminal.svg.

    python -m tools.recording docs/pictures/terminal.svg "prefixtune demo" ["MORE" ...]

The commands run here one after the other, without a terminal, so they print plain lines. Waits are shortened to two
seconds; the last line of the picture says how long everything took. Readers who want no motion see the last state.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

LONGEST_WAIT = 2.0
COLUMNS, LINE, WIDTH = 92, 19, 780

STYLE = """
.back{fill:#f6f8fa;stroke:#d1d9e0}
text{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:#1f2328;white-space:pre}
.command{fill:#0969da;font-weight:600}.took{fill:#59636e}
@media (prefers-color-scheme:dark){
.back{fill:#151b23;stroke:#3d444d}text{fill:#e6edf3}.command{fill:#4493f8}.took{fill:#9198a1}}
@media (prefers-reduced-motion:no-preference){text{opacity:0;animation:come 0s forwards}}
@keyframes come{to{opacity:1}}
"""


def record(command: str) -> list[tuple[float, str]]:
    """Run a command; returns its lines, each with the seconds that passed before it.

    Raises:
        SystemExit: It failed.
    """
    lines, last = [], time.monotonic()
    with subprocess.Popen(
        command, shell=True, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        for line in process.stdout or ():
            now = time.monotonic()
            lines.append((now - last, line.rstrip()))
            last = now
    if process.returncode:
        sys.exit(f"{command!r} ended with exit code {process.returncode}")
    return lines


def draw(recorded: Sequence[tuple[str, Sequence[tuple[float, str]]]]) -> str:
    """The SVG of commands and their lines."""
    rows: list[tuple[float, str, str]] = []
    moment = 0.5
    for command, lines in recorded:
        rows.append((moment, "command", f"$ {command}"))
        moment += 1
        for wait, line in lines:
            moment += min(wait, LONGEST_WAIT)
            rows += [(moment, "", part) for part in textwrap.wrap(line, COLUMNS, drop_whitespace=False) or [""]]
    seconds = sum(wait for _, lines in recorded for wait, _ in lines)
    rows.append((moment, "took", f"{seconds:.0f} seconds in all; long waits are cut short here"))
    height = LINE * len(rows) + 30
    texts = "\n".join(
        f'<text x="16" y="{26 + LINE * index}" class="{kind}" style="animation-delay:{at:.1f}s">{escape(line)}</text>'
        for index, (at, kind, line) in enumerate(rows)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="A terminal: {escape(", ".join(command for command, _ in recorded), quote=True)}">\n'
        f"<style>{STYLE}</style>\n"
        f'<rect class="back" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>\n{texts}\n</svg>\n'
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Record, and write the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("commands", nargs="+", metavar="command")
    options = parser.parse_args(arguments)
    options.output.write_text(draw([(command, record(command)) for command in options.commands]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
