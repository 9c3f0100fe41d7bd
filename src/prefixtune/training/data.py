"""The data of a run: its files read and checked, then turned into token ids."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.data import TASKS, Example, ExampleLike, as_examples, limit_targets
from prefixtune.data import read_data as read_task_data
from prefixtune.data.chat import chat_format, has_chat_template
from prefixtune.data.encoding import DEFAULT_WINDOW, TEXT_FORMAT, default_format
from prefixtune.data.examples import TaskKind, distinct_sources, has_messages, merge_examples, source_ids
from prefixtune.data.forms import Form, example_form
from prefixtune.data.labels import Labels, choose_labels, encode_rows, labels_of_example, read_labels, with_label_words
from prefixtune.data.streams import read_text
from prefixtune.data.tokenized import TokenizedDataset, TokenizedExample, hash_tokens
from prefixtune.errors import ConfigError, DataError, reading_development_data
from prefixtune.prefix.chat_format import allow_template
from prefixtune.prefix.text_format import MAX_TEMPLATE_CHARS, MODEL_TEMPLATE, TextFormat
from prefixtune.training.config import TrainConfig
from prefixtune.training.starts.build import resolve_site_lengths
from prefixtune.training.starts.examples import ExamplePlan, hide_own_blocks, plan_examples
from prefixtune.utils.console import Console

# --- files -> examples -----------------------------------------------------------------------------------------------


def read_data(
    config: TrainConfig, examples: Sequence[ExampleLike] | None, dev_examples: Sequence[ExampleLike] | None
) -> tuple[TrainConfig, Sequence[Example], Sequence[Example]]:
    """Read a run's files.

    Args:
        config: The run.
        examples: To train on; None: `config.train` is read.
        dev_examples: To choose the best prefix by; None: `config.dev` is read, if given.

    Returns:
        The configuration, with the form of the training data if it was recognized, and the task that this belongs to;
        the training and the development examples, as many as are used.

    Raises:
        ConfigError: There is no training file, or patience without development data.
        DataError: A file cannot be read.
    """
    form, train = _read(config, examples, "train")
    if form is not None:
        values = {"task": form.task, "form": form.name}
        if form.name == "text":
            values["prompt_format"] = config.prompt_format or TEXT_FORMAT.prompt
            values["target_format"] = config.target_format or TEXT_FORMAT.target
        config = config.replace(**values)
    train = limit_targets(train, config.limit)
    dev: Sequence[Example] = []
    if dev_examples is not None or config.dev:
        with reading_development_data():
            dev = limit_targets(_read(config, dev_examples, "dev")[1], config.dev_limit)
    elif config.hold_out:
        train, dev = _hold_out(config, train)
    if config.patience and not dev:
        raise ConfigError(f"patience is {config.patience} without development data.", hint="set dev (--dev FILE).")
    _check_labels(config, train, dev)
    return config, train, dev


def _check_labels(config: TrainConfig, train: Sequence[Example], dev: Sequence[Example]) -> None:
    """Refuse options that the labels of the data do not go with.

    Raises:
        ConfigError: There are no labels, or other ones, or the run cannot learn any.
        DataError: There are fewer than two labels, or the development examples have others.
    """
    kind = _task_kind(config)
    if kind == "generation":
        for name in ("classifier", "label_words"):
            if getattr(config, name) != config.default(name):
                what = f"{name} is {getattr(config, name)!r}, but task {config.task!r} has no labels."
                raise ConfigError(what, hint="use --task classification.")
        return
    read_labels(kind, train, dev, by=config.classifier, words=config.words_by_label)
    if config.keep_general:
        what = f"keep_general is {config.keep_general:g}, but only prefixes that write texts learn general requests."
        raise ConfigError(what, hint="leave it out.")
    if kind == "tagging" or config.classifier == "head":
        _check_head(config)


def _check_head(config: TrainConfig) -> None:
    """Refuse a run that cannot train a head.

    Raises:
        ConfigError: It starts from examples, or trains no prefix.
    """
    if config.initialization == "examples":
        raise ConfigError("initialization is 'examples', but a head learns labels.", hint="use classifier = 'words'.")
    if not config.trains_prefix:
        raise ConfigError(f"method {config.method!r} trains no head.", hint="use classifier = 'words'.")


def _task_kind(config: TrainConfig) -> TaskKind:
    return TASKS[config.task].kind if config.task in TASKS else "generation"


def _read(
    config: TrainConfig, given: Sequence[ExampleLike] | None, split: str
) -> tuple[Form | None, Sequence[Example]]:
    """The examples of a file, of a folder's split, or that a caller gave; at least one has a target.

    Returns:
        Their form, if it was recognized; and the examples.
    """
    source, target, is_train = config.source or None, config.target or None, split == "train"
    if given is None:
        parts = TASKS[config.task].parts if config.task in TASKS else ()
        path = (config.train if is_train else config.dev) or (*parts, "")[0]
        if not path:
            raise ConfigError("no training file is given.", hint="set train (--train FILE).")
        # Development data may have another form.
        wanted = {"form" if is_train else "prefer": config.form}
        read = read_task_data(
            config.task, path, source=source, target=target, split=split, needs_targets=True, **wanted
        )
        form, examples = read.form, read.examples
    else:
        wanted, form = {"form": config.form if is_train else ""}, None
        if is_train and config.task == "records" and not (source or target):
            form = example_form(given, **wanted)
        examples = as_examples(given, source, target, **wanted, needs_targets=True)
        # Rows as those of a file; where there are none, the caller has grouped the targets.
        if (form or config.form) and (config.task if form is None else form.task) == "records":
            examples = merge_examples(examples)
    if not any(example.targets for example in examples):
        what = f"there are {len(examples):,} examples, and none has a target."
        raise DataError(what, hint="name its column (--target), or give another file.")
    return form, examples


def _hold_out(config: TrainConfig, train: Sequence[Example]) -> tuple[Sequence[Example], Sequence[Example]]:
    """Divide the examples into those to train on and a share of the sources, with all their targets, to develop with.

    Raises:
        DataError: There is only one source, or each that was drawn has a label of its own.
    """
    sources, ids = distinct_sources(train), source_ids(train)
    if len(sources) < 2:
        raise DataError(f"hold_out is {config.hold_out:g}, but there is only one training source.", hint="set it to 0.")
    count = min(max(1, round(config.hold_out * len(sources))), len(sources) - 1)
    drawn = random.Random(f"{config.seed}/hold_out").sample(range(len(sources)), count)
    held = {ids[sources[index]] for index in drawn}
    if (kind := _task_kind(config)) != "generation":
        # An example is trained on if no other that is left has its label.
        labels = [labels_of_example(example, number, kind) for number, example in enumerate(train, start=1)]
        known = {label for one, own in zip(ids, labels, strict=True) if one not in held for label in own}
        held -= {one for one, own in zip(ids, labels, strict=True) if not known.issuperset(own)}
    if not held:
        raise DataError("no example can be held out, as no other has its label.", hint="set hold_out to 0.")
    dev = [example for one, example in zip(ids, train, strict=True) if one in held]
    left = [example for one, example in zip(ids, train, strict=True) if one not in held]
    return left, limit_targets(dev, config.dev_limit)


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
        prefix_length: P of the decoder.
        questions: Of a memory, questions with their answers, to be stored with it.
        digest: Tells this data from any other, so that a run is never resumed on other data.
        general: Requests about other things, with the bare model's labels.
    """

    train: TokenizedDataset
    dev: TokenizedDataset | None
    text_format: TextFormat
    labels: Labels | None
    digest: str
    plan: ExamplePlan | None = None
    prefix_length: int = 0
    questions: Sequence[tuple[str, str]] = ()
    general: Sequence[TokenizedExample] = ()

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
        console: Says where texts are learned in windows; None: nothing does.

    Raises:
        CheckpointError: The start to resume from is not in the data.
        ConfigError: The backbone cannot do the task, or has no such site.
        DataError: An example does not fit, or a template cannot be stored.
    """
    labels = _choose_labels(config, backbone, examples, dev_examples)
    by_head = labels is not None and labels.by == "head"
    if by_head:
        _check_head(config)
    text_format = training_format(
        config, backbone, for_head=by_head, for_labels=labels is not None, has_messages=has_messages(examples)
    )
    lengths = resolve_site_lengths(config, backbone, stored_start) if config.trains_prefix else {}

    if labels is not None and not by_head:
        examples, dev_examples = (with_label_words(some, labels) for some in (examples, dev_examples))
    limits: dict[str, Any] = {"max_length": config.max_length, "on_too_long": config.on_too_long}
    plan = None
    if config.initialization == "examples" and config.trains_prefix:
        plan = plan_examples(config, backbone, text_format, examples, lengths, stored_start)
        lengths = plan.site_lengths
    limits["prefix_length"] = lengths.get("decoder", 0)
    train = encode_rows(backbone, examples, labels, text_format, **limits)
    if console is not None and config.form == "text" and len(train.examples) > len(examples):
        console.info(
            f"texts longer than {config.max_length or DEFAULT_WINDOW:,} positions (max_length) are learned in windows: "
            f"{len(examples):,} texts, {len(train.examples):,} windows"
        )
    if plan is not None:
        train = dataclasses.replace(train, examples=hide_own_blocks(train, examples, plan))
    dev = None
    if dev_examples:
        # What is held out is of the training data.
        is_given = config.dev or not config.hold_out
        with reading_development_data() if is_given else contextlib.nullcontext():
            dev = encode_rows(backbone, dev_examples, labels, text_format, **limits)
    if config.form != "text":  # which may have any beginning to go on with
        longest = max(train.longest_prompt, dev.longest_prompt if dev is not None else 0)
        text_format = dataclasses.replace(text_format, longest_target=train.longest_target, longest_prompt=longest)
    return TrainData(train, dev, text_format, labels, _digest(train, dev), plan, limits["prefix_length"])


def _choose_labels(
    config: TrainConfig, backbone: Backbone, examples: Sequence[Example], dev_examples: Sequence[Example]
) -> Labels | None:
    """What a run learns to classify; None: it learns to generate."""
    kind = _task_kind(config)
    if kind != "generation":
        return choose_labels(kind, backbone, examples, dev_examples, by=config.classifier, words=config.words_by_label)
    if config.form == "text" and backbone.kind != "decoder":
        raise ConfigError(f"{backbone.name!r} does not go on with a text.", hint="choose a decoder-only model.")
    if backbone.kind == "encoder":
        raise ConfigError(
            f"{backbone.name!r} is an encoder, which reads text and writes none, but task {config.task!r} generates.",
            hint="choose a model that generates, or --task classification or tagging.",
        )
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
        ConfigError: The backbone cannot have the chat template, or there is a system message and no template.
        DataError: The template's file cannot be read, or a template cannot be stored in a header.
    """
    default = default_format(backbone, for_head=for_head)
    written = TextFormat(config.prompt_format or default.prompt, config.target_format or default.target)
    chats = backbone.kind == "decoder" and not for_labels
    if config.chat_template not in ("", "none") and not chats:
        what = f"chat_template is {config.chat_template!r}, but only decoders read chats."
        raise ConfigError(what, hint="leave it out.")
    template = read_template(config)
    if template not in ("", MODEL_TEMPLATE):
        # Named by the user, so that what the run makes can be used at once.
        allow_template(template, remember=True)
    own = not (config.chat_template or config.prompt_format or config.target_format)
    if own and chats and has_messages and has_chat_template(backbone):
        template = MODEL_TEMPLATE
    if config.system and not template:
        raise ConfigError("system is given, but no chat template.", hint="give one (--chat-template).")
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


def read_template(config: TrainConfig) -> str:
    """The chat template that the configuration names; empty: none.

    Raises:
        DataError: The file cannot be read, or its template is too large to be stored.
    """
    template = "" if config.chat_template == "none" else config.chat_template
    if template not in ("", MODEL_TEMPLATE):
        template = read_text(Path(template), max_bytes=4 * MAX_TEMPLATE_CHARS, needed="a template")
        # Its length.
        TextFormat.from_dict({"chat_template": template})
    return template


def _digest(*datasets: TokenizedDataset | None) -> str:
    """A hash of all token ids."""
    total = hashlib.sha256()
    for dataset in datasets:
        if dataset is not None:
            hash_tokens(dataset.examples, total.update)
        total.update(b"|")
    return total.hexdigest()
