"""Labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.data import Example, check_labels, check_tags, label_names, tag_names
from prefixtune.data.encoding import TokenizedDataset, TokenizedExample, around_lengths, encode_prompts, position_limit
from prefixtune.errors import ConfigError, DataError, did_you_mean
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat, cut_prompt

__all__ = ["Labels", "check_choice", "choose_labels", "encode_labelled", "labels_of", "with_label_words"]


@dataclass(frozen=True)
class Labels:
    """What a classifying prefix tells apart, as its header keeps it.

    Attributes:
        kind: `classification` or `tagging`.
        by: `head` or `words`.
        names: The labels; a head's scores are in this order.
        words: By words only: what the model is to write for each.
    """

    kind: str
    by: str
    names: tuple[str, ...]
    words: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As stored in an artifact's header."""
        return {"kind": self.kind, "by": self.by, "names": list(self.names), "words": list(self.words)}


def labels_of(prefix: Prefix | None) -> Labels | None:
    """What a prefix was trained to tell apart, by its header; None: it generates."""
    stored = None if prefix is None else prefix.header.get("labels")
    if not isinstance(stored, Mapping):
        return None
    return Labels(stored["kind"], stored["by"], tuple(stored["names"]), tuple(stored.get("words", ())))


def choose_labels(
    kind: str,
    backbone: Backbone,
    examples: Sequence[Example],
    dev_examples: Sequence[Example] = (),
    *,
    by: str = "auto",
    words: Mapping[str, str] | None = None,
) -> Labels:
    """The labels of a run, from its training examples.

    Args:
        kind: `classification` or `tagging`.
        backbone: Decides between head and words where `by` is `auto`: an encoder takes a head, others words.
        examples: To train on.
        dev_examples: Must have no other labels.
        by: `auto`, `head` or `words`.
        words: Label -> its word; a label that is not there is its own word.

    Raises:
        ConfigError: The backbone cannot do it that way, or `words` names an unknown label or gives two one word.
        DataError: There are fewer than two labels, or the development examples have others.
    """
    names = check_choice(kind, examples, dev_examples, by=by, words=words)
    if by == "auto":
        by = "head" if kind == "tagging" or backbone.kind == "encoder" else "words"
    if by == "head" and backbone.kind == "encoder-decoder":
        raise ConfigError(
            f"{backbone.name!r} is an encoder-decoder, on which no head is trained.",
            hint="use classifier = 'words' for classification; for tagging choose an encoder or a decoder-only model.",
        )
    if by == "words" and backbone.kind == "encoder":
        why = f"{backbone.name!r} is an encoder and writes none"
        raise ConfigError(f"classifier is 'words', but {why}.", hint="use classifier = 'head'.")
    if by == "head":
        return Labels(kind, by, names)
    return Labels(kind, by, names, _words(names, words))


def check_choice(
    kind: str,
    examples: Sequence[Example],
    dev_examples: Sequence[Example] = (),
    *,
    by: str = "auto",
    words: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """The names of a run's labels; all that can be wrong with them whatever the backbone is refused.

    Raises:
        ConfigError: Tags by words, or `words` names an unknown label or gives two one word.
        DataError: There are fewer than two labels, or the development examples have others.
    """
    names = tag_names(examples) if kind == "tagging" else label_names(examples)
    (check_tags if kind == "tagging" else check_labels)(dev_examples, names)
    if by == "words" and kind == "tagging":
        raise ConfigError("classifier is 'words', but tags are too many words.", hint="use classifier = 'head'.")
    if by != "head":
        _words(names, words)
    return names


def _words(names: Sequence[str], words: Mapping[str, str] | None) -> tuple[str, ...]:
    """Each label's word."""
    given = dict(words or {})
    for name in given:
        if name not in names:
            raise ConfigError(f"label_words names {name!r}, which is no label.", hint=did_you_mean(name, names))
    chosen = tuple(given.get(name, name) for name in names)
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"two labels share a word: {', '.join(chosen)}.", hint="give every label its own.")
    return chosen


def with_label_words(examples: Sequence[Example], labels: Labels) -> list[Example]:
    """The same examples with each label's word as the target."""
    words = dict(zip(labels.names, labels.words, strict=True))
    return [Example(e.source, tuple(words[target] for target in e.targets), e.fields) for e in examples]


def encode_labelled(
    backbone: Backbone,
    examples: Sequence[Example],
    labels: Labels,
    text_format: TextFormat,
    *,
    prefix_length: int,
    max_length: int = 0,
    on_too_long: str = "cut",
) -> TokenizedDataset:
    """Turn examples into token ids with label numbers, for a head.

    A text's label is predicted at its first token where an encoder reads it, at its last elsewhere; a word's tag at
    the word's first or last token likewise. A cut text loses the tags of the words that were cut.

    Args:
        backbone: Whose tokenizer and positions count.
        examples: Each with one label, or with `tokens` and `tags` among its fields.
        labels: All there are.
        text_format: The text around a source.
        prefix_length: P; the prefix takes as many of a decoder-only backbone's positions.
        max_length: Positions of a text; 0: what the backbone allows.
        on_too_long: `cut` the text, or raise an `error`.

    Raises:
        DataError: No example, or a too long one where cutting is not wanted.
    """
    if not examples:
        raise DataError("there is no example to train on.", hint="check the file and `limit`.")
    limit = position_limit(backbone, prefix_length, max_length)
    numbers = {name: number for number, name in enumerate(labels.names)}
    before, after = around_lengths(backbone, text_format)
    encoded, cut, longest_prompt = [], 0, 0
    for number, example in enumerate(examples):
        tagging = labels.kind == "tagging"
        prompt, places = labelled_prompt(
            backbone, text_format, example.source, example.fields.get("tokens") if tagging else None
        )
        names = example.fields["tags"] if tagging else example.targets[:1]
        if len(prompt) > limit:
            if on_too_long == "error":
                raise DataError(
                    f"example {number + 1} ({example.source[:60]!r}) takes {len(prompt)} tokens, but {limit} positions "
                    "are allowed.",
                    hint="raise max_length, or let on_too_long = 'cut' shorten it.",
                )
            if limit <= before + after:
                raise DataError(
                    f"the text around example {number + 1} ({example.source[:60]!r}) takes {before + after} tokens, "
                    f"but {limit} positions are allowed, and a cut would leave nothing of the example.",
                    hint="raise max_length.",
                )
            cut += 1
            kept = limit - after
            if tagging:
                places = [place for place in places if place < kept]
            else:
                places = [place if place < kept else place - len(prompt) + limit for place in places]
            prompt = cut_prompt(prompt, limit, after)
        else:
            longest_prompt = max(longest_prompt, len(prompt))
        targets = tuple(numbers[name] for name in names[: len(places)])
        encoded.append(TokenizedExample(tuple(prompt), (targets,), tuple(places)))
    return TokenizedDataset(tuple(encoded), cut, longest_prompt)


def labelled_prompt(
    backbone: Backbone, text_format: TextFormat, source: str, tokens: Sequence[str] | None
) -> tuple[list[int], list[int]]:
    """A prompt's token ids, and where its label, or each of its words' tags, is predicted."""
    if tokens is None:
        ids = encode_prompts(backbone, text_format, [source])[0]
        return ids, [0 if backbone.kind == "encoder" else len(ids) - 1]
    if not backbone.tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer of {backbone.name!r} does not tell which characters its tokens come from.",
            hint="use a model with a fast tokenizer (tokenizer.json) for tagging.",
        )
    text = text_format.format_prompt(source, backbone.separator)
    made = backbone.tokenizer(
        text, add_special_tokens=backbone.kind != "decoder", return_offsets_mapping=True, verbose=False
    )
    places, start = [], len(text_format.around(backbone.separator)[0])
    for token in tokens:
        stop = start + len(token)
        inside = [n for n, (a, b) in enumerate(made["offset_mapping"]) if a < stop and b > start and b > a]
        if not inside:
            raise DataError(
                f"the tokenizer of {backbone.name!r} makes nothing of the token {token!r}.", hint="leave it out."
            )
        places.append(inside[0] if backbone.kind == "encoder" else inside[-1])
        start = stop + 1
    return list(made["input_ids"]), places
