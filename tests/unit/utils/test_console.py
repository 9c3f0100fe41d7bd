"""Messages, progress, and texts that would steer a terminal."""

import io

import pytest

from prefixtune.utils.console import Console, print_table, safe_text


@pytest.fixture
def stream():
    return io.StringIO()


def run(console, *, total, seconds):
    """Steps that take so many seconds, by a clock that stands still otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.monotonic", lambda: 0.0)
        with console.progress("train", total) as progress:
            for step in range(1, total + 1):
                patch.setattr("time.monotonic", lambda now=step * seconds: now)
                progress.update(step, loss=10 / step, tokens_per_second=1234.5)


def test_a_text_from_elsewhere_does_not_steer_the_terminal(stream, capsys):
    console = Console(stream=stream)
    evil, shown = "a\x1b[2J\x1b]0;b\x07\u202e\nc", "a\ufffd[2J\ufffd]0;b\ufffd\ufffd\\nc"
    for say in (console.info, console.warn, console.error):
        say(evil)
    assert stream.getvalue() == f"{shown}\nwarning: {shown}\nerror: {shown}\n"
    print_table(evil, [evil], [[evil]])
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [shown] * 3


def test_the_work_goes_on_when_nobody_reads_its_messages(capsys):
    class Gone(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    console = Console(stream=Gone())
    console.info("hello")
    run(console, total=10, seconds=100)
    print_table("", ["a"], [[1]])
    assert capsys.readouterr().out.split() == ["a", "1"]


def test_quiet_shows_errors_only(stream):
    console = Console(quiet=True, stream=stream)
    console.info("hello")
    console.warn("careful")
    run(console, total=10, seconds=100)
    console.error("bad")
    assert stream.getvalue() == "error: bad\n"


def test_a_long_run_gives_a_line_now_and_then(stream):
    run(Console(stream=stream), total=100, seconds=1)
    lines = stream.getvalue().splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [15, 30, 45, 60, 75, 90, 100]
    assert lines[0] == "train: 15/100 (15 %), loss 0.6667, tokens/s 1,234, 1:25 left"


def test_no_closing_line_after_an_error(stream):
    def interrupted():
        with Console(stream=stream).progress("train", 10) as progress:
            progress.update(3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert stream.getvalue() == ""


def test_only_what_would_steer_a_terminal_is_replaced():
    for text in ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\U0001f468\u200d\U0001f469", "co\u00adop"):
        assert safe_text(text) == text
    for mark in ("\x1b", "\x9b", "\r", "\u202e", "\u2066", "\ud800"):
        assert safe_text(f"a{mark}b") == "a\ufffdb"
