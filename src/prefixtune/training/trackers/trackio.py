"""A run in trackio: a database in the run's folder, unless trackio's own variables say otherwise."""

from __future__ import annotations

import contextlib
import contextvars
import io
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefixtune.training.trackers.tracker import Outcome, TrackedRun

__all__ = ["Trackio"]

_REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
"""Variables that send runs elsewhere."""
_KEYS = {"step": "train/loss", "evaluation": "eval/loss", "examples": "eval/examples"}
"""A key of each kind of event."""


class Trackio:
    """A run in trackio.

    trackio keeps one folder for a whole program: of several runs in one program, all are in that of the first one.
    """

    def __init__(self, run: TrackedRun) -> None:
        module, folder = _import((run.folder.resolve() / run.identity.get("folder", "trackio")).resolve())
        project = run.identity.get("project") or run.project or "prefixtune"
        name = run.identity.get("name") or _free_name(module, project, run.name)
        # trackio ends the run that is current; in a context of its own, there is none.
        context = contextvars.copy_context()
        context.run(module.context_vars.current_run.set, None)
        is_remote = any(os.environ.get(variable) for variable in _REMOTE)
        with _quiet(), contextlib.nullcontext() if is_remote else _offline():
            self._run = context.run(
                module.init,
                project=project,
                name=name,
                config=dict(run.hyperparameters),
                resume="allow" if run.identity else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self.identity = {"project": project, "name": name, "folder": os.path.relpath(folder, run.folder.resolve())}
        self.logged = run.logged if is_remote else _stored_steps(project, name, self._run.id)
        show = f"trackio show --project {shlex.quote(project)}"
        self.how_to_see = show if is_remote else f"TRACKIO_DIR={shlex.quote(os.path.relpath(folder))} {show}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Figures of a step."""
        self._run.log(dict(values), step=step)

    def log_text(self, title: str, text: str, step: int) -> None:
        """A text in Markdown."""
        import trackio

        module: Any = trackio
        self._run.log({title: module.Markdown(text)}, step=step)

    def finish(self, outcome: Outcome) -> None:
        """Wait until everything is in the database."""
        with _quiet():
            self._run.finish()


def _import(folder: Path) -> tuple[Any, Path]:
    """The module, with its files in a folder, unless it has one already; and the folder that it has."""
    has_own = "trackio" in sys.modules or os.environ.get("TRACKIO_DIR")
    if not has_own:
        os.environ["TRACKIO_DIR"] = str(folder)
    try:
        import trackio
        from trackio.utils import TRACKIO_DIR
    finally:
        if not has_own:
            del os.environ["TRACKIO_DIR"]
    return trackio, Path(TRACKIO_DIR).resolve()


def _free_name(module: Any, project: str, name: str) -> str:
    """The name, with a number if another run of the project has it: runs are resumed by their names."""
    try:
        taken = {run.name for run in module.Api().runs(project)}
    except ValueError:  # There is no such project yet.
        return name
    names = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 3))]
    return next(free for free in names if free not in taken)


def _stored_steps(project: str, name: str, identity: str) -> dict[str, int]:
    """The last step of each kind in the database; a program that was killed may have lost half a second of them."""
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs(project, name, run_id=identity)
    return {kind: max((row["step"] for row in rows if key in row), default=0) for kind, key in _KEYS.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what trackio prints: standard output is for results."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep trackio from asking the hub for the user's name, as it does wherever a token is stored."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
