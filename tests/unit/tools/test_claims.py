"""The claims' verdicts: from the differences of studies alone, by one rule."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from prefixtune.report.results import Cell, Comparisons, Difference, Study
from tools.claims import CLAIMS, claims_table, measure_claim, verdict

LEVEL, LOW_DATA, UNSEEN = CLAIMS[:3]


def difference(point: str, differences: tuple[float, ...], part: str = "", reference: str = "") -> Difference:
    reference = reference or "prefix-examples-n2000-P106-examples"
    p_values = (0.1,) * len(differences)
    mean = sum(differences) / len(differences)
    return Difference(
        point=point, reference=reference, part=part, differences=differences, p_values=p_values, mean=mean
    )


def study(*points: Difference) -> Study:
    return Study(path=Path("study"), cells=(Cell(id="a"),), comparisons=Comparisons(points=points))


def test_the_prefix_is_ahead_where_the_other_is_behind() -> None:
    found = measure_claim(LEVEL, [difference("full-n2000", (-1.0, -2.0, -3.0))])
    assert found is not None
    assert (found.mean, found.count) == (2.0, 3)
    assert found.interval == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-3)


def test_several_sizes_count_by_their_mean_for_each_sample() -> None:
    points = [
        difference("full-n50", (-4.0, -2.0)),
        difference("full-n100", (0.0, -6.0)),
        difference("top2-n50", (9.0,)),
    ]
    found = measure_claim(LOW_DATA, points)
    assert found is not None
    assert (found.mean, found.standard_error, found.count) == (3.0, 1.0, 2)
    # A size that lacks a sample would be a mean of other samples.
    assert measure_claim(LOW_DATA, [*points[:1], difference("full-n100", (0.0,))]) is None


def test_only_pairs_of_a_prefix_on_the_claims_part_count() -> None:
    assert measure_claim(UNSEEN, [difference("full-n1000", (1.0, 2.0))]) is None
    assert measure_claim(UNSEEN, [difference("full-n1000", (1.0, 2.0), "unseen", "lora4-n1000")]) is None
    assert measure_claim(UNSEEN, [difference("full-early-n1000", (1.0, 2.0), "unseen")]) is None
    assert measure_claim(UNSEEN, [difference("full-n1000", (1.0, 2.0), "unseen")]) is not None


@pytest.mark.parametrize(
    ("differences", "least", "expected"),
    [
        ((-2.0, -2.2, -2.1), 0.0, "holds"),
        ((2.0, 2.2, 2.1), 0.0, "does not hold"),
        ((2.0, -2.2, 0.1), 0.0, "not decided"),
        ((0.4, 0.5, 0.6), -1.0, "holds"),
        ((0.9, 1.1, 1.0), -1.0, "not decided"),
        ((-9.0,), 0.0, "not decided"),
    ],
)
def test_the_interval_decides(differences: tuple[float, ...], least: float, expected: str) -> None:
    found = measure_claim(LEVEL, [difference("full-n2000", differences)])
    assert found is not None
    assert verdict(found, least)[0] == expected


def test_every_claim_has_a_row_and_none_an_invented_figure() -> None:
    assert [row[2:4] for row in claims_table({})] == [["", "not run"]] * len(CLAIMS)
    rows = claims_table({"methods": study(difference("full-n2000", (-1.0, -2.0, -3.0)))})
    assert rows[0][2:] == ["+2.0 BLEU (-0.5 to +4.5), 3 samples", "holds", "the interval is above -1"]
    assert {row[3] for row in rows[1:]} == {"not run"}
    one = claims_table({"methods": study(difference("full-n2000", (-1.0,)))})
    assert one[0][2:] == ["+1.0 BLEU, one sample", "not decided", "one sample has no interval"]
