"""`prefixtune explain`: what a prefix does and says, as one page and as numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from prefixtune.cli.common import print_json
from prefixtune.cli.decoding import BackboneOptions
from prefixtune.cli.loading import columns_as_trained, load_with_prefixes, short_name
from prefixtune.cli.options import OutputOptions, command, form_option, json_option, positional
from prefixtune.errors import PrefixError
from prefixtune.training.config import FormName
from prefixtune.utils.config import CommaList
from prefixtune.utils.console import Console

if TYPE_CHECKING:
    from prefixtune.data import Example
    from prefixtune.explain.view import View
    from prefixtune.prefix.prefix import Prefix

__all__ = ["explain"]


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
    output: str = Field("explain.html", description="the page", json_schema_extra={"metavar": "FILE"})
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
        page = Path(self.output)
        if page.suffix not in (".html", ".htm") or os.path.isdir(page):
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
    from prefixtune.explain.subject import Limits
    from prefixtune.explain.view import TITLES
    from prefixtune.utils.files import check_writable

    console = Console(quiet=options.quiet)
    page = Path(options.output)
    check_writable(page)
    if options.figures:
        check_writable(Path(options.figures) / "any")
    examples: list[Example] = []
    files = [options.prefix, *([options.against] if options.against else [])]
    backbone, prefixes = load_with_prefixes(
        console, options, files, check=lambda read: _read_all(options, read, examples)
    )
    limits = Limits(
        rows=options.rows,
        parts=options.parts,
        corpus_tokens=options.corpus,
        batch_size=options.batch_size,
        seconds=60 * options.minutes,
        seed=options.seed,
    )
    names = [name for name in TITLES if name in (options.views or TITLES)]
    views: list[View] = []
    try:
        _make_views(console, names, views, backbone, prefixes, examples, limits)
    finally:
        # A stopped run writes the views that are done.
        figures = _write(options, page, views, prefixes[0], backbone.name, len(examples)) if views else []
    if options.as_json:
        print_json({**summarize(prefixes[0], backbone, views), "page": str(page), "figures": figures})
    else:
        _show(console, views)
        print(
            f"{page} ({page.stat().st_size:,} bytes)" + f"; {len(figures)} figures in {options.figures}" * bool(figures)
        )
    return 0


def _read_all(options: ExplainOptions, prefixes: Sequence[Prefix], examples: list[Example]) -> None:
    """Add the first rows of --data to `examples`.

    Raises:
        PrefixError: A file cannot be read, no example has a target, or one has a label that the prefix does not know.
    """
    from prefixtune.data.labels import check_known, labels_of

    labels = labels_of(prefixes[0])
    if options.data:
        kept = [e for e in _read_data(options, options.data, options.split, prefixes) if e.targets][: options.rows]
        if not kept:
            raise PrefixError(f"no example of {options.data!r} has a target.", hint="name the column with --target.")
        examples += kept
    if labels is not None:
        check_known(examples, labels)


def _read_data(options: ExplainOptions, path: str, split: str, prefixes: Sequence[Prefix]) -> list[Example]:
    """The examples of a file, read as the prefix's task.

    Raises:
        PrefixError: It cannot be read.
    """
    from prefixtune.data import form_that_fits, read_task

    header = prefixes[0].header
    name = options.task or str(header.get("task") or "records")
    columns = columns_as_trained(options, name, header)
    if name == "records" and not any(columns.values()):
        columns["form"] = form_that_fits(name, path, str(header.get("form") or ""), split=split or None)
    return list(read_task(name, path, split=split or None, **columns))


def _make_views(
    console: Console,
    names: Sequence[str],
    views: list[View],
    backbone: Any,
    prefixes: Sequence[Prefix],
    examples: Sequence[Example],
    limits: Any,
) -> None:
    """Add each view to `views` as it is done."""
    from prefixtune.explain.explain import explain as explain_prefix
    from prefixtune.explain.view import TITLES

    against = prefixes[1] if len(prefixes) > 1 else None
    with console.progress("views", len(names)) as bar:
        parts = 0

        def on_part(name: str) -> None:
            nonlocal parts
            parts += 1
            bar.update(len(views), view=TITLES[name].lower(), parts=parts)

        for view in explain_prefix(
            backbone, prefixes[0], examples, against=against, limits=limits, views=names, on_part=on_part
        ):
            views.append(view)
            bar.update(len(views))


def _write(
    options: ExplainOptions, page: Path, views: Sequence[View], prefix: Prefix, backbone: str, rows: int
) -> list[str]:
    """Write the page and the figures; returns the figures' names."""
    from prefixtune.explain.page import compose
    from prefixtune.pages.page import save_figures, to_html
    from prefixtune.utils.files import write_text

    facts = [
        ("prefix", options.prefix),
        ("task", str(prefix.header.get("task") or "")),
        ("backbone", backbone),
        ("length", ", ".join(f"{site} {prefix.length(site)}" for site in prefix.sites)),
        ("data", f"{options.data}, {rows} rows" if options.data else "none"),
        ("against", options.against),
    ]
    document = compose(views, facts, f"What the prefix {short_name(options.prefix)} does")
    write_text(page, to_html(document))
    return save_figures(document, Path(options.figures)) if options.figures else []


def _show(console: Console, views: Sequence[View]) -> None:
    """The main figures of each view, as a table."""
    from prefixtune.explain.text import lines

    console.table("", ["view", "finding"], [[view.title, line] for view in views for line in lines(view)], result=True)
