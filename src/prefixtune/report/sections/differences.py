"""How far each point of a study is from its counterpart, on the same test items."""

from __future__ import annotations

from collections.abc import Sequence

from prefixtune.report.document import Column, Listing, Section, Table, Value
from prefixtune.report.format import decimals_for, fixed, metric_name, signed
from prefixtune.report.results import Difference, Study
from prefixtune.report.sections.points import point_names
from prefixtune.report.sections.systems import System

__all__ = ["differences_section"]


LEVEL = 0.05


def differences_section(study: Study, systems: Sequence[System]) -> Section | None:
    """The differences between points, with their p-values; None where there are none."""
    differences = study.differences
    if not differences:
        return None
    names = point_names(study)
    decimals = decimals_for([spread.mean for system in systems if (spread := system.spread(study.metric)) is not None])
    columns = [
        Column("of", [Value(names.get(d.point, d.point)) for d in differences], numeric=False),
        Column("less that of", [Value(names.get(d.reference, d.reference)) for d in differences], numeric=False),
    ]
    if any(difference.part for difference in differences):
        columns.append(Column("test items", [Value(d.part or "all") for d in differences], numeric=False))
    columns.append(Column("mean", [_mean(d, decimals) for d in differences], "± standard error"))
    columns.append(
        Column("each run", [Value("; ".join(signed(x, decimals) for x in d.differences)) for d in differences])
    )
    has_tests = any(p_value is not None for difference in differences for p_value in difference.p_values)
    if has_tests:
        p_values = [Value("; ".join(fixed(p_value, 3) for p_value in d.p_values)) for d in differences]
        columns.append(Column("p", p_values, "each run"))
    table = Table(f"Differences in {metric_name(study.metric)}", columns, num_headers=2)
    notes = [
        f"p: {study.comparisons.test}, over the test items: how often chance alone gives a difference this large. "
        "It is about these runs; how much a score changes with another seed or sample is in the standard error, where "
        "there are several runs.",
        f"★: every run differs in the same direction, each with p below {LEVEL}.",
    ]
    return Section("Differences", [table, Listing(notes)] if has_tests else [table])


def _mean(difference: Difference, decimals: int) -> Value:
    error, mean = difference.standard_error, difference.mean
    tested = [p_value is not None and p_value < LEVEL for p_value in difference.p_values]
    one_way = len({value > 0 for value in difference.differences}) == 1
    small = "" if error is None else f"± {fixed(error, decimals)}"
    return Value(signed(mean, decimals), small, number=mean, significant=all(tested) and one_way)
