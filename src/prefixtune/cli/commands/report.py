"""`prefixtune report`: folders of runs become one page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from prefixtune.cli.common import AddCommand
from prefixtune.errors import ConfigError
from prefixtune.utils.console import Console

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `prefixtune report` takes."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a training run, an evaluation or a study, or a study in one JSON file; several are compared",
    )
    parser.add_argument(
        "--output",
        default="report.html",
        metavar="FILE",
        help="the page (default: report.html); Markdown goes beside it",
    )
    parser.add_argument("--title", default="", help="default: told by the folders")
    parser.add_argument("--json", action="store_true", help="print the files as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="no warnings, only results and errors")


def run(options: argparse.Namespace) -> int:
    """`prefixtune report`."""
    from prefixtune.report import compose, read_results, to_html, to_markdown
    from prefixtune.utils.files import write_text
    from prefixtune.utils.writable import check_writable

    page = Path(options.output)
    if page.suffix not in (".html", ".htm") or page.is_dir():
        raise ConfigError(
            f"--output is {options.output!r}, but must be the name of an .html file.",
            hint="the Markdown file beside it gets the same name with .md.",
        )
    for file in (page, page.with_suffix(".md")):
        check_writable(file)
    document = compose([read_results(Path(run)) for run in options.runs], options.title)
    text = page.with_suffix(".md")
    write_text(page, to_html(document))
    write_text(text, to_markdown(document))
    console = Console(quiet=options.quiet)
    for warning in document.warnings:
        console.warn(warning)
    if options.json:
        files = {"html": str(page), "markdown": str(text), "warnings": list(document.warnings)}
        print(json.dumps(files, ensure_ascii=False), flush=True)
    else:
        print(f"{page} ({page.stat().st_size:,} bytes) and {text}")
    return 0


def register(command: AddCommand) -> None:
    """Add the command and its options to the command line."""
    parser = command(
        "report",
        run,
        "make one page of runs, evaluations and studies, to look at",
        """

examples:
  prefixtune report runs/methods --output methods.html
  prefixtune report runs/e2e runs/bare --title "With and without the prefix\"""",
    )
    add_arguments(parser)
