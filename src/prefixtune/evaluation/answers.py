"""What a model has answered so far, as JSON lines in a file, so that a stopped evaluation goes on.

Lines are appended, and each says by a digest what its answer depends on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.identity import weights
from prefixtune.errors import DataError
from prefixtune.prefix.prefix import Prefix
from prefixtune.utils.files import line_writer, reporting_write_errors

__all__ = ["OTHER_FOLDER", "append_rows", "digest_facts", "model_facts", "read_rows"]

OTHER_FOLDER = "choose another output folder, or delete the file."
"""What to do about a file of something else."""
_NUM_SAMPLES = 64
"""Numbers of each weight that go into the facts of a model."""


def read_rows(path: Path, is_row: Callable[[Any], bool], wrong: str) -> Iterator[dict[str, Any]]:
    """The rows of a file, if there is one; incomplete lines are ignored.

    Args:
        path: The file.
        is_row: Whether a line's value is a row of such a file.
        wrong: What the message says of a line that is none, such as "is no answer".

    Raises:
        DataError: The file cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}.", hint=OTHER_FOLDER) from error
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not is_row(row):
            raise DataError(f"line {number} of {str(path)!r} {wrong}.", hint=OTHER_FOLDER)
        yield row


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a file, which is made with its folder if it is missing.

    Raises:
        PrefixError: It cannot be written.
    """
    with reporting_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with line_writer(path) as append:
        # An incomplete line of a process that was killed stays alone on its line.
        append("\n" + "\n".join(json.dumps(row) for row in rows))


def model_facts(backbone: Backbone) -> dict[str, Any]:
    """What answers depend on of a backbone: its weights as they compute, so also after rounding to 8 or 4 bits."""
    return {
        "fingerprint": backbone.fingerprint,
        "weights": [_sample(value) for _, value in weights(backbone.model)],
        "dtype": str(backbone.dtype),
    }


def _sample(weight: torch.Tensor) -> list[float]:
    """Some numbers of a weight that identify it, the same on any number of cores."""
    # torchao's tensors can neither be sliced nor summed.
    plain = weight if type(weight) in (torch.Tensor, torch.nn.Parameter) else weight.dequantize()
    flat = plain.detach().reshape(-1)
    sampled: list[float] = flat[:: max(1, len(flat) // _NUM_SAMPLES)].float().tolist()
    return sampled


def digest_facts(facts: Mapping[str, Any], prefix: Prefix | None) -> str:
    """Identifies facts, such as `model_facts` and settings, together with a prefix."""
    facts = {**facts, "header": None if prefix is None else prefix.header.get("text_format")}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for tensor in () if prefix is None else prefix.tensors():
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]
