"""What a training run would read of a file: its form, lengths in tokens, an example with its labels, duplicates.

Only a tokenizer is loaded. Of a large file the first rows are read, and of these as many are tokenized as a person
waits for; the report says so.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import load_tokenizer
from prefixtune.data.encoding import encode_examples, encode_prompts
from prefixtune.data.examples import Example, TaskKind, merge_examples
from prefixtune.data.files import iter_file
from prefixtune.data.folders import locate
from prefixtune.data.forms import TEMPLATES, describe_data, make_example
from prefixtune.data.labels import ClassifierKind, choose_labels, with_label_words
from prefixtune.data.registry import TASKS, read_task, resolve_task
from prefixtune.data.tokenized import TokenizedExample
from prefixtune.data.truncation import template_lengths
from prefixtune.data.windows import TEXT_FORMAT, is_text
from prefixtune.errors import DataError, PrefixError
from prefixtune.evaluation.overlap import find_overlap
from prefixtune.training.config import TrainConfig
from prefixtune.training.data import training_format
from prefixtune.training.schedule import optimizer_steps

__all__ = ["DataReport", "Lengths", "Limit", "Measures", "Part", "measure_examples", "report_data"]

_UNBOUNDED = 1 << 30
_NUM_BINS = 10


@dataclass(frozen=True)
class Lengths:
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


@dataclass(frozen=True)
class Limit:
    """What happens to the examples at a limit of positions.

    Attributes:
        positions: The limit (`max_length`).
        cut: Examples that lose something: the end of a source, or the last turns of a conversation; texts alone lose
            nothing.
        refused: Examples whose target alone does not fit; training would stop with an error.
        name: Whose limit it is.
    """

    positions: int
    cut: int
    refused: int
    name: str = ""


@dataclass(frozen=True)
class Part:
    """A piece of an example as the model reads it; the loss is on it or not."""

    text: str
    is_label: bool


@dataclass(frozen=True)
class DataReport:
    """What a file holds.

    Attributes:
        read: One line: the form, and how much.
        rows: That were read.
        is_whole: These are all rows.
        examples: Of these rows, equal sources merged.
        tokenized: Examples whose lengths are known.
        backbone: Whose tokens are counted.
        chat_template: Whether a chat template writes the examples.
        lengths: Of sources, targets and both.
        limits: What would be cut at which length.
        positions: Positions of an optimizer step: mean and most, with the prefix; and the steps of an epoch.
        example: The first example, in pieces.
        more_targets: Further targets of the first example.
        equal_rows: Rows that are there before.
        equal_sources: Rows whose source is there before, with another target.
        labels: Label -> how many, for classification.
        overlap: Of a test file: how many of its sources are here.
    """

    read: str
    rows: int
    is_whole: bool
    examples: int
    tokenized: int
    backbone: str
    chat_template: bool
    lengths: list[Lengths]
    limits: list[Limit]
    positions: dict[str, int]
    example: list[Part]
    more_targets: int
    equal_rows: int
    equal_sources: int
    labels: dict[str, int] = field(default_factory=dict)
    overlap: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def report_data(
    config: TrainConfig, *, test: str = "", max_rows: int = 100_000, max_tokenized: int = 2_000
) -> DataReport:
    """Look at a run's training file; nothing is written and no weights are loaded.

    Args:
        config: The run: its `train`, `task`, `form`, `source`, `target`, `backbone`, `max_length`, `prefix_length`, and
            so on.
        test: A file whose sources are compared; empty: none.
        max_rows: Rows that are read of either file, at most; 0: all.
        max_tokenized: Examples that are tokenized, at most, evenly spaced.

    Raises:
        PrefixError: A file cannot be read, or an option is wrong; as in training.
    """
    data = _read(config, config.train, max_rows, "train")
    rows, kind = data.rows, data.kind
    if not any(row.targets for row in rows):
        raise DataError(f"{config.train} has no targets.", hint="name the target column (--target).")
    if kind != "generation" and not data.is_whole:
        _check_labels(config, rows, kind)
    merged = merge_examples(rows) if data.merges else rows
    backbone, unlimited = (load_tokenizer(config.backbone, limited=limited) for limited in (True, False))
    counts = dict(Counter(target for row in rows for target in row.targets)) if kind == "classification" else {}
    measures = measure_examples(config, merged, kind, backbone, unlimited, max_tokenized=max_tokenized)
    test_rows = _read(config, test, max_rows, "test").rows if test else []
    numbers = _row_counts(rows)
    return DataReport(
        data.title,
        len(rows),
        data.is_whole,
        len(merged),
        len(measures.examples),
        config.backbone,
        measures.chat_template,
        measures.lengths,
        measures.limits,
        measures.positions,
        measures.parts,
        len(measures.examples[0].targets) - 1,
        *numbers,
        dict(sorted(counts.items(), key=lambda pair: -pair[1])),
        find_overlap(test_rows, rows, config.train).to_dict() if test else None,
    )


@dataclass(frozen=True)
class Measures:
    """What tokens say of examples.

    Attributes:
        examples: Those that were tokenized.
        chat_template: Whether a chat template writes them.
        lengths: As in `DataReport`, like the others.
        limits: Likewise.
        positions: Likewise.
        parts: Of the first example.
    """

    examples: Sequence[Example]
    chat_template: bool
    lengths: list[Lengths]
    limits: list[Limit]
    positions: dict[str, int]
    parts: list[Part]


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
    chosen: Sequence[Example] = _spread([example for example in examples if example.targets], max_tokenized)
    by_head = False
    are_texts = unlimited.kind == "decoder" and all(map(is_text, chosen))
    if kind != "generation":
        labels = choose_labels(kind, unlimited, examples, by=config.classifier, words=config.words_by_label)
        by_head = labels.by == "head"
        if not by_head:
            chosen = list(with_label_words(chosen, labels))
    if are_texts:
        around = {"prompt_format": TEXT_FORMAT.prompt, "target_format": TEXT_FORMAT.target}
        config = config.replace(**{name: getattr(config, name) or text for name, text in around.items()})
    has_messages = any(example.messages for example in examples)
    text_format = training_format(config, unlimited, for_head=by_head, has_messages=has_messages)
    if by_head:
        # A head reads the source alone: its labels take no positions.
        prompts = encode_prompts(unlimited, text_format, [example.source for example in chosen])
        tokenized = [TokenizedExample(tuple(prompt), ((),)) for prompt in prompts]
    else:
        # Texts, too, are whole here.
        whole = encode_examples(unlimited, chosen, text_format, prefix_length=0, max_length=_UNBOUNDED)
        tokenized = list(whole.examples)
    windows = tokenized
    if are_texts:
        in_windows = encode_examples(
            backbone, chosen, text_format, prefix_length=config.prefix_length, max_length=config.max_length
        )
        windows = list(in_windows.examples)
    template = sum(template_lengths(unlimited, text_format, "a"))
    factor = (num_examples or len(examples)) / max(len(chosen), 1)
    return Measures(
        chosen,
        text_format.is_chat,
        _all_lengths(tokenized, by_head),
        # Training learns all of a text, in as many windows as it needs.
        _limits(config, backbone, [] if are_texts else tokenized, template, by_head),
        {} if by_head else _positions(config, backbone, windows, factor),
        _parts(unlimited, tokenized[0], by_head),
    )


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """What was read of a file.

    Attributes:
        rows: The example of each row; of a task that is not read by rows, those of training.
        is_whole: Whether these are all.
        title: One line for people.
        kind: Of the task.
        merges: Whether training makes one example of equal sources.
    """

    rows: list[Example]
    is_whole: bool
    title: str
    kind: TaskKind
    merges: bool = False


def _read(config: TrainConfig, path: str, most: int, split: str) -> _Data:
    """Read a file as training would, row by row where that can be done.

    Args:
        config: The run.
        path: A file; of a folder or a set with splits, the one of that name is read.
        most: Rows that are read, at most; 0: all.
        split: `train` or `test`.
    """
    source, target = config.source or None, config.target or None
    task, found, columns = resolve_task(config.task, path, source=source, target=target, split=split, form=config.form)
    chosen = TASKS[task]
    if found is None and not (config.task == "records" and source):
        examples = read_task(task, path, source=source, target=target, split=split)
        return _Data(examples, True, f"{path}: read as task {task}: {len(examples):,} examples", chosen.kind)
    every = iter_file(locate(Path(path), split, chosen.formats, chosen.release))
    records = itertools.islice(every, most) if most else every
    # As training refuses them.
    needed = target is not None if found is None else split == "train" or found.task != "records"
    kept = [
        make_example(record, found or TEMPLATES, needs_targets=needed, templates=(source, target)) for record in records
    ]
    is_whole = next(every, None) is None
    title = f"{path}: read by templates: {len(kept):,} rows"
    if found is not None:
        title = describe_data(found, kept, path, columns)
    return _Data(kept, is_whole, title, chosen.kind, chosen.merges)


def _check_labels(config: TrainConfig, rows: Sequence[Example], kind: TaskKind) -> None:
    """Refuse the first rows of a file, if a run could not be made of their labels alone.

    Raises:
        PrefixError: They have too few, or not one that the run names; the rest of the file may have it.
    """
    by: ClassifierKind | Literal["auto"] = "head" if config.classifier == "head" else "auto"
    try:
        choose_labels(kind, None, rows, by=by, words=config.words_by_label)
    except PrefixError as error:
        raise type(error)(
            f"in the first {len(rows):,} rows of {config.train}: {error.message}",
            hint=f"read all rows: --rows 0; if there are no others, {error.hint}",
        ) from error


def _spread(examples: Sequence[Example], most: int) -> list[Example]:
    """Some of the examples, evenly spaced, the first one among them."""
    count = min(len(examples), most)
    return [examples[index * len(examples) // count] for index in range(count)]


def _row_counts(rows: Sequence[Example]) -> tuple[int, int]:
    """Rows that are there before, and rows whose source alone is."""
    sources: set[Any] = set()
    whole: set[Any] = set()
    equal_rows = equal_sources = 0
    for row in rows:
        source = (" ".join(row.source.split()), row.messages[:-1]) if row.source else row.targets
        if (source, row.targets) in whole:
            equal_rows += 1
        elif source in sources:
            equal_sources += 1
        sources.add(source)
        whole.add((source, row.targets))
    return equal_rows, equal_sources


# --- lengths ---------------------------------------------------------------------------------------------------------


def _all_lengths(tokenized: Sequence[TokenizedExample], by_head: bool) -> list[Lengths]:
    sources = [len(example.prompt) for example in tokenized]
    if by_head:
        return [_lengths("source", sources)]
    targets = [stop - first for example in tokenized for first, stop in _spans(example)]
    whole = [_whole(example, by_head) for example in tokenized]
    return [_lengths("source", sources), _lengths("target", targets), _lengths("together", whole)]


def _lengths(what: str, numbers: Sequence[int]) -> Lengths:
    ordered = sorted(numbers)
    longest = ordered[-1]

    def quantile(share: float) -> int:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    shortest = ordered[0]
    width = -(-(longest - shortest + 1) // _NUM_BINS)
    counts = Counter((number - shortest) // width for number in ordered)
    starts = range(shortest, longest + 1, width)
    bins = [(start, start + width - 1, counts[index]) for index, start in enumerate(starts)]
    return Lengths(what, int(statistics.median(ordered)), quantile(0.9), quantile(0.99), longest, bins)


def _limits(
    config: TrainConfig, backbone: Backbone, tokenized: Sequence[TokenizedExample], around: int, by_head: bool
) -> list[Limit]:
    """What would be cut at the run's own limit, and at the model's."""
    separate = backbone.kind == "encoder-decoder"

    def at(positions: int, name: str) -> Limit:
        model = backbone.max_positions
        taken = backbone.prefix_positions(config.prefix_length)
        room = positions if model is None else min(positions, model - taken)
        cut = refused = 0
        for example in tokenized:
            # Of a conversation the last turns are left out first; the first one's message is cut last.
            spans = _spans(example)[:1] if example.turns else _spans(example)
            longest = 0 if by_head else max(stop - first for first, stop in spans)
            left = room if separate else room - longest
            is_long = len(example.prompt) > left
            if longest > room or (is_long and left <= around):
                refused += 1
            else:
                cut += is_long or (_whole(example, by_head) > room and not separate)
        return Limit(positions, cut, refused, name)

    own = {config.max_length: "--max-length", backbone.max_positions: f"all that {config.backbone} has"}
    return [at(positions, name) for positions, name in own.items() if positions]


def _spans(example: TokenizedExample) -> Sequence[tuple[int, int]]:
    return example.turns or [(0, len(target)) for target in example.targets]


def _whole(example: TokenizedExample, by_head: bool) -> int:
    return len(example.prompt) + (0 if by_head else max(map(len, example.targets)))


def _positions(
    config: TrainConfig, backbone: Backbone, tokenized: Sequence[TokenizedExample], factor: float
) -> dict[str, int]:
    """Positions that the model computes in an optimizer step, without padding; of the examples that were tokenized."""
    model = backbone.max_positions
    most = min(config.max_length or _UNBOUNDED, _UNBOUNDED if model is None else model)
    steps = [
        sum(min(most, len(example.prompt) + sum(map(len, example.targets))) for batch in step for example in batch)
        for step in optimizer_steps(config, tokenized, epoch=0)
    ]
    return {"mean": round(statistics.mean(steps)), "most": max(steps), "steps": max(1, round(len(steps) * factor))}


# --- an example ------------------------------------------------------------------------------------------------------


def _parts(backbone: Backbone, example: TokenizedExample, by_head: bool) -> list[Part]:
    """An example as the model reads it: its first target, in pieces with and without a loss."""

    def text(ids: Sequence[int]) -> str:
        return str(backbone.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    parts = [Part(text(example.prompt), False)]
    if by_head:
        return parts
    target, position = example.targets[0], 0
    for first, stop in example.turns or [(0, len(target))]:
        if first > position:
            parts.append(Part(text(target[position:first]), False))
        parts.append(Part(text(target[first:stop]), True))
        position = stop
    if position < len(target):
        parts.append(Part(text(target[position:]), False))
    return parts
