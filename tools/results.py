"""Keep the results of studies in docs/results/, and their tables in docs/RESULTS.md and docs/choosing.md.

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
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefixtune.report import read_results
from prefixtune.report.files import Files
from prefixtune.report.results import Study
from prefixtune.studies import StudyConfig, plan
from prefixtune.studies.compare import write_comparisons
from prefixtune.utils.files import write_text
from tools.choosing import choosing_tables
from tools.claims import RULE, claims_table
from tools.nested_length import NESTED, nested_table
from tools.outputs import pack_outputs, read_kept, restore_outputs
from tools.pages import DOCS, ROOT
from tools.study_tables import costs_table, differences_table, scores_table, table, toys_table

PACKED, RUNS = DOCS / "results", ROOT / "runs"
PAGES = (DOCS / "RESULTS.md", DOCS / "choosing.md")
COSTS = ROOT / "bench" / "results" / "methods.json"
PATTERNS = ("study.json", "comparisons.json", "tuning/*.json", "cells/*/cell.json", "cells/*/evaluation.json")
DATA = ROOT.parent / "shared" / "data"
FOLDERS = {"webnlg": "webnlg2017"}
"""Folders of data sets that are not called as their tasks."""
_MARK = re.compile(r"<!-- ([^\n]+) -->\n.*?<!-- end -->", re.DOTALL)
_NOTHING = "Not run yet."
_PATH = re.compile(r"(?<![^\s'\"=])/[^\s'\",]+")
_ALLOWED = re.compile("|".join(re.escape(pattern).replace(r"\*", "[A-Za-z0-9-]+") for pattern in PATTERNS))


# --- files ------------------------------------------------------------------------------------------------------------


def pack(folder: Path, path: Path) -> None:
    """Write a study's folder as one file, a line for each of its files."""
    names = [file.relative_to(folder).as_posix() for pattern in PATTERNS for file in sorted(folder.glob(pattern))]
    contents = (portable(json.loads((folder / name).read_bytes())) for name in names)
    lines = [f"{json.dumps(name)}: {_compact(content)}" for name, content in zip(names, contents, strict=True)]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def portable(value: Any) -> Any:
    """The same JSON with paths from the repository's folder, or by their names alone, also as words of a command.

    >>> portable({"data": "/elsewhere/e2e", "command": "study --data /elsewhere/e2e"})
    {'data': 'e2e', 'command': 'study --data e2e'}
    """
    if isinstance(value, dict):
        return {key: portable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [portable(each) for each in value]
    return _PATH.sub(_from_here, value) if isinstance(value, str) else value


def _from_here(found: re.Match[str]) -> str:
    path = Path(found[0])
    return os.path.relpath(path, ROOT) if path.is_relative_to(ROOT.parent) else path.name


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


# --- the page ---------------------------------------------------------------------------------------------------------


def read_studies(files: Sequence[Path]) -> dict[str, Study]:
    """The kept studies by their names."""
    found: dict[str, Study] = {}
    for path in files:
        study = read_results(path)
        assert isinstance(study, Study)
        found[study_name(path)] = study
    return found


def with_tables(page: str, files: Sequence[Path]) -> str:
    """The page with the tables of the kept studies at their marks: `<!-- NAME -->`, `<!-- NAME: differences -->`.

    `<!-- claims -->` is for the claims, `<!-- toys -->` for the toy tasks, `<!-- costs -->` for the cost of a step;
    those of docs/choosing.md are in `tools.choosing`. A mark of which nothing is kept says so.
    """
    studies = read_studies(files)
    outputs = {study_name(path): read_kept(outputs_file(path)) for path in files}
    tables: dict[str, str] = {}
    for name, study in studies.items():
        kept = outputs[name]
        tables[name] = scores_table(study, None if kept is None else kept.outputs)
        tables[f"{name}: differences"] = differences_table(study)
    head = ["claim about the prefix", "the paper's figure", "ours", "over test items", "p, corrected", "verdict", "why"]
    toys = [study for study in studies.values() if study.task.startswith("toy_")]
    tables["claims"] = f"{RULE}\n\n{table(head, claims_table(studies, outputs))}"
    tables["costs"] = costs_table(_read(COSTS))
    if "length" in studies:
        tables["length: nested"] = nested_table(studies["length"], _read(NESTED))
    tables["toys"] = toys_table(toys) if toys else _NOTHING
    tables |= choosing_tables(studies, outputs)
    return _MARK.sub(lambda found: f"<!-- {found[1]} -->\n\n{tables.get(found[1], _NOTHING)}\n\n<!-- end -->", page)


def _read(path: Path) -> Any:
    return json.loads(path.read_bytes()) if path.exists() else None


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
        compare(file.parent)
        pack(file.parent, path)
        pack_outputs(file.parent, outputs_file(path))
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8"), study_files()), encoding="utf-8")


def compare(folder: Path) -> None:
    """Compare the runs that a study has so far; a study that is not finished has not done so itself."""
    values = json.loads((folder / "study.json").read_text(encoding="utf-8"))["config"]
    known = {key: value for key, value in values.items() if key in StudyConfig.model_fields}
    config = StudyConfig(**{**known, "output": str(folder)})
    write_comparisons(config, plan(config))


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
