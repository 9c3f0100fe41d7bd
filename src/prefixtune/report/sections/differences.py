"""How far each point of a study is from its counterpart, on the same test items."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

from prefixtune.report.document import Column, Listing, Section, Table, Value
from prefixtune.report.format import decimals_for, fixed, metric_name, signed
from prefixtune.report.results import Study
from prefixtune.report.sections.points import point_names
from prefixtune.report.sections.systems import System

__all__ = ["differences_section"]


def differences_section(study: Study, systems: Sequence[System]) -> Section | None:
    """The differences between points, with their p-values; None where there are none."""
    if not study.differences:
        return None
    names = point_names(study)
    decimals = decimals_for([spread.mean for system in systems if (spread := system.spread(study.metric)) is not None])
    rows = []
    for difference in study.differences:
        error = difference.standard_error
        rows.append(
            [
                Value(names.get(difference.point, difference.point)),
                Value(names.get(difference.reference, difference.reference)),
                Value(difference.part or "all"),
                Value(
                    signed(difference.mean, decimals),
                    "" if error is None else f"± {fixed(error, decimals)}",
                    number=difference.mean,
                ),
                Value("; ".join(signed(value, decimals) for value in difference.differences)),
                Value("; ".join(fixed(value, 3) for value in difference.p_values)),
            ]
        )
    columns = [Column("of", numeric=False), Column("less that of", numeric=False), Column("test items", numeric=False)]
    columns += [Column("mean", "± standard error"), Column("each run"), Column("p", "each run")]
    has_parts = any(difference.part for difference in study.differences)
    has_tests = any(p_value is not None for difference in study.differences for p_value in difference.p_values)
    shown = [True, True, has_parts, True, True, has_tests]
    table = Table(
        f"Differences in {metric_name(study.metric)}",
        list(compress(columns, shown)),
        [list(compress(row, shown)) for row in rows],
        num_headers=2,
    )
    note = (
        f"p: {study.difference_test}, over the test items: how often chance alone gives a difference as large as this. "
        "It is about these runs; how much a score changes with another seed or sample is in the standard error, where "
        "there are several runs."
    )
    return Section("Differences", [table, Listing([note])] if has_tests else [table])
