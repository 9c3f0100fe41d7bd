"""The paper's claims, each with its figure, ours and a verdict, from the stored studies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Literal

from prefixtune.evaluation.metrics import MeanDifference, mean_difference
from prefixtune.report.results import Difference, Study

__all__ = ["CLAIMS", "RULE", "Claim", "claims_table", "measure_claim", "verdict"]


Verdict = Literal["holds", "does not hold", "not decided"]
RULE = (
    "A claim **holds** where the 95 % interval of the difference (Student's t over samples and seeds) is above the\n"
    "least difference that the claim allows, and does **not hold** where it is below; otherwise, and with a single\n"
    'sample, it is **not decided**. The least difference is 0 for "better", and is in brackets beside "level".'
)


@dataclass(frozen=True)
class Claim:
    """A claim that a prefix differs from something else.

    Attributes:
        text: The claim.
        paper: Its figure in the paper, the prefix less the other; empty: the paper has none.
        study: The name of the study that asks it.
        other: A pattern of the points that the prefix is compared with; where several sizes match, their mean counts.
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


_FULL = r"full-(n\d+|all)"
CLAIMS = (
    Claim("level (-1) with full fine-tuning on E2E", "+1.5 (70.3 against 68.8)", "methods", _FULL, least=-1.0),
    Claim("better than full fine-tuning with 50 to 500 targets (E2E)", "+2.9 on average", "low-data", _FULL),
    Claim(
        "better than full fine-tuning on unseen categories (WebNLG)",
        "+18.6 (45.3 against 26.7)",
        "unseen",
        _FULL,
        part="unseen",
    ),
    Claim(
        "level (-2) with full fine-tuning on summaries (XSUM there, SciTLDR here)",
        "-1.3 (43.8 against 45.1)",
        "summarization",
        _FULL,
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
    Claim("better than LoRA at equal numbers (rank 4) on E2E", "", "methods", r"lora4-n\d+"),
    Claim("better than LoRA with 50 to 500 targets (E2E)", "", "low-data", r"lora4-n\d+"),
    Claim("level (-1) with LoRA on unseen categories (WebNLG)", "", "unseen", r"lora4-n\d+", part="unseen", least=-1.0),
)


def claims_table(studies: Mapping[str, Study]) -> list[list[str]]:
    """Rows of claim, paper's figure, ours, verdict and why.

    Args:
        studies: By name; claims of a study that is not among them are "not run".
    """
    rows = []
    for claim in CLAIMS:
        study = studies.get(claim.study)
        found = None if study is None else measure_claim(claim, study.differences)
        paper = claim.paper or "not asked"
        if found is None:
            why = "there is no study yet" if study is None else f"the study {claim.study} has no such pair yet"
            rows.append([claim.text, paper, "", "not run", why])
        else:
            word, why = verdict(found, claim.least)
            rows.append([claim.text, paper, _figure(found, claim.unit), word, why])
    return rows


def measure_claim(claim: Claim, differences: Sequence[Difference]) -> MeanDifference | None:
    """The prefix's score less the other's, over all samples; None where no pair was compared."""
    # A study's difference is the other's score less the prefix's.
    points = [
        point.differences
        for point in differences
        if re.fullmatch(claim.other, point.point) and point.reference.startswith("prefix") and point.part == claim.part
    ]
    if not points or len({len(values) for values in points}) > 1:
        return None
    return mean_difference([-claim.scale * mean(sample) for sample in zip(*points, strict=True)])


def verdict(found: MeanDifference, least: float) -> tuple[Verdict, str]:
    """The verdict on a difference, by `RULE`, and why.

    >>> verdict(MeanDifference(2.0, 0.5, (0.6, 3.4), 0.02, 5), 0.0)
    ('holds', 'the interval is above 0')
    """
    if found.interval is None:
        return "not decided", "one sample has no interval"
    low, high = found.interval
    if low > least:
        return "holds", f"the interval is above {least:g}"
    if high < least:
        return "does not hold", f"the interval is below {least:g}"
    return "not decided", f"the interval includes {least:g}"


def _figure(found: MeanDifference, unit: str) -> str:
    if found.interval is None:
        return f"{found.mean:+.1f} {unit}, one sample"
    low, high = found.interval
    return f"{found.mean:+.1f} {unit} ({low:+.1f} to {high:+.1f}), {found.count} samples"
