"""What a training run would read of a file: its form, lengths in tokens, an example with its labels, duplicates.

Only a tokenizer is loaded, and of many examples some are tokenized.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import load_tokenizer, without_limits
from prefixtune.data.encoding import TEXT_FORMAT, is_text
from prefixtune.data.examples import Example, TaskKind, conversation_of, has_messages, limit_targets
from prefixtune.data.forms import describe_data
from prefixtune.data.labels import choose_labels, encode_rows, with_label_words
from prefixtune.data.registry import TASKS, Reading, read_data
from prefixtune.data.streams import shown
from prefixtune.data.tokenized import TokenizedDataset, TokenizedExample
from prefixtune.data.truncation import position_limit
from prefixtune.errors import DataError
from prefixtune.results import Overlap
from prefixtune.training.config import TrainConfig
from prefixtune.training.data import training_format
from prefixtune.training.schedule import count_steps

_UNBOUNDED = 1 << 30
MAX_TOKENIZED = 2_000
"""Examples that are tokenized, at most, evenly spaced."""
_MAX_TRAINING_BYTES = 2**25
"""Largest training set that is read again for the comparison, which takes a few seconds."""


class Lengths(BaseModel):
    """Numbers of tokens.

    Attributes:
        what: Of what: source, target, or both together.
        median: The middle one.
        p90: Nine of ten are no longer.
        p99: Ninety-nine of a hundred are no longer.
        longest: The longest.
    """

    what: str
    median: int
    p90: int
    p99: int
    longest: int


class Measures(BaseModel):
    """What tokens say of examples.

    Attributes:
        tokenized: Examples whose lengths are known.
        chat_template: Whether a chat template writes the examples.
        lengths: Of sources, targets and both.
        positions: The limit: `max_length`, or what the model has; None: there is none.
        cut: Examples that lose something at the limit: the end of a source, or the last turns of a conversation; texts
            alone lose nothing.
        refused: Examples whose target leaves no room for a source; training would stop with an error.
        steps: Optimizer steps of an epoch.
        example: The first example in pieces, as the model reads it: a text, and whether the loss is on it.
    """

    tokenized: int
    chat_template: bool
    lengths: list[Lengths]
    positions: int | None
    cut: int
    refused: int
    steps: int
    example: list[tuple[str, bool]]


class DataReport(Measures):
    """What a file holds.

    Attributes:
        read: One line: the form, and how much.
        rows: As many targets.
        examples: Equal sources merged, where training merges them.
        backbone: Whose tokens are counted.
        equal_rows: Rows that are there before.
        equal_sources: Rows whose source is there before, with another target.
        labels: Label -> how many, for classification.
        overlap: Of a test file: how many of its sources are here.
    """

    read: str
    rows: int
    examples: int
    backbone: str
    equal_rows: int
    equal_sources: int
    labels: dict[str, int] = {}
    overlap: Overlap | None = None


def report_data(config: TrainConfig, *, test: str = "") -> DataReport:
    """Look at a run's training file; nothing is written and no weights are loaded.

    Args:
        config: The run: its `train`, `task`, `form`, `source`, `target`, `backbone`, `max_length`, `prefix_length`, and
            so on.
        test: A file whose sources are compared; empty: none.

    Raises:
        PrefixError: A file cannot be read, or an option is wrong; as in training.
    """
    read = _read(config, config.train, "train")
    examples, kind = read.examples, TASKS[read.task].kind
    if not any(example.targets for example in examples):
        raise DataError(f"{config.train} has no targets.", hint="name the target column (--target).")
    measures = _measure(config, examples, kind, load_tokenizer(config.backbone))
    labels = Counter(target for example in examples for target in example.targets if kind == "classification")
    equal_rows, equal_sources = _count_equal(examples)
    line = f"{shown(config.train)}: read as task {read.task}: examples {len(examples):,}"
    if read.form is not None:
        line = describe_data(read.form, examples, config.train, read.columns)
    return DataReport(
        **dict(measures),
        read=line,
        rows=sum(len(example.targets) or 1 for example in examples),
        examples=len(examples),
        backbone=config.backbone,
        equal_rows=equal_rows,
        equal_sources=equal_sources,
        labels=dict(labels.most_common()),
        overlap=find_overlap(_read(config, test, "test").examples, examples, config.train) if test else None,
    )


def _read(config: TrainConfig, path: str, split: str) -> Reading:
    """The data as training reads them."""
    columns: dict[str, Any] = {"source": config.source or None, "target": config.target or None}
    return read_data(config.task, path, split=split, form=config.form, needs_targets=split == "train", **columns)


def _count_equal(examples: Sequence[Example]) -> tuple[int, int]:
    """Rows that are there before, and rows whose source alone is."""
    targets: dict[Any, list[str]] = {}
    for example in examples:
        targets.setdefault(_key(example), []).extend(example.targets)
    distinct = sum(len(set(each)) for each in targets.values())
    return sum(map(len, targets.values())) - distinct, distinct - sum(map(bool, targets.values()))


def _measure(config: TrainConfig, examples: Sequence[Example], kind: TaskKind, backbone: Backbone) -> Measures:
    """Tokenize examples, and measure them.

    Args:
        config: The run.
        examples: Of its data; at least one has a target.
        kind: Of the task.
        backbone: Its tokenizer, with as many positions as the model.

    Raises:
        PrefixError: As in training.
    """
    unlimited, solved = without_limits(backbone), [example for example in examples if example.targets]
    count = min(len(solved), MAX_TOKENIZED)
    chosen: Sequence[Example] = [solved[index * len(solved) // count] for index in range(count)]
    labels = None
    if kind != "generation":
        labels = choose_labels(kind, unlimited, examples, by=config.classifier, words=config.words_by_label)
    by_head = labels is not None and labels.by == "head"
    if labels is not None and not by_head:
        chosen = with_label_words(chosen, labels)
    are_texts = unlimited.kind == "decoder" and all(map(is_text, chosen))
    if are_texts:
        prompt, target = config.prompt_format or TEXT_FORMAT.prompt, config.target_format or TEXT_FORMAT.target
        config = config.replace(prompt_format=prompt, target_format=target)
    text_format = training_format(
        config, unlimited, for_head=by_head, for_labels=labels is not None, has_messages=has_messages(examples)
    )

    def made(reader: Backbone, example: Example, prefix_length: int, max_length: int) -> TokenizedDataset:
        lengths: dict[str, Any] = {"prefix_length": prefix_length, "max_length": max_length}
        return encode_rows(reader, [example], labels, text_format, **lengths)

    limit = position_limit(backbone, config.prefix_length, config.max_length)
    whole: list[TokenizedExample] = []
    windows: list[TokenizedExample] = []
    cut = refused = 0
    for example in chosen:
        rows = made(unlimited, example, 0, _UNBOUNDED).examples
        whole += rows
        if are_texts:
            windows += made(backbone, example, config.prefix_length, config.max_length).examples
        elif max(_total(row, by_head) for row in rows) > limit:
            try:
                fitted = made(backbone, example, config.prefix_length, config.max_length)
                cut += bool(fitted.num_truncated or fitted.num_dropped_turns)
            except DataError:
                refused += 1
    lengths = [_lengths("source", [len(row.prompt) for row in whole])]
    if not by_head:
        targets = [stop - first for row in whole for spans in row.label_spans() for first, stop in spans]
        lengths += [_lengths("target", targets), _lengths("together", [_total(row, by_head) for row in whole])]
    return Measures(
        tokenized=len(chosen),
        chat_template=text_format.is_chat,
        lengths=lengths,
        positions=min(filter(None, (config.max_length, backbone.max_positions)), default=None),
        cut=cut,
        refused=refused,
        steps=max(1, round(count_steps(config, windows or whole) * len(solved) / len(chosen))),
        example=_parts(unlimited, whole[0], by_head),
    )


def _lengths(what: str, found: Sequence[int]) -> Lengths:
    median, p90, p99, longest = np.quantile(found, [0.5, 0.9, 0.99, 1], method="higher").tolist()
    return Lengths(what=what, median=median, p90=p90, p99=p99, longest=longest)


def _total(row: TokenizedExample, by_head: bool) -> int:
    """Tokens of the source and the longest target; a head's labels are no tokens."""
    return len(row.prompt) + (0 if by_head else max(map(len, row.targets)))


def _parts(backbone: Backbone, row: TokenizedExample, by_head: bool) -> list[tuple[str, bool]]:
    """An example as the model reads it: its first target, in pieces with and without a loss."""
    pieces: list[tuple[Sequence[int], bool]] = [(row.prompt, False)]
    if not by_head:
        target, position = row.targets[0], 0
        for first, stop in row.label_spans()[0]:
            pieces += [(target[position:first], False), (target[first:stop], True)]
            position = stop
        pieces.append((target[position:], False))
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return [(str(backbone.tokenizer.decode(list(ids), **options)), is_label) for ids, is_label in pieces if ids]


# --- examples that are also in another set ----------------------------------------------------------------------------


def find_overlap(examples: Sequence[Example], training: Sequence[Example], train: str) -> Overlap:
    """Count the examples whose source is also in a training set.

    >>> find_overlap([Example("a  b"), Example("c")], [Example(" a b", ("x",))], "my.csv").count
    1
    """
    known = set(map(_key, training))
    count = sum(_key(example) in known for example in examples)
    return Overlap(count=count, num_examples=len(examples), train=train)


def training_examples(config: TrainConfig) -> list[Example] | None:
    """The examples that a run was trained on; None: they cannot be read again.

    They are gone, on a hub, from standard input, or too large.

    Raises:
        PrefixError: The files are not what the run was trained on.
    """
    task, path = TASKS.get(config.task), Path(config.train)
    if task is None:
        return None
    if not task.parts:
        if not config.train or not path.exists():
            return None
        files = [path] if path.is_file() else path.rglob("*")
        if sum(file.stat().st_size for file in files) > _MAX_TRAINING_BYTES:
            return None
    return limit_targets(_read(config, config.train or task.parts[0], "train").examples, config.limit)


def _key(example: Example) -> tuple[str, ...]:
    """The messages before the answer, or a text alone, without differences in white space and the system's message."""
    messages = [message.content for message in conversation_of(example) if message.role != "system"]
    texts = messages if any(messages) else example.targets
    return tuple(" ".join(text.split()) for text in texts)
