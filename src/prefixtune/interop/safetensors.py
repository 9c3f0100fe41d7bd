"""Tensors by name, read from safetensors files; a pickle is refused, with the command that converts it."""

from __future__ import annotations

import shlex
from pathlib import Path

from torch import Tensor

from prefixtune.errors import CheckpointError
from prefixtune.prefix.tensor_file import read_file

__all__ = ["conversion", "is_pickle", "read_tensors"]


_PICKLES = (b"PK\x03\x04", b"\x80")
"""First bytes of files from `torch.save`: zip archives since torch 1.6, bare pickles before."""


def is_pickle(path: Path) -> bool:
    """Whether a file was written by `torch.save`, whatever its name."""
    with open(path, "rb") as handle:
        start = handle.read(9)
    # A safetensors file begins with the length of its table, which may look like a pickle, and the table.
    return start.startswith(_PICKLES) and start[8:] != b"{"


def conversion(path: Path) -> str:
    """The command that converts a pickle of tensors to safetensors, and reads nothing but tensors."""
    output = str(path.with_suffix(".safetensors"))
    code = (
        "import torch; from safetensors.torch import save_file; "
        f"save_file({{name: t.detach().clone().contiguous() for name, t in "
        f"torch.load({str(path)!r}, map_location='cpu', weights_only=True).items()}}, {output!r})"
    )
    return f"python -c {shlex.quote(code)}"


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors, and its metadata.

    Raises:
        CheckpointError: The file is missing, truncated, or a pickle, which could run code.
    """
    if path.is_file() and is_pickle(path):
        raise CheckpointError(
            f"{str(path)!r} is a pickle, which could run code; only safetensors files are read.",
            hint=f"convert it, if you trust its source: {conversion(path)}",
        )
    return read_file(path)
