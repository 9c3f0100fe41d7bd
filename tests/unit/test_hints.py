"""Every hint in the source is tried: the commands, options, keys, extras and files that it names exist."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixtune.cli.main import command_options
from prefixtune.distillation.config import DistillConfig
from prefixtune.inference.config import GenerateConfig
from prefixtune.server.settings import ServeConfig
from prefixtune.studies import StudyConfig
from prefixtune.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "prefixtune"

COMMANDS = {name: {*map(options.flag, options.model_fields)} for name, options in command_options().items()}
KEYS = {
    name
    for config in (TrainConfig, DistillConfig, GenerateConfig, StudyConfig, ServeConfig)
    for name in config.model_fields
}
#: File or folder of the source -> the commands whose users see its hints; all of them must have the option.
SEEN_BY = {
    "cli/commands/convert.py": ["convert"],
    "cli/commands/demo.py": ["demo"],
    "cli/commands/distill.py": ["distill"],
    "cli/commands/evaluate.py": ["evaluate"],
    "cli/commands/export.py": ["export"],
    "cli/commands/generate.py": ["generate"],
    "cli/commands/report.py": ["report"],
    "cli/commands/score.py": ["score"],
    "cli/commands/serve.py": ["serve"],
    "cli/commands/serve_vllm.py": ["serve"],
    "cli/commands/study.py": ["study"],
    "cli/commands/train.py": ["train"],
    "data/labels.py": ["train"],
    "distillation/": ["distill"],
    "interop/export.py": ["export"],
    "interop/llama_cpp/": ["export"],
    "interop/onnx/": ["export"],
    "interop/vllm/": ["serve"],
    "server/": ["serve"],
    "studies/": ["study"],
    "training/": ["train"],
}
#: Options of other programs.
FOREIGN = {
    *("--cache-type-k", "--cache-type-v", "--no-deps", "--force-reinstall", "--python", "--target", "--system"),
    *("--max-model-len", "--disable-sliding-window", "--attention-backend"),
}
#: Other words with an underscore: of PEFT, transformers, the tasks' files, the environment.
FOREIGN_WORDS = {
    *("eos_token", "tokenizer_config", "adapter_config", "save_pretrained", "save_to_disk", "modules_to_save"),
    *("use_reentrant", "remove_unused_columns", "padding_free", "control_trans", "triples_scores"),
    *("max_gen_toks", "generation_kwargs", "label_smoothing_factor"),
}


def texts_in(node: ast.expr) -> Iterator[str]:
    """The texts that an expression may give, with {} for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    elif isinstance(node, ast.IfExp):
        yield from texts_in(node.body)
        yield from texts_in(node.orelse)
    elif isinstance(node, ast.BinOp):
        for left in list(texts_in(node.left)) or ["{}"]:
            yield from (left + right for right in list(texts_in(node.right)) or ["{}"])


def hints() -> Iterator[tuple[str, int, str]]:
    """File, line and text of every hint."""
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found: list[ast.expr] = []
            match node:
                case ast.keyword(arg="hint" | "remedy"):
                    found = [node.value]
                case ast.Assign(targets=[ast.Name(id=target)]) if "hint" in target.lower() or target == "by_hand":
                    found = [node.value]
                case ast.Call(func=ast.Name(id="Unavailable" | "KeyboardInterrupt")):
                    found = node.args[-1:]
            for text in (text for value in found for text in texts_in(value)):
                yield name, node.lineno if hasattr(node, "lineno") else found[0].lineno, text


HINTS = list(hints())


def names_of_the_source() -> set[str]:
    """Functions, classes, parameters and attributes."""
    names: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names |= {node.name, *(arg.arg for arg in [*node.args.args, *node.args.kwonlyargs])}
            elif isinstance(node, ast.ClassDef | ast.keyword):
                names.add(str(node.name if isinstance(node, ast.ClassDef) else node.arg))
    return names


def test_there_are_hints_to_try() -> None:
    assert len(HINTS) > 300


def test_the_commands_that_hints_name_exist() -> None:
    named = [(*hint, word) for hint in HINTS for word in re.findall(r"`prefixtune ([a-z][a-z-]*)", hint[2])]
    assert len(named) > 20
    assert [each for each in named if each[3] not in COMMANDS] == []


def test_the_options_that_hints_name_exist_for_their_command() -> None:
    wrong, tried = [], 0
    for name, line, text in HINTS:
        quoted = re.findall(r"`prefixtune ([a-z][a-z-]*)([^`]*)`", text)
        for command, rest in quoted:
            for option in re.findall(r"--[a-z][a-z-]*", rest):
                tried += 1
                if command in COMMANDS and option not in COMMANDS[command]:
                    wrong.append((name, line, f"prefixtune {command} {option}"))
        seen_by = next((commands for start, commands in SEEN_BY.items() if name.startswith(start)), None)
        for option in set(re.findall(r"--[a-z][a-z-]*", re.sub(r"`[^`]*`", "", text))) - FOREIGN:
            tried += 1
            lacking = [command for command in seen_by or () if option not in COMMANDS[command]]
            if lacking or not any(option in options for options in COMMANDS.values()):
                wrong.append((name, line, f"{option} {lacking}"))
    assert tried > 40
    assert wrong == []


def test_the_keys_and_names_in_hints_exist() -> None:
    known = KEYS | names_of_the_source() | FOREIGN_WORDS
    wrong, tried = [], 0
    for name, line, text in HINTS:
        for key in re.findall(r"\b([a-z][a-z_]*) = ['\"\d]", text):
            tried += 1
            if key not in KEYS:
                wrong.append((name, line, f"{key} = ..."))
        for word in re.findall(r"(?<![\w./-])[a-z]+(?:_[a-z]+)+(?![\w/.-]*\.(?:csv|xml))", text):
            tried += 1
            if word not in known:
                wrong.append((name, line, word))
    assert tried > 40
    assert wrong == []


def test_the_extras_and_documents_in_hints_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    source = "".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    named = re.findall(
        r"prefixtune\[([a-z-]+)\]|needs_extra\(\"([a-z-]+)\"|package_version\(.*extra=\"([a-z-]+)\"", source
    )
    assert {name for names in named for name in names if name} == extras.keys() - {"all"}
    pages = [(*hint, page) for hint in HINTS for page in re.findall(r"docs/[a-z_]+\.md", hint[2])]
    assert pages
    assert [each for each in pages if not (ROOT / each[3]).is_file()] == []


@pytest.mark.parametrize("name", sorted(SEEN_BY))
def test_what_this_test_knows_of_files_holds(name: str) -> None:
    assert (SOURCE / name).exists()
    assert set(SEEN_BY[name]) <= COMMANDS.keys()
