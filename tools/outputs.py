"""The outputs of a study in one compressed file, without the texts of its data set.

NAME.outputs.json.gz beside NAME.json in docs/results/ is an object with

    study, task, protocol, metric    of the study
    items                            for each test item, a digest of its references (see `item_key`)
    parts                            for each test item, the part of the test set that it is in; absent: there are none
    cells                            the ids of the runs
    outputs                          for each item, the text of each run
    statistics                       for each item and run, the numbers whose sums give the corpus's score

Items come before runs because the runs' texts of one item are alike, which makes the file smaller.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prefixtune.data import TASKS
from prefixtune.data.examples import Example, references_of
from prefixtune.evaluation.metrics import measure
from prefixtune.evaluation.records import EVALUATION_FILE, OUTPUTS_FILE, write_outputs
from prefixtune.studies import StudyConfig
from prefixtune.studies.data import StudyData
from prefixtune.utils.files import atomic_path

__all__ = ["MAX_BYTES", "Kept", "item_key", "pack_outputs", "read_kept", "restore_outputs"]


MAX_BYTES = 1_000_000
_DIGITS = 6
"""Decimals of item scores that are not counts."""


@dataclass
class Kept:
    """The outputs of a study's runs.

    Attributes:
        study: Its name, task, protocol and metric.
        items: `item_key` of each test item.
        parts: The part of the test set that each item is in, such as `seen`; empty: there are none.
        outputs: Id of a run -> its text for each item.
        statistics: Id of a run -> its numbers for each item.
    """

    study: Mapping[str, str]
    items: list[str]
    parts: list[str] = field(default_factory=list)
    outputs: dict[str, list[str]] = field(default_factory=dict)
    statistics: dict[str, list[list[float]]] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The file; equal outputs give equal bytes."""
        cells, items = sorted(self.outputs), range(len(self.items))
        values = {
            **self.study,
            "items": self.items,
            **({"parts": self.parts} if self.parts else {}),
            "cells": cells,
            "outputs": [[self.outputs[cell][item] for cell in cells] for item in items],
            "statistics": [[self.statistics[cell][item] for cell in cells] for item in items],
        }
        text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
        return gzip.compress(text.encode("utf-8"), 9, mtime=0)


def item_key(references: Sequence[str]) -> str:
    """A digest of an item's references, whatever their white space.

    >>> item_key(["A  pub. ", "An inn."]) == item_key(["A pub.", "An inn."])
    True
    """
    text = "\n".join(" ".join(reference.split()) for reference in references)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def read_kept(path: Path) -> Kept | None:
    """The outputs in a file; None where there is none."""
    if not path.exists():
        return None
    values = json.loads(gzip.decompress(path.read_bytes()))
    kept = Kept(
        {key: values[key] for key in ("study", "task", "protocol", "metric")}, values["items"], values.get("parts", [])
    )
    for index, cell in enumerate(values["cells"]):
        kept.outputs[cell] = [texts[index] for texts in values["outputs"]]
        kept.statistics[cell] = [rows[index] for rows in values["statistics"]]
    return kept


def pack_outputs(folder: Path, path: Path) -> None:
    """Write the outputs of a study's runs; of runs whose outputs are not in the folder, those of the file before stay.

    Raises:
        ValueError: The file would be too large, or outputs are not those that a run was scored on.
    """
    facts = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    study = {"study": facts["name"], "task": facts["task"], "metric": facts["metric"]}
    study["protocol"] = TASKS[facts["task"]].protocol
    before, kept = read_kept(path), Kept(study, [])
    for cell in sorted(folder.glob("cells/*/")):
        _add(kept, cell)
    if before is not None and (not kept.items or kept.items == before.items):
        kept.items, kept.parts = before.items, before.parts
        for name in before.outputs.keys() - kept.outputs.keys():
            if (folder / "cells" / name / EVALUATION_FILE).exists():
                kept.outputs[name], kept.statistics[name] = before.outputs[name], before.statistics[name]
    if not kept.outputs:
        return
    content = kept.to_bytes()
    if len(content) > MAX_BYTES:
        raise ValueError(
            f"{path.name} would have {len(content):,} bytes, but at most {MAX_BYTES:,} are kept in the repository; "
            f"lower test_limit below {len(kept.items):,}, or divide the study"
        )
    if not path.exists() or path.read_bytes() != content:
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)


def _add(kept: Kept, cell: Path) -> None:
    """Add a run's outputs, if they are there."""
    if not ((cell / OUTPUTS_FILE).exists() and (cell / EVALUATION_FILE).exists()):
        return
    rows = [json.loads(line) for line in (cell / OUTPUTS_FILE).read_text(encoding="utf-8").split("\n") if line]
    outputs, references = [row["output"] for row in rows], [row["references"] for row in rows]
    items = [item_key(texts) for texts in references]
    kept.items = kept.items or items
    parts = [row["groups"].get("seen", "") for row in rows]
    kept.parts = parts if any(parts) else []
    metric, protocol = kept.study["metric"], kept.study["protocol"]
    measured = measure(outputs, references, protocol=protocol, metrics=[metric])[metric]
    expected = json.loads((cell / EVALUATION_FILE).read_text(encoding="utf-8"))["scores"][metric]["score"]
    if kept.items != items or not math.isclose(measured.score, expected, rel_tol=1e-9, abs_tol=1e-9):
        raise ValueError(f"{cell.name}: its outputs are not those that were scored, or are of other test items")
    kept.outputs[cell.name] = outputs
    kept.statistics[cell.name] = [[_number(value) for value in row] for row in measured.statistics.values.tolist()]


def _number(value: float) -> float:
    return int(value) if value == int(value) else round(value, _DIGITS)


def restore_outputs(path: Path, folder: Path, data: Path) -> str:
    """Write those outputs of a study's runs into its folder that it lacks, with the texts of its data set.

    Args:
        path: The file.
        folder: The study's, already unpacked.
        data: The folder of the data set; ignored for a set that is made here.

    Returns:
        Why nothing was written; empty: all was.
    """
    kept = read_kept(path)
    if kept is None:
        return "no outputs are kept"
    scored = [folder / "cells" / cell for cell in kept.outputs if (folder / "cells" / cell / EVALUATION_FILE).exists()]
    missing = [cell for cell in scored if not (cell / OUTPUTS_FILE).exists()]
    if not missing:
        return ""
    values = json.loads((folder / "study.json").read_text(encoding="utf-8"))["config"]
    task, protocol = TASKS[values["task"]], kept.study["protocol"]
    if not task.parts:
        if not data.exists():
            return f"{str(data)!r} does not exist, so that sources and references are missing"
        values |= {"data": str(data), "train": "", "dev": "", "test": ""}
    known = {key: value for key, value in values.items() if key in StudyConfig.model_fields}
    examples: list[Example] = StudyData(StudyConfig(**known)).test
    if [item_key(references_of(example, protocol)) for example in examples] != kept.items:
        return f"{str(data)!r} has other test items"
    for cell in missing:
        write_outputs(cell, kept.outputs[cell.name], examples, protocol=protocol)
    return ""
