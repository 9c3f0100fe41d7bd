"""One output per example; a file of the outputs so far lets a stopped evaluation continue.

Lines of JSON are appended, and each says by a digest what its output depends on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.identity import weights
from prefixtune.data.examples import Example
from prefixtune.engine.base import Engine
from prefixtune.errors import ConfigError, DataError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import complete
from prefixtune.inference.prompts import prepare_prompts
from prefixtune.prefix.prefix import Prefix, content_hash
from prefixtune.prefix.text_format import TextFormat
from prefixtune.utils.files import check_writable, line_writer, reporting_write_errors

DECODED_FILE = "decoded.jsonl"
_OF_SAMPLING_ONLY = ("batch_size", "seed")
"""Settings that outputs depend on only if they are sampled."""
_NUM_SAMPLES = 64
"""Numbers of each weight that identify a model."""
_OTHER_FOLDER = "choose another output folder, or delete the file."
_KEYS = {"digest", "number", "output", "seconds"}


def decode(
    backbone: Backbone,
    examples: Sequence[Example],
    prefix: Prefix | None,
    *,
    text_format: TextFormat | None,
    config: GenerateConfig,
    engine: Engine | None = None,
    resume_file: Path | None,
    on_batch: Callable[[int], None] | None,
    on_cut: Callable[[Sequence[int]], None],
) -> tuple[list[str], float, int]:
    """One output per example; those of a stopped evaluation are kept.

    Returns:
        The outputs, the seconds that decoding took, and how many outputs took all tokens they may have and did not end.
    """
    if resume_file is not None:
        check_writable(resume_file)
    sources = [example.messages or example.source for example in examples]
    # Every length is checked, and every truncated source counted, before any of them is computed.
    prompts = prepare_prompts(backbone, sources, [prefix] * len(sources), config, text_format, on_cut=on_cut)
    digest, rows = "", dict[int, dict[str, Any]]()
    if resume_file is not None:
        digest = _digest(backbone, sources, prefix, text_format, config, engine)
        rows = {row["number"]: row for row in read_decoded(resume_file, digest)}
    missing = [number for number in range(len(prompts)) if number not in rows]
    batch: list[dict[str, Any]] = []
    start = time.perf_counter()
    for number, output in complete(backbone, prompts, config, missing, engine):
        text = prompts[number].text_format.extract_target(output.text)
        row = {"number": number, "output": text, "ended": output.finish_reason != "length", "digest": digest}
        batch.append(row)
        rows[number] = row
        if len(batch) == config.batch_size or len(rows) == len(prompts):
            elapsed = time.perf_counter() - start
            for row in batch:
                row["seconds"] = round(elapsed / len(batch), 6)
            if resume_file is not None:
                _append(resume_file, batch)
            batch, start = [], time.perf_counter()
        if on_batch is not None:
            on_batch(len(rows))
    ordered = [rows[number] for number in range(len(prompts))]
    unended = sum(row.get("ended") is False for row in ordered)
    return [row["output"] for row in ordered], sum(row["seconds"] for row in ordered), unended


def read_decoded(path: Path, digest: str) -> Iterator[dict[str, Any]]:
    """The rows that a stopped evaluation wrote; incomplete lines are ignored.

    Raises:
        ConfigError: The rows belong to another evaluation.
        DataError: The file cannot be read, or was not written by an evaluation.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}.", hint=_OTHER_FOLDER) from error
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not (isinstance(row, dict) and row.keys() >= _KEYS):
            raise DataError(f"line {number} of {str(path)!r} is not what an evaluation writes.", hint=_OTHER_FOLDER)
        if row["digest"] != digest:
            raise ConfigError(
                f"{str(path)!r} holds outputs of another evaluation (another prefix, model, data or settings).",
                hint=_OTHER_FOLDER,
            )
        yield row


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with reporting_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with line_writer(path) as append:
        # An incomplete line of a process that was killed stays alone on its line.
        append("\n" + "\n".join(json.dumps(row) for row in rows))


def _digest(
    backbone: Backbone,
    sources: Sequence[Any],
    prefix: Prefix | None,
    text_format: TextFormat | None,
    config: GenerateConfig,
    engine: Engine | None,
) -> str:
    """Identify what the outputs depend on: model, prefix, texts and settings.

    How many texts run at once changes no output that is not sampled; so an evaluation that ran out of memory goes on
    with smaller batches.
    """
    if config.temperature == 0:
        config = config.replace(**{name: config.default(name) for name in _OF_SAMPLING_ONLY})
    # As they compute, so also after training, or rounding to 8 or 4 bits; another engine has weights of its own.
    computed = [_sample(value) for _, value in weights(backbone.model)] if engine is None else engine.name
    facts = {
        "fingerprint": backbone.fingerprint,
        "weights": computed,
        "dtype": str(backbone.dtype),
        "format": None if text_format is None else text_format.to_dict(),
        "sources": sources,
        "decoding": config.to_dict(),
        "prefix": None if prefix is None else [content_hash(prefix), prefix.header.get("text_format")],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _sample(weight: torch.Tensor) -> list[float]:
    """Some numbers of a weight that identify it, the same on any number of cores."""
    # torchao's tensors can neither be sliced nor summed.
    plain = weight if type(weight) in (torch.Tensor, torch.nn.Parameter) else weight.dequantize()
    flat = plain.detach().reshape(-1)
    sampled: list[float] = flat[:: max(1, len(flat) // _NUM_SAMPLES)].float().tolist()
    return sampled
