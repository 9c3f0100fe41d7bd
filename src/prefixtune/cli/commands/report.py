"""`prefixtune report`: one page of runs, evaluations and studies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from prefixtune.cli.common import print_json
from prefixtune.cli.options import OutputOptions, command, json_option, positional
from prefixtune.errors import ConfigError
from prefixtune.utils.config import TextList
from prefixtune.utils.console import Console

__all__ = ["report"]


class ReportOptions(OutputOptions):
    """The options of `prefixtune report`."""

    runs: TextList = positional(
        description="folder of a training run, an evaluation or a study, or a study in one JSON file; several are "
        "compared"
    )
    output: str = Field("report.html", description="the page; the same as Markdown is written next to it")
    figures: str = Field(
        "", description="also write each figure into this folder, as SVG, PDF, PNG, and its numbers as CSV"
    )
    title: str = Field("", description="(default: from the folders)")
    as_json: bool = json_option("the files")

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """The page is no .html file."""
        page = Path(self.output)
        if page.suffix not in (".html", ".htm") or os.path.isdir(page):
            yield (
                ("output",),
                f"--output is {self.output!r}, but must be the name of an .html file; the Markdown file next to it "
                "gets the same name with .md",
            )


@command
def report(options: ReportOptions) -> int:
    """Make one page of runs, evaluations and studies, to look at.

    For example:
        prefixtune report runs/methods --output methods.html
        prefixtune report runs/methods --output methods.html --figures paper/figures
        prefixtune report runs/e2e runs/bare --title "With and without the prefix"
    """
    from prefixtune.report import compose, read_results, save_figures, to_html, to_markdown
    from prefixtune.utils.files import check_writable, write_text

    page = Path(options.output)
    markdown = page.with_suffix(".md")
    for path in (page, markdown):
        check_writable(path)
    _check_own(page, markdown)
    if options.figures:
        check_writable(Path(options.figures) / "any")
    document = compose([read_results(Path(run)) for run in options.runs], options.title)
    write_text(page, to_html(document))
    write_text(markdown, to_markdown(document))
    figures = save_figures(document, Path(options.figures)) if options.figures else []
    warnings, num_charts = list(document.warnings), len(document.charts)
    if options.figures and len(figures) < num_charts:
        warnings.append(f"{num_charts - len(figures)} of {num_charts} figures are not written; report fewer runs.")
    console = Console(quiet=options.quiet)
    for warning in warnings:
        console.warn(warning)
    if options.as_json:
        files = {"html": str(page), "markdown": str(markdown), "figures": figures, "warnings": warnings}
        print_json(files)
    else:
        print(
            f"{page} ({page.stat().st_size:,} bytes) and {markdown}"
            + (f"; {len(figures)} figures in {options.figures}" * bool(figures))
        )
    return 0


def _check_own(page: Path, markdown: Path) -> None:
    """Refuse to replace files that are no report, where their names are not given but follow.

    Raises:
        ConfigError: There is one: the Markdown, which gets the page's name, or a page of the default name.
    """
    from prefixtune.report import is_own_markdown

    owned = [(markdown, "the report as Markdown", is_own_markdown)]
    if page == Path(ReportOptions.default("output")):
        owned.append((page, "the report", _is_own_page))
    for path, what, is_own in owned:
        try:
            is_free = is_own(path)
        except OSError as error:
            is_free = isinstance(error, FileNotFoundError)
        if not is_free:
            raise ConfigError(
                f"{str(path)!r} exists and is not known as a report, but {what} gets this name.",
                hint="choose another --output; or remove the file, if it is an older report.",
            )


def _is_own_page(path: Path) -> bool:
    return b"<footer><p>Written by prefixtune " in path.read_bytes()
