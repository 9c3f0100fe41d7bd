"""Keep the results of studies in docs/results/, and their tables in docs/RESULTS.md and docs/choosing.md.

    python -m tools.results              # pack the studies of runs/ that the page names, and write the tables again
    python -m tools.results --restore    # unpack into runs/ what is not there, to go on from it

Each study has two files. NAME.json holds its JSON files by their paths, without outputs, weights, states and tries;
`prefixtune report docs/results/NAME.json` shows it as it is. NAME.outputs.json.gz holds what its runs wrote (see
`tools.outputs`), without sources and references, which belong to the data sets; where these are at hand (--data
FOLDER, with e2e/, webnlg2017/, dart/ and scitldr/), `--restore` puts them together again, also into a study that is
there without them. Runs that are done count as done after `--restore`.

A kept study is not replaced by one with fewer runs that are done, unless `--force` is given. A study that the page does
not name, such as one of your own, is left out. An error of one study lets the others go on; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prefixtune.errors import ConfigError, PrefixError
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
from tools.study_tables import costs_table, differences_table, metrics_table, scores_table, table, toys_table

PACKED, RUNS = DOCS / "results", ROOT / "runs"
PAGES = (DOCS / "RESULTS.md", DOCS / "choosing.md")
COSTS = ROOT / "bench" / "results" / "methods.json"
PATTERNS = ("study.json", "comparisons.json", "tuning/*.json", "cells/*/cell.json", "cells/*/evaluation.json")
DATA = ROOT.parent / "shared" / "data"
FOLDERS = {"webnlg": "webnlg2017"}
"""Folders of data sets that are not called as their tasks."""
_MARK = re.compile(r"<!-- ([^\n]+) -->\n.*?<!-- end -->", re.DOTALL)
_NOTHING = "Not run yet."
_PATH = re.compile(r"(?<![^\s'\"=,])/[^\s'\",]+")
_ALLOWED = re.compile("|".join(re.escape(pattern).replace(r"\*", "[A-Za-z0-9-]+") for pattern in PATTERNS))


# --- files ------------------------------------------------------------------------------------------------------------


def pack(folder: Path, path: Path) -> None:
    """Write a study's folder as one file, a line for each of its files."""
    lines = [f"{json.dumps(name)}: {_compact(portable(content))}" for name, content in _contents(folder).items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _contents(folder: Path) -> dict[str, Any]:
    """The JSON files of a study by their paths in its folder."""
    files = [file for pattern in PATTERNS for file in sorted(folder.glob(pattern))]
    return {file.relative_to(folder).as_posix(): json.loads(file.read_bytes()) for file in files}


def portable(value: Any) -> Any:
    """The same JSON with paths from the repository's folder, or by their names alone, also as words of a command.

    >>> portable({"data": "/elsewhere/e2e", "command": "study --backbones a,/elsewhere/b", "seen": {"/elsewhere/b": 1}})
    {'data': 'e2e', 'command': 'study --backbones a,b', 'seen': {'b': 1}}
    """
    if isinstance(value, dict):
        return {portable(key): portable(each) for key, each in value.items()}
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
    """The page with the tables of the kept studies at their marks: `<!-- NAME -->`, `<!-- NAME: differences -->` and
    `<!-- NAME: metrics -->`.

    `<!-- claims -->` is for the claims, `<!-- toys -->` for the toy tasks, `<!-- costs -->` for the cost of a step;
    those of docs/choosing.md are in `tools.choosing`. A mark of which nothing is kept says so.
    """
    studies = read_studies(files)
    outputs = {study_name(path): read_kept(outputs_file(path)) for path in files}
    tables: dict[str, str] = {}
    for name, study in studies.items():
        tables[name] = scores_table(study, outputs[name])
        tables[f"{name}: differences"] = differences_table(study, outputs[name])
        tables[f"{name}: metrics"] = metrics_table(study)
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
    parser.add_argument("--restore", action="store_true", help="unpack into runs/ what is not there")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the data sets, for the outputs")
    parser.add_argument("--force", action="store_true", help="also replace kept studies that have more finished runs")
    options = parser.parse_args()
    if options.restore:
        steps = [partial(restore, path, RUNS / study_name(path), options.data) for path in study_files()]
    else:
        folders = sorted(file.parent for file in [*RUNS.glob("*/study.json"), *RUNS.glob("*/*/study.json")])
        steps = [partial(keep, folder, force=options.force) for folder in folders]
    # All of them, whatever one says.
    are_done = [_try(step) for step in steps]
    if not options.restore:
        for page in PAGES:
            page.write_text(with_tables(page.read_text(encoding="utf-8"), study_files()), encoding="utf-8")
    if not all(are_done):
        sys.exit(1)


def _try(step: Callable[[], None]) -> bool:
    """Take a step, and say on stderr why it failed, if it did."""
    try:
        step()
    except (PrefixError, OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    return True


def keep(folder: Path, *, force: bool = False) -> None:
    """Pack a study of runs/, if the page names it or it is kept already.

    Args:
        folder: Of the study.
        force: Even if the kept one has more finished runs.

    Raises:
        ConfigError: It has.
        DataError: A file of it is broken.
        ValueError: Its outputs are too large, or are not those that were scored.
    """
    name = folder.relative_to(RUNS)
    path = PACKED / name.with_suffix(".json")
    if not path.exists() and name.as_posix() not in named_studies(PAGES[0].read_text(encoding="utf-8")):
        print(f"{name.as_posix()}: left out, as {PAGES[0].name} has no mark <!-- {name.as_posix()} -->")
        return
    if path.exists() and not force:
        before, now = _num_done(Files.open(path).packed or {}), _num_done(_contents(folder))
        if now < before:
            raise ConfigError(
                f"{name.as_posix()}: {now} runs are done in {str(folder)!r}, but {before} in the kept {path.name}.",
                hint="restore it first, or replace it with --force.",
            )
    compare(folder)
    pack(folder, path)
    pack_outputs(folder, outputs_file(path))


def named_studies(page: str) -> set[str]:
    r"""The studies at the marks of a page.

    >>> sorted(named_studies("<!-- first/low-data -->\n<!-- end -->\n<!-- dart: differences -->\n<!-- end -->"))
    ['dart', 'first/low-data']
    """
    return {found[1].partition(":")[0] for found in _MARK.finditer(page)}


def _num_done(contents: Mapping[str, Any]) -> int:
    """How many runs of a study are done, by its files."""
    return sum(name.endswith("/cell.json") and value.get("status") == "done" for name, value in contents.items())


def compare(folder: Path) -> None:
    """Compare the runs that a study has so far; a study that is not finished has not done so itself."""
    values = json.loads((folder / "study.json").read_text(encoding="utf-8"))["config"]
    known = {key: value for key, value in values.items() if key in StudyConfig.model_fields}
    config = StudyConfig(**{**known, "output": str(folder)})
    write_comparisons(config, plan(config))


def restore(path: Path, folder: Path, data: Path) -> None:
    """Unpack a study into a folder, unless it is there, with its outputs where these are missing and the data at hand.

    Raises:
        DataError: The file, or the data, cannot be read.
        ValueError: The file holds what `pack` does not write.
    """
    shown = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # As a whole or not at all.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".restore-") as temporary:
            unpack(path, Path(temporary) / "study")
            os.rename(Path(temporary) / "study", folder)
        print(f"{shown}: restored")
    task = json.loads((folder / "study.json").read_text(encoding="utf-8"))["task"]
    if problem := restore_outputs(outputs_file(path), folder, data / FOLDERS.get(task, task)):
        print(f"{shown}: without outputs: {problem}")


if __name__ == "__main__":
    main()
