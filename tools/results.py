"""Keep the results of studies in docs/results/, one file each, and their tables in docs/RESULTS.md.

    python -m tools.results              # pack every study of runs/, and write the tables again
    python -m tools.results --restore    # unpack into runs/ every study that is not there, to go on from it

A file holds the study's JSON files by their paths, without outputs (they contain the references of the data), weights,
states and tries. Runs that are done count as done after `--restore`; `prefixtune report docs/results/NAME.json` shows
it as it is.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from prefixtune.report import read_results
from prefixtune.report.files import Files
from prefixtune.report.results import Cell, Evaluation, Score, Study
from prefixtune.utils.files import write_text
from tools.pages import DOCS, ROOT

PACKED, RUNS, PAGE = DOCS / "results", ROOT / "runs", DOCS / "RESULTS.md"
PATTERNS = ("study.json", "comparisons.json", "tuning/*.json", "cells/*/cell.json", "cells/*/evaluation.json")
_ALLOWED = re.compile("|".join(re.escape(pattern).replace(r"\*", "[A-Za-z0-9-]+") for pattern in PATTERNS))


# --- files ------------------------------------------------------------------------------------------------------------


def pack(folder: Path, path: Path) -> None:
    """Write a study's folder as one file, a line for each of its files."""
    names = [file.relative_to(folder).as_posix() for pattern in PATTERNS for file in sorted(folder.glob(pattern))]
    lines = [f"{json.dumps(name)}: {_compact(json.loads((folder / name).read_bytes()))}" for name in names]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def unpack(path: Path, folder: Path) -> None:
    """Write a study's file as the folder that it was packed from.

    Raises:
        DataError: The file is something else.
        ValueError: It holds a file that `pack` does not write.
    """
    contents = Files.open(path).packed or {}
    for name in contents:
        if not _ALLOWED.fullmatch(name):
            raise ValueError(f"{path} holds {name!r}, which belongs to no study")
    for name, content in contents.items():
        write_text(folder / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# --- tables -----------------------------------------------------------------------------------------------------------


def scores_table(study: Study) -> str:
    """A study's scores, one row for each point: what varied, runs, the rate among those tried, scores, losses."""
    points: dict[str, list[tuple[Cell, Evaluation]]] = {}
    for cell in study.cells:
        if cell.status == "done" and cell.run is not None and cell.run.evaluation is not None:
            points.setdefault(cell.point, []).append((cell, cell.run.evaluation))
    metrics = list(next(iter(points.values()))[0][1].scores) if points else []
    groups = sorted({name for runs in points.values() for name in _group_scores(runs[0][1])})
    head = [*study.factors, "runs", "learning rate (tried)", *(name.upper() for name in metrics)]
    head += [f"BLEU, {name}" for name in groups] + ["development loss", "trained"]
    rows = []
    for point, runs in sorted(points.items(), key=lambda item: _order(item[1][0][0], study.factors)):
        first, evaluations = runs[0][0], [evaluation for _, evaluation in runs]
        row = [str(first.factors.get(name, "")) for name in study.factors]
        row += [str(len(runs)), _rates(study.tuning.get(point))]
        row += [_score([evaluation.scores[name] for evaluation in evaluations]) for name in metrics]
        in_groups = [_group_scores(evaluation) for evaluation in evaluations]
        row += [_score([scores[name] for scores in in_groups if name in scores]) for name in groups]
        losses = [cell.figures["dev_loss"] for cell, _ in runs if "dev_loss" in cell.figures]
        row += [f"{mean(losses):.3f}" if losses else "", f"{first.figures['trained_parameters']:,.0f}"]
        rows.append(row)
    return _table(head, rows)


def differences_table(study: Study) -> str:
    """How far a study's points are from their counterparts, one row for each."""
    if not study.differences:
        return "None yet."
    head = ["BLEU of", "less that of", "test items", "each run (p)", "mean ± standard error"]
    is_corrected = any(point.corrected_p_value is not None for point in study.differences)
    rows = []
    for point in study.differences:
        runs = [
            f"{difference:+.1f}" + (f" ({p_value:.3f})" if p_value is not None else "")
            for difference, p_value in zip(point.differences, point.p_values, strict=True)
        ]
        error = point.standard_error
        spread = f"{point.mean:+.1f} ± {error:.1f}" if error is not None else ""
        row = [point.point, point.reference, point.part or "all", "; ".join(runs), spread]
        if is_corrected:
            ends, p_values = point.interval, (point.p_value, point.corrected_p_value)
            row.append("" if ends is None else f"{ends[0]:+.1f} to {ends[1]:+.1f}")
            row += ["" if p_value is None else f"{p_value:.3f}" for p_value in p_values]
        rows.append(row)
    return _table([*head, "95 % interval", "p", "p, corrected"] if is_corrected else head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _group_scores(evaluation: Evaluation) -> dict[str, Score]:
    """BLEU of seen and unseen categories, where the data distinguishes them."""
    groups = evaluation.groups.get("seen", {})
    return {name: group.scores["bleu"] for name, group in groups.items() if "bleu" in group.scores}


def _order(cell: Cell, factors: Sequence[str]) -> list[Any]:
    # By the number first, where there is one.
    values = [cell.factors.get(name, "") for name in factors]
    return sorted(values, key=lambda value: isinstance(value, str))


def _rates(tuning: dict[str, Any] | None) -> str:
    if tuning is None:
        return ""
    tried = sorted(float(rate) for rate in tuning["learning_rate"])
    edge = ", at the edge" if len(tried) > 1 and tuning["chosen"] in (tried[0], tried[-1]) else ""
    return f"{tuning['chosen']:g} ({', '.join(f'{rate:g}' for rate in tried)}{edge})"


def _score(scores: Sequence[Score]) -> str:
    """One run: its score and interval; several: mean, standard deviation and range."""
    values = [score.score for score in scores if score.score is not None]
    digits = 1 if max(values) > 10 else 2 if max(values) > 1 else 3
    if len(values) > 1:
        spread = f"{min(values):.{digits}f} to {max(values):.{digits}f}"
        return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f} ({spread})"
    interval = scores[0].interval
    text = f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})" if interval else ""
    return f"{values[0]:.{digits}f}{text}"


def with_tables(page: str, studies: Sequence[Path]) -> str:
    """The page with the tables of the packed studies at their marks: `<!-- NAME -->`, `<!-- NAME: differences -->`."""
    for path in studies:
        study = read_results(path)
        assert isinstance(study, Study)
        for mark, table in ((path.stem, scores_table(study)), (f"{path.stem}: differences", differences_table(study))):
            start, end = f"<!-- {mark} -->\n", "<!-- end -->"
            before, mark_found, rest = page.partition(start)
            if mark_found:
                page = f"{before}{start}\n{table}\n\n{end}{rest.partition(end)[2]}"
    return page


# --- the command ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Pack and write the tables, or unpack."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--restore", action="store_true", help="unpack into runs/ every study that is not there")
    if parser.parse_args().restore:
        for path in sorted(PACKED.glob("*.json")):
            if not (RUNS / path.stem).exists():
                unpack(path, RUNS / path.stem)
        return
    for path in sorted(RUNS.glob("*/study.json")):
        pack(path.parent, PACKED / f"{path.parent.name}.json")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_tables(page, sorted(PACKED.glob("*.json"))), encoding="utf-8")


if __name__ == "__main__":
    main()
