"""`prefixtune explain` and `report`: pages of what a prefix does and says, and of runs and evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefixtune.cli.decoding import BackboneOptions
from prefixtune.cli.loading import load_trained, read_as_trained, read_trained, short_name
from prefixtune.cli.options import PREFIX, Conflicts, OutputOptions, PathText, ReadingOptions, command, option
from prefixtune.cli.show import Table
from prefixtune.errors import PrefixError
from prefixtune.utils.config import CommaList
from prefixtune.utils.folders import data_folder

if TYPE_CHECKING:
    from prefixtune.data import Example
    from prefixtune.explain.subject import View
    from prefixtune.pages.document import Document
    from prefixtune.prefix.prefix import Prefix

_MOST_ROWS = 12
"""Of a table, in the terminal; the page has them all."""


class PageOptions(OutputOptions):
    """The options of a page that is written."""

    output: str = option("", "the page (default: beside the first of what it is about)", metavar="FILE")
    figures: str = option(
        "", "also write each figure into this folder, as SVG, PDF, PNG, and its numbers as CSV", metavar="FOLDER"
    )

    def conflicts(self) -> Conflicts:
        """The page is no .html file."""
        yield from super().conflicts()
        if self.output and Path(self.output).suffix not in (".html", ".htm"):
            yield ("output",), f"--output is {self.output!r}, but must be the name of an .html file"

    def page(self, usual: Path) -> Path:
        """Where the page is written, which is possible.

        Raises:
            PrefixError: Nothing can be written there.
        """
        from prefixtune.utils.files import check_writable

        page = Path(self.output) if self.output else usual
        for path in (page, *([Path(self.figures) / "any"] if self.figures else [])):
            check_writable(path)
        return page

    def write(self, page: Path, document: Document) -> tuple[str, list[str]]:
        """Write the page and its figures; returns a line that says so, and the figures' files."""
        from prefixtune.pages.page import save_figures, to_html
        from prefixtune.utils.files import write_text

        write_text(page, to_html(document))
        figures = save_figures(document, Path(self.figures)) if self.figures else []
        drawn = f"; {len(figures)} figures in {self.figures}" if figures else ""
        return f"{page} ({page.stat().st_size:,} bytes){drawn}", [str(figure) for figure in figures]


class ReportOptions(PageOptions):
    """The options of `prefixtune report`."""

    runs: tuple[PathText, ...] = option(
        description="folders of training runs or evaluations, which are compared", positional=True
    )
    title: str = option("", "(default: from the folders)")


@command
def report(options: ReportOptions) -> None:
    """Make one page of runs and evaluations, to look at.

    For example:
        prefixtune report runs/e2e
        prefixtune report runs/a runs/b --output both.html --figures paper/figures
        prefixtune report runs/e2e runs/bare --title "With and without the prefix"
    """
    from prefixtune.report import compose, read_results

    page = options.page(Path(options.runs[0], "report.html"))
    document = compose([read_results(Path(run)) for run in options.runs], options.title)
    line, figures = options.write(page, document)
    for warning in document.warnings:
        options.console.warn(warning)
    options.show({"html": str(page), "figures": figures, "warnings": list(document.warnings)}, line)


class ExplainOptions(BackboneOptions, PageOptions, ReadingOptions):
    """The options of `prefixtune explain`."""

    prefix: str = option(description=PREFIX, positional=True)
    data: str = option(description="examples with targets, best not those of the training", metavar="PATH")
    against: PathText = option("", "a prefix of another task, to compare with", metavar="FILE")
    views: CommaList[Literal["attention", "loss", "nearest", "description", "general"]] = option(
        (), "only these, of attention,loss,nearest,description,general", metavar="NAMES"
    )
    rows: int = option(32, "most examples, each with its first target; of texts alone, most windows", ge=1, le=10_000)
    batch_size: int = option(8, "examples per batch", ge=1)
    seed: int = option(0, "of the controls and intervals", ge=0)


@command
def explain(options: ExplainOptions) -> None:
    """Look at what a prefix does and says: attention, losses without its parts, nearest text, its own description.

    Every view has controls beside it (a random prefix of the same norms, a prefix of another task) and says what it can
    and cannot show. A stopped run writes the views that are done.

    For example:
        prefixtune explain runs/e2e/prefix.safetensors --data e2e/testset_w_refs.csv
        prefixtune explain runs/e2e --data e2e/ --split dev --against runs/reviews --output e2e.html --figures figures
    """
    from prefixtune.explain.explain import explain as explain_prefix
    from prefixtune.explain.explain import summarize
    from prefixtune.explain.page import compose
    from prefixtune.explain.subject import TITLES, make_subject

    page = options.page(_usual_page(options.prefix))
    trained = read_trained(options, [options.prefix, *([options.against] if options.against else [])])
    examples = _read_examples(options, trained.prefixes[0])
    backbone, (prefix, *against), _ = load_trained(options, trained)
    limits = {"rows": options.rows, "batch_size": options.batch_size, "seed": options.seed}
    subject = make_subject(backbone, prefix, examples, against=next(iter(against), None), **limits)
    names = [name for name in TITLES if name in (options.views or TITLES)]
    made = explain_prefix(subject, names)
    views: list[View] = []
    try:
        with options.console.progress("views", len(names)) as bar:
            for name in names:
                bar.update(len(views), view=TITLES[name].lower())
                views.append(next(made))
            bar.update(len(views))
    finally:
        # A stopped run writes the views that are done; one that has none leaves an earlier page alone.
        if views:
            title = f"What the prefix {short_name(options.prefix)} does"
            document = compose(views, _facts(options, prefix, backbone.name, len(examples)), title)
            line, figures = options.write(page, document)
    facts: dict[str, Any] = {**summarize(subject, views), "page": str(page), "figures": figures}
    options.show(facts, *_parts(document), line)


def _usual_page(prefix: str) -> Path:
    """Where the page of a prefix is written unless --output says otherwise."""
    path = Path(prefix)
    if path.is_dir() or path.name == "prefix.safetensors":
        return (path if path.is_dir() else path.parent) / "explain.html"
    if path.is_file():
        return path.with_name(f"{path.stem}.explain.html")
    return data_folder() / "explain" / f"{short_name(prefix)}.html"


def _read_examples(options: ExplainOptions, prefix: Prefix) -> list[Example]:
    """The first rows of --data, read as the prefix's task.

    Raises:
        PrefixError: A file cannot be read, no example has a target, or one has a label that the prefix does not know.
    """
    from prefixtune.data.labels import check_labels, labels_of

    labels, read = labels_of(prefix), read_as_trained(options, prefix.header, options.data, options.split or None)
    examples = [one for one in read.examples if one.targets][: options.rows]
    if not examples:
        raise PrefixError(f"no example of {options.data!r} has a target.", hint="name the column with --target.")
    if labels is not None:
        check_labels(examples, labels.names, labels.kind)
    return examples


def _facts(options: ExplainOptions, prefix: Prefix, backbone: str, rows: int) -> Sequence[tuple[str, str]]:
    return [
        ("prefix", options.prefix),
        ("task", str(prefix.header.get("task") or "")),
        ("backbone", backbone),
        ("length", ", ".join(f"{site} {prefix.length(site)}" for site in prefix.sites)),
        ("data", f"{options.data}, {rows} rows"),
        ("against", options.against),
    ]


def _parts(document: Document) -> Iterator[Table | str]:
    """The tables of the page, without the rows of long ones, and what its lists and pictures say."""
    from prefixtune.pages import document as page

    for section in document.sections:
        for block in section.blocks:
            if isinstance(block, page.Table):
                names = [column.name for column in block.columns]
                rows = [[value.text for value in row] for row in block.rows[:_MOST_ROWS]]
                yield Table(f"{section.title}: {block.caption}", names, rows)
            elif isinstance(block, page.Listing):
                yield from block.items
            elif isinstance(block, tuple):
                yield from (f"{picture.title}: {picture.description}" for picture in block)
