"""The curve of `prefixtune length` beside that of the study `length`: one nested run on the same samples.

    python -m tools.nested_length E2E_FOLDER     # after the study: it takes the study's dtype and rate

Writes bench/results/nested_length.json, which `python -m tools.results` shows beside the study.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.results import FOLDER
from prefixtune.report.results import Study
from prefixtune.studies import StudyConfig, plan
from prefixtune.studies.cell import begun_with, build_train_config, clear_folder
from prefixtune.studies.data import StudyData
from prefixtune.studies.lengths import LENGTH_FILE, study_lengths
from prefixtune.studies.records import chosen_rate, read_study
from prefixtune.training.folder import STATE_FILE
from prefixtune.utils.files import write_text
from tools.pages import ROOT
from tools.study_tables import table

__all__ = ["NESTED", "nested_table"]


NESTED = FOLDER / "nested_length.json"
METHOD = "prefix-words"
"""The variant of the study that has a run for each length."""


def nested_table(study: Study, measured: Mapping[str, Any] | None) -> str:
    """The development loss of a run for each length, and of the nested run cut to it.

    Args:
        study: The study of lengths.
        measured: What this program wrote; None: nothing.
    """
    if measured is None:
        return "Not run yet: `python -m tools.nested_length E2E_FOLDER`."
    nested = {point["prefix_length"]: point for point in measured["lengths"]}
    trained = {
        cell.factors["prefix_length"]: cell.figures["dev_loss"]
        for cell in study.cells
        if cell.factors.get("method") == METHOD and "dev_loss" in cell.figures
    }
    rows = []
    for length in sorted({*nested, *trained}):
        row = [str(length), f"{trained[length]:.3f}" if length in trained else ""]
        if length in nested:
            low, high = nested[length]["interval"]
            row.append(f"{nested[length]['loss']:.3f} ({low:.3f} to {high:.3f})")
        else:
            row.append("")
        rows.append(row)
    chosen = (
        f"The nested run's best length is {measured['best']}; the shortest that is not significantly worse is "
        f"{measured['chosen']} (p = {measured['significance']:g})."
    )
    return f"{table(['P', 'a run for each length', 'one nested run, cut (95 %, over sources)'], rows)}\n\n{chosen}"


def main() -> None:
    """Train the nested run, and keep its curve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("data", type=Path, help="the folder of E2E")
    options = parser.parse_args()
    config = StudyConfig.from_file(ROOT / "studies" / "length.toml", name="length", data=str(options.data))
    stored = read_study(config)
    if stored is not None:
        config = config.model_copy(update={"dtype": stored.get("dtype") or stored["config"]["dtype"]})
    cells = [cell for cell in plan(config) if cell.method == METHOD]
    longest = max(cells, key=lambda cell: cell.prefix_length)
    rate = chosen_rate(config, longest)
    if rate is None:
        # A study with a budget may have ended before.
        print("left out: the study has not chosen the rate yet: prefixtune study length --config studies/length.toml")
        return
    folder = config.folder.with_name("length-nested")
    train, dev = StudyData(config).for_cell(longest)
    run = build_train_config(config, longest, rate, folder, longest.num_targets)
    lengths = sorted({cell.prefix_length for cell in cells})
    resume = (folder / STATE_FILE).exists() and begun_with(folder) == (rate, config.dtype)
    if not resume:
        # It was stopped before its first save, is at a rate that is no longer the chosen one, or is of another dtype.
        clear_folder(folder)
    study_lengths(run, lengths=lengths, resume=resume, examples=train, dev_examples=dev)
    facts = json.loads((folder / LENGTH_FILE).read_text(encoding="utf-8"))
    kept = {key: facts[key] for key in ("backbone", "best", "chosen", "significance", "test", "num_sources", "lengths")}
    write_text(NESTED, json.dumps({**kept, "learning_rate": rate}, indent=1) + "\n")


if __name__ == "__main__":
    main()
