"""Charts drawn by matplotlib: inside the page, and as files.

In the page the colours are the page's own variables, so that they follow its dark mode; series differ by colour,
dashes and markers.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from prefixtune.pages.document import Chart, HeatMap, Picture, Series
from prefixtune.pages.format import Number, clean, short, spread_out
from prefixtune.utils.files import atomic_path, write_text

TEXT, QUIET, LINE, SHEET = "#1c2127", "#59626d", "#dcdedf", "#ffffff"
COLORS = ("#1f5fa8", "#b8431f", "#1b7a4b", "#7a3fa0", "#8a6100", "#0b7285", "#b02a6f", "#5c6470")
VARIABLES = {TEXT: "text", QUIET: "quiet", LINE: "line", SHEET: "sheet"} | {c: f"s{n}" for n, c in enumerate(COLORS)}
"""Colour -> the variable of style.css that stands for it in the page."""
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[Any, ...] = (
    "-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (1, 3)), (0, (8, 3)), (0, (3, 2, 1, 2, 1, 2)),
)  # fmt: skip
WIDTH, HEIGHT = 5.0, 3.1
"""Inches; in the page, 72 units each."""
MOST_POINTS = 480
"""Of a line; the CSV has all."""
STYLE = {
    "font.size": 11.5,
    "text.color": TEXT,
    "text.parse_math": False,  # a dollar sign would start a formula
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": LINE,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "ytick.left": False,
    "lines.linewidth": 1.8,
    "errorbar.capsize": 2.5,
    "legend.frameon": False,
    "legend.fontsize": 11.5,
    "figure.constrained_layout.h_pad": 0.02,
    "figure.constrained_layout.w_pad": 0.02,
    "pdf.fonttype": 42,
}


@contextmanager
def matplotlib_style(**changes: Any) -> Iterator[None]:
    """Settings of this module alone, whatever the user's. Fonts, their cache and tight layouts are not reported."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import matplotlib

        with warnings.catch_warnings(), matplotlib.rc_context():
            warnings.simplefilter("ignore")
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE | changes)
            yield
    finally:
        logger.setLevel(level)


def inline_svg(chart: Picture, identity: str) -> str:
    """A chart as an SVG element for a page with the variables of style.css.

    It has no ids but its own, no styles and nothing that is fetched; equal charts give equal text.

    Args:
        chart: What is drawn.
        identity: What its ids begin with; unique in the page.
    """
    file = io.BytesIO()
    with matplotlib_style(**{"svg.fonttype": "none", "svg.hashsalt": identity}):
        draw(chart).savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawn = ElementTree.fromstring(file.getvalue())
    root = ElementTree.Element("svg", {"class": "chart", "viewBox": drawn.get("viewBox", ""), "role": "img"})
    for name, text in (("title", chart.title), ("desc", chart.description)):
        ElementTree.SubElement(root, name, {"id": f"{identity}-{name}"}).text = clean(text)
    root.set("aria-labelledby", f"{identity}-title {identity}-desc")
    root.extend(part for part in drawn if part.tag.endswith("}g"))
    used = set(re.findall(r"#(\w+)\)?\"", file.getvalue().decode()))
    for element in root.iter():
        _plain(element, used)
    return ElementTree.tostring(root, encoding="unicode")


def _plain(element: ElementTree.Element, used: set[str]) -> None:
    """Attributes in place of styles, variables in place of colours, and only ids that are used."""
    element.tag = element.tag.rpartition("}")[2]
    element.tail = None
    attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    for declaration in attributes.pop("style", "").split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key in ("font", "font-size"):
            attributes["font-size"] = value.partition("px")[0].rpartition(" ")[2]
        elif key and key != "font-family":
            attributes[key] = f"var(--{VARIABLES[value]})" if value in VARIABLES else value
    if element.tag not in ("title", "desc") and attributes.get("id") not in used:
        attributes.pop("id", None)
    for key in {"d", "x", "y", "transform"} & attributes.keys():
        attributes[key] = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.4g}", attributes[key])
        attributes[key] = " ".join(attributes[key].split())
    element.attrib.clear()
    element.attrib.update(attributes)


def save_figure(chart: Picture, path: Path) -> None:
    """Write a chart as SVG, PDF and PNG, and its numbers as CSV.

    Args:
        chart: What is drawn.
        path: Of the files, without the end of the name.

    Raises:
        PrefixError: A file cannot be written.
    """
    with matplotlib_style(**{"svg.hashsalt": path.name}):
        figure = draw(chart)
        for kind, metadata in (("svg", {"Date": None}), ("pdf", {"CreationDate": None}), ("png", {"Software": None})):
            with atomic_path(path.with_name(f"{path.name}.{kind}")) as temporary:
                figure.savefig(temporary, format=kind, dpi=200, metadata=metadata)
    write_text(path.with_name(f"{path.name}.csv"), numbers(chart))


def numbers(chart: Picture) -> str:
    """Every point of a chart as CSV, with its interval."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    if isinstance(chart, HeatMap):
        writer.writerow([chart.y_label, *chart.columns])
        writer.writerows([name, *values] for name, values in zip(chart.rows, chart.values, strict=True))
        return str(clean(file.getvalue()))
    x_name, y_name = (chart.y_label, chart.x_label) if chart.rows else (chart.x_label, chart.y_label)
    writer.writerow(["series", x_name, y_name, "low", "high"])
    for series in chart.series:
        for index, (x, y) in enumerate(series.points):
            at, value = (chart.rows[int(y)], x) if chart.rows else (x, y)
            writer.writerow([series.name, at, value, *(series.ranges[index] if series.ranges else ("", ""))])
    return str(clean(file.getvalue()))


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw(chart: Picture) -> Any:
    """A matplotlib figure."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    if isinstance(chart, HeatMap):
        return _draw_heat_map(chart)
    drawn = chart.series
    names = dict.fromkeys(series.name for series in drawn)
    height = 0.7 + 0.14 * len(chart.rows) * (len(names) + 1) if chart.rows else HEIGHT
    columns = max(1, min(3, int(72 * WIDTH / (60 + 6.5 * max(len(_label(name)) for name in names or ["-"])))))
    height += 0.22 * math.ceil(len(names) / columns) * (len(names) > 1)
    figure = Figure(figsize=(WIDTH, min(height, 100)), layout="constrained")
    axes = figure.add_subplot()
    several = sum(series.kind == "dots" for series in drawn)
    handles: dict[str, Any] = {}
    for index, series in enumerate(drawn):
        # Dots in the same row would hide each other.
        shift = index - (several - 1) / 2 if several > 1 else 0.0
        handles[series.name] = _draw_series(axes, series, shift, several)
    axes.set_xlabel(_label(chart.x_label), loc="right")
    if chart.rows:
        axes.set_yticks(range(len(chart.rows)), [_label(row, 26) for row in chart.rows])
        axes.set_ylim(len(chart.rows) - 0.5, -0.5)
        axes.set_xlim(*_limits(chart.series, 0))
        axes.grid(visible=False, axis="y")
    else:
        _set_line_axes(axes, chart)
    if len(handles) > 1:
        texts = [_label(name) for name in handles]
        figure.legend(handles.values(), texts, loc="outside lower left", ncols=columns, handlelength=2.4)
    return figure


def _draw_heat_map(chart: HeatMap) -> Any:
    """A matplotlib figure of cells; how full a colour is says how large a value is, and the colour its sign."""
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    rows, columns = len(chart.rows), len(chart.columns)
    figure = Figure(figsize=(WIDTH, min(0.8 + 0.17 * rows, 8)), layout="constrained")
    axes = figure.add_subplot()
    largest = max((abs(value) for row in chart.values for value in row), default=0.0) or 1.0
    colors = [
        (*to_rgb(COLORS[0] if value >= 0 else COLORS[1]), min(1.0, abs(value) / largest))
        for row in chart.values
        for value in row
    ]
    edges_x, edges_y = ([index - 0.5 for index in range(count + 1)] for count in (columns, rows))
    axes.pcolormesh(edges_x, edges_y, [[0.0] * columns] * rows, facecolor=colors, edgecolor="none").set_array(None)
    axes.grid(visible=False)
    for set_ticks, names, most in ((axes.set_xticks, chart.columns, 10), (axes.set_yticks, chart.rows, 16)):
        at = range(0, len(names), math.ceil(len(names) / most))
        set_ticks(list(at), [_label(names[index], 14) for index in at])
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlabel(_label(chart.x_label), loc="right")
    axes.set_title(f"{_label(chart.y_label)}; full colour: {short(largest)}", loc="left", color=QUIET, fontsize=11.5)
    return figure


def _label(text: str, most: int = 44) -> str:
    """A text that is short enough for a picture; the page's tables have all of it."""
    text = " ".join(clean(text).split())
    text = text if len(text) <= most else f"{text[: most // 2]}…{text[1 - most // 2 :]}"
    return f" {text}" if text.startswith("_") else text  # matplotlib hides names with an underscore


def _draw_series(axes: Any, series: Series, shift: float, several: int) -> Any:
    """Draw one series, and return what stands for it in a legend."""
    look = {"color": COLORS[series.style % len(COLORS)], "linestyle": DASHES[series.style % len(DASHES)]}
    x, y = zip(*spread_out(series.points, MOST_POINTS), strict=True)
    if series.kind == "faint":
        return axes.plot(x, y, linewidth=0.8, alpha=0.35, color=look["color"])[0]
    if series.kind == "plain":
        return axes.plot(x, y, **look)[0]
    look |= {"marker": MARKERS[series.style % len(MARKERS)], "markersize": 6.5, "markeredgecolor": SHEET}
    if series.kind == "dots":
        look["linestyle"] = "none"
        y = tuple(row + shift / (several + 1) for row in y)
    if not series.ranges:
        return axes.plot(x, y, **look)[0]
    ends: Sequence[tuple[Number, ...]] = list(zip(*series.ranges, strict=True))
    return axes.errorbar(x, y, xerr=_distances(x, ends), elinewidth=1.4, **look)


def _distances(values: Sequence[Number], ends: Sequence[Sequence[Number]]) -> list[list[Number]]:
    """How far low and high ends are from the values, as matplotlib wants error bars."""
    low = [max(0.0, value - end) for value, end in zip(values, ends[0], strict=True)]
    return [low, [max(0.0, end - value) for value, end in zip(values, ends[1], strict=True)]]


def _set_line_axes(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_title(_label(chart.y_label), loc="left", color=QUIET, fontsize=STYLE["font.size"])
    axes.grid(visible=False, axis="x")
    axes.set_ylim(*_limits(chart.series, 1))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10), integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def _limits(series: Sequence[Series], axis: int) -> tuple[Number, Number]:
    """Room for every line and error bar; a faint line may leave the picture, so that it flattens nothing."""
    firm = [point[axis] for each in series if each.kind != "faint" for point in each.points]
    firm += [end for each in series for span in each.ranges for end in span]
    faint = sorted(point[axis] for each in series if each.kind == "faint" for point in each.points)
    values = firm + faint[math.ceil(0.02 * len(faint)) : math.ceil(0.98 * len(faint))] or [0.0]
    # What matplotlib can still draw with a margin.
    low, high = max(-1e300, min(values)), min(1e300, max(values))
    largest = max(abs(low), abs(high))
    # Differences in the last digits are none.
    margin = max(0.06 * (high - low) if high - low > 1e-9 * largest else 0.05 * largest, 1e-12)
    return low - margin, high + margin
