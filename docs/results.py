"""Keep what studies found, without data and weights, in docs/results; or put it back, to go on from it.

python docs/results.py             copy runs/NAME to docs/results/NAME, for every study that there is
python docs/results.py --restore   copy docs/results/NAME to runs/NAME, where there is none yet

Runs that are done count as done again after `--restore`; `prefixtune report docs/results/NAME` reads it as it is.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
KEPT, RUNS = DOCS / "results", DOCS.parent / "runs"
PATTERNS = ("study.json", "tuning/*.json", "cells/*/cell.json", "cells/*/evaluation.json")
"""All but outputs (they hold the data's references), weights, states and tries."""


def copy(source: Path, target: Path) -> None:
    """Copy a study's figures."""
    for pattern in PATTERNS:
        for path in source.glob(pattern):
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def main() -> int:
    """Copy one way or the other."""
    restore = "--restore" in sys.argv
    for study in sorted((KEPT if restore else RUNS).glob("*/study.json")):
        name = study.parent.name
        if not restore:
            copy(study.parent, KEPT / name)
        elif not (RUNS / name).exists():
            copy(study.parent, RUNS / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
