"""A run in Weights & Biases: offline in the run's folder, unless WANDB_MODE says otherwise."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import Any

from prefixtune.training.trackers.tracker import Outcome, TrackedRun

__all__ = ["WeightsAndBiases"]


class WeightsAndBiases:
    """A run in Weights & Biases.

    A resumed run keeps its id; offline, it writes a second folder with the same id. Offline, wandb writes in blocks of
    32 KiB: a program that is killed loses up to so much, and the second folder has these steps again.
    """

    def __init__(self, run: TrackedRun) -> None:
        # Reports of wandb's own errors go to its makers; not without being asked.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        mode = os.environ.get("WANDB_MODE", "offline")
        folder = os.environ.get("WANDB_DIR") or str(run.folder)
        project = run.project or os.environ.get("WANDB_PROJECT") or "prefixtune"
        module: Any = wandb
        self._last_step = run.step
        self.identity = dict(run.identity) or {"id": secrets.token_hex(4), "project": project, "name": run.name}
        self.logged = run.logged
        if mode == "offline":
            self.logged = dict.fromkeys(run.logged, int(self.identity.get("written", "0")))
        self._run = module.init(
            project=self.identity["project"],
            name=self.identity["name"],
            id=self.identity["id"],
            dir=folder,
            mode=mode,
            config=dict(run.hyperparameters),
            # Offline there is nothing to ask whether the run is there.
            resume="allow" if run.identity and mode == "online" else None,
            # Several runs may be open, also the user's own.
            reinit="create_new",
            settings=module.Settings(console="off", silent=True),
        )
        where = f"wandb sync {folder}/wandb/offline-run-*-{self.identity['id']}"
        self.how_to_see = where if mode == "offline" else str(self._run.url or "")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Figures of a step."""
        self._run.log(dict(values), step=step)
        self._last_step = step

    def log_text(self, title: str, text: str, step: int) -> None:
        """A text in Markdown, as a file of the run."""
        import wandb

        module: Any = wandb
        table = module.Table(columns=["step", "text"], data=[[step, text]])
        self._run.log({title: table}, step=step)

    def finish(self, outcome: Outcome) -> None:
        """End the run; one that failed is marked as such."""
        self._run.finish(exit_code=1 if outcome == "failed" else 0)
        self.identity["written"] = str(self._last_step)
