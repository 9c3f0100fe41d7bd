"""Keep what studies found, without data and weights, in docs/results, and its tables in docs/RESULTS.md.

python docs/results.py             copy runs/NAME to docs/results/NAME, for every study that there is, and remake tables
python docs/results.py --restore   copy docs/results/NAME to runs/NAME, where there is none yet, to go on from it

Runs that are done count as done again after `--restore`; `prefixtune report docs/results/NAME` reads it as it is.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

DOCS = Path(__file__).resolve().parent
KEPT, RUNS, PAGE = DOCS / "results", DOCS.parent / "runs", DOCS / "RESULTS.md"
PATTERNS = ("study.json", "comparisons.json", "tuning/*.json", "cells/*/cell.json", "cells/*/evaluation.json")
"""All but outputs (they hold the data's references), weights, states and tries."""


def copy(source: Path, target: Path) -> None:
    """Copy a study's figures."""
    for pattern in PATTERNS:
        for path in source.glob(pattern):
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def cells_of(study: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every run that is done, and its evaluation."""
    for path in sorted(study.glob("cells/*/cell.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        if cell["status"] == "done":
            yield cell, json.loads((path.parent / "evaluation.json").read_text(encoding="utf-8"))


def table_of(study: Path) -> str:
    """A study's scores, one row for each point: what varied, runs, the rate among those tried, scores, losses."""
    facts = json.loads((study / "study.json").read_text(encoding="utf-8"))
    points: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = defaultdict(list)
    for cell, evaluation in cells_of(study):
        points[cell["id"].rpartition("-subset")[0]].append((cell, evaluation))
    parts = list(next(iter(points.values()))[0][1]["scores"]) if points else []
    groups = sorted({name for found in points.values() for name in _groups(found[0][1])})
    head = [*facts["factors"], "runs", "learning rate (tried)", *(name.upper() for name in parts)]
    head += [f"BLEU, {name}" for name in groups] + ["development loss", "trained"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for point, found in sorted(points.items(), key=lambda pair: _order(pair[1][0][0], facts["factors"])):
        first = found[0][0]
        row = [str(first["factors"].get(name, "")) for name in facts["factors"]]
        row += [str(len(found)), _rates(facts["tuning"].get(point))]
        row += [_score([evaluation["scores"][name] for _, evaluation in found]) for name in parts]
        row += [
            _score([_groups(evaluation)[name] for _, evaluation in found if name in _groups(evaluation)])
            for name in groups
        ]
        losses = [cell["figures"]["dev_loss"] for cell, _ in found if cell["figures"].get("dev_loss") is not None]
        row += [f"{mean(losses):.3f}" if losses else "", f"{first['figures']['trained_parameters']:,}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def differences_of(study: Path) -> str:
    """How far a study's points are from their counterparts, one row for each."""
    path = study / "comparisons.json"
    if not path.exists():
        return "None yet."
    points = json.loads(path.read_text(encoding="utf-8"))["points"]
    lines = ["| BLEU of | less that of | test items | each run (p) | mean ± standard error |", "|---|---|---|---|---|"]
    for point in points:
        runs = [
            f"{difference:+.1f}" + (f" ({p_value:.3f})" if p_value is not None else "")
            for difference, p_value in zip(point["differences"], point["p_values"], strict=True)
        ]
        error = point["standard_error"]
        spread = f"{point['mean']:+.1f} ± {error:.1f}" if error is not None else ""
        row = [point["point"], point["reference"], point["part"] or "all", "; ".join(runs), spread]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _groups(evaluation: dict[str, Any]) -> dict[str, Any]:
    """BLEU of seen and unseen categories, where the data tells them apart."""
    seen = evaluation.get("groups", {}).get("seen", {})
    return {name: part["scores"]["bleu"] for name, part in seen.items() if "bleu" in part.get("scores", {})}


def _order(cell: dict[str, Any], factors: list[str]) -> list[Any]:
    # By the number first, where there is one.
    values = [cell["factors"].get(name, "") for name in factors]
    return sorted(values, key=lambda value: isinstance(value, str))


def _rates(tuning: dict[str, Any] | None) -> str:
    if tuning is None:
        return ""
    tried = sorted(float(rate) for rate in tuning["learning_rate"])
    edge = ", at the edge" if len(tried) > 1 and tuning["chosen"] in (tried[0], tried[-1]) else ""
    return f"{tuning['chosen']:g} ({', '.join(f'{rate:g}' for rate in tried)}{edge})"


def _score(scores: list[dict[str, Any]]) -> str:
    """One run: its score and interval; several: mean, standard deviation and range."""
    values = [each["score"] for each in scores]
    digits = 1 if max(values) > 10 else 2 if max(values) > 1 else 3
    if len(values) > 1:
        spread = f"{min(values):.{digits}f} to {max(values):.{digits}f}"
        return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f} ({spread})"
    interval = scores[0].get("interval")
    told = f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})" if interval else ""
    return f"{values[0]:.{digits}f}{told}"


def main() -> int:
    """Copy one way or the other, and remake the tables."""
    restore = "--restore" in sys.argv
    for study in sorted((KEPT if restore else RUNS).glob("*/study.json")):
        name = study.parent.name
        if not restore:
            copy(study.parent, KEPT / name)
        elif not (RUNS / name).exists():
            copy(study.parent, RUNS / name)
    if not restore and PAGE.exists():
        text = PAGE.read_text(encoding="utf-8")
        for study in sorted(KEPT.glob("*/study.json")):
            for what, make in (("", table_of), (": differences", differences_of)):
                mark = re.escape(study.parent.name + what)
                made = make(study.parent)
                text = re.sub(
                    rf"(<!-- {mark} -->\n).*?(<!-- end -->)",
                    lambda m, t=made: f"{m[1]}\n{t}\n\n{m[2]}",
                    text,
                    flags=re.S,
                )
        PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
