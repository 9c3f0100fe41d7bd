"""What a model has answered so far, in a file: a stopped evaluation goes on, and the same question is asked once.

lm-eval has a cache of its own, which knows neither model nor prefix and stores pickles; this file holds lines of JSON,
and its keys are made of all that an answer depends on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import DataError
from prefixtune.prefix.prefix import Prefix
from prefixtune.utils.files import line_writer
from prefixtune.utils.writable import reporting_write_errors

__all__ = ["RESPONSES_FILE", "Responses", "model_digest", "request_key"]

RESPONSES_FILE = "responses.jsonl"


class Responses:
    """The answers of a file, and the new ones, which are appended to it.

    Args:
        path: The file; None: answers are kept in memory alone.

    Raises:
        DataError: The file cannot be read, or holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, Any] = {} if path is None else _read(path)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        """The answer to the request of a key."""
        return self._known[key]

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keep answers by their keys.

        Raises:
            PrefixError: The file cannot be written.
        """
        self._known.update(answers)
        if self._path is None or not answers:
            return
        with reporting_write_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"key": key, "answer": answer}) for key, answer in answers.items()]
        with line_writer(self._path) as append:
            # An incomplete line of a process that was killed stays alone on its line.
            append("\n" + "\n".join(lines))


def _read(path: Path) -> dict[str, Any]:
    """The answers in a file, by their keys; an incomplete line is ignored."""
    hint = "choose another output folder, or delete the file."
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}.", hint=hint) from error
    known: dict[str, Any] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(row, dict) or not isinstance(row.get("key"), str) or not _is_answer(row.get("answer")):
            raise DataError(f"line {number} of {str(path)!r} is no answer to a request of lm-eval.", hint=hint)
        known[row["key"]] = row["answer"]
    return known


def _is_answer(answer: object) -> bool:
    """Whether it is a text, a log-likelihood, or one and whether it is greedy."""
    if isinstance(answer, list) and len(answer) == 2 and isinstance(answer[1], bool):
        answer = answer[0]
    return isinstance(answer, str | float)


def model_digest(backbone: Backbone, prefix: Prefix | None, settings: Sequence[Any]) -> str:
    """Identifies a backbone with a prefix, and settings that its answers depend on."""
    facts = [backbone.fingerprint, backbone.name, backbone.dtype_name, *settings]
    if prefix is not None:
        facts += [prefix.header.get("placement"), prefix.header.get("text_format")]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for tensor in () if prefix is None else prefix.tensors():
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def request_key(model: str, kind: str, arguments: Sequence[Any]) -> str:
    """The key of a request's answer.

    Args:
        model: `model_digest` of what answers.
        kind: lm-eval's name of the request, such as `loglikelihood`.
        arguments: The request's arguments.
    """
    return hashlib.sha256(json.dumps([model, kind, *arguments], sort_keys=True, default=str).encode()).hexdigest()
