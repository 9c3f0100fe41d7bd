"""The paper's studies: grids of runs over methods, data sizes, lengths and starts, on any model and data.

A study is a folder. Its cells are run one by one, and each is kept when it is done; so a study can be stopped at any
moment, goes on where it was, and can be shared among processes. Knows nothing of how results are shown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefixtune.studies.config import StudyConfig
from prefixtune.studies.grid import Cell, plan
from prefixtune.studies.kinds import STUDIES, StudyKind

__all__ = ["STUDIES", "Cell", "StudyConfig", "StudyKind", "plan", "run_study"]


if TYPE_CHECKING:
    from prefixtune.studies.runner import run_study


def __getattr__(name: str) -> Any:
    # Running a study needs torch, planning one does not.
    if name != "run_study":
        raise AttributeError(f"module 'prefixtune.studies' has no attribute {name!r}")
    from prefixtune.studies.runner import run_study

    return run_study
