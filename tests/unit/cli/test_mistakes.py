"""What users are told of over 200 mistakes, beside what they were told with argparse and dataclasses: none got worse.

`mistakes.json` is the table, `tests/mistakes.py` explains its columns, and `python tests/mistakes.py` prints both
answers.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from command_line import run_apart
from mistakes import FOREIGN, MISTAKES, Answer, Mistake, answer_to, lacks, make_folder


def _id(mistake: Mistake) -> str:
    return f"{mistake.mistake}: {mistake.typed[-60:]}"


def _check(mistake: Mistake, answer: Answer) -> None:
    shown = f"{mistake.typed}\n{answer.error}\nhint: {answer.hint}"
    assert answer.code == 2, f"exit code {answer.code}\n{shown}\n{answer.stderr}"
    assert not lacks(answer.text, mistake.needs), shown
    assert answer.hint, shown
    assert answer.stdout == ""
    assert "\n" not in answer.error, shown
    everything = answer.stderr + answer.text
    assert not [word for word in FOREIGN if re.search(rf"(?<![\w]){re.escape(word)}", everything)], everything
    assert not [word for word in mistake.never if word in everything], everything


@pytest.mark.parametrize("mistake", MISTAKES, ids=_id)
def test_the_answer_says_what_is_wrong_and_what_to_do(mistake: Mistake, tmp_path: Path) -> None:
    make_folder(tmp_path, mistake)
    _check(mistake, answer_to(mistake, tmp_path))


APART = (
    "train --sead 3 --prefix-length 0",
    "generate --json --top-k x hello",
    "serve --backbone model --prefixes folder ",
)


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m.command in APART], ids=_id)
def test_a_program_of_its_own_answers_the_same(mistake: Mistake, tmp_path: Path) -> None:
    make_folder(tmp_path, mistake)
    words = shlex.split(mistake.command)
    out, err = run_apart(*words, code=2, cwd=tmp_path, environment=dict(mistake.environment))
    answer = answer_to(mistake, tmp_path)
    assert (out, err) == ("", answer.stderr)


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if "--json" in m.command], ids=_id)
def test_a_program_gets_one_object(mistake: Mistake, tmp_path: Path) -> None:
    make_folder(tmp_path, mistake)
    error = json.loads(answer_to(mistake, tmp_path).stderr)
    assert error.keys() == {"error", "hint", "kind", "exit_code"}
    assert (error["kind"], error["exit_code"]) == ("ConfigError", 2)


def test_every_kind_of_mistake_is_in_the_table() -> None:
    commands = {mistake.command.split()[0] for mistake in MISTAKES if mistake.command}
    assert commands >= {
        "convert", "demo", "doctor", "evaluate", "export", "generate", "inspect", "prepare", "pull", "push", "report",
        "score", "serve", "study", "tasks", "train",
    }  # fmt: skip
    calls = {mistake.python.split("(")[0] for mistake in MISTAKES if mistake.python}
    assert calls >= {"EngineConfig", "GenerateConfig", "ServeConfig", "StudyConfig", "TrainConfig", "generate", "train"}
