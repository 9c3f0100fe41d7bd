"""The paper's claims, each with its figure, ours and a verdict, from the stored studies."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Literal

from prefixtune.evaluation.metrics import MeanDifference, holm, mean_difference
from prefixtune.evaluation.metrics.student import t_quantile
from prefixtune.report.results import Cell, Pair, Study
from prefixtune.studies.compare import sample_overlap
from prefixtune.studies.kinds import UNTRAINED
from tools.items import item_interval, kept_pairs
from tools.outputs import Kept

__all__ = [
    "CLAIMS",
    "FULL",
    "LORA",
    "RULE",
    "Claim",
    "Finding",
    "claims_table",
    "figure",
    "measure_claim",
    "minimum_detectable",
    "repetitions",
    "verdict",
]


Verdict = Literal["holds", "does not hold", "not decided", "partly run", "not run"]
LEVEL = 0.05
RULE = """\
A claim **holds** where the mean difference is above the least one that the claim allows, and does **not hold** where it
is below, by more than chance, asked twice. Over samples and seeds: Student's t, p < 0.05 after Holm's correction
for all claims of the table, those not run included. Over test items: the 95 % interval of a paired bootstrap, in which
all samples count together. Otherwise, and with a single sample, a claim is **not decided**; before all of its runs are
done it has no verdict. The least difference is 0 for "better", and is in brackets beside "level": it was chosen before
the runs. Intervals are of 95 %, and are not corrected. "It takes" says how far from the least difference the mean would
have to be for p < 0.05, with the spread that these samples have and the smallest p-value of the table."""


@dataclass(frozen=True)
class Claim:
    """A claim that a prefix differs from something else.

    Attributes:
        text: The claim.
        paper: Its figure in the paper, the prefix less the other; empty: the paper has none.
        study: The name of the study that asks it.
        other: A pattern of the points that the prefix is compared with; where several sizes match, their mean counts.
        prefix: A pattern of the prefix's points.
        part: Of the test set; empty: all of it.
        least: The smallest difference with which it holds.
        scale: What scores are multiplied by.
        unit: Of the difference.
    """

    text: str
    paper: str
    study: str
    other: str
    part: str = ""
    least: float = 0.0
    scale: float = 1.0
    unit: str = "BLEU"
    prefix: str = "prefix.*"


FULL, LORA = r"full-(n\d+|all)", "lora4"
"""Points of full fine-tuning; and how those of LoRA begin at the numbers of a prefix of 106 positions."""
CLAIMS = (
    Claim("level (-1) with full fine-tuning on E2E", "+1.5 (70.3 against 68.8)", "methods", FULL, least=-1.0),
    Claim("better than full fine-tuning with 50 to 500 targets (E2E)", "+2.9 on average", "low-data", FULL),
    Claim(
        "better than full fine-tuning on unseen categories (WebNLG)",
        "+18.6 (45.3 against 26.7)",
        "unseen",
        FULL,
        part="unseen",
    ),
    Claim(
        "level (-2) with full fine-tuning on summaries (XSUM there, SciTLDR here)",
        "-1.3 (43.8 against 45.1)",
        "summarization",
        FULL,
        least=-2.0,
        scale=100.0,
        unit="ROUGE-1",
    ),
    Claim(
        "with few targets, real words are a better start than random values",
        "a figure only",
        "initialization",
        r".*-random",
    ),
    Claim("better than LoRA of rank 4, at no more numbers (E2E)", "", "methods", rf"{LORA}-n\d+"),
    Claim("better than LoRA with 50 to 500 targets (E2E)", "", "low-data", rf"{LORA}-n\d+"),
    Claim(
        "level (-1) with LoRA on unseen categories (WebNLG)", "", "unseen", rf"{LORA}-n\d+", part="unseen", least=-1.0
    ),
)


@dataclass(frozen=True)
class Finding:
    """What a study has of a claim so far.

    Attributes:
        difference: The prefix's score less the other's, over the samples that are whole.
        planned: How many samples the study has.
        items: The 95 % interval of the mean difference over test items; None: the outputs are not stored.
        p_value: Of the hypothesis that the difference is the least one; None: there is one sample, or all differences
            are equal.
        corrected: The same, by Holm's correction over the table.
        items_p_value: Of a single run and its counterpart, by paired randomization of the test items.
    """

    difference: MeanDifference
    planned: int
    items: tuple[float, float] | None = None
    p_value: float | None = None
    corrected: float | None = None
    items_p_value: float | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all samples are done."""
        return self.difference.count == self.planned


def claims_table(studies: Mapping[str, Study], outputs: Mapping[str, Kept | None] = {}) -> list[list[str]]:
    """Rows of claim, paper's figure, ours over samples, over items, corrected p-value, verdict and why.

    Args:
        studies: By name; claims of a study that is not among them are "not run".
        outputs: What is stored of their outputs, by name.
    """
    found = {
        claim: measure_claim(claim, studies[claim.study], outputs.get(claim.study))
        for claim in CLAIMS
        if claim.study in studies
    }
    # A claim that is run in part is a question that has no answer yet.
    asked = {claim: f.p_value for claim, f in found.items() if f and f.is_whole and f.p_value is not None}
    corrected = dict(zip(asked, holm(list(asked.values()), len(CLAIMS)), strict=True))
    rows = []
    for claim in CLAIMS:
        finding = found.get(claim)
        paper = claim.paper or "not asked"
        if finding is None:
            planned = repetitions(claim, studies[claim.study].cells) if claim.study in studies else []
            why = f"0 of {len(planned)} samples" if planned else "there is no such run yet"
            rows.append([claim.text, paper, "", "", "", "not run", why])
            continue
        finding = replace(finding, corrected=corrected.get(claim))
        word, why = verdict(finding, claim.least)
        p_value = "" if finding.corrected is None else f"{finding.corrected:.3f}"
        items = _interval(finding.items) if finding.items else ""
        rows.append([claim.text, paper, figure(finding.difference, claim.unit), items, p_value, word, why])
    return rows


def measure_claim(claim: Claim, study: Study, kept: Kept | None = None) -> Finding | None:
    """The prefix's score less the other's, over the samples of which all pairs are there; None: there is none.

    Several seeds of a sample count once, by their mean; where there is one sample, each of its seeds counts.

    Args:
        claim: What is claimed.
        study: The study that asks it.
        kept: Its outputs.
    """
    planned = _by_sample(repetitions(claim, study.cells))
    points = {cell.point for cell in study.cells if re.fullmatch(claim.other, cell.point)}
    by_repetition: dict[str, list[Pair]] = {}
    for pair in study.comparisons.pairs:
        point, prefix = pair.run.rpartition("-subset")[0], pair.reference.rpartition("-subset")[0]
        if point in points and re.fullmatch(claim.prefix, prefix) and pair.part == claim.part:
            by_repetition.setdefault(_sample(pair.reference), []).append(pair)
    found = [[by_repetition.get(repetition, []) for repetition in own] for own in planned.values()]
    whole = [[*itertools.chain(*own)] for own in found if all(len(pairs) == len(points) for pairs in own)]
    if not whole:
        return None
    # A study's difference is the other's score less the prefix's.
    differences = [-claim.scale * mean(pair.difference for pair in pairs) for pairs in whole]
    runs = [(pair.reference, pair.run) for pairs in whole for pair in pairs]
    numbers = kept_pairs(kept, runs, claim.part)
    interval = item_interval(numbers) if numbers else None
    sizes = [int(cell.factors.get("num_targets") or 0) for cell in _with_samples(claim, study.cells)]
    # Several seeds of one sample say nothing of other samples.
    is_one_sample = len({repetition.partition("-seed")[0] for own in planned.values() for repetition in own}) == 1
    shared = 0.0 if is_one_sample else max((sample_overlap(size, study.train_targets) for size in sizes), default=0.0)
    return Finding(
        mean_difference(differences, shared),
        len(planned),
        None if interval is None else (claim.scale * interval[0], claim.scale * interval[1]),
        mean_difference([difference - claim.least for difference in differences], shared).p_value,
        items_p_value=whole[0][0].p_value if len(runs) == 1 else None,
    )


def repetitions(claim: Claim, cells: Sequence[Cell]) -> list[str]:
    """The samples and seeds of all runs that a claim is about."""
    return list(dict.fromkeys(_sample(cell.id) for cell in _with_samples(claim, cells)))


def _by_sample(repetitions: Sequence[str]) -> dict[str, list[str]]:
    """The repetitions of each sample; of a single one, each by itself.

    >>> _by_sample(["0-seed0", "1-seed0", "0-seed1"]), _by_sample(["0-seed0", "0-seed1"])
    ({'0': ['0-seed0', '0-seed1'], '1': ['1-seed0']}, {'0-seed0': ['0-seed0'], '0-seed1': ['0-seed1']})
    """
    samples: dict[str, list[str]] = {}
    for repetition in repetitions:
        samples.setdefault(repetition.partition("-seed")[0], []).append(repetition)
    return samples if len(samples) > 1 else {repetition: [repetition] for repetition in repetitions}


def _with_samples(claim: Claim, cells: Sequence[Cell]) -> list[Cell]:
    """The runs whose samples a claim is about: the other's, or the prefix's where the other is not trained."""
    others = [cell for cell in cells if re.fullmatch(claim.other, cell.point)]
    if others and all(cell.point.startswith(UNTRAINED) for cell in others):
        return [cell for cell in cells if re.fullmatch(claim.prefix, cell.point)]
    return others


def _sample(run: str) -> str:
    """The sample and the seed of a run, as at the end of its id."""
    return run.rpartition("-subset")[2]


def verdict(finding: Finding, least: float) -> tuple[Verdict, str]:
    """The verdict on a difference, by `RULE`, and why.

    >>> found = MeanDifference(2.0, 0.5, (0.6, 3.4), 0.02, 5)
    >>> verdict(Finding(found, 5, (1.0, 3.0), 0.02, 0.04), 0.0)
    ('holds', 'above 0 over samples and over items')
    >>> verdict(Finding(found, 8, (1.0, 3.0), 0.02), 0.0)
    ('partly run', '5 of 8 samples')
    """
    found, items = finding.difference, finding.items
    if not finding.is_whole:
        return "partly run", f"{found.count} of {finding.planned} samples"
    if finding.corrected is None:
        same = f"the differences of {found.count} samples are equal, which gives no p-value"
        return "not decided", "one sample has no interval" if found.count == 1 else same
    if finding.corrected >= LEVEL:
        told = minimum_detectable(found)
        return "not decided", f"p = {finding.corrected:.3f} over samples" + (f"; it takes {told:.1f}" if told else "")
    if items is None:
        return "not decided", "no outputs are stored, so there is no interval over items"
    if items[0] <= least <= items[1]:
        return "not decided", f"the interval over items includes {least:g}"
    over = "over samples and over items"
    above = found.mean > least
    return ("holds", f"above {least:g} {over}") if above else ("does not hold", f"below {least:g} {over}")


def minimum_detectable(found: MeanDifference) -> float:
    """How far a mean must be from the least difference to be told from it; 0: the differences are equal.

    It is that of the table's smallest p-value, which Holm's correction multiplies by the number of claims.

    >>> round(minimum_detectable(MeanDifference(0.4, 1.5, (-3.8, 4.6), 0.8, 5)), 1)
    7.9
    """
    if not found.standard_error:
        return 0.0
    return found.standard_error * t_quantile(1 - LEVEL / (2 * len(CLAIMS)), found.count - 1)


def figure(found: MeanDifference, unit: str) -> str:
    """A mean difference with its interval over samples."""
    if found.interval is None:
        return f"{found.mean:+.1f} {unit}, one sample"
    return f"{found.mean:+.1f} {unit} ({_interval(found.interval)}), {found.count} samples"


def _interval(ends: tuple[float, float]) -> str:
    return f"{ends[0]:+.1f} to {ends[1]:+.1f}"
