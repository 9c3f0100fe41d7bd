"""Records."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prefixtune.backbone.backbone import Backbone, weights
from prefixtune.data import Example, references_of
from prefixtune.errors import ConfigError, DataError
from prefixtune.evaluation.metrics import Score
from prefixtune.inference.config import GenerateConfig
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat
from prefixtune.utils.files import line_writer, write_text
from prefixtune.utils.machine import describe_machine, versions
from prefixtune.utils.writable import reporting_write_errors

__all__ = ["Evaluation", "GroupScores", "append_decoded", "read_decoded", "summarize", "write_evaluation"]


_SAMPLES = 64
EVALUATION_FILE, OUTPUTS_FILE, DECODED_FILE = "evaluation.json", "outputs.jsonl", "decoded.jsonl"


@dataclass(frozen=True)
class GroupScores:
    """The scores of a part of the examples.

    Attributes:
        num_examples: How many they are.
        scores: By metric.
    """

    num_examples: int
    scores: dict[str, Score]


@dataclass(frozen=True)
class Evaluation:
    """Scores, and the outputs that they were computed on.

    Attributes:
        scores: By metric; each names its implementation.
        outputs: One per example.
        groups: Grouping -> group -> its scores, where examples are grouped (category, seen or unseen, ...).
        left_out: Metric -> why it could not be computed here.
        seconds: What decoding took; of one that was stopped and went on, all of it.
        num_cut: Sources that were cut to fit.
    """

    scores: dict[str, Score]
    outputs: tuple[str, ...]
    groups: dict[str, dict[str, GroupScores]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    num_cut: int = 0


def digest_of(
    backbone: Backbone,
    examples: Sequence[Example],
    prefix: Prefix | None,
    text_format: TextFormat | None,
    config: GenerateConfig,
) -> str:
    """Tells decodings apart: model, prefix, texts and settings."""
    total = hashlib.sha256()
    facts = {
        "fingerprint": backbone.fingerprint,
        "weights": [_sample(value) for _, value in weights(backbone.model)],
        "dtype": str(backbone.dtype),
        "format": None if text_format is None else text_format.to_dict(),
        "header": None if prefix is None else prefix.header.get("text_format"),
        "decoding": dataclasses.asdict(config),
        "sources": [example.source for example in examples],
    }
    total.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for tensor in () if prefix is None else prefix.tensors():
        total.update(tensor.detach().float().cpu().numpy().tobytes())
    return total.hexdigest()[:32]


def _sample(weight: torch.Tensor) -> list[float]:
    """Some numbers of a weight that tell it apart, the same on any number of cores."""
    # torchao's tensors can neither be sliced nor summed.
    plain = weight if type(weight) in (torch.Tensor, torch.nn.Parameter) else weight.dequantize()
    flat = plain.detach().reshape(-1)
    sampled: list[float] = flat[:: max(1, len(flat) // _SAMPLES)].float().tolist()
    return sampled


def read_decoded(path: Path, digest: str) -> Iterator[dict[str, Any]]:
    """What an evaluation that was stopped had decoded; a last line that was cut off by a kill is left out."""
    hint = "choose another output folder, or delete it."
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}.", hint=hint) from error
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict) or not {"digest", "number", "output", "seconds"} <= row.keys():
            raise DataError(f"line {number} of {str(path)!r} is not what an evaluation writes.", hint=hint)
        if row["digest"] != digest:
            raise ConfigError(
                f"{str(path)!r} keeps outputs that were decoded otherwise (another prefix, model, data or settings).",
                hint=hint,
            )
        yield row


def append_decoded(path: Path, digest: str, outputs: Mapping[int, str], seconds: float) -> None:
    """Keep a batch's outputs, so that an interrupted evaluation continues after them."""
    rows = [
        {"number": number, "output": output, "seconds": round(seconds / len(outputs), 6), "digest": digest}
        for number, output in outputs.items()
    ]
    with reporting_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with line_writer(path) as append:
        # A line that a kill cut off stays alone on its line.
        append("\n" + "\n".join(json.dumps(row) for row in rows))


# --- on disk ---------------------------------------------------------------------------------------------------------


def write_evaluation(
    folder: Path, outcome: Evaluation, examples: Sequence[Example], facts: Mapping[str, Any], *, protocol: str = "plain"
) -> None:
    """Write scores, outputs and settings to a folder, for `prefixtune report` and other programs.

    Args:
        folder: Made where it is not there. `evaluation.json` and `outputs.jsonl` in it are replaced.
        outcome: The evaluation.
        examples: What it was made on.
        facts: Task, data, method, backbone, settings and the like; joins `evaluation.json`.
        protocol: As in `evaluate`.

    Raises:
        PrefixError: A file cannot be written.
    """
    rows = [
        {
            "number": number,
            "source": example.source,
            "references": references_of(example, protocol),
            "output": output,
            "groups": dict(example.groups),
        }
        for number, (example, output) in enumerate(zip(examples, outcome.outputs, strict=True))
    ]
    write_text(folder / OUTPUTS_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    summary = {
        "kind": "evaluation",
        **facts,
        "num_examples": len(examples),
        **summarize(outcome),
        "seconds": round(outcome.seconds, 2),
        "machine": describe_machine(),
        "versions": versions(),
    }
    write_text(folder / EVALUATION_FILE, json.dumps(summary, ensure_ascii=False, indent=1) + "\n")


def summarize(outcome: Evaluation) -> dict[str, Any]:
    """Scores, by group too, as JSON tells them."""
    return {
        "scores": {name: _as_json(score) for name, score in outcome.scores.items()},
        "groups": {
            grouping: {
                group: {
                    "num_examples": found.num_examples,
                    "scores": {name: _as_json(score) for name, score in found.scores.items()},
                }
                for group, found in groups.items()
            }
            for grouping, groups in outcome.groups.items()
        },
        "left_out": outcome.left_out,
        "num_cut": outcome.num_cut,
    }


def _as_json(score: Score) -> dict[str, Any]:
    return {
        "score": score.score,
        "implementation": score.implementation,
        "higher_is_better": score.higher_is_better,
        "interval": None if score.interval is None else list(score.interval),
    }
