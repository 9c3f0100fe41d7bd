"""The data of a run: read and checked, then turned into token ids, then put in the order of its steps."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.data import TASKS, Example, ExampleLike, as_examples, form_that_fits, limit_targets, read_task
from prefixtune.data.chat import chat_format
from prefixtune.data.encoding import default_format, encode_examples
from prefixtune.data.examples import TaskKind, distinct_sources, has_messages, merge_examples, source_ids
from prefixtune.data.labels import Labels, choose_labels, encode_labelled, with_label_words
from prefixtune.data.order import TargetGroup, plan_epoch, take
from prefixtune.data.tokenized import TokenizedDataset, TokenizedExample, hash_tokens, target_counts, turn_counts
from prefixtune.errors import ConfigError, DataError
from prefixtune.prefix.text_format import TextFormat
from prefixtune.training.chat import choose_template
from prefixtune.training.checks import check_generates, check_no_labels, no_solved_examples
from prefixtune.training.config import TrainConfig
from prefixtune.training.distributed import ProcessGroup
from prefixtune.training.folder import check_unused
from prefixtune.training.forms import check_texts_alone
from prefixtune.training.starts.build import resolve_site_lengths
from prefixtune.training.starts.examples import ExamplePlan, check_example_count, hide_own_blocks, plan_examples
from prefixtune.utils.console import Console

__all__ = [
    "TrainData",
    "count_steps",
    "does_hold_out",
    "is_large_file",
    "optimizer_steps",
    "plan_steps",
    "read_data",
    "tokenize",
    "training_format",
]


_LARGE_BYTES = 2**25
"""Bytes of a file from which on it is said that it is read."""
_MANY = 20_000
"""Examples from which on it is said that they are tokenized."""

# --- files -> examples -----------------------------------------------------------------------------------------------


def read_data(
    config: TrainConfig,
    examples: Sequence[ExampleLike] | None,
    dev_examples: Sequence[ExampleLike] | None,
    processes: ProcessGroup,
    *,
    resume: bool,
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Read a run's files, and refuse what its options do not go with.

    Args:
        config: The run.
        examples: To train on; None: `config.train` is read.
        dev_examples: To choose the best prefix by; None: `config.dev` is read, if given.
        processes: Those of the run; the first one checks the folder.
        resume: The folder may hold a run.

    Returns:
        The training and the development examples, as many as are used.

    Raises:
        ConfigError: An option does not go with the data, or the folder holds a run.
        DataError: A file cannot be read.
    """
    if not resume and processes.is_main:
        check_unused(Path(config.output))
    train: Sequence[Example] = limit_targets(_training_examples(config, examples), config.limit)
    dev: Sequence[Example] = limit_targets(_development_examples(config, dev_examples), config.dev_limit)
    if does_hold_out(config, dev_examples):
        train, dev = _hold_out(config, train)
    if config.patience and not dev:
        raise ConfigError(
            f"patience is {config.patience}, but patience needs a development file to evaluate on.",
            hint="set dev (--dev FILE), or patience to 0.",
        )
    kind = _task_kind(config)
    if kind == "generation":
        check_no_labels(config)
    else:
        choose_labels(kind, None, train, dev, by=config.classifier, words=config.words_by_label)
    check_example_count(config, train)
    check_texts_alone(config)
    return train, dev


def is_large_file(path: str) -> bool:
    """Whether reading a file takes long."""
    return os.path.isfile(path) and os.path.getsize(path) >= _LARGE_BYTES


def does_hold_out(config: TrainConfig, dev_examples: Sequence[ExampleLike] | None) -> bool:
    """Whether a share of the training sources becomes the development examples; not where there are some."""
    return bool(config.hold_out) and not config.dev and dev_examples is None


def _hold_out(config: TrainConfig, train: Sequence[Example]) -> tuple[Sequence[Example], Sequence[Example]]:
    """Divide the examples into those to train on and a share of the sources, with all their targets, to develop with.

    Raises:
        DataError: There is only one source.
    """
    sources, ids = distinct_sources(train), source_ids(train)
    if len(sources) < 2:
        raise DataError(
            f"hold_out is {config.hold_out:g}, but there is only one training source.",
            hint="give more data or a development file, or set hold_out to 0.",
        )
    count = min(max(1, round(config.hold_out * len(sources))), len(sources) - 1)
    drawn = random.Random(f"{config.seed}/hold_out").sample(range(len(sources)), count)
    held = {ids[sources[index]] for index in drawn}
    dev = [example for one, example in zip(ids, train, strict=True) if one in held]
    left = [example for one, example in zip(ids, train, strict=True) if one not in held]
    return left, limit_targets(dev, config.dev_limit)


def _task_kind(config: TrainConfig) -> TaskKind:
    return TASKS[config.task].kind if config.task in TASKS else "generation"


def _training_examples(config: TrainConfig, examples: Sequence[ExampleLike] | None) -> Sequence[Example]:
    if examples is not None:
        return _with_targets(_convert(config, examples, "example"), "training")
    parts = TASKS[config.task].parts if config.task in TASKS else ()
    if not config.train and config.task in TASKS and not parts:
        raise ConfigError("no training file is given.", hint="set train (--train FILE).")
    return _with_targets(_read(config, config.train or (*parts, "")[0], "train"), "training")


def _development_examples(config: TrainConfig, examples: Sequence[ExampleLike] | None) -> Sequence[Example]:
    if examples is not None:
        return _with_targets(_convert(config, examples, "development example"), "development")
    return _with_targets(_read(config, config.dev, "dev"), "development") if config.dev else []


def _read(config: TrainConfig, path: str, split: str) -> Sequence[Example]:
    """The examples of a file, or of a folder's split."""
    # Development data may have another form.
    form = config.form if split == "train" else form_that_fits(config.task, path, config.form, split=split)
    return read_task(
        config.task,
        path,
        source=config.source or None,
        target=config.target or None,
        split=split,
        form=form,
        needs_targets=True,
    )


def _convert(config: TrainConfig, examples: Sequence[ExampleLike], what: str) -> list[Example]:
    """The examples that a caller gave."""
    form = config.form if what == "example" else ""
    converted = as_examples(examples, config.source or None, config.target or None, what, form=form, needs_targets=True)
    # As those of a file; without a form, the caller has grouped the targets.
    return merge_examples(converted) if config.form and config.task == "records" else converted


def _with_targets(examples: Sequence[Example], what: str) -> Sequence[Example]:
    """The examples, at least one of which must have a target."""
    if not examples:
        raise DataError(f"the {what} data has no example.", hint="check the file and `limit`.")
    if not any(example.targets for example in examples):
        raise DataError(
            f"the {what} data has {len(examples):,} examples, and none has a target to learn.",
            hint="name the column or template of the targets (--target), or give another file.",
        )
    return examples


# --- examples -> tokens ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainData:
    """What a run learns from, as token ids.

    Attributes:
        train: To train on.
        dev: To choose the best prefix by; None: there is none.
        text_format: The text around source and target, with the lengths that training left whole.
        labels: What the run learns to classify; None: it learns to generate.
        plan: The training examples that the prefix starts from; None: it starts from something else.
        digest: Tells this data from any other, so that a run is never resumed on other data.
    """

    train: TokenizedDataset
    dev: TokenizedDataset | None
    text_format: TextFormat
    labels: Labels | None
    digest: str
    plan: ExamplePlan | None = None

    @property
    def has_head(self) -> bool:
        """Whether a head is trained with the prefix."""
        return self.labels is not None and self.labels.by == "head"

    @property
    def head_labels(self) -> Sequence[str]:
        """The labels that a head tells apart, in order; empty: there is no head."""
        return self.labels.names if self.labels is not None and self.has_head else ()


def tokenize(
    config: TrainConfig,
    backbone: Backbone,
    examples: Sequence[Example],
    dev_examples: Sequence[Example],
    *,
    stored_start: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> TrainData:
    """Choose the labels, and the examples to start from, and turn a run's examples into token ids.

    Args:
        config: The run.
        backbone: The frozen model.
        examples: To train on.
        dev_examples: To choose the best prefix by.
        stored_start: How the run that is resumed describes its start; None: it begins.
        console: Says so where the examples are many; None: nothing does.

    Raises:
        CheckpointError: The start to resume from is not in the data.
        ConfigError: The backbone cannot do the task, or has no such site.
        DataError: An example does not fit, or a template cannot be stored.
    """
    labels = _choose_labels(config, backbone, examples, dev_examples)
    text_format = training_format(
        config,
        backbone,
        for_head=labels is not None and labels.by == "head",
        for_labels=labels is not None,
        has_messages=has_messages(examples),
    )
    lengths = resolve_site_lengths(config, backbone, stored_start) if config.trains_prefix else {}

    def encode(examples: Sequence[Example], prefix_length: int) -> TokenizedDataset:
        if console is not None and len(examples) > _MANY:
            console.info(f"tokenizing {len(examples):,} examples ...")
        return _tokenize(config, backbone, examples, labels, text_format, prefix_length)

    plan = None
    if config.initialization == "examples" and config.trains_prefix:
        if labels is not None and labels.by == "head":
            raise no_solved_examples()
        plan = plan_examples(
            config,
            backbone,
            text_format,
            examples if labels is None else with_label_words(examples, labels),
            lengths,
            stored_start,
        )
        lengths = plan.site_lengths
    train = encode(examples, lengths.get("decoder", 0))
    if plan is not None:
        train = dataclasses.replace(train, examples=hide_own_blocks(train, examples, plan))
    dev = encode(dev_examples, lengths.get("decoder", 0)) if dev_examples else None
    if config.form != "text":  # which may have any beginning to go on with
        text_format = dataclasses.replace(
            text_format,
            longest_target=train.longest_target,
            longest_prompt=max(dataset.longest_prompt for dataset in (train, dev) if dataset is not None),
        )
    return TrainData(train, dev, text_format, labels, _digest(train, dev), plan)


def _choose_labels(
    config: TrainConfig, backbone: Backbone, examples: Sequence[Example], dev_examples: Sequence[Example]
) -> Labels | None:
    """What a run learns to classify; None: it learns to generate."""
    kind = _task_kind(config)
    if kind != "generation":
        return choose_labels(kind, backbone, examples, dev_examples, by=config.classifier, words=config.words_by_label)
    check_generates(config, backbone)
    return None


def training_format(
    config: TrainConfig,
    backbone: Backbone,
    *,
    for_head: bool = False,
    for_labels: bool = False,
    has_messages: bool = False,
) -> TextFormat:
    """The text format of a training run, as its header stores it.

    Args:
        config: The run.
        backbone: The frozen model.
        for_head: A head is trained.
        for_labels: Labels are learned, by a head or as words.
        has_messages: The data is chats, or prompts and completions: the backbone's own chat template writes them,
            unless the configuration says otherwise.

    Raises:
        ConfigError: The backbone cannot have the chat template.
        DataError: A template cannot be stored in a header.
    """
    default = default_format(backbone, for_head=for_head)
    written = TextFormat(config.prompt_format or default.prompt, config.target_format or default.target)
    template = choose_template(config, backbone, for_labels=for_labels, has_messages=has_messages)
    if template:
        written = chat_format(backbone, template, config.system)
    return dataclasses.replace(
        written,
        separator=backbone.separator,
        end=written.end or backbone.end,
        source=config.source,
        target_template=config.target,
        max_length=config.max_length,
        on_too_long=config.on_too_long,
    )


def _tokenize(
    config: TrainConfig,
    backbone: Backbone,
    examples: Sequence[Example],
    labels: Labels | None,
    text_format: TextFormat,
    prefix_length: int,
) -> TokenizedDataset:
    limits: dict[str, Any] = {
        "prefix_length": prefix_length,
        "max_length": config.max_length,
        "on_too_long": config.on_too_long,
    }

    if labels is not None and labels.by == "head":
        return encode_labelled(backbone, examples, labels, text_format, **limits)
    if labels is not None:
        examples = with_label_words(examples, labels)
    return encode_examples(backbone, examples, text_format, **limits)


def _digest(*datasets: TokenizedDataset | None) -> str:
    """A hash of all token ids."""
    total = hashlib.sha256()
    for dataset in datasets:
        if dataset is not None:
            hash_tokens(dataset.examples, total.update)
        total.update(b"|")
    return total.hexdigest()


# --- tokens -> steps -------------------------------------------------------------------------------------------------


def plan_steps(
    config: TrainConfig, examples: Sequence[TokenizedExample], epoch: int
) -> Iterator[list[list[TargetGroup]]]:
    """The batches of every optimizer step of an epoch; they depend on the seed and the epoch alone."""
    batches = plan_epoch(
        target_counts(examples),
        turn_counts(examples),
        batch_size=config.batch_size,
        targets_per_source=config.targets_per_source,
        seed=config.seed,
        epoch=epoch,
    )
    while step := list(itertools.islice(batches, config.gradient_accumulation)):
        yield step


def count_steps(config: TrainConfig, examples: Sequence[TokenizedExample]) -> int:
    """The optimizer steps of an epoch; where conversations make them differ, of the first."""
    if turn_counts(examples) is not None:
        return sum(1 for _ in plan_steps(config, examples, epoch=0))
    # Every batch but the last is full.
    batches = -(-sum(target_counts(examples)) // config.batch_size)
    return -(-batches // config.gradient_accumulation)


def optimizer_steps(
    config: TrainConfig, examples: Sequence[TokenizedExample], epoch: int
) -> Iterator[list[list[TokenizedExample]]]:
    """The examples of every optimizer step of an epoch, as `plan_steps` plans them."""
    for step in plan_steps(config, examples, epoch):
        yield [take(examples, batch) for batch in step]
