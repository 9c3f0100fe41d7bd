"""Heat maps: cells in the page, whose colour says how large a value is and its sign; all numbers in the CSV."""

import re

from prefixtune.pages.document import Document, HeatMap, Section
from prefixtune.pages.page import save_figures, to_html

MAP = HeatMap(
    "Mass <by> layer",
    "Three layers and two positions.",
    ["0", "1", "2"],
    ["p0", "p1"],
    [[0.0, 1.0], [0.5, -0.25], [0.125, 0.75]],
    "position",
    "layer",
)
DOCUMENT = Document("Page", "", [Section("Attention", [(MAP,)])], command="explain")


def test_the_page_draws_every_cell():
    page = to_html(DOCUMENT)
    svg = page[page.index('<svg class="chart"') : page.index("</svg>")]
    positive = re.findall(r'fill="var\(--s0\)"(?: fill-opacity="([\d.]+)")?', svg)
    assert sorted(float(opacity or 1) for opacity in positive) == [0.125, 0.5, 0.75, 1]  # nothing is drawn for 0
    assert re.findall(r'fill="var\(--s1\)" fill-opacity="([\d.]+)"', svg) == ["0.25"]
    assert "Mass &lt;by&gt; layer" in svg
    assert "Written by prefixtune explain." in page


def test_figures_hold_all_numbers(tmp_path):
    (name,) = save_figures(DOCUMENT, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{name}.{kind}" for kind in ("csv", "pdf", "png", "svg")
    ]
    lines = (tmp_path / f"{name}.csv").read_text().splitlines()
    assert lines == ["layer,p0,p1", "0,0.0,1.0", "1,0.5,-0.25", "2,0.125,0.75"]
