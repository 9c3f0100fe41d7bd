"""The library `adapters`, from outside: a child process in its own environment, since it pins another transformers.

It works only while it is asked to; so it takes its turns like a side of this process.
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
from data import to_lists
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefixtune.data.encoding import TokenizedExample

_NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


class PeerError(Exception):
    """The peer is not there, or stopped; the text says why, in a line."""


class AdaptersPeer:
    """A running child.

    Args:
        python: The Python of an environment with `adapters`.
        attention: What transformers calls the attention: `sdpa` (its default) or `eager`.
        folder: The backbone.
        prefix_length: P, at all three sites.

    Raises:
        PeerError: There is no such environment, or it cannot run the side.
    """

    def __init__(self, python: Path | None, attention: str, folder: Path, prefix_length: int) -> None:
        if python is None:
            raise PeerError("no --adapters-python was given")
        # Not a pipe: nobody reads it meanwhile.
        self._messages = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        environment = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
        try:
            self._process = subprocess.Popen(
                [str(python), str(Path(__file__).with_name("adapters_child.py"))],
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
            self.facts = self.ask(
                folder=str(folder),
                attention=attention,
                prefix_length=prefix_length,
                threads=torch.get_num_threads(),
            )
        except PeerError:
            self.close()
            raise

    def ask(self, **command: Any) -> dict[str, Any]:
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
            said = self._messages.read().strip().splitlines()
            raise PeerError(said[-1] if said else f"the peer stopped with exit status {code}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def take(self, batches: list[list[TokenizedExample]], weights: Sequence[Tensor]) -> None:
        """Start anew with these batches, and these parameters in the order encoder, decoder, cross."""
        with tempfile.TemporaryDirectory(prefix="prefixtune-bench-") as folder:
            path = Path(folder, "weights.safetensors")
            save_file({str(n): weight.detach().contiguous() for n, weight in enumerate(weights)}, path)
            self.ask(do="take", batches=to_lists(batches), weights=str(path))

    def gradients(self, number: int, *, mask_decoder: bool | None = None) -> tuple[float, list[Tensor]]:
        """A batch's loss, and its gradient in every parameter; with a mask for the decoder, without, or as usual."""
        with tempfile.TemporaryDirectory(prefix="prefixtune-bench-") as folder:
            path = Path(folder, "gradients.safetensors")
            answer = self.ask(do="gradients", batch=number, into=str(path), mask_decoder=mask_decoder)
            found = load_file(path)
        return answer["loss"], [found[str(n)] for n in range(len(found))]

    def step(self, number: int) -> tuple[float, float]:
        """Seconds and loss of an optimizer step on a batch."""
        answer = self.ask(do="step", batch=number)
        return answer["seconds"], answer["loss"]

    def memory(self, batches: list[list[TokenizedExample]]) -> dict[str, float]:
        """Peak memory over a step on each of these batches; to be asked first, and nothing after it."""
        return self.ask(do="memory", batches=to_lists(batches))

    def close(self) -> None:
        """Let the child end, and wait for it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                # A child that is gone cannot take what was still to be sent.
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()
        self._messages.close()
