"""What a training run would read of a file: its form, lengths in tokens, an example with its labels, duplicates.

Only a tokenizer is loaded, and of many examples some are tokenized.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import load_tokenizer
from prefixtune.data.encoding import TEXT_FORMAT, encode_examples, is_text
from prefixtune.data.examples import Example, TaskKind, has_messages
from prefixtune.data.forms import describe_data
from prefixtune.data.labels import choose_labels, encode_labelled, with_label_words
from prefixtune.data.registry import TASKS, read_task, resolve_task
from prefixtune.data.streams import shown
from prefixtune.data.tokenized import TokenizedDataset, TokenizedExample
from prefixtune.data.truncation import position_limit
from prefixtune.errors import DataError
from prefixtune.evaluation.overlap import find_overlap
from prefixtune.results import Overlap
from prefixtune.training.config import TrainConfig
from prefixtune.training.data import training_format
from prefixtune.training.schedule import count_steps

_UNBOUNDED = 1 << 30
_NUM_BINS = 10
MAX_TOKENIZED = 2_000
"""Examples that are tokenized, at most, evenly spaced."""


class Lengths(BaseModel):
    """Numbers of tokens.

    Attributes:
        what: Of what: source, target, or both together.
        median: The middle one.
        p90: Nine of ten are no longer.
        p99: Ninety-nine of a hundred are no longer.
        longest: The longest.
        bins: Numbers of texts by length, as (from, to, how many).
    """

    what: str
    median: int
    p90: int
    p99: int
    longest: int
    bins: list[tuple[int, int, int]]


class Limit(BaseModel):
    """What training does to the examples at its limit of positions.

    Attributes:
        positions: The limit: `max_length`, or what the model has; None: there is none.
        cut: Examples that lose something: the end of a source, or the last turns of a conversation; texts alone lose
            nothing.
        refused: Examples whose target alone does not fit; training would stop with an error.
    """

    positions: int | None
    cut: int
    refused: int


class Part(BaseModel):
    """A piece of an example as the model reads it; the loss is on it or not."""

    text: str
    is_label: bool


class Measures(BaseModel):
    """What tokens say of examples.

    Attributes:
        tokenized: Examples whose lengths are known.
        chat_template: Whether a chat template writes the examples.
        lengths: Of sources, targets and both.
        limit: What would be cut.
        steps: Optimizer steps of an epoch.
        example: The first example, in pieces.
    """

    tokenized: int
    chat_template: bool
    lengths: list[Lengths]
    limit: Limit
    steps: int
    example: list[Part]


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


def report_data(config: TrainConfig, *, test: str = "", max_tokenized: int = MAX_TOKENIZED) -> DataReport:
    """Look at a run's training file; nothing is written and no weights are loaded.

    Args:
        config: The run: its `train`, `task`, `form`, `source`, `target`, `backbone`, `max_length`, `prefix_length`, and
            so on.
        test: A file whose sources are compared; empty: none.
        max_tokenized: Examples that are tokenized, at most.

    Raises:
        PrefixError: A file cannot be read, or an option is wrong; as in training.
    """
    read, kind, examples = _read(config, config.train, "train")
    if not any(example.targets for example in examples):
        raise DataError(f"{config.train} has no targets.", hint="name the target column (--target).")
    backbone, unlimited = (load_tokenizer(config.backbone, limited=limited) for limited in (True, False))
    measures = measure_examples(config, examples, kind, backbone, unlimited, max_tokenized=max_tokenized)
    labels = Counter(target for example in examples for target in example.targets if kind == "classification")
    equal_rows, equal_sources = _count_equal(examples)
    return DataReport(
        **dict(measures),
        read=read,
        rows=sum(len(example.targets) or 1 for example in examples),
        examples=len(examples),
        backbone=config.backbone,
        equal_rows=equal_rows,
        equal_sources=equal_sources,
        labels=dict(labels.most_common()),
        overlap=find_overlap(_read(config, test, "test")[2], examples, config.train) if test else None,
    )


def _read(config: TrainConfig, path: str, split: Any) -> tuple[str, TaskKind, list[Example]]:
    """A line for people, the kind of the task, and the examples, as training reads them."""
    names = {"source": config.source or None, "target": config.target or None, "split": split, "form": config.form}
    task, form, columns = resolve_task(config.task, path, needs_targets=split == "train", **names)
    examples = read_task(config.task, path, needs_targets=split == "train", **names)
    read = f"{shown(path)}: read as task {task}: examples {len(examples):,}"
    return (describe_data(form, examples, path, columns) if form else read), TASKS[task].kind, examples


def _count_equal(examples: Sequence[Example]) -> tuple[int, int]:
    """Rows that are there before, and rows whose source alone is."""
    targets: dict[Any, list[str]] = {}
    for example in examples:
        source = (" ".join(example.source.split()), tuple(example.messages[:-1])) if example.source else example.targets
        targets.setdefault(source, []).extend(example.targets)
    distinct = sum(len(set(each)) for each in targets.values())
    return sum(map(len, targets.values())) - distinct, distinct - len(targets)


def measure_examples(
    config: TrainConfig,
    examples: Sequence[Example],
    kind: TaskKind,
    backbone: Backbone,
    unlimited: Backbone,
    *,
    max_tokenized: int,
    num_examples: int = 0,
) -> Measures:
    """Tokenize examples, and measure them.

    Args:
        config: The run.
        examples: Of its data; at least one has a target.
        kind: Of the task.
        backbone: It has as many positions as the model.
        unlimited: It has the same tokenizer, and any number of positions.
        max_tokenized: Examples that are tokenized, at most, evenly spaced.
        num_examples: Of all the data, of which the examples are a sample; 0: they are all.

    Raises:
        PrefixError: As in training.
    """
    solved: Sequence[Example] = [example for example in examples if example.targets]
    count = min(len(solved), max_tokenized)
    chosen: Sequence[Example] = [solved[index * len(solved) // count] for index in range(count)]
    labels = None
    if kind != "generation":
        labels = choose_labels(kind, unlimited, examples, by=config.classifier, words=config.words_by_label)
    by_head = labels is not None and labels.by == "head"
    if labels is not None and not by_head:
        chosen = with_label_words(chosen, labels)
    are_texts = unlimited.kind == "decoder" and all(map(is_text, chosen))
    if are_texts:
        around = {"prompt_format": TEXT_FORMAT.prompt, "target_format": TEXT_FORMAT.target}
        config = config.replace(**{name: getattr(config, name) or text for name, text in around.items()})
    text_format = training_format(config, unlimited, for_head=by_head, has_messages=has_messages(examples))

    def encode(reader: Backbone, example: Example, prefix_length: int, max_length: int) -> TokenizedDataset:
        limits: dict[str, Any] = {"prefix_length": prefix_length, "max_length": max_length}
        if labels is not None and by_head:
            return encode_labelled(reader, [example], labels, text_format, **limits)
        return encode_examples(reader, [example], text_format, **limits)

    limit = position_limit(backbone, config.prefix_length, config.max_length)
    whole: list[TokenizedExample] = []
    windows: list[TokenizedExample] = []
    cut = refused = 0
    for example in chosen:
        rows = encode(unlimited, example, 0, _UNBOUNDED).examples
        whole += rows
        if are_texts:
            windows += encode(backbone, example, config.prefix_length, config.max_length).examples
        elif max(_total(row, by_head) for row in rows) > limit:
            try:
                made = encode(backbone, example, config.prefix_length, config.max_length)
                cut += bool(made.num_truncated or made.num_dropped_turns)
            except DataError:
                refused += 1
    return Measures(
        tokenized=len(chosen),
        chat_template=text_format.is_chat,
        lengths=_all_lengths(whole, by_head),
        limit=Limit(positions=config.max_length or backbone.max_positions, cut=cut, refused=refused),
        steps=max(1, round(count_steps(config, windows or whole) * (num_examples or len(solved)) / len(chosen))),
        example=_parts(unlimited, whole[0], by_head),
    )


def _all_lengths(rows: Sequence[TokenizedExample], by_head: bool) -> list[Lengths]:
    sources = _lengths("source", [len(row.prompt) for row in rows])
    if by_head:
        return [sources]
    targets = [stop - first for row in rows for first, stop in _spans(row)]
    return [sources, _lengths("target", targets), _lengths("together", [_total(row, by_head) for row in rows])]


def _lengths(what: str, numbers: Sequence[int]) -> Lengths:
    ordered = sorted(numbers)
    shortest, longest = ordered[0], ordered[-1]
    p90, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.9, 0.99))
    width = -(-(longest - shortest + 1) // _NUM_BINS)
    counts = Counter((number - shortest) // width for number in ordered)
    starts = range(shortest, longest + 1, width)
    bins = [(start, start + width - 1, counts[index]) for index, start in enumerate(starts)]
    return Lengths(what=what, median=int(statistics.median(ordered)), p90=p90, p99=p99, longest=longest, bins=bins)


def _spans(row: TokenizedExample) -> Sequence[tuple[int, int]]:
    return row.turns or [(0, len(target)) for target in row.targets]


def _total(row: TokenizedExample, by_head: bool) -> int:
    """Tokens of the source and the longest target; a head's labels are no tokens."""
    return len(row.prompt) + (0 if by_head else max(map(len, row.targets)))


def _parts(backbone: Backbone, row: TokenizedExample, by_head: bool) -> list[Part]:
    """An example as the model reads it: its first target, in pieces with and without a loss."""
    pieces: list[tuple[Sequence[int], bool]] = [(row.prompt, False)]
    if not by_head:
        target, position = row.targets[0], 0
        for first, stop in row.turns or [(0, len(target))]:
            pieces += [(target[position:first], False), (target[first:stop], True)]
            position = stop
        pieces.append((target[position:], False))
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return [
        Part(text=str(backbone.tokenizer.decode(list(ids), **options)), is_label=is_label)
        for ids, is_label in pieces
        if ids
    ]
