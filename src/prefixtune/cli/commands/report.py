"""`prefixtune report`: one page of runs and evaluations."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from prefixtune.cli.options import OutputOptions, command, json_option, positional
from prefixtune.cli.show import show
from prefixtune.errors import ConfigError
from prefixtune.utils.config import TextList
from prefixtune.utils.console import Console

__all__ = ["report"]


class ReportOptions(OutputOptions):
    """The options of `prefixtune report`."""

    runs: TextList = positional(description="folder of a training run or an evaluation; several are compared")
    output: str = Field("", description="the page (default: report.html in the first of the folders)")
    figures: str = Field(
        "", description="also write each figure into this folder, as SVG, PDF, PNG, and its numbers as CSV"
    )
    title: str = Field("", description="(default: from the folders)")
    as_json: bool = json_option("the files")


@command
def report(options: ReportOptions) -> int:
    """Make one page of runs and evaluations, to look at.

    For example:
        prefixtune report runs/e2e
        prefixtune report runs/a runs/b --output both.html --figures paper/figures
        prefixtune report runs/e2e runs/bare --title "With and without the prefix"
    """
    from prefixtune.report import compose, read_results, save_figures, to_html
    from prefixtune.utils.files import check_writable, write_text

    page = Path(options.output or f"{options.runs[0]}/report.html")
    if page.suffix not in (".html", ".htm"):
        raise ConfigError(f"--output is {str(page)!r}, which is no name of an .html file.", hint="end it with .html.")
    for path in (page, *([Path(options.figures) / "any"] if options.figures else [])):
        check_writable(path)
    document = compose([read_results(Path(run)) for run in options.runs], options.title)
    write_text(page, to_html(document))
    figures = save_figures(document, Path(options.figures)) if options.figures else []
    console = Console(quiet=options.quiet)
    for warning in document.warnings:
        console.warn(warning)
    facts = {"html": str(page), "figures": figures, "warnings": list(document.warnings)}
    drawn = f"; {len(figures)} figures in {options.figures}" if figures else ""
    show(facts, f"{page} ({page.stat().st_size:,} bytes){drawn}", as_json=options.as_json)
    return 0
