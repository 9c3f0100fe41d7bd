"""Mistakes that users make, from `unit/cli/mistakes.json`, and what the command line and the Python interface answer.

`python tests/mistakes.py` prints the table: each mistake, and its answer.

An entry of the file has:

- `mistake`: what is wrong, in a few words.
- `command`: the arguments of `prefixtune`, as typed in a shell; or `python`: a call of its public names.
- `files`: name -> text; `environment`: variables.
- `needs`: what an answer must contain: the option, the value got, what is allowed, the suggestion. Small and capital
  letters, and `-` and `_`, are the same; ` | ` separates words of which one is enough.
- `never`: what it must not contain, such as a secret.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import prefixtune
import prefixtune.backbone.load
import prefixtune.studies.data
import prefixtune.training.train
from patching import replace_everywhere
from prefixtune.backbone.backbone import Backbone
from prefixtune.cli.main import main
from prefixtune.errors import PrefixError
from prefixtune.prefix.artifact import save_prefix
from prefixtune.prefix.prefix import Prefix

__all__ = ["FOREIGN", "MISTAKES", "Answer", "Mistake", "answer_to", "lacks", "make_folder"]

FOREIGN = (
    "Traceback", "pydantic", "cyclopts", "validation error", "Input should be", "Value error", "extra_forbidden",
    "errors.", "type=", "input_value", "NoneType", "<class", "typing.", "Literal[",
)  # fmt: skip
"""Words of libraries and of Python, that no answer contains."""


@dataclass(frozen=True)
class Mistake:
    """An entry of the file; see above."""

    mistake: str
    needs: Sequence[str]
    command: str = ""
    python: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    never: Sequence[str] = ()

    @property
    def typed(self) -> str:
        """What the user typed."""
        variables = "".join(f"{name}={shlex.quote(value)} " for name, value in self.environment.items())
        return f"{variables}prefixtune {self.command}" if self.command else self.python


MISTAKES = [
    Mistake(**entry)
    for entry in json.loads((Path(__file__).parent / "unit" / "cli" / "mistakes.json").read_text(encoding="utf-8"))
]


@dataclass(frozen=True)
class Answer:
    """What a user gets.

    Attributes:
        code: The exit code; of a Python call, 2 for a `PrefixError`.
        error: What is wrong.
        hint: What to do.
        stdout: What was printed to stdout.
        stderr: What was printed to stderr.
    """

    code: int
    error: str
    hint: str
    stdout: str = ""
    stderr: str = ""

    @property
    def text(self) -> str:
        """All that is shown."""
        return f"{self.error}\n{self.hint}".strip()


def lacks(text: str, pieces: Sequence[str]) -> list[str]:
    """The pieces that an answer does not contain."""
    text = _normal(text)
    return [piece for piece in pieces if not any(_normal(word) in text for word in piece.split(" | "))]


def _normal(text: str) -> str:
    return text.lower().replace("_", "-")


def make_folder(folder: Path, mistake: Mistake) -> None:
    """Files that the mistakes are about: data, a prefix, what looks like a model; and the mistake's own files."""
    model = {"model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32}
    rows = [{"name": name, "text": f"{name} eats."} for name in ("Ann", "Bo")]
    for name in ("model", "folder"):
        (folder / name).mkdir()
    (folder / "model" / "config.json").write_text(json.dumps({**model, "num_key_value_heads": 2}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "binary.toml").write_bytes(b"\xff\xfe\x00")
    pair = torch.zeros(2, 4, 8), torch.ones(2, 4, 8)
    header = {"backbone": {"name": "model", "kind": "decoder", "fingerprint": "a:b"}}
    save_prefix(folder / "p.safetensors", Prefix({"decoder": (pair,) * 3}, header))
    for name, text in mistake.files.items():
        (folder / name).write_text(text, encoding="utf-8")


def answer_to(mistake: Mistake, folder: Path) -> Answer:
    """What the command or the call answers, in this process and in a folder that `make_folder` made."""
    with _offline(), contextlib.chdir(folder):
        if mistake.python:
            return _answer_of_call(mistake.python)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in mistake.environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdin", io.StringIO())
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    code = main(shlex.split(mistake.command))
                except SystemExit as ended:
                    code = int(ended.code or 0)
    return Answer(code, *_error_and_hint(err.getvalue()), out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """No model loads: a mistake that is not seen ends here, and starts no training and no server."""

    def loaded(*args: Any, **options: Any) -> Any:
        raise AssertionError("the backbone was loaded")

    with pytest.MonkeyPatch.context() as patch:
        replace_everywhere(patch, prefixtune.backbone.load.load_backbone, loaded)
        yield


def _answer_of_call(code: str) -> Answer:
    names = {name: getattr(prefixtune, name) for name in prefixtune.__all__}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            eval(code, {**names, "nan": math.nan, "inf": math.inf, "backbone": object.__new__(Backbone)})
    except PrefixError as error:
        return Answer(2, error.message, error.hint, stderr=str(error))
    except Exception as error:
        return Answer(1, f"{type(error).__name__}: {error}", "")
    return Answer(0, "", "")


def _error_and_hint(text: str) -> tuple[str, str]:
    """The two parts of what is printed on stderr, for people or as JSON."""
    if text.startswith("{"):
        fields = json.loads(text)
        return fields["error"], fields["hint"]
    error, _, hint = text.partition("error: ")[2].partition("\nhint: ")
    return error.strip(), hint.strip()


def _print_table() -> None:
    for mistake in MISTAKES:
        with tempfile.TemporaryDirectory() as folder:
            make_folder(Path(folder), mistake)
            now = answer_to(mistake, Path(folder))
        print(f"\n{mistake.mistake}\n  $ {mistake.typed}")
        for name, text in mistake.files.items():
            print(f"  {name}: {text!r}")
        print(f"  {now.error}\n  hint: {now.hint}")
        missing = lacks(now.text, mistake.needs)
        if missing or now.code != 2:
            print(f"  MISSES {missing}, exit code {now.code}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _print_table()
