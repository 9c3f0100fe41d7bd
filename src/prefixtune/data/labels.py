"""The labels of a prefix that classifies or tags, and examples with labels -> token ids."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.encoding import TokenizedDataset, TokenizedExample, TurnsAs, encode_examples, encode_prompts
from prefixtune.data.examples import Example, TaskKind
from prefixtune.data.truncation import fit_source, named_example, position_limit, template_lengths
from prefixtune.errors import ConfigError, DataError, RequestError, did_you_mean, reading_development_data, short_repr
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat, TruncationPolicy, bounded

ClassifierKind = Literal["head", "words"]
"""How labels are predicted: by a trained linear layer, or by the language model's probability of each label's word."""


@dataclass(frozen=True)
class Labels:
    """The labels of a prefix that classifies or tags, as stored in its header.

    Attributes:
        kind: `classification` or `tagging`.
        by: `head` or `words`.
        names: The labels; a head's scores are in this order.
        words: By words only: the text that the model should write for each label.
    """

    kind: TaskKind
    by: ClassifierKind
    names: tuple[str, ...]
    words: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As stored in an artifact's header."""
        return {"kind": self.kind, "by": self.by, "names": list(self.names), "words": list(self.words)}


def labels_of(prefix: Prefix | None) -> Labels | None:
    """The labels in a prefix's header; None: it generates."""
    return None if prefix is None else labels_in(prefix.header)


def labels_in(header: Mapping[str, Any]) -> Labels | None:
    """The labels in a header; None: what it describes generates."""
    stored = header.get("labels")
    if not isinstance(stored, Mapping):
        return None
    return Labels(stored["kind"], stored["by"], tuple(stored["names"]), tuple(stored.get("words", ())))


def label_names(examples: Iterable[Example], kind: TaskKind = "classification") -> tuple[str, ...]:
    """The distinct labels of a training set, sorted as text; of tags `O`, then for each type, sorted, `B-` and `I-`.

    Both tags of a type are listed even if only one occurs, so that a longer span elsewhere has no unknown tag.

    >>> label_names([Example("Splendid.", ("good",)), Example("Dull.", ("bad",)), Example("Fine.", ("good",))])
    ('bad', 'good')
    >>> label_names([Example("Westport at", fields={"tags": ("B-STATION", "O")})], "tagging")
    ('O', 'B-STATION', 'I-STATION')

    Raises:
        DataError: There are fewer than two labels, or an example does not have what it must.
    """
    found = {
        label for number, example in enumerate(examples, start=1) for label in labels_of_example(example, number, kind)
    }
    names = tuple(sorted(found))
    if kind == "tagging":
        types = sorted({tag[2:] for tag in names} - {""})
        names = ("O", *(f"{position}-{name}" for name in types for position in "BI"))
    if len(names) < 2:
        raise DataError(f"the labels are {short_repr(names)}, but there must be two.", hint="check the target column.")
    return names


def check_labels(examples: Iterable[Example], names: Sequence[str], kind: TaskKind = "classification") -> None:
    """Check that a development or test set has no label that the training set lacks.

    Args:
        examples: The set to check.
        names: The known labels, as `label_names` gives them.
        kind: Of the labels.

    Raises:
        DataError: A label is unknown (the message names it, its first example and the nearest known one), or an example
            does not have what it must.
    """
    for number, example in enumerate(examples, start=1):
        for label in labels_of_example(example, number, kind):
            if label not in names:
                what = f"label {short_repr(label)} of example {number} is not known."
                raise DataError(what, hint=did_you_mean(label, names))


def labels_of_example(example: Example, number: int, kind: TaskKind) -> Sequence[str]:
    """The label of an example, or its tags.

    Raises:
        DataError: It does not have what it must; `number` is in the message.
    """
    labels = example.fields.get("tags") if kind == "tagging" else example.targets
    if not isinstance(labels, tuple) or (kind == "classification" and len(labels) != 1):
        what = f"must have {'one label' if kind == 'classification' else 'tags'}"
        hint = "name their column with --target."
    elif kind == "classification" and len(example.messages) > 1:
        what, hint = "has several messages", "a label is of one text: put all into one."
    else:
        return labels
    raise DataError(f"example {number} ({short_repr(example.source)}) {what}.", hint=hint)


def choose_labels(
    kind: TaskKind,
    backbone: Backbone,
    examples: Sequence[Example],
    dev_examples: Sequence[Example] = (),
    *,
    by: ClassifierKind | Literal["auto"] = "auto",
    words: Mapping[str, str] | None = None,
) -> Labels:
    """The labels of a run, from its training examples.

    Args:
        kind: `classification` or `tagging`.
        backbone: Decides between head and words if `by` is `auto`: an encoder gets a head, other models words.
        examples: The training examples.
        dev_examples: They may have no other labels.
        by: `auto`, `head` or `words`.
        words: Label -> its word; a label that is missing here is its own word.

    Raises:
        ConfigError: The backbone does not support `by`, or `words` names an unknown label or gives two labels one word.
        DataError: There are fewer than two labels, or the development examples have others.
    """
    names, chosen = read_labels(kind, examples, dev_examples, by=by, words=words)
    if by == "auto":
        by = "head" if kind == "tagging" or backbone.kind == "encoder" else "words"
        if by == "head" and words:
            raise ConfigError("label_words is given, but not used: a head is trained.", hint="leave it out.")
    if backbone.kind == {"head": "encoder-decoder", "words": "encoder"}[by]:
        raise ConfigError(
            f"{backbone.name!r} is an {backbone.kind}, for which classifier = {by!r} is not possible.",
            hint="use 'head' with an encoder, 'words' with an encoder-decoder (for classification alone).",
        )
    return Labels(kind, by, names, chosen if by == "words" else ())


def read_labels(
    kind: TaskKind,
    examples: Sequence[Example],
    dev_examples: Sequence[Example],
    *,
    by: ClassifierKind | Literal["auto"],
    words: Mapping[str, str] | None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the labels, and their words unless there is to be a head: what can be said without a model.

    Raises:
        ConfigError: As for `choose_labels`, but for what the backbone does not support.
        DataError: As for `choose_labels`.
    """
    names = label_names(examples, kind)
    with reading_development_data():
        check_labels(dev_examples, names, kind)
    if by == "words" and kind == "tagging":
        raise ConfigError("classifier is 'words', but tags are too many words.", hint="use classifier = 'head'.")
    return names, _label_words(names, words) if by != "head" else ()


def _label_words(names: Sequence[str], words: Mapping[str, str] | None) -> tuple[str, ...]:
    """Each label's word."""
    word_of = dict(words or {})
    for name in word_of:
        if name not in names:
            raise ConfigError(f"label_words names {name!r}, which is not a label.", hint=did_you_mean(name, names))
    chosen = tuple(word_of.get(name, name) for name in names)
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"two labels share a word: {', '.join(chosen)}.", hint="give every label its own.")
    return chosen


def with_label_words(examples: Sequence[Example], labels: Labels) -> Sequence[Example]:
    """The same examples with each label's word as the target."""
    word_of = dict(zip(labels.names, labels.words, strict=True))
    return [Example(e.source, tuple(word_of[target] for target in e.targets), e.fields) for e in examples]


def encode_labelled(
    backbone: Backbone,
    examples: Sequence[Example],
    labels: Labels,
    text_format: TextFormat,
    *,
    prefix_length: int,
    max_length: int = 0,
    on_too_long: TruncationPolicy = "cut",
) -> TokenizedDataset:
    """Turn examples into token ids with label indices, for a head.

    A text's label is predicted at its first token if an encoder reads it, otherwise at its last token; a word's tag at
    the word's first or last token likewise. A truncated text loses the tags of the words that were cut off.

    Args:
        backbone: Its tokenizer and positions count.
        examples: Each with one label, or with `tokens` and `tags` among its fields.
        labels: All labels.
        text_format: The text around a source.
        prefix_length: P; the prefix takes as many of a decoder-only backbone's positions.
        max_length: Positions of a text; 0: as many as the backbone allows.
        on_too_long: `cut` the text at its end, or raise an `error`.

    Raises:
        DataError: An example is too long and may not be truncated.
    """
    limit = position_limit(backbone, prefix_length, max_length)
    after = template_lengths(backbone, text_format)[1]
    label_ids = {name: index for index, name in enumerate(labels.names)}
    parts: list[TokenizedDataset] = []
    for number, example in enumerate(examples, start=1):
        tokens = example.fields["tokens"] if labels.kind == "tagging" else None
        names = example.fields["tags"] if labels.kind == "tagging" else example.targets[:1]
        with named_example(example, number):
            prompt, positions = encode_labelled_prompt(backbone, text_format, example.source, tokens, limit)
            kept = fit_source(backbone, text_format, prompt, (), limit, on_too_long)
        # Words that are cut off lose their tags; a text's own label may be predicted behind its source, which moves.
        moved, stop = len(kept) - len(prompt), len(kept) - after
        if moved and tokens is not None:
            positions = [position for position in positions if position < stop]
        elif moved:
            positions = [position if position < stop else position + moved for position in positions]
        if not positions:
            with named_example(example, number):
                raise RequestError("a cut leaves none of its words whole.", hint="raise max_length, or leave it out.")
        targets = tuple(label_ids[name] for name in names[: len(positions)])
        row = TokenizedExample(kept, (targets,), tuple(positions))
        parts.append(TokenizedDataset.of_one(row, prompt_length=len(prompt)))
    return TokenizedDataset.of_all(parts)


def encode_rows(
    backbone: Backbone,
    examples: Sequence[Example],
    labels: Labels | None,
    text_format: TextFormat,
    *,
    turns: TurnsAs = "packed",
    **limits: Any,
) -> TokenizedDataset:
    """`encode_labelled` where the labels are those of a head; else `encode_examples`, of targets in the labels' words.

    Args:
        backbone: Its tokenizer and positions count.
        examples: To encode.
        labels: What is learned; None: texts.
        text_format: The text around source and target.
        turns: How conversations become examples.
        **limits: As for the two.
    """
    if labels is not None and labels.by == "head":
        return encode_labelled(backbone, examples, labels, text_format, **limits)
    return encode_examples(backbone, examples, text_format, turns=turns, **limits)


def encode_labelled_prompt(
    backbone: Backbone,
    text_format: TextFormat,
    source: str,
    tokens: Sequence[str] | None,
    max_positions: int | None = None,
) -> tuple[list[int], list[int]]:
    """A prompt's token ids, and where its label, or the tag of each of its words, is predicted.

    Args:
        backbone: Its tokenizer counts.
        text_format: The text around the source.
        source: The text; for tagging its words with a space between.
        tokens: For tagging: the words; None: one label for the whole text.
        max_positions: As `positions` of `encode_prompts`; words for which no token could fit have no position.

    Raises:
        ConfigError: Tagging needs a fast tokenizer, and this backbone has none.
        DataError: The tokenizer makes no token of a word.
    """
    if tokens is None:
        ids = encode_prompts(backbone, text_format, [source], positions=max_positions)[0]
        return ids, [0 if backbone.kind == "encoder" else len(ids) - 1]
    if not backbone.tokenizer.is_fast:
        what = f"the tokenizer of {backbone.name!r} does not say which characters its tokens come from."
        raise ConfigError(what, hint="use a model with a fast tokenizer (tokenizer.json) for tagging.")
    source = bounded(backbone, source, max_positions)
    text = text_format.format_prompt(source, backbone.separator)
    encoding = backbone.tokenizer(
        text, add_special_tokens=backbone.kind != "decoder", return_offsets_mapping=True, verbose=False
    )
    # The tokens that have characters, in the order of the text, as the words are.
    spans = [(index, first, last) for index, (first, last) in enumerate(encoding["offset_mapping"]) if last > first]
    firsts, lasts = [first for _, first, _ in spans], [last for _, _, last in spans]
    start = len(text_format.around(backbone.separator)[0])
    positions, end_of_source = [], start + len(source)
    for token in tokens:
        stop = start + len(token)
        if stop > end_of_source:
            break
        at, end = bisect_right(lasts, start), bisect_left(firsts, stop)
        if end <= at:
            what = f"the tokenizer of {backbone.name!r} makes no token of the word {short_repr(token)}."
            raise DataError(what, hint="leave it out.")
        positions.append(spans[at if backbone.kind == "encoder" else end - 1][0])
        start = stop + 1
    return list(encoding["input_ids"]), positions
