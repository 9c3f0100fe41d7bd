"""The tables of studies in Markdown: scores of every point and size, and differences from the first point.

    python -m research.tables research/studies/low_data.toml [MORE.toml ...] [--metric bleu]

A score is the mean over samples, with the standard deviation where there are several.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from prefixtune.data import TASKS
from prefixtune.errors import PrefixError
from research.compare import compare, compare_over_sizes, load
from research.study import Study, read_study

_COSTS = {"trained_parameters": "trained", "file_bytes": "bytes", "steps": "steps", "seconds": "seconds"}


def scores(study: Study) -> pd.DataFrame:
    """A row for each point and size that has runs: the mean of each score, and the median of each cost."""
    runs = load(study)
    metrics = [name for name in TASKS[study.task].metrics if name in runs]
    costs = [name for name in _COSTS if name in runs]
    rows = []
    for (size, point), group in runs.groupby(["size", "point"], sort=False):
        means = {name: _mean(group[name]) for name in metrics}
        taken = {_COSTS[name]: f"{group[name].median():,.0f}" for name in costs if group[name].notna().any()}
        rows.append({"point": point, "targets": size or "all", "samples": len(group), **means, **taken})
    return pd.DataFrame(rows).fillna("")


def _mean(values: pd.Series[float]) -> str:
    digits = 2 if values.abs().max() >= 10 else 4
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def differences(study: Study, metric: str, found: pd.DataFrame) -> pd.DataFrame:
    """What `compare` found, for people."""
    spans = zip(found["low"], found["high"], strict=True)
    between = ["" if pd.isna(low) else f"{low:.3f} to {high:.3f}" for low, high in spans]
    return pd.DataFrame(
        {
            "point": found["point"],
            "targets": [size or "all" for size in found["size"]],
            "samples": found["samples"],
            f"{metric}: difference from {next(iter(study.points))}": [f"{value:+.3f}" for value in found["difference"]],
            "95 %": between,
            "p (Holm)": ["" if pd.isna(value) else f"{value:.4f}" for value in found["corrected"]],
        }
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("files", type=Path, nargs="+", help="studies, TOML files")
    parser.add_argument("--metric", default="", help="that is compared (default: the task's first)")
    options = parser.parse_args(arguments)
    try:
        studies = {path: read_study(path) for path in options.files}
    except PrefixError as error:
        parser.error(str(error))
    for path, study in studies.items():
        metric = options.metric or TASKS[study.task].metrics[0]
        if metric not in load(study):
            parser.error(f"no run of {path} has the score {metric!r}")
        print(f"## {path.stem}\n")
        found = [compare(study, metric)]
        if len(study.sizes) > 1:
            found.append(compare_over_sizes(study, metric).assign(size="mean of all"))
        for table in (scores(study), *(differences(study, metric, one) for one in found)):
            if len(table):
                print(table.to_markdown(index=False, disable_numparse=True), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
