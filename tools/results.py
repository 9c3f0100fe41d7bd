"""Keep the results of studies in docs/results/, and their tables in docs/RESULTS.md.

    python -m tools.results              # pack every study of runs/, and write the tables again
    python -m tools.results --restore    # unpack into runs/ every study that is not there, to go on from it

Each study has two files. NAME.json holds its JSON files by their paths, without outputs, weights, states and tries;
`prefixtune report docs/results/NAME.json` shows it as it is. NAME.outputs.json.gz holds what its runs wrote (see
`tools.outputs`), without sources and references, which belong to the data sets; where these are at hand (--data
FOLDER, with e2e/, webnlg2017/, dart/ and scitldr/), `--restore` puts them together again. Runs that are done count as
done after `--restore`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from prefixtune.pages.format import metric_name
from prefixtune.report import read_results
from prefixtune.report.files import Files
from prefixtune.report.results import Cell, Evaluation, Score, Study
from prefixtune.utils.files import write_text
from tools.claims import RULE, claims_table
from tools.outputs import pack_outputs, restore_outputs
from tools.pages import DOCS, ROOT

PACKED, RUNS, PAGE = DOCS / "results", ROOT / "runs", DOCS / "RESULTS.md"
PATTERNS = ("study.json", "comparisons.json", "tuning/*.json", "cells/*/cell.json", "cells/*/evaluation.json")
DATA = ROOT.parent / "shared" / "data"
FOLDERS = {"webnlg": "webnlg2017"}
"""Folders of data sets that are not called as their tasks."""
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


def study_files() -> list[Path]:
    """The files of all kept studies."""
    return sorted(PACKED.glob("**/*.json"))


def study_name(path: Path) -> str:
    """A kept study's name, as in the marks of the page: `methods`, `first/methods`."""
    return path.relative_to(PACKED).with_suffix("").as_posix()


def outputs_file(path: Path) -> Path:
    """The file with the outputs, beside a study's own."""
    return path.with_suffix(".outputs.json.gz")


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
    decimals = _decimals(study)
    head = [f"{metric_name(study.metric)} of", "less that of", "test items", "each run (p)", "mean ± standard error"]
    is_corrected = any(point.corrected_p_value is not None for point in study.differences)
    rows = []
    for point in study.differences:
        runs = [
            f"{difference:+.{decimals}f}" + (f" ({p_value:.3f})" if p_value is not None else "")
            for difference, p_value in zip(point.differences, point.p_values, strict=True)
        ]
        error = point.standard_error
        spread = f"{point.mean:+.{decimals}f} ± {error:.{decimals}f}" if error is not None else ""
        row = [point.point, point.reference, point.part or "all", "; ".join(runs), spread]
        if is_corrected:
            ends, p_values = point.interval, (point.p_value, point.corrected_p_value)
            row.append("" if ends is None else f"{ends[0]:+.{decimals}f} to {ends[1]:+.{decimals}f}")
            row += ["" if p_value is None else f"{p_value:.3f}" for p_value in p_values]
        rows.append(row)
    return _table([*head, "95 % interval", "p", "p, corrected"] if is_corrected else head, rows)


def toys_table(studies: Sequence[Study]) -> str:
    """The share of exact answers on each toy task, a column for each method."""
    points: dict[str, dict[str, list[Score]]] = {}
    for study in studies:
        for cell in study.cells:
            if cell.status == "done" and cell.run is not None and cell.run.evaluation is not None:
                scores = points.setdefault(study.task, {}).setdefault(cell.point, [])
                scores.append(cell.run.evaluation.scores[study.metric])
    columns = list(dict.fromkeys(point for scores in points.values() for point in scores))
    rows = [[task, *(_score(scores[c]) if c in scores else "" for c in columns)] for task, scores in points.items()]
    return _table(["task", *columns], rows)


def _decimals(study: Study) -> int:
    """How many a difference has: scores of 0 to 1 need more."""
    scores = [cell.run.evaluation.scores for cell in study.cells if cell.run is not None and cell.run.evaluation]
    values = [score.score for by_name in scores if (score := by_name.get(study.metric)) and score.score is not None]
    return 1 if max(values, default=0.0) > 10 else 3


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
    """The page with the tables of the kept studies at their marks: `<!-- NAME -->`, `<!-- NAME: differences -->`.

    `<!-- claims -->` is for the claims, `<!-- toys -->` for the toy tasks.
    """
    found: dict[str, Study] = {}
    for path in studies:
        study = read_results(path)
        assert isinstance(study, Study)
        found[study_name(path)] = study
    for name, study in found.items():
        page = _at_mark(page, name, scores_table(study))
        page = _at_mark(page, f"{name}: differences", differences_table(study))
    head = ["claim about the prefix", "the paper's figure", "ours", "verdict", "why"]
    page = _at_mark(page, "claims", f"{RULE}\n\n{_table(head, claims_table(found))}")
    toys = [study for study in found.values() if study.task.startswith("toy_")]
    return _at_mark(page, "toys", toys_table(toys) if toys else "Not run yet.")


def _at_mark(page: str, mark: str, table: str) -> str:
    before, start, rest = page.partition(f"<!-- {mark} -->\n")
    end = "<!-- end -->"
    return f"{before}{start}\n{table}\n\n{end}{rest.partition(end)[2]}" if start else page


# --- the command ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Pack and write the tables, or unpack."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--restore", action="store_true", help="unpack into runs/ every study that is not there")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the data sets, for the outputs")
    options = parser.parse_args()
    if options.restore:
        for path in study_files():
            restore(path, RUNS / study_name(path), options.data)
        return
    for file in sorted([*RUNS.glob("*/study.json"), *RUNS.glob("*/*/study.json")]):
        path = PACKED / file.parent.relative_to(RUNS).with_suffix(".json")
        pack(file.parent, path)
        pack_outputs(file.parent, outputs_file(path))
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_tables(page, study_files()), encoding="utf-8")


def restore(path: Path, folder: Path, data: Path) -> None:
    """Unpack a study into a folder that is not there yet, with its outputs if the data are at hand."""
    if folder.exists():
        return
    unpack(path, folder)
    task = json.loads((folder / "study.json").read_text(encoding="utf-8"))["task"]
    problem = restore_outputs(outputs_file(path), folder, data / FOLDERS.get(task, task))
    print(f"{folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder}: restored")
    if problem:
        print(f"  without outputs: {problem}")


if __name__ == "__main__":
    main()
