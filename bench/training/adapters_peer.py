"""The library `adapters` as a child process in its own environment, since it pins another transformers.

It works only on command, so it takes turns like a side of this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.data import Batch, to_lists
from bench.results import PeerError

_ROOT = Path(__file__).resolve().parents[2]
_NOT_INHERITED = ("PYTHONHOME", "VIRTUAL_ENV")


class AdaptersPeer:
    """A running child.

    Args:
        python: The Python of an environment with `adapters`.
        attention: An attention of transformers: `sdpa` (its default) or `eager`.
        folder: The backbone.
        prefix_length: P, at all three sites.

    Raises:
        PeerError: There is no such environment, or it cannot run `adapters`.
    """

    def __init__(self, python: Path | None, attention: str, folder: Path, prefix_length: int) -> None:
        if python is None:
            raise PeerError("no --adapters-python was given")
        # Not a pipe, which would fill: it is read only if the child stops.
        self._messages = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        environment = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
        environment |= {
            "PYTHONPATH": str(_ROOT / "src"),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
        }
        try:
            self._process = subprocess.Popen(
                [os.path.abspath(python), "-m", "bench.training.adapters_child"],
                cwd=_ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._messages,
                env=environment,
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            raise PeerError(f"{python}: {error.strerror}") from error
        try:
            self.facts = self.request(
                folder=str(folder),
                attention=attention,
                prefix_length=prefix_length,
                threads=torch.get_num_threads(),
            )
        except PeerError:
            self.close()
            raise

    def request(self, **command: Any) -> dict[str, Any]:
        """Send a line and wait for the answer.

        Raises:
            PeerError: The child stopped instead.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            code = self._process.wait()
            self._messages.seek(0)
            lines = self._messages.read().strip().splitlines()
            raise PeerError(lines[-1] if lines else f"the peer stopped with exit status {code}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def start(self, batches: list[Batch], weights: Sequence[Tensor]) -> None:
        """Start again with these batches and these parameters, in the order encoder, decoder, cross."""
        with tempfile.TemporaryDirectory(prefix="prefixtune-bench-") as folder:
            path = Path(folder, "weights.safetensors")
            save_file({str(index): weight.detach().contiguous() for index, weight in enumerate(weights)}, path)
            self.request(command="start", batches=to_lists(batches), weights=str(path))

    def gradients(self, batch: int, *, mask_decoder: bool | None = None) -> tuple[float, list[Tensor]]:
        """A batch's loss, and its gradient in every parameter; None: with a mask for the decoder where it needs one."""
        with tempfile.TemporaryDirectory(prefix="prefixtune-bench-") as folder:
            path = Path(folder, "gradients.safetensors")
            answer = self.request(command="gradients", batch=batch, output=str(path), mask_decoder=mask_decoder)
            stored = load_file(path)
        return answer["loss"], [stored[str(index)] for index in range(len(stored))]

    def step(self, batch: int) -> tuple[float, float]:
        """Seconds and loss of an optimizer step on a batch."""
        answer = self.request(command="step", batch=batch)
        return answer["seconds"], answer["loss"]

    def memory(self, batches: list[Batch]) -> dict[str, float]:
        """Peak memory over a step on each of these batches; the only request of a new child."""
        return self.request(command="memory", batches=to_lists(batches))

    def close(self) -> None:
        """End the child, and wait for it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                # A child that has ended cannot read the rest.
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()
        self._messages.close()
