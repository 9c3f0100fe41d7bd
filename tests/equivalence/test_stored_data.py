"""Data in files trains exactly as data in memory: the same tokens, order, digest and losses, the second time too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefixtune as pt
from prefixtune.data import cache, stored_examples, stored_tokens
from prefixtune.data.encoding import encode_examples
from prefixtune.data.examples import Example
from prefixtune.data.stored_examples import StoredExamples
from prefixtune.data.tokenized import TokenTable
from prefixtune.errors import DataError
from prefixtune.prefix.text_format import TextFormat
from prefixtune.training.loop import TrainLoop
from prefixtune.training.train import train_together

QUESTIONS = [{"question": f"{i % 9} of", "answer": "abcdefgh"[i % 8] * (1 + i % 4)} for i in range(20)]
CHATS = [
    {
        "messages": [
            {"role": "user" if turn % 2 == 0 else "assistant", "content": "abcdef"[(turn + i) % 6] * (1 + i % 3)}
            for turn in range(2 * (1 + i % 3))
        ]
    }
    for i in range(12)
]
LABELS = [{"text": f"it is {i}", "label": ("good", "bad")[i % 2]} for i in range(12)]
TAGS = [{"tokens": ["a", f"b{i}"], "tags": ["O", ("B-X", "O")[i % 2]]} for i in range(12)]
TEXTS = [{"text": "abc " * (1 + i % 4)} for i in range(12)]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)

RUNS: dict[str, tuple[list[dict[str, Any]], str, dict[str, Any]]] = {
    "merged": (QUESTIONS, "llama", {}),
    "several targets": (QUESTIONS, "llama", {"targets_per_source": 2, "gradient_accumulation": 2}),
    "templates": (QUESTIONS, "llama", {"source": "{question} so", "target": "answer", "limit": 15}),
    "held out": (QUESTIONS, "llama", {"hold_out": 0.3, "eval_every": 2, "dev_limit": 3}),
    "chats": (CHATS, "llama", {"chat_template": "template.jinja"}),
    "cut": (CHATS, "llama", {"chat_template": "template.jinja", "max_length": 16}),
    "texts": (TEXTS, "llama", {"hold_out": 0.2}),
    "words": (LABELS, "llama", {"classifier": "words"}),
    "head": (LABELS, "llama", {"classifier": "head"}),
    "tags": (TAGS, "bert", {"task": "tagging"}),
    "encoder-decoder": (QUESTIONS, "t5", {}),
    "nested": (QUESTIONS, "llama", {"nested": True, "prefix_dropout": 0.2}),
    "examples": (
        QUESTIONS,
        "llama",
        {"initialization": "examples", "init_examples": 2, "prefix_length": 0, "hold_out": 0.3, "leave_one_out": True},
    ),
    "words of examples": (
        LABELS,
        "llama",
        {"initialization": "examples", "init_examples": 2, "prefix_length": 0, "classifier": "words"},
    ),
}


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it lets every set of data count as large."""
    monkeypatch.setenv("PREFIXTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "template.jinja").write_text(TEMPLATE)

    def count_as_large() -> None:
        for module, name, value in (
            (stored_examples, "FEW", 0),
            (stored_examples, "KEPT_BYTES", 0),
            (stored_examples, "_BLOCK", 2),
            (stored_tokens, "FEW", 0),
            (stored_tokens, "_PART", 3),
        ):
            monkeypatch.setattr(module, name, value)

    return count_as_large


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def run(backbone: Any, output: Path, **options: Any) -> tuple[list[Any], TrainLoop]:
    """The figures of a run's events, and its loop."""
    loops: list[TrainLoop] = []
    events: list[Any] = []
    config = {"prefix_length": 2, "init_text": "ab", "max_steps": 6, "batch_size": 4, "save_every": 3, **options}
    resume = bool(config.pop("resume", False))
    pt.train(
        pt.TrainConfig(output=str(output), **config),
        backbone=backbone,
        resume=resume,
        progress=False,
        check=loops.append,
        on_event=events.append,
    )
    return [{name: value for name, value in event.items() if name != "seconds"} for event in events], loops[0]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_from_files_is_that_from_memory(
    name: str, tiny_backbone: Callable[..., Any], tmp_path: Path, large: Callable[[], None]
):
    rows, family, options = RUNS[name]
    backbone, options = tiny_backbone(family), {"train": write(tmp_path / "train.jsonl", rows), **options}
    if name == "words":
        options["dev"] = write(tmp_path / "dev.jsonl", rows[:4])
    events, loop = run(backbone, tmp_path / "few", **options)
    assert isinstance(loop.data.train.examples, tuple)
    assert not cache.data_folder().exists()
    large()
    for output in ("many", "again", "uncached"):
        cached = output != "uncached"
        found, other = run(backbone, tmp_path / output, **options, data_cache=cached)
        assert isinstance(other.data.train.examples, TokenTable)
        assert found == events
        assert other.data.digest == loop.data.digest
        for one, two in ((loop.data.train, other.data.train), (loop.data.dev, other.data.dev)):
            assert (one is None) == (two is None)
            if one is not None and two is not None:
                assert list(two.examples) == list(one.examples)
                figures = ("num_truncated", "longest_prompt", "num_dropped_turns", "num_unpacked")
                assert [getattr(two, figure) for figure in figures] == [getattr(one, figure) for figure in figures]
                assert (two.num_targets, two.longest_target) == (one.num_targets, one.longest_target)
    assert any(event["event"] == "evaluation" for event in events)
    # What was kept is what a run with a cache made: examples and tokens, for training and development.
    entries = list(cache.data_folder().glob("*/index.json"))
    assert len(entries) >= (1 if name == "tags" else 2)  # tags are read as a whole


def test_a_run_goes_on_with_data_in_files(tiny_backbone: Callable[..., Any], tmp_path: Path, large: Callable[[], None]):
    backbone, path = tiny_backbone("llama"), write(tmp_path / "train.jsonl", QUESTIONS)
    whole, _ = run(backbone, tmp_path / "whole", train=path, max_steps=12)
    # Begun in memory, continued from files: after an epoch and a part of the next.
    run(backbone, tmp_path / "run", train=path, max_steps=8)
    planned, _ = run(backbone, tmp_path / "planned", train=path, max_steps=12)
    assert planned == whole
    stopped: list[Any] = []

    class Stopped(Exception):
        pass

    def stop(event: Any) -> None:
        stopped.append(event)
        if event["event"] == "save" and event["step"] == 6:
            raise Stopped

    config = pt.TrainConfig(
        train=path,
        prefix_length=2,
        init_text="ab",
        max_steps=12,
        batch_size=4,
        save_every=3,
        output=str(tmp_path / "cut"),
    )
    with pytest.raises(Stopped):
        pt.train(config, backbone=backbone, progress=False, on_event=stop)
    large()
    resumed: list[Any] = []
    pt.train(config, backbone=backbone, progress=False, on_event=resumed.append, resume=True)

    def losses(events: list[Any]) -> list[tuple[int, float]]:
        return [(event["step"], event["loss"]) for event in events if event["event"] == "step"]

    assert losses(resumed) == losses(whole)[6:]


def test_runs_together_share_data_in_files(
    tiny_backbone: Callable[..., Any], tmp_path: Path, large: Callable[[], None]
):
    backbone, path = tiny_backbone("llama"), write(tmp_path / "train.jsonl", QUESTIONS)

    def together(folder: str) -> list[Any]:
        configs = [
            pt.TrainConfig(
                train=path,
                prefix_length=2,
                init_text="ab",
                max_steps=3,
                batch_size=4,
                output=str(tmp_path / folder / str(seed)),
                seed=seed,
                beside="self",
            )
            for seed in range(2)
        ]
        events: list[Any] = []
        train_together(configs, backbone=backbone, on_event=events.append)
        return [(event["step"], event["loss"]) for event in events if event["event"] == "step"]

    few = together("few")
    large()
    assert together("many") == few


def test_messages_name_the_example(tiny_backbone: Callable[..., Any], large: Callable[[], None]):
    backbone = tiny_backbone("llama")
    examples = [Example(f"{i}", ("x" * (40 if i == 7 else 2),)) for i in range(9)]

    def encode(some: Any, first: int) -> Any:
        return encode_examples(
            backbone, some, TextFormat("{source} =", "{target}"), prefix_length=2, max_length=30, first=first
        )

    large()
    with pytest.raises(DataError, match="a target of example 8 "):
        stored_tokens.encode_stored(examples, encode)
    seen: list[int] = []
    stored_tokens.encode_stored(examples[:7], encode, on_part=seen.append)
    assert seen == [3, 6, 7]


def test_a_broken_entry_is_made_again(tiny_backbone: Callable[..., Any], tmp_path: Path, large: Callable[[], None]):
    backbone, path = tiny_backbone("llama"), write(tmp_path / "train.jsonl", QUESTIONS)
    large()
    events, loop = run(backbone, tmp_path / "one", train=path)
    for column in cache.data_folder().glob("*/*.bin"):
        column.write_bytes(column.read_bytes()[:-1])
    again, other = run(backbone, tmp_path / "two", train=path)
    assert (again, other.data.digest) == (events, loop.data.digest)


def test_another_file_format_or_length_has_tokens_of_its_own(
    tiny_backbone: Callable[..., Any], tmp_path: Path, large: Callable[[], None]
):
    backbone, path = tiny_backbone("llama"), write(tmp_path / "train.jsonl", QUESTIONS)
    large()
    digests = set()
    for number, options in enumerate(
        ({}, {"prompt_format": "{source} :"}, {"target_format": "{target}."}, {"max_length": 11}, {"limit": 9})
    ):
        digests.add(run(backbone, tmp_path / f"run{number}", train=path, **options)[1].data.digest)
    other = write(tmp_path / "train.jsonl", QUESTIONS[:-1])
    digests.add(run(backbone, tmp_path / "other", train=other)[1].data.digest)
    assert len(digests) == 6


def test_large_data_stays_in_files(tmp_path: Path, large: Callable[[], None]):
    large()
    found = pt.data.load_task("records", write(tmp_path / "train.jsonl", QUESTIONS))
    assert isinstance(found, StoredExamples)
