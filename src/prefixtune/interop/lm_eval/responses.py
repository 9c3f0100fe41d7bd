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

from prefixtune.inference.answers import append_rows, read_rows

__all__ = ["RESPONSES_FILE", "Responses", "request_key"]

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
        append_rows(self._path, [{"key": key, "answer": answer} for key, answer in answers.items()])


def _read(path: Path) -> dict[str, Any]:
    """The answers in a file, by their keys."""
    rows = read_rows(path, _is_response, "is no answer to a request of lm-eval")
    return {row["key"]: row["answer"] for row in rows}


def _is_response(row: object) -> bool:
    return isinstance(row, dict) and isinstance(row.get("key"), str) and _is_answer(row.get("answer"))


def _is_answer(answer: object) -> bool:
    """Whether it is a text, a log-likelihood, or one and whether it is greedy."""
    if isinstance(answer, list) and len(answer) == 2 and isinstance(answer[1], bool):
        answer = answer[0]
    return isinstance(answer, str | float)


def request_key(model: str, kind: str, arguments: Sequence[Any]) -> str:
    """The key of a request's answer.

    Args:
        model: Identifies what answers: the backbone with its prefix, and settings.
        kind: lm-eval's name of the request, such as `loglikelihood`.
        arguments: The request's arguments.
    """
    return hashlib.sha256(json.dumps([model, kind, *arguments], sort_keys=True, default=str).encode()).hexdigest()
