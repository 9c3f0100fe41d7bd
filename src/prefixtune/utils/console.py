"""Output for people: a progress bar on a terminal, plain lines in a log, messages and tables.

Progress and messages go to stderr; stdout holds results only.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from rich import box
from rich import console as rich_console
from rich import progress as rich_progress
from rich.table import Table
from rich.text import Text

Figure = float | int | str

SECONDS = 15.0
"""Without a terminal: between two lines."""


class Progress:
    """The progress of a piece of work.

    Args:
        show: Takes the steps done, and all figures.
    """

    def __init__(self, show: Callable[[int, dict[str, Figure]], object]) -> None:
        self._show = show
        self._figures: dict[str, Figure] = {}

    def update(self, step: int, **figures: Figure) -> None:
        """Show the progress.

        Args:
            step: Steps done so far, counted from the start of the work.
            figures: Figures to show, such as `loss=2.31, tokens_per_second=1200`; shown until replaced.
        """
        self._figures |= figures
        self._show(step, self._figures)


class _Lines:
    """Plain lines about progress, for logs and pipes."""

    def __init__(self, title: str, total: int | None, start: int, write: Callable[[str], None]) -> None:
        self._title, self._total, self._start, self._write = title, total, start, write
        self._begin = self._last = time.monotonic()
        self._step = self._written = start
        self._figures: dict[str, Figure] = {}

    def show(self, step: int, figures: dict[str, Figure]) -> None:
        """Write a line, if the last one was some time ago."""
        self._step, self._figures = step, figures
        if time.monotonic() - self._last >= SECONDS:
            self.line()

    def line(self) -> None:
        """Write a line, unless this step has one."""
        if self._step == self._written:
            return
        self._last, self._written = time.monotonic(), self._step
        done, elapsed = self._step - self._start, self._last - self._begin
        share = f"/{self._total:,} ({100 * self._step / self._total:.0f} %)" if self._total else ""
        left = elapsed / done * (self._total - self._step) if self._total and done > 0 else 0
        time_text = f"{format_seconds(left)} left" if left > 0 else f"{format_seconds(elapsed)} taken"
        self._write(", ".join([f"{self._title}: {self._step:,}{share}", *_describe(self._figures), time_text]))


def _describe(figures: dict[str, Figure]) -> list[str]:
    return [f"{name.replace('_per_second', '/s').replace('_', ' ')} {format_figure(figures[name])}" for name in figures]


class Console:
    """Prints for people, on stderr; characters that would steer the terminal are replaced.

    Colors follow the terminal and the environment variable `NO_COLOR`.

    Args:
        quiet: Show nothing but errors.
        stream: Where to print; stderr when left out.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self._out = _rich_console(sys.stderr if stream is None else stream)

    @contextlib.contextmanager
    def progress(self, title: str, total: int | None, *, start: int = 0) -> Iterator[Progress]:
        """Show the progress of a piece of work while the block runs: a bar on a terminal, plain lines elsewhere.

        Args:
            title: Names the work.
            total: Steps of the whole work; None: unknown.
            start: Steps that were done before, when work is resumed.
        """
        if self.quiet:
            yield Progress(lambda step, figures: None)
        elif self._out.is_interactive:
            with _bar(self._out) as bar:
                task = bar.add_task(title, total=total, completed=start, figures="")
                yield Progress(
                    lambda step, figures: bar.update(task, completed=step, figures="  ".join(_describe(figures)))
                )
        else:
            lines = _Lines(title, total, start, self._print)
            yield Progress(lines.show)
            lines.line()

    def info(self, text: str) -> None:
        """Print a line, unless quiet."""
        if not self.quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        """Print a warning, unless quiet."""
        if not self.quiet:
            _print_line(self._out, Text.assemble(("warning: ", "yellow"), _text(text)))

    def error(self, message: str, hint: str = "") -> None:
        """Print `error: ...`, and `hint: ...` when there is one."""
        _print_line(self._out, Text.assemble(("error: ", "bold red"), _text(message)))
        if hint:
            _print_line(self._out, Text.assemble(("hint: ", "cyan"), _text(hint)))

    def _print(self, text: str) -> None:
        _print_line(self._out, _text(text))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Figure | None]]) -> None:
    """Print a table on stdout; columns of numbers are aligned to the right, and None is an empty cell.

    Args:
        title: Above the table; empty for none.
        columns: The headings.
        rows: One value per column in every row.
    """
    out = _rich_console(sys.stdout)
    table = Table(box=box.SIMPLE_HEAD if out.is_terminal else None, pad_edge=False)
    for index, name in enumerate(columns):
        cells = [row[index] for row in rows if row[index] is not None]
        numbers = bool(cells) and not any(isinstance(cell, str) for cell in cells)
        table.add_column(_text(name), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_text("" if cell is None else format_figure(cell)) for cell in row))
    if title:
        _print_line(out, _text(title, "bold"))
    out.print(table, markup=False, highlight=False, emoji=False)


@contextlib.contextmanager
def show_batches(
    title: str, total: int, on_batch: Callable[[int], None] | None, progress: bool
) -> Iterator[Callable[[int], None]]:
    """Yield what a function calls after each batch: it calls its caller's own, and may show the progress on stderr.

    Args:
        title: Names the work.
        total: Of the whole work.
        on_batch: The caller's; None: there is none.
        progress: Whether to show it.
    """
    with Console(quiet=not progress).progress(title, total) as bar:

        def both(done: int) -> None:
            bar.update(done)
            if on_batch is not None:
                on_batch(done)

        yield both


def format_figure(value: Figure) -> str:
    """Format a number for people: four significant digits, thousands separated.

    >>> [format_figure(value) for value in (2.34567, 12345.6, 0.00001234, 120000, "n/a", True)]
    ['2.346', '12,346', '1.234e-05', '120,000', 'n/a', 'True']
    """
    if isinstance(value, str | bool):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_seconds(seconds: float) -> str:
    """Format a duration as minutes and seconds, with hours if there are any.

    >>> format_seconds(7), format_seconds(187.6), format_seconds(36000)
    ('0:07', '3:08', '10:00:00')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, other ends of lines, halves of surrogate pairs, and what turns the order of the text behind it.

Marks that join letters or emoji are text.
"""


def safe_text(text: str) -> str:
    r"""A text from elsewhere for a terminal: characters that would steer it are replaced.

    >>> safe_text("a\x1b[2Jb\n")
    'a\ufffd[2Jb\n'
    """
    return _STEERING.sub("\ufffd", text)


class _RichConsole(rich_console.Console):
    def on_broken_pipe(self) -> None:
        """Without a reader of messages the work goes on; one of results may have read enough, which `main` handles."""
        if self.file is sys.stdout:
            raise BrokenPipeError
        self.quiet = True


def _rich_console(stream: TextIO) -> rich_console.Console:
    terminal = stream.isatty()
    # A log has no width: tables may be as wide as they need.
    width = None if terminal else 1000
    return _RichConsole(file=stream, force_terminal=terminal, force_jupyter=False, width=width)


def _text(text: str, style: str = "") -> Text:
    # One line, which no value from elsewhere divides.
    return Text(safe_text(text).replace("\n", "\\n"), style=style)


def _print_line(out: rich_console.Console, text: Text) -> None:
    """Print the text unchanged: no markup, no line breaks."""
    out.print(text, soft_wrap=True, highlight=False)


def _bar(out: rich_console.Console) -> rich_progress.Progress:
    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(bar_width=24),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[figures]}", markup=False),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("left"),
        rich_progress.TimeRemainingColumn(),
        console=out,
        redirect_stdout=False,  # results printed during the work belong to stdout
    )
