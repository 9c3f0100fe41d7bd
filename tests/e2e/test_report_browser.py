"""The report in a real browser."""

import pytest

from browser import CHROMIUM, NO_CHROMIUM
from command_line import run
from made_up_runs import evaluation, examples, five_runs, write_lines

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report of everything, written by the command as it is called."""
    folder = tmp_path_factory.mktemp("report")
    one = evaluation(folder / "one", title="a title without any place to break the line at: " + "x" * 120)
    rows = examples(60, 0.5)
    rows[0]["output"] = "</script><script>window.attacked = true</script><img src=x onerror='window.attacked = true'>"
    rows[1]["output"] = "unbreakable" * 40
    write_lines(one / "outputs.jsonl", rows)
    made = (*five_runs(folder), one)
    path = folder / "report.html"
    run("report", *map(str, made), "--output", str(path), "--quiet")
    return path


def test_loads_without_complaint_and_from_one_file(browser, page):
    browser.open(page)
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.value("window.attacked") is None
    assert browser.value("document.querySelectorAll('svg.chart').length") > 3


def test_never_wider_than_the_window(browser, page):
    browser.open(page, width=360)
    browser.value("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert browser.value("[document.documentElement.scrollWidth, document.documentElement.clientWidth]") == [360, 360]
    # Wide tables move in a box of their own.
    moving = "[...document.querySelectorAll('.scroll')].some((box) => box.scrollWidth > box.clientWidth)"
    assert browser.value(moving)
    outside = (
        "[...document.querySelectorAll('main *')].filter((each) => !each.closest('.scroll, svg')"
        " && each.getBoundingClientRect().right > innerWidth + 0.5).map((each) => each.outerHTML.slice(0, 80))"
    )
    assert browser.value(outside) == []


def test_the_keyboard_reaches_the_report_and_sorts_a_table(browser, page):
    browser.open(page)
    browser.press("Tab", 9)
    assert browser.value("document.activeElement.className") == "skip"
    assert browser.value("document.activeElement.getBoundingClientRect().left") >= 0
    assert browser.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("Enter", 13)
    assert browser.value("location.hash") == "#report"

    table = "[...document.querySelectorAll('table')].find((each) => each.caption.textContent.startsWith('Scores'))"
    # But for the evaluation with a long title.
    names = f"[...{table}.tBodies[0].rows].map((row) => row.cells[0].textContent).filter((name) => name.length < 50)"
    written = browser.value(names)
    browser.value(f"{table}.tHead.rows[0].cells[1].querySelector('button').focus()")
    for direction, expected in (
        ("ascending", ["zero-shot", "adapter", "lora", "prefix", "fine-tuning"]),
        ("descending", ["fine-tuning", "prefix", "lora", "adapter", "zero-shot"]),
    ):
        browser.press("Enter", 13)
        assert browser.value(names) == expected
        assert browser.value(f"{table}.tHead.rows[0].cells[1].getAttribute('aria-sort')") == direction
    assert sorted(written) == sorted(expected)


def test_the_filter_shows_only_what_fits(browser, page):
    browser.open(page)
    box = "[...document.querySelectorAll('.outputs')].at(-1)"
    field = f"{box}.querySelector('input')"
    assert browser.value(f"{box}.querySelector('.filter').checkVisibility()") is True
    browser.value(f"{field}.value = 'UNBREAKABLE'; {field}.dispatchEvent(new Event('input'))")
    shown = f"[...{box}.querySelectorAll('.items > li')].filter((each) => each.checkVisibility()).length"
    assert browser.value(shown) == 1
    assert browser.value(f"{box}.querySelector('[role=status]').textContent") == "1 of 60"


def test_whole_without_scripts(browser, page):
    browser.open(page, scripts=False)
    assert browser.complaints() == []
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    names = [node.get("name", {}).get("value", "") for node in nodes if not node.get("ignored")]
    roles = [node.get("role", {}).get("value", "") for node in nodes if not node.get("ignored")]
    assert "Development loss" in " ".join(names)
    assert {"main", "banner", "navigation", "contentinfo", "table", "columnheader", "rowheader"} <= set(roles)
    # What only a script could do is not offered.
    assert "searchbox" not in roles
