"""The tables of docs/choosing.md: what the stored studies and measurements say about when to choose a prefix."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from prefixtune.report.results import Study
from tools.claims import FULL, LORA, Claim, claims_table, figure, measure_claim, repetitions
from tools.outputs import Kept
from tools.pages import ROOT
from tools.study_tables import table

__all__ = ["choosing_tables"]


BENCH = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Question:
    """A row of the table: where a prefix is compared, and the study, the points' size, and the part that say it."""

    text: str
    study: str
    size: str
    part: str = ""
    scale: float = 1.0
    unit: str = "BLEU"


QUESTIONS = (
    *(Question(f"{size} targets of E2E", "low-data", f"n{size}") for size in (50, 100, 200, 500)),
    Question("2,000 targets of E2E", "methods", "n2000"),
    Question("all of E2E (42,061 targets)", "e2e-full", "all"),
    Question("1,000 targets of WebNLG, all categories", "unseen", "n1000"),
    Question("of these, categories that training has", "unseen", "n1000", "seen"),
    Question("categories that it lacks", "unseen", "n1000", "unseen"),
    Question("100 summaries (SciTLDR)", "low-data-scitldr", "n100", "", 100.0, "ROUGE-1"),
    Question("320 summaries", "summarization", "n320", "", 100.0, "ROUGE-1"),
    Question("1,000 targets of DART", "dart", "n1000"),
    Question("an encoder-decoder of 17M, 2,000 targets of E2E (46 positions from words)", "encoder-decoder", "n2000"),
)


def choosing_tables(studies: Mapping[str, Study], outputs: Mapping[str, Kept | None]) -> dict[str, str]:
    """The tables by their marks.

    Args:
        studies: By name.
        outputs: What is stored of their outputs, by name.
    """
    return {
        "quality": _quality(studies),
        "first round": _first_round(studies),
        "serving": _serving(_read("serve.json"), _read("decode.json")),
        "open": _open(studies, outputs),
    }


def _quality(studies: Mapping[str, Study]) -> str:
    names = "LoRA of rank 4", "full fine-tuning", "ten positions from words", "few-shot"
    head = ["task and data", *(f"prefix less {name}" for name in names)]
    rows = []
    for q in QUESTIONS:
        others = [rf"{LORA}-{q.size}", rf"full-{q.size}", rf"prefix-words-{q.size}-P10-task", "few-shot-all"]
        prefix = rf"prefix.*-{q.size}-.*"
        claims = [Claim("", "", q.study, other, q.part, 0.0, q.scale, q.unit, prefix) for other in others]
        rows.append([q.text, *(_cell(claim, studies) for claim in claims)])
    return table(head, rows)


def _first_round(studies: Mapping[str, Study]) -> str:
    claims = (
        (
            "2,000 targets of E2E",
            "LoRA of rank 8 (21 times the parameters)",
            Claim("", "", "first/methods", "lora8-n2000"),
        ),
        (
            "2,000 targets of E2E",
            "an adapter with about as many parameters",
            Claim("", "", "first/methods", "adapter3-n2000"),
        ),
        ("2,000 targets of E2E", "full fine-tuning", Claim("", "", "first/methods", FULL)),
        ("50 to 500 targets of E2E", "full fine-tuning", Claim("", "", "first/low-data", FULL)),
        ("WebNLG, seen categories", "full fine-tuning", Claim("", "", "first/unseen", FULL, part="seen")),
        ("WebNLG, unseen categories", "full fine-tuning", Claim("", "", "first/unseen", FULL, part="unseen")),
    )
    rows = [[data, other, _cell(claim, studies)] for data, other, claim in claims]
    return table(["task and data", "prefix less", "difference"], rows)


def _cell(claim: Claim, studies: Mapping[str, Study]) -> str:
    """A mean difference with its interval, or how far the study is."""
    study = studies.get(claim.study)
    if study is None:
        return "not run"
    if not repetitions(claim, study.cells):
        return "not asked there"
    found = measure_claim(claim, study)
    if found is None:
        return "not run"
    text = figure(found.difference, claim.unit)
    if found.difference.count == 1 and found.items_p_value is not None:
        text += f" (p = {found.items_p_value:.3f} over test items)"
    return text if found.is_whole else f"{text} of {found.planned}: partly run"


def _serving(serve: Mapping[str, Any], decode: Mapping[str, Any]) -> str:
    speeds = serve["tokens_per_second"]
    ratio = {name: median(values) for name, values in serve["speed_ratios"].items()}
    settings, machine = serve["settings"], serve["machine"]
    rows = [
        ["a prefix for each request", f"{speeds['different']:.0f}", ""],
        ["one prefix for all", f"{speeds['one']:.0f}", f"{ratio['different / one']:.2f}"],
        ["no prefix", f"{speeds['none']:.0f}", f"{ratio['different / none']:.2f}"],
    ]
    text = (
        f"{settings['requests']} requests at once, {settings['tokens_in']} tokens in and {settings['tokens_out']} out, "
        f"P = {settings['prefix_length']}, {serve['backbone']} in {serve['dtype']}; {machine['processor']}, "
        f"{machine['cores']} cores, {serve['date'][:10]} (`bench/results/serve.json`):\n\n"
        + table(["", "tokens/s", "a prefix for each, against it"], rows)
    )
    memory = serve["memory"]
    text += (
        f"\n\nA prefix of P = {settings['prefix_length']} is a file of {memory['file_bytes']:,} bytes; 1,000 of them "
        f"at hand take {memory['resident_mib_per_1000']:.0f} MiB, {memory['tensor_mib_per_1000']:.0f} of it their "
        "numbers.\n\n"
    )
    seconds = {(row["texts"], row["prefix_length"]): row["seconds"] for row in decode["figures"]}
    texts, lengths = ({key[axis]: None for key in seconds} for axis in (0, 1))
    rows = [[str(count), *(f"{seconds[count, p] / seconds[count, 0]:.2f}" for p in lengths if p)] for count in texts]
    head = ["texts at once", *(f"P = {p}" for p in lengths if p)]
    return (
        text + f"A step of decoding, as a multiple of one without a prefix, {decode['date'][:10]} "
        "(`bench/results/decode.json`):\n\n" + table(head, rows)
    )


def _open(studies: Mapping[str, Study], outputs: Mapping[str, Kept | None]) -> str:
    rows = claims_table(studies, outputs)
    left = [f"- {text} ({word}: {why})" for text, *_, word, why in rows if word not in ("holds", "does not hold")]
    settled = [f"- {text}: **{word}**" for text, *_, word, _ in rows if word in ("holds", "does not hold")]
    return "\n".join([*settled, *left])


def _read(name: str, folder: Path = BENCH) -> Any:
    return json.loads((folder / name).read_bytes())
