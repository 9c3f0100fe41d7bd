"""`prefixtune report`: one page of runs, evaluations and studies."""

from __future__ import annotations

import argparse
from pathlib import Path

from prefixtune.cli.common import AddCommand, print_json
from prefixtune.errors import ConfigError
from prefixtune.utils.console import Console

__all__ = ["register"]


def register(command: AddCommand) -> None:
    """Add the command and its options to the command line."""
    parser = command(
        "report",
        run,
        "make one page of runs, evaluations and studies, to look at",
        """

examples:
  prefixtune report runs/methods --output methods.html
  prefixtune report runs/methods --output methods.html --figures paper/figures
  prefixtune report runs/e2e runs/bare --title "With and without the prefix\"""",
    )
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
        help="the page (default: report.html); the same as Markdown goes next to it",
    )
    parser.add_argument(
        "--figures",
        metavar="DIR",
        help="also write each figure into this folder, as SVG, PDF, PNG, and its numbers as CSV",
    )
    parser.add_argument("--title", default="", help="default: from the folders")
    parser.add_argument("--json", action="store_true", help="print the files as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="no warnings, only results and errors")


def run(options: argparse.Namespace) -> int:
    """`prefixtune report`."""
    from prefixtune.report import compose, read_results, save_figures, to_html, to_markdown
    from prefixtune.utils.files import write_text
    from prefixtune.utils.writable import check_writable, writable_folder

    page = Path(options.output)
    if page.suffix not in (".html", ".htm") or page.is_dir():
        raise ConfigError(
            f"--output is {options.output!r}, but must be the name of an .html file.",
            hint="the Markdown file next to it gets the same name with .md.",
        )
    for path in (page, page.with_suffix(".md")):
        check_writable(path)
    if options.figures:
        with writable_folder(Path(options.figures), Path(options.figures)):
            pass
    document = compose([read_results(Path(run)) for run in options.runs], options.title)
    markdown = page.with_suffix(".md")
    write_text(page, to_html(document))
    write_text(markdown, to_markdown(document))
    figures = save_figures(document, Path(options.figures)) if options.figures else []
    console = Console(quiet=options.quiet)
    for warning in document.warnings:
        console.warn(warning)
    if options.json:
        files = {"html": str(page), "markdown": str(markdown), "figures": figures, "warnings": list(document.warnings)}
        print_json(files)
    else:
        print(
            f"{page} ({page.stat().st_size:,} bytes) and {markdown}"
            + (f"; {len(figures)} figures in {options.figures}" * bool(figures))
        )
    return 0
