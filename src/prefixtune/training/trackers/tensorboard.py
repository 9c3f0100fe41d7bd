"""A run in TensorBoard: event files in the run's folder."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from prefixtune.training.trackers.tracker import Outcome, TrackedRun

__all__ = ["TensorBoard"]


class TensorBoard:
    """A run in TensorBoard.

    A resumed run writes another file into the same folder. TensorBoard drops what earlier files hold of
    later steps than the run's log does, which a kill may have cut short.
    """

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = run.folder / "tensorboard"
        self.identity = {"folder": folder.name}
        self.logged = run.logged
        self.how_to_see = f"tensorboard --logdir {shlex.quote(str(folder))}"
        # Typed as Any: the class has no types of its own.
        writer: Any = SummaryWriter
        self._writer = writer(str(folder), purge_step=max(run.logged.values()) + 1 if run.identity else None)
        if not run.identity:
            # `add_hparams` would make a second run in a folder of its own.
            for summary in hparams(dict(run.hyperparameters), {}):
                self._writer.file_writer.add_summary(summary)
            self._writer.flush()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Figures of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_text(self, title: str, text: str, step: int) -> None:
        """A text in Markdown."""
        self._writer.add_text(title, text, step)
        self._writer.flush()

    def finish(self, outcome: Outcome) -> None:
        """Close the file."""
        self._writer.close()
