"""`prefixtune explain`: what a prefix does and says, as one page and as numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from prefixtune.cli.decoding import BackboneOptions
from prefixtune.cli.loading import columns_as_trained, load_with_prefixes, short_name
from prefixtune.cli.options import OutputOptions, command, form_option, json_option, positional
from prefixtune.cli.show import Table, show
from prefixtune.errors import PrefixError
from prefixtune.training.config import FormName
from prefixtune.utils.config import CommaList
from prefixtune.utils.console import Console
from prefixtune.utils.folders import data_folder

if TYPE_CHECKING:
    from prefixtune.backbone.backbone import Backbone
    from prefixtune.data import Example
    from prefixtune.explain.subject import View
    from prefixtune.pages.document import Document
    from prefixtune.prefix.prefix import Prefix

__all__ = ["explain"]

_MOST_ROWS = 12
"""Of a table, in the terminal; the page has them all."""


class ExplainOptions(BackboneOptions, OutputOptions):
    """The options of `prefixtune explain`."""

    prefix: str = positional(
        description="a file, the folder of its run, or hub:OWNER/NAME; several with a + between them are joined"
    )
    data: str = Field(
        "",
        description="examples with targets, best not those of the training; without it, views that run the prefix on "
        "data are left out",
        json_schema_extra={"metavar": "PATH"},
    )
    against: str = Field(
        "", description="a prefix of another task, to compare with", json_schema_extra={"metavar": "FILE"}
    )
    output: str = Field(
        "",
        description="the page; empty: explain.html beside the prefix, or (joined, hub) in your data folder",
        json_schema_extra={"metavar": "FILE"},
    )
    figures: str = Field(
        "",
        description="also write each figure into this folder, as SVG, PDF, PNG, and its numbers as CSV",
        json_schema_extra={"metavar": "FOLDER"},
    )
    views: CommaList[Literal["attention", "loss", "nearest", "description"]] = Field(
        (),
        description="only these, of attention,loss,nearest,description",
        json_schema_extra={"metavar": "NAMES"},
    )
    rows: int = Field(
        32, ge=1, le=10_000, description="most examples, each with its first target; of texts alone, most windows"
    )
    parts: int = Field(
        32, ge=1, le=1000, description="most blocks that positions and layers are left out in, one at a time"
    )
    corpus: int = Field(2048, ge=64, le=1_000_000, description="most tokens of real text to find the nearest among")
    minutes: float = Field(10.0, ge=0, description="no new part begins after these; 0: no limit")
    batch_size: int = Field(8, ge=1, description="examples per batch")
    seed: int = Field(0, ge=0, description="of the controls and intervals")
    task: str = Field("", description="how the data are read (default: the prefix's task)")
    split: Literal["", "train", "dev", "test"] = Field("", description="which part of a folder")
    source: str | None = Field(None, description="records: column or template (default: as in training)")
    target: str | None = Field(None, description="records: column or template (default: as in training)")
    form: Literal["", FormName] = form_option()
    as_json: bool = json_option("all numbers")

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """The page is no .html file, there is no such view, or what says how data are read has no data."""
        if self.output and Path(self.output).suffix not in (".html", ".htm"):
            yield ("output",), f"--output is {self.output!r}, but must be the name of an .html file"
        for name in ("task", "split", "source", "target", "form"):
            if getattr(self, name) and not self.data:
                yield (name,), f"--{name} says how --data is read: give --data PATH too"


@command
def explain(options: ExplainOptions) -> int:
    """Look at what a prefix does and says: attention, losses without its parts, nearest text, its own description.

    Every view has controls beside it (a random prefix of the same norms, a prefix of another task) and says what it can
    and cannot show. A stopped run writes the views that are done.

    For example:
        prefixtune explain runs/e2e/prefix.safetensors --data e2e/testset_w_refs.csv
        prefixtune explain runs/e2e --data e2e/ --split dev --against runs/reviews --output e2e.html --figures figures
    """
    from prefixtune.explain.explain import summarize
    from prefixtune.explain.page import compose
    from prefixtune.pages.page import save_figures, to_html
    from prefixtune.utils.files import check_writable, write_text

    console = Console(quiet=options.quiet)
    page = Path(options.output) if options.output else _usual_page(options.prefix)
    check_writable(page)
    if options.figures:
        check_writable(Path(options.figures) / "any")
    examples: list[Example] = []
    files = [options.prefix, *([options.against] if options.against else [])]
    backbone, prefixes = load_with_prefixes(
        console, options, files, check=lambda read: _read_all(options, read, examples)
    )
    views: list[View] = []
    try:
        _make_views(console, options, views, backbone, prefixes, examples)
    finally:
        # A stopped run writes the views that are done; one that has none leaves an earlier page alone.
        if views:
            about = _facts(options, prefixes[0], backbone.name, len(examples))
            document = compose(views, about, f"What the prefix {short_name(options.prefix)} does")
            write_text(page, to_html(document))
            figures = save_figures(document, Path(options.figures)) if options.figures else []
    facts = {**summarize(prefixes[0], backbone, views), "page": str(page), "figures": figures}
    drawn = f"; {len(figures)} figures in {options.figures}" if figures else ""
    show(facts, *_parts(document), f"{page} ({page.stat().st_size:,} bytes){drawn}", as_json=options.as_json)
    return 0


def _make_views(
    console: Console,
    options: ExplainOptions,
    views: list[View],
    backbone: Backbone,
    prefixes: Sequence[Prefix],
    examples: Sequence[Example],
) -> None:
    """Add each view to `views` as it is done."""
    from prefixtune.explain.explain import explain as explain_prefix
    from prefixtune.explain.subject import TITLES, Limits

    limits = Limits(
        rows=options.rows,
        parts=options.parts,
        corpus_tokens=options.corpus,
        batch_size=options.batch_size,
        seconds=60 * options.minutes,
        seed=options.seed,
    )
    against, parts = prefixes[1] if len(prefixes) > 1 else None, itertools.count(1)
    names = [name for name in TITLES if name in (options.views or TITLES)]
    with console.progress("views", len(names)) as bar:

        def on_part(name: str) -> None:
            bar.update(len(views), view=TITLES[name].lower(), parts=next(parts))

        for view in explain_prefix(
            backbone, prefixes[0], examples, against=against, limits=limits, views=names, on_part=on_part
        ):
            views.append(view)


def _usual_page(prefix: str) -> Path:
    """Where the page of a prefix is written unless --output says otherwise."""
    path = Path(prefix)
    if path.is_dir() or path.name == "prefix.safetensors":
        return (path if path.is_dir() else path.parent) / "explain.html"
    if path.is_file():
        return path.with_name(f"{path.stem}.explain.html")
    return data_folder() / "explain" / f"{short_name(prefix)}.html"


def _read_all(options: ExplainOptions, prefixes: Sequence[Prefix], examples: list[Example]) -> None:
    """Add the first rows of --data, read as the prefix's task, to `examples`.

    Raises:
        PrefixError: A file cannot be read, no example has a target, or one has a label that the prefix does not know.
    """
    from prefixtune.data import read_task
    from prefixtune.data.labels import check_labels, labels_of

    if not options.data:
        return
    header, labels, split = prefixes[0].header, labels_of(prefixes[0]), options.split or None
    name = options.task or str(header.get("task") or "records")
    columns = columns_as_trained(options, name, header)
    examples += [one for one in read_task(name, options.data, split=split, **columns) if one.targets][: options.rows]
    if not examples:
        raise PrefixError(f"no example of {options.data!r} has a target.", hint="name the column with --target.")
    if labels is not None:
        check_labels(examples, labels.names, labels.kind)


def _facts(options: ExplainOptions, prefix: Prefix, backbone: str, rows: int) -> list[tuple[str, str]]:
    return [
        ("prefix", options.prefix),
        ("task", str(prefix.header.get("task") or "")),
        ("backbone", backbone),
        ("length", ", ".join(f"{site} {prefix.length(site)}" for site in prefix.sites)),
        ("data", f"{options.data}, {rows} rows" if options.data else "none"),
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
