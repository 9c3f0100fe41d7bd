"""The claims' verdicts: from the differences of studies and the numbers of their items, by one rule."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from prefixtune.evaluation.metrics import holm
from prefixtune.evaluation.metrics.student import t_p_value
from prefixtune.report.results import Cell, Comparisons, Pair, Study
from prefixtune.studies import StudyConfig, plan
from tools.claims import CLAIMS, Claim, Finding, claims_table, measure_claim, verdict
from tools.outputs import Kept
from tools.pages import ROOT

LEVEL, LOW_DATA, UNSEEN = CLAIMS[:3]
PREFIX = "prefix-examples-n2000-P106-examples"


def study(
    points: Mapping[str, tuple[float, ...]], part: str = "", reference: str = PREFIX, planned: int | None = None
) -> Study:
    """A study whose points differ from a prefix by so much, on one sample after the other."""
    cells, pairs = [], []
    for point, differences in points.items():
        for index in range(len(differences) if planned is None else planned):
            cells.append(Cell(id=f"{point}-subset{index}-seed{index}"))
        for index, difference in enumerate(differences):
            names = (f"{name}-subset{index}-seed{index}" for name in (point, reference))
            run, other = names
            pairs.append(Pair(run=run, reference=other, part=part, difference=difference, p_value=0.1))
    return Study(path=Path("study"), cells=tuple(cells), comparisons=Comparisons(pairs=tuple(pairs)))


def outputs(study: Study, ahead: float) -> Kept:
    """The items of a study's runs by a metric that is a mean: every item of a prefix is ahead by so much."""
    names = [name for pair in study.comparisons.pairs for name in (pair.run, pair.reference)]
    statistics = {name: [[1.0 + ahead * ("prefix" in name), 1.0]] * 9 for name in names}
    return Kept({}, ["item"] * 9, [], {}, statistics)


def test_the_prefix_is_ahead_where_the_other_is_behind() -> None:
    found = measure_claim(LEVEL, study({"full-n2000": (-1.0, -2.0, -3.0)}))
    assert found is not None
    assert (found.difference.mean, found.difference.count, found.planned) == (2.0, 3, 3)
    half = 4.3027 / math.sqrt(3)
    assert found.difference.interval == pytest.approx((2 - half, 2 + half), abs=1e-3)
    # Against the least difference, -1, and not against 0.
    assert found.p_value == pytest.approx(t_p_value(3 * math.sqrt(3), 2))


def test_several_sizes_count_by_their_mean_for_each_sample() -> None:
    points = {"full-n50": (-4.0, -2.0), "full-n100": (0.0, -6.0), "top2-n50": (9.0, 9.0)}
    found = measure_claim(LOW_DATA, study(points))
    assert found is not None
    assert (found.difference.mean, found.difference.standard_error, found.difference.count) == (3.0, 1.0, 2)


def test_seeds_of_a_sample_count_once() -> None:
    """As in the comparisons of the study itself."""
    differences = {(0, 0): -1.0, (0, 1): -3.0, (1, 0): -6.0, (1, 1): -2.0}
    names = {key: [f"{point}-subset{key[0]}-seed{key[1]}" for point in ("full-n50", PREFIX)] for key in differences}
    pairs = [
        Pair(run=names[key][0], reference=names[key][1], part="", difference=difference, p_value=0.1)
        for key, difference in differences.items()
    ]
    cells = tuple(Cell(id=run) for run, _ in names.values())
    made = Study(path=Path("study"), cells=cells, comparisons=Comparisons(pairs=tuple(pairs)))
    found = measure_claim(LOW_DATA, made)
    assert found is not None
    # The means of the samples are 2 and 4.
    assert (found.difference.mean, found.difference.standard_error, found.difference.count) == (3.0, 1.0, 2)
    assert found.is_whole
    found = measure_claim(LOW_DATA, made.model_copy(update={"comparisons": Comparisons(pairs=tuple(pairs[:3]))}))
    assert found is not None
    assert (found.difference.mean, found.difference.count, found.planned) == (2.0, 1, 2)
    # Of a single sample, the seeds are all there is.
    found = measure_claim(LOW_DATA, made.model_copy(update={"cells": cells[:2]}))
    assert found is not None
    assert (found.difference.mean, found.difference.count, found.planned) == (2.0, 2, 2)


def test_only_samples_that_are_whole_count() -> None:
    whole = study({"full-n50": (-4.0, -2.0, -7.0), "full-n100": (0.0, -6.0)}, planned=5)
    found = measure_claim(LOW_DATA, whole)
    assert found is not None
    assert (found.difference.mean, found.difference.count, found.planned) == (3.0, 2, 5)
    # The second sample of one size and the third of the other are no pair.
    pairs = [pair for pair in whole.comparisons.pairs if "n50-subset1" not in pair.run]
    found = measure_claim(LOW_DATA, whole.model_copy(update={"comparisons": Comparisons(pairs=tuple(pairs))}))
    assert found is not None
    assert (found.difference.mean, found.difference.count) == (2.0, 1)


def test_only_pairs_of_a_prefix_on_the_claims_part_count() -> None:
    values = {"full-n1000": (1.0, 2.0)}
    assert measure_claim(UNSEEN, study(values)) is None
    assert measure_claim(UNSEEN, study(values, "unseen", "lora4-n1000")) is None
    assert measure_claim(UNSEEN, study({"full-early-n1000": (1.0, 2.0)}, "unseen")) is None
    assert measure_claim(UNSEEN, study(values, "unseen")) is not None


def test_one_run_without_training_is_compared_with_every_sample_of_a_size() -> None:
    shown, prefixes = "few-shot-all-subset0-seed0", [f"prefix-n{size}-P106-examples" for size in (50, 100)]
    cells, pairs = [Cell(id=shown)], []
    for prefix, differences in zip(prefixes, [(-1.0, -3.0), (-9.0, -9.0)], strict=True):
        for index, difference in enumerate(differences):
            cells.append(Cell(id=f"{prefix}-subset{index}-seed{index}"))
            pairs.append(Pair(run=shown, reference=cells[-1].id, part="", difference=difference, p_value=0.1))
    claim = Claim("", "", "low-data", "few-shot-all", prefix="prefix.*-n50-.*")
    compared = Study(path=Path("study"), cells=tuple(cells), comparisons=Comparisons(pairs=tuple(pairs)))
    found = measure_claim(claim, compared)
    assert found is not None
    assert (found.difference.mean, found.difference.count, found.planned) == (2.0, 2, 2)
    # Samples of 50 of 100 targets share a half, which widens the interval as everywhere: sqrt(1/2 + 1) for sqrt(1/2).
    sized = [cell.model_copy(update={"factors": {"num_targets": 50 * ("n50" in cell.id)}}) for cell in cells]
    shared = measure_claim(claim, compared.model_copy(update={"cells": tuple(sized), "train_targets": 100}))
    assert shared is not None
    assert shared.difference.standard_error == pytest.approx(math.sqrt(3) * found.difference.standard_error)
    found = measure_claim(claim, compared.model_copy(update={"comparisons": Comparisons(pairs=tuple(pairs[:1]))}))
    assert found is not None
    assert (found.difference.mean, found.difference.count, found.planned) == (1.0, 1, 2)


@pytest.mark.parametrize(
    ("differences", "least", "items", "expected"),
    [
        ((-2.0, -2.2, -2.1), 0.0, (1.0, 3.0), "holds"),
        ((-2.0, -2.2, -2.1), 0.0, None, "not decided"),
        ((-2.0, -2.2, -2.1), 0.0, (-0.1, 3.0), "not decided"),
        ((2.0, 2.2, 2.1), 0.0, (-3.0, -1.0), "does not hold"),
        ((2.0, -2.2, 0.1), 0.0, (1.0, 3.0), "not decided"),
        ((0.4, 0.5, 0.6), -1.0, (-0.9, 0.0), "holds"),
        ((0.9, 1.1, 1.0), -1.0, (-2.0, 0.0), "not decided"),
        ((-9.0,), 0.0, (1.0, 9.0), "not decided"),
        ((-2.0, -2.0, -2.0), 0.0, (1.0, 3.0), "not decided"),
    ],
)
def test_chance_is_excluded_twice(
    differences: tuple[float, ...], least: float, items: tuple[float, float] | None, expected: str
) -> None:
    claim = type(LEVEL)("a claim", "", "methods", LEVEL.other, least=least)
    found = measure_claim(claim, study({"full-n2000": differences}))
    assert found is not None
    # As the only question.
    finding = Finding(found.difference, found.planned, items, found.p_value, found.p_value)
    assert verdict(finding, least)[0] == expected


def test_every_claim_has_a_row_and_none_an_invented_figure() -> None:
    nothing = ["", "", "", "not run", "there is no such run yet"]
    assert [row[2:] for row in claims_table({})] == [nothing] * len(CLAIMS)
    done = study({"full-n2000": (-1.0, -1.2, -1.1, -1.1)})
    rows = claims_table({"methods": done}, {"methods": outputs(done, 1.1)})
    assert rows[0][2:4] == ["+1.1 BLEU (+1.0 to +1.2), 4 samples", "+1.1 to +1.1"]
    assert rows[0][5:] == ["holds", "above -1 over samples and over items"]
    assert {row[5] for row in rows[1:]} == {"not run"}
    one = claims_table({"methods": study({"full-n2000": (-1.0,)})})
    assert one[0][2:] == ["+1.0 BLEU, one sample", "", "", "not decided", "one sample has no interval"]


def test_samples_alone_are_no_verdict() -> None:
    """The rule asks for chance among the items, too."""
    rows = claims_table({"methods": study({"full-n2000": (-1.0, -1.2, -1.1, -1.1)})})
    assert rows[0][5:] == ["not decided", "no outputs are stored, so there is no interval over items"]
    equal = study({"full-n2000": (-3.0, -3.0, -3.0)})
    rows = claims_table({"methods": equal}, {"methods": outputs(equal, 3.0)})
    assert rows[0][4:] == ["", "not decided", "the differences of 3 samples are equal, which gives no p-value"]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.text)
def test_every_claim_has_the_samples_that_a_verdict_needs(claim: Claim) -> None:
    path = ROOT / "studies" / f"{claim.study.replace('-', '_')}.toml"
    config = StudyConfig.from_file(path, name=claim.study)
    # As the protocol promises (docs/studies.md): each with a seed of its own.
    assert config.repeats == [(index, index) for index in range(5)]
    for pattern in (claim.prefix, claim.other):
        cells = [cell for cell in plan(config) if re.fullmatch(pattern, cell.group)]
        assert {cell.subset for cell in cells} == set(range(5))


def test_what_is_run_in_part_has_no_verdict() -> None:
    rows = claims_table({"methods": study({"full-n2000": (-9.0, -9.2, -9.0, -9.2)}, planned=5)})
    assert rows[0][2:] == ["+9.1 BLEU (+8.9 to +9.3), 4 samples", "", "", "partly run", "4 of 5 samples"]
    rows = claims_table({"methods": study({"full-n2000": ()}, planned=5)})
    assert rows[0][2:] == ["", "", "", "not run", "0 of 5 samples"]


def test_claims_are_corrected_for_all_that_the_table_asks() -> None:
    done = {"full-n2000": (-1.0, -2.0, -1.5), "lora4-n2000": (-0.2, -0.3, -0.25)}
    rows = claims_table({"methods": study(done)}, {"methods": outputs(study(done), 0.25)})
    p_values = []
    for claim in (CLAIMS[0], CLAIMS[5]):
        found = measure_claim(claim, study(done))
        assert found is not None
        assert found.p_value is not None
        p_values.append(found.p_value)
    # The six that are not run count as if nothing was found.
    expected = holm([*p_values, *[1.0] * 6])[:2]
    assert [rows[0][4], rows[5][4]] == [f"{value:.3f}" for value in expected]
    # Of itself the second would hold.
    assert p_values[1] < 0.05 < expected[1]
    # 12.59 standard errors of 0.029: the quantile of Student's t for two degrees of freedom and 0.05 / 8.
    assert rows[5][5:] == ["not decided", f"p = {expected[1]:.3f} over samples; it takes 0.4"]


def test_items_are_those_of_the_runs() -> None:
    values = study({"full-n2000": (-1.0, -2.0)})
    found = measure_claim(LEVEL, values, outputs(values, 0.5))
    assert found is not None
    assert found.items == pytest.approx((0.5, 0.5))
