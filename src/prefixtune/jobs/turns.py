"""Training goes on while a job is prepared: both take turns in one thread, between two layers of the model."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from prefixtune.attention.injection import run_apart

__all__ = ["Turns"]


_SHORTEST, _LONGEST = 0.05, 1.0
"""Seconds of a turn of the preparation."""


class Turns:
    """To be called at each layer while a job is prepared; gives the others about half of the time.

    Args:
        check: Called each time; raises where the preparation is to end.
        work: What the others do in a turn of theirs, such as one step.
        device: Of the model.
    """

    def __init__(self, check: Callable[[], object], work: Callable[[], object], device: torch.device) -> None:
        self._check, self._work, self._device = check, work, device
        self._back, self._turn = time.monotonic(), _SHORTEST

    def __call__(self) -> None:
        """Let the others have a turn, if it is time.

        Raises:
            Exception: What `check` raises.
        """
        self._check()
        began = time.monotonic()
        if began - self._back < self._turn:
            return
        run_apart(self._work, self._device)
        self._back = time.monotonic()
        # As long as the others took; but they wait no longer than that.
        self._turn = min(max(self._back - began, _SHORTEST), _LONGEST)
