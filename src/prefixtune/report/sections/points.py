"""The points of a study: which cells are repetitions of one system, its name, and which systems are shown together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prefixtune.pages.document import NUM_STYLES
from prefixtune.pages.format import natural, plain, short, spread_out, words
from prefixtune.report.results import Cell, Study
from prefixtune.report.sections.systems import System, figures_of

__all__ = ["cell_figures", "name_factors", "point_names", "representatives", "study_systems", "varying_factors"]


_REPETITIONS = ("subset", "seed")


def varying_factors(study: Study) -> list[str]:
    """The study's factors, and others that vary, without the repetitions."""
    values: dict[str, set[object]] = {}
    for cell in study.cells:
        for key, value in cell.factors.items():
            values.setdefault(key, set()).update([value] if _is_present(value) else [])
    varying = dict.fromkeys([*study.factors, *(key for key in values if len(values[key]) > 1)])
    return [name for name in varying if name in values and name not in _REPETITIONS]


def name_factors(study: Study) -> list[str]:
    """The factors in a system's name: those that vary, without the axis."""
    factors = [name for name in varying_factors(study) if name != study.axis]
    return factors or ["method"] * any("method" in cell.factors for cell in study.cells)


def study_systems(study: Study) -> list[System]:
    """The cells with equal factors, apart from the repetitions, as one system."""
    names = name_factors(study)
    # Runs on all targets know how many these are only when they are done; those that wait belong to the same point.
    axis_values = {_point(cell): value for cell in study.cells if (value := _axis_value(cell, study.axis)) is not None}
    cells: dict[tuple[str, float | None], list[Cell]] = {}
    for cell in study.cells:
        if cell.factors:
            cells.setdefault((_name(study, cell, names), axis_values.get(_point(cell))), []).append(cell)
    keys = sorted(cells, key=lambda key: (-1.0 if key[1] is None else key[1], natural(key[0])))
    styles = {name: index for index, name in enumerate(sorted({name for name, _ in keys}, key=natural))}
    systems = []
    for name, axis_value in keys:
        repetitions = cells[name, axis_value]
        repetitions.sort(key=lambda cell: [natural(cell.factors.get(key)) for key in _REPETITIONS])
        done = [
            (cell.run, cell_figures(cell)) for cell in repetitions if cell.status == "done" and cell.run is not None
        ]
        runs, figures = [run for run, _ in done], [figures for _, figures in done]
        systems.append(System(name, runs, figures, len(repetitions), study.axis, axis_value, styles[name]))
    return systems


def cell_figures(cell: Cell) -> dict[str, float]:
    """What a cell cost: from its log, and from what was written down about it."""
    return {**(figures_of(cell.run) if cell.run is not None else {}), **cell.figures}


def point_names(study: Study) -> dict[str, str]:
    """What the points of the grid are called, by what the ids of their cells begin with."""
    factors, names = name_factors(study), dict[str, str]()
    for cell in study.cells:
        value = cell.factors.get(study.axis)
        at = f", {words(study.axis)} {plain(value)}" if _is_present(value) else ""
        names[cell.point] = _name(study, cell, factors) + at
    return names


def _name(study: Study, cell: Cell, factors: Sequence[str]) -> str:
    """What a cell's system is called, whatever its value on the axis."""
    present = [(key, cell.factors[key]) for key in factors if _is_present(cell.factors.get(key))]
    # A word speaks for itself, a number needs its factor's name.
    parts = [value if isinstance(value, str) else f"{words(key)} {plain(value)}" for key, value in present]
    return ", ".join(parts) or study.name


def _is_present(value: Any) -> bool:
    """Whether a factor has a value: 0 targets or positions belong to a method that uses none, or all."""
    return value is not None and (isinstance(value, bool) or value != 0)


def _point(cell: Cell) -> str:
    """What a cell's repetitions have in common."""
    return json.dumps({key: value for key, value in cell.factors.items() if key not in _REPETITIONS}, sort_keys=True)


def _axis_value(cell: Cell, axis: str) -> float | None:
    """A cell's value on the axis; None for the bare model, which is drawn as a level.

    A run on all targets has 0 in its factors; how many they are is among its figures, or in its log.
    """
    value = cell.factors.get(axis) or cell.figures.get(axis)
    if not value and cell.run is not None:
        value = next((event.get(axis) for event in cell.run.events if event.get("event") == "start"), None)
    return float(value) if isinstance(value, int | float) and value and abs(value) < 1e15 else None


def representatives(systems: Sequence[System], axis: str) -> tuple[list[System], str]:
    """A few systems that can be compared, and their value on the axis in words.

    Of several series: each at the largest value that all have reached. Of a single one, or where there is no such
    value: every value.
    """
    finished = [system for system in systems if system.evaluations]
    reached: dict[str, set[float]] = {}
    for system in finished:
        if system.axis_value is not None:
            reached.setdefault(system.name, set()).add(system.axis_value)
    if not reached:
        return sorted(finished, key=lambda system: system.style), ""
    common = set.intersection(*reached.values())
    if len(reached) > 1 and common:
        chosen = [system for system in finished if system.axis_value in (None, max(common))]
        return sorted(chosen, key=lambda system: system.style), f" at {words(axis)} {short(max(common))}"
    shown = spread_out(finished, NUM_STYLES)
    if len(reached) == 1:
        shown = [
            system
            if system.axis_value is None
            else replace(system, name=f"{words(axis)} {short(system.axis_value)}", axis_value=None)
            for system in shown
        ]
    return [replace(system, name=system.label, style=index) for index, system in enumerate(shown)], ""
