"""One output per example; a file of the outputs so far lets a stopped evaluation continue."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.examples import Example
from prefixtune.errors import ConfigError
from prefixtune.evaluation.answers import OTHER_FOLDER, append_rows, digest_facts, model_facts, read_rows
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import complete
from prefixtune.inference.prompts import prepare_prompts
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat
from prefixtune.utils.files import check_writable

__all__ = ["DECODED_FILE", "Decoded", "decode", "read_decoded"]

DECODED_FILE = "decoded.jsonl"
_OF_SAMPLING_ONLY = ("batch_size", "seed")
"""Settings that outputs depend on only if they are sampled."""


@dataclass(frozen=True)
class Decoded:
    """The outputs of an evaluation.

    Attributes:
        outputs: One per example.
        seconds: That decoding took.
        num_unended: Outputs that took all tokens they may have and did not end.
    """

    outputs: list[str]
    seconds: float
    num_unended: int


def decode(
    backbone: Backbone,
    examples: Sequence[Example],
    prefix: Prefix | None,
    text_format: TextFormat | None,
    config: GenerateConfig,
    *,
    resume_file: Path | None,
    on_batch: Callable[[int], None] | None,
    on_cut: Callable[[Sequence[int]], None],
) -> Decoded:
    """One output per example; those of a stopped evaluation are kept."""
    if resume_file is not None:
        check_writable(resume_file)
    sources = [example.messages or example.source for example in examples]
    # Every length is checked, and every truncated source counted, before any of them is computed.
    prompts = prepare_prompts(backbone, sources, [prefix] * len(sources), config, text_format, on_cut=on_cut)
    rows: list[dict[str, Any]] = []
    digest = ""
    if resume_file is not None:
        digest = _digest(backbone, examples, prefix, text_format, config)
        rows = list(read_decoded(resume_file, digest))
    outputs: dict[int, str] = {row["number"]: row["output"] for row in rows}
    unended = {row["number"] for row in rows if row.get("ended") is False}
    seconds = sum(row["seconds"] for row in rows)
    missing = [number for number in range(len(prompts)) if number not in outputs]
    new: dict[int, str] = {}
    start_time = time.perf_counter()
    for number, output in complete(backbone, prompts, config, missing):
        if output.finish_reason == "length":
            unended.add(number)
        outputs[number] = new[number] = prompts[number].text_format.extract_target(output.text)
        if len(new) == config.batch_size or len(outputs) == len(prompts):
            elapsed = time.perf_counter() - start_time
            seconds += elapsed
            if resume_file is not None:
                _append_decoded(resume_file, digest, new, unended, elapsed)
            new, start_time = {}, time.perf_counter()
        if on_batch is not None:
            on_batch(len(outputs))
    return Decoded([outputs[index] for index in range(len(examples))], seconds, len(unended))


def read_decoded(path: Path, digest: str) -> Iterator[dict[str, Any]]:
    """The rows that a stopped evaluation wrote; an incomplete last line is ignored.

    Raises:
        ConfigError: The rows belong to another evaluation.
        DataError: The file cannot be read, or was not written by an evaluation.
    """
    keys = {"digest", "number", "output", "seconds"}
    rows = read_rows(path, lambda row: isinstance(row, dict) and keys <= row.keys(), "is not what an evaluation writes")
    for row in rows:
        if row["digest"] != digest:
            raise ConfigError(
                f"{str(path)!r} holds outputs of another evaluation (another prefix, model, data or settings).",
                hint=OTHER_FOLDER,
            )
        yield row


def _append_decoded(
    path: Path, digest: str, outputs: Mapping[int, str], unended: Collection[int], seconds: float
) -> None:
    """Add a batch's outputs to the file."""
    each = round(seconds / len(outputs), 6)
    append_rows(
        path,
        [
            {"number": n, "output": output, "ended": n not in unended, "seconds": each, "digest": digest}
            for n, output in outputs.items()
        ],
    )


def _digest(
    backbone: Backbone,
    examples: Sequence[Example],
    prefix: Prefix | None,
    text_format: TextFormat | None,
    config: GenerateConfig,
) -> str:
    """Identify what the outputs depend on: model, prefix, texts and settings.

    How many texts run at once changes no output that is not sampled; so an evaluation that ran out of memory goes on
    with smaller batches.
    """
    if config.temperature == 0:
        config = config.replace(**{name: config.default(name) for name in _OF_SAMPLING_ONLY})
    facts = {
        **model_facts(backbone),
        "format": None if text_format is None else text_format.to_dict(),
        "sources": [example.messages or example.source for example in examples],
        "decoding": config.to_dict(),
    }
    return digest_facts(facts, prefix)
