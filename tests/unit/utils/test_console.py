"""Messages, progress without and with a terminal, tables."""

from __future__ import annotations

import io
import sys

import pytest

from prefixtune.utils.console import Console, format_figure, format_seconds, safe_text


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def run(console: Console, clock: Clock, *, total: int | None, seconds: float, steps: int, start: int = 0) -> None:
    with console.progress("train", total, start=start) as progress:
        for step in range(start + 1, steps + 1):
            clock.now += seconds
            progress.update(step, loss=10 / step, tokens_per_second=1234.5)


def test_error_format(stream: io.StringIO) -> None:
    console = Console(stream=stream)
    console.error("no file [red]'a'[/red].", "give another :smile: one.")
    console.error("x" * 200)
    assert stream.getvalue() == (
        "error: no file [red]'a'[/red].\nhint: give another :smile: one.\nerror: " + "x" * 200 + "\n"
    )


def test_info_and_warning(stream: io.StringIO) -> None:
    console = Console(stream=stream)
    console.info("reading [1/2] 'a.csv'")
    console.warn("3 rows cut")
    assert stream.getvalue() == "reading [1/2] 'a.csv'\nwarning: 3 rows cut\n"


def test_messages_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.info("hello")
    console.error("bad")
    assert capsys.readouterr() == ("", "hello\nerror: bad\n")


def test_a_text_from_elsewhere_does_not_steer_the_terminal(
    stream: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(stream=stream)
    evil, shown = "a\x1b[2J\x1b]0;b\x07\u202ec", "a\ufffd[2J\ufffd]0;b\ufffd\ufffdc"
    for say in (console.info, console.warn, console.error):
        say(evil)
    assert stream.getvalue() == f"{shown}\nwarning: {shown}\nerror: {shown}\n"
    console.table(evil, [evil], [[evil]], result=True)
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [shown] * 3


def test_the_work_goes_on_when_nobody_reads_its_messages(capsys: pytest.CaptureFixture[str]) -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    console = Console(stream=Gone())
    console.info("hello")
    run(console, Clock(), total=10, seconds=100, steps=10)
    console.table("", ["a"], [[1]], result=True)
    assert capsys.readouterr().out.split() == ["a", "1"]


def test_quiet_shows_errors_only(stream: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True, stream=stream)
    console.info("hello")
    console.warn("careful")
    console.table("t", ["a"], [[1]])
    run(console, Clock(), total=10, seconds=100, steps=10)
    console.error("bad")
    assert stream.getvalue() == "error: bad\n"
    console.table("", ["a"], [[1]], result=True)
    assert capsys.readouterr().out.split() == ["a", "1"]


def test_a_short_run_gives_one_line(stream: io.StringIO) -> None:
    clock = Clock()
    run(Console(stream=stream, clock=clock), clock, total=100, seconds=0.02, steps=100)
    assert stream.getvalue() == "train: 100/100 (100 %), loss 0.1, tokens/s 1,234, 0:02 taken\n"


def test_a_long_run_gives_a_line_now_and_then(stream: io.StringIO) -> None:
    clock = Clock()
    run(Console(stream=stream, clock=clock), clock, total=100, seconds=1, steps=100)
    lines = stream.getvalue().splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [15, 30, 45, 60, 75, 90, 100]
    assert lines[0] == "train: 15/100 (15 %), loss 0.6667, tokens/s 1,234, 1:25 left"


def test_a_resumed_run_counts_its_own_time(stream: io.StringIO) -> None:
    clock = Clock()
    run(Console(stream=stream, clock=clock), clock, total=100, seconds=5, steps=51, start=50)
    assert stream.getvalue() == "train: 51/100 (51 %), loss 0.1961, tokens/s 1,234, 4:05 left\n"


def test_no_closing_line_after_an_error(stream: io.StringIO) -> None:
    def interrupted() -> None:
        with Console(stream=stream).progress("train", 10) as progress:
            progress.update(3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    terminal_console = Console(stream=terminal)
    assert terminal_console.live
    with terminal_console.progress("train", 10) as progress:
        progress.update(4, loss=2.5)
        progress.update(10, tokens_per_second=99)
        terminal_console.info("saved")
        print("a result")
        print("a message of a library", file=sys.stderr)
    shown = terminal.getvalue()
    for part in ("train", "10/10", "loss 2.5  tokens/s 99", "saved", "\x1b["):
        assert part in shown
    assert "a result" not in shown
    assert capsys.readouterr().out == "a result\n"


def test_table_in_a_log(stream: io.StringIO) -> None:
    rows = [["prefix [P=10]", 0.6512345, 120_000], ["none", None, 3]]
    Console(stream=stream).table("Scores", ["method", "BLEU", "tokens"], rows)
    assert [line.rstrip() for line in stream.getvalue().splitlines()] == [
        "Scores",
        "method           BLEU   tokens",
        "prefix [P=10]  0.6512  120,000",
        "none                         3",
    ]


def test_figures() -> None:
    assert format_figure(float("nan")) == "nan"
    assert format_figure(-1234567.8) == "-1,234,568"
    assert format_figure(10**399) == "1" + ",000" * 133, "larger than any float"
    assert format_seconds(59.6) == "1:00"


@pytest.mark.parametrize(
    "text",
    [
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "co\u00adop",
        "\U0001fae8",
    ],
)
def test_text_of_any_language_reaches_a_terminal(text: str) -> None:
    assert safe_text(text) == text


@pytest.mark.parametrize("mark", ["\x1b", "\x9b", "\r", "\u202e", "\u2066", "\ud800"])
def test_what_would_steer_a_terminal_is_replaced(mark: str) -> None:
    assert safe_text(f"a{mark}b") == "a\ufffdb"
