"""Bars and HTML in a notebook, with a kernel that keeps what it displays."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

import prefixtune as pt
from prefixtune.utils.console import Console, show_batches
from prefixtune.utils.notebook import curve_svg, facts_html, in_notebook


class Page:
    """As much of IPython as is used: what is on the page, one entry per display, replaced in place."""

    def __init__(self) -> None:
        self.shown: list[list[dict[str, str]]] = []

    def display(self, bundle: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        states = [bundle]
        self.shown.append(states)
        return SimpleNamespace(update=lambda bundle, raw: states.append(bundle))


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    page = Page()
    ipython, inner = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    inner.display = page.display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", inner)
    return page


def test_a_kernel_is_a_notebook_and_a_terminal_is_none(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_notebook()
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: SimpleNamespace())
    assert not in_notebook(), "IPython in a terminal has no kernel"
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: None)
    assert not in_notebook()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not in_notebook()


def test_a_bar_is_one_display_that_is_replaced(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.info("a message")
    with console.progress("training", 3) as progress:
        for step in (1, 2, 3):
            progress.update(step, loss=1 / step)
    (states,) = page.shown
    assert states[-1]["text/plain"].startswith("training: 3/3 (100 %), loss 0.3333, ")
    assert 'value="3" max="3"' in states[-1]["text/html"]
    assert len(states) < 4, "updates at once are one"
    # Messages stay on stderr, as the kernel forwards it.
    assert capsys.readouterr().err == "a message\n"


def test_a_bar_shows_where_it_stopped(page: Page) -> None:
    def stopped() -> None:
        with Console().progress("<b>", None) as progress:
            progress.update(1)
            progress.update(7)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    html = page.shown[0][-1]["text/html"]
    assert "&lt;b&gt;: 7" in html
    assert "value=" not in html, "nobody knows how many there are"


def test_quiet_and_streams_of_ones_own_have_no_bar(page: Page) -> None:
    stream = io.StringIO()
    for console in (Console(quiet=True), Console(stream=stream)):
        with console.progress("training", 3) as progress:
            progress.update(3)
    assert page.shown == []
    assert stream.getvalue().startswith("training: 3/3")


def test_batches_are_shown_where_nobody_else_does(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    with show_batches("generating", 4, heard.append, None) as on_batch:
        assert on_batch is not None
        on_batch(4)
    with show_batches("generating", 4, None, False) as silent:
        assert silent is None
    assert (heard, page.shown) == ([4], [])
    monkeypatch.setattr("prefixtune.utils.notebook._PATIENCE", 0)
    with show_batches("generating", 4, None, None) as on_batch:
        assert on_batch is not None
        on_batch(2)
    with show_batches("generating", 4, heard.append, True) as on_batch:
        assert on_batch is not None
        on_batch(3)
    assert [states[-1]["text/plain"].split(",")[0] for states in page.shown] == [
        "generating: 2/4 (50 %)",
        "generating: 3/4 (75 %)",
    ]
    assert heard == [4, 3]


def test_generate_and_evaluate_have_bars(
    page: Page, tiny_backbone: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixtune.utils.notebook._PATIENCE", 0)
    backbone, texts, few = tiny_backbone("llama"), ["a", "b", "c"], {"max_new_tokens": 2}
    pt.generate(backbone, texts, batch_size=4, **few)
    assert page.shown == [], "one batch has no progress"
    pt.generate(backbone, texts, batch_size=2, **few)
    pt.evaluate(backbone, [pt.Example(text, ("x",)) for text in texts], batch_size=2, **few)
    titles = [states[-1]["text/plain"].split(" (")[0] for states in page.shown]
    assert titles == ["generating: 3/3", "evaluating: 3/3"]


def test_elsewhere_generate_is_silent(tiny_backbone: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    backbone, texts, few = tiny_backbone("llama"), ["a", "b", "c"], {"max_new_tokens": 2, "batch_size": 2}
    pt.generate(backbone, texts, **few)
    assert capsys.readouterr().err == ""
    pt.generate(backbone, texts, **few, progress=True)
    assert capsys.readouterr().err.startswith("generating: 3/3 (100 %)")


# --- values -----------------------------------------------------------------------------------------------------------


def test_facts_are_escaped_and_short() -> None:
    html = facts_html("<T>", {"<name>": "<script>x</script>", "none": None, "empty": "", "long": "a" * 5000})
    tree = ElementTree.fromstring(html)
    assert [cell.text for cell in tree.iter("td")][:3] == ["<name>", "<script>x</script>", "long"]
    assert len(html) < 2000


def test_curves_are_small_and_skip_what_is_not_finite() -> None:
    points = [(float(step), 2.0 / step) for step in range(1, 5000)]
    svg = curve_svg({"training": points, "<dev>": [(1, 1.0), (2, float("nan")), (3, 0.5)]}, label="loss")
    lines = ElementTree.fromstring(svg).findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [200, 2]
    assert len(svg) < 5000
    x, y = lines[0].attrib["points"].split()[-1].split(",")
    assert float(x) == pytest.approx(344)
    assert float(y) == pytest.approx(94, abs=0.1), "the lowest loss is at the bottom"
    assert curve_svg({"training": [(1, 2.0)]}) == ""
    assert "nan" not in svg
