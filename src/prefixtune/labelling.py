"""Classification and tagging: labels instead of texts.

Two ways. A *head*: a linear layer on the last hidden state, trained with the prefix and stored with it (P-tuning v2).
*Words*: each label has a word, and the language model itself tells how likely each is after the text; no head is
needed. An encoder takes a head, as it writes no words; tagging always does.

Knows nothing of files and of training's steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefixtune.attach import check_fits
from prefixtune.backbone import Backbone, BackboneLike, as_backbone
from prefixtune.batching import (
    Batch,
    Encoded,
    Encoding,
    TextFormatLike,
    around_lengths,
    as_text_format,
    check_texts,
    collate,
    encode_prompts,
    fit_prompt,
    format_of,
    position_limit,
    report_cut,
)
from prefixtune.checkpoint import PrefixLike, as_prefix
from prefixtune.errors import ConfigError, DataError, RequestError, describe_value, did_you_mean
from prefixtune.loss import batch_loss
from prefixtune.prefix import Prefix
from prefixtune.tasks import Example, check_labels, check_tags, label_names, tag_names
from prefixtune.text_format import TextFormat, cut_prompt

__all__ = [
    "Labels",
    "Prediction",
    "check_choice",
    "choose_labels",
    "classify",
    "encode_labelled",
    "labels_of",
    "sample_hidden",
    "tag",
    "worded",
]


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


@dataclass(frozen=True)
class Prediction:
    """What was told of one text, or of one token of it.

    Attributes:
        label: The likeliest.
        probabilities: Of every label; they sum to 1.
    """

    label: str
    probabilities: dict[str, float]


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


def worded(examples: Sequence[Example], labels: Labels) -> list[Example]:
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
) -> Encoding:
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
        prompt, places = _prompt(
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
        encoded.append(Encoded(tuple(prompt), (targets,), tuple(places)))
    return Encoding(tuple(encoded), cut, longest_prompt)


def _prompt(
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


def classify(
    backbone: BackboneLike,
    texts: Sequence[str],
    prefix: PrefixLike | None = None,
    *,
    labels: Sequence[str] | None = None,
    text_format: TextFormatLike | None = None,
    batch_size: int = 16,
    max_total_length: int = 0,
    on_too_long: str = "",
    on_batch: Callable[[int], None] | None = None,
    on_cut: Callable[[Sequence[int]], None] | None = None,
) -> list[Prediction]:
    """Tell each text's label, and how likely every label is.

    Args:
        backbone: The frozen model: a `Backbone`, a name or path, or a (model, tokenizer) pair.
        texts: Sources, as in training.
        prefix: Trained for classification: a `Prefix`, a path, or a repository of the hub; None: the bare model, by the
            labels' own words.
        labels: For the bare model: what to tell apart.
        text_format: The text around a source; None: what the prefix was trained with.
        batch_size: Texts per batch.
        max_total_length: Positions of a text; 0: as in training.
        on_too_long: `cut` a text that is too long, or raise an `error`; empty: as in training.
        on_batch: Told after each batch how many texts are done.
        on_cut: Called before the work with the numbers of the texts that were cut to fit, counted from 0, where any
            were; None: a warning says so.

    Raises:
        ConfigError: The prefix is for something else, or there are no labels.
        RequestError: A text does not fit the backbone's positions.
        BackboneError: The prefix does not fit the backbone.
    """
    check_texts(texts)
    if labels is not None and (isinstance(labels, str) or not all(isinstance(label, str) for label in labels)):
        raise ConfigError(f"labels is {describe_value(labels)}, but must be a list of strings.", hint="write [a, b].")
    backbone = as_backbone(backbone)
    prefix = as_prefix(prefix, backbone)
    chosen = _labels("classification", prefix, labels)
    form = format_of(backbone, prefix, as_text_format(text_format)).with_lengths(max_total_length, on_too_long)
    if prefix is not None:
        check_fits(prefix, backbone.geometry, backbone.name)
    whole = encode_prompts(backbone, form, list(texts)) if texts else []
    answers: list[tuple[int, ...]] = []
    if chosen.by == "words":
        if backbone.kind == "encoder":
            raise ConfigError(f"{backbone.name!r} is an encoder and writes no words.", hint="train a head with it.")
        answers = [tuple(ids) for ids in backbone.encode_targets([form.format_target(word) for word in chosen.words])]
    room = max((len(answer) for answer in answers), default=0) if backbone.kind == "decoder" else 0
    length = 0 if prefix is None else prefix.length()
    prompts = [
        fit_prompt(backbone, form, prompt, prefix_length=length, new_tokens=room, name=f"text {number}")
        for number, prompt in enumerate(whole, start=1)
    ]
    report_cut(whole, prompts, on_cut)
    _check_lengths(backbone, prefix, [len(prompt) + room for prompt in prompts])
    predictions: list[Prediction] = []
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        if chosen.by == "words":
            scores = _score_words(backbone, prefix, chunk, answers)
        else:
            place = [0 if backbone.kind == "encoder" else len(prompt) - 1 for prompt in chunk]
            scores = _score_head(backbone, prefix, chunk, [[p] for p in place])
        predictions.extend(_predict(row, chosen.names) for row in scores)
        if on_batch is not None:
            on_batch(len(predictions))
    return predictions


def tag(
    backbone: BackboneLike,
    texts: Sequence[Sequence[str]],
    prefix: PrefixLike,
    *,
    text_format: TextFormatLike | None = None,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[Prediction]]:
    """Tell each token's tag, and how likely every tag is.

    Args:
        backbone: The frozen model: a `Backbone`, a name or path, or a (model, tokenizer) pair.
        texts: Each a list of tokens without inner space, as in training.
        prefix: Trained for tagging: a `Prefix`, a path, or a repository of the hub.
        text_format: The text around a source; None: what the prefix was trained with.
        batch_size: Texts per batch.
        on_batch: Told after each batch how many texts are done.

    Raises:
        ConfigError: The prefix is for something else.
        RequestError: A text is empty or does not fit the backbone's positions.
        BackboneError: The prefix does not fit the backbone.
    """
    if isinstance(texts, str):
        raise RequestError(f"texts is one string, {texts[:40]!r}, not a list of lists.", hint="write [text.split()].")
    backbone = as_backbone(backbone)
    loaded = as_prefix(prefix, backbone)
    if loaded is None:
        raise ConfigError("the bare model cannot tag.", hint="give a prefix that was trained for tagging.")
    chosen = _labels("tagging", loaded, None)
    form = format_of(backbone, loaded, as_text_format(text_format))
    check_fits(loaded, backbone.geometry, backbone.name)
    for number, tokens in enumerate(texts):
        if isinstance(tokens, str) or not tokens or not all(isinstance(token, str) for token in tokens):
            raise RequestError(f"text {number + 1} is {tokens!r}, not a list of tokens.", hint="write text.split().")
    pairs = [_prompt(backbone, form, " ".join(tokens), tokens) for tokens in texts]
    _check_lengths(backbone, loaded, [len(prompt) for prompt, _ in pairs])
    tagged: list[list[Prediction]] = []
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        scores = iter(_score_head(backbone, loaded, [prompt for prompt, _ in chunk], [places for _, places in chunk]))
        tagged.extend([_predict(next(scores), chosen.names) for _ in places] for _, places in chunk)
        if on_batch is not None:
            on_batch(len(tagged))
    return tagged


def _labels(kind: str, prefix: Prefix | None, given: Sequence[str] | None) -> Labels:
    stored = labels_of(prefix)
    if stored is not None and stored.kind == kind and given is None:
        return stored
    if prefix is None and given:
        names = tuple(dict.fromkeys(given))
        return Labels(kind, "words", names, names)
    what = "the bare model" if prefix is None else f"a prefix for {stored.kind if stored else 'generation'}"
    raise ConfigError(
        f"{what} cannot be used for {kind}{' with given labels' if given else ''}.",
        hint=f"give a prefix that was trained for {kind}, or for the bare model a list of labels.",
    )


def _check_lengths(backbone: Backbone, prefix: Prefix | None, lengths: Sequence[int]) -> None:
    limit = backbone.max_positions
    taken = backbone.taken_positions(0 if prefix is None else prefix.length())
    for number, length in enumerate(lengths):
        if length == 0:
            raise RequestError(f"text {number + 1} has no token.", hint="give it some words.")
        if limit is not None and length + taken > limit:
            raise RequestError(
                f"text {number + 1} needs {length + taken} positions, but {backbone.name!r} has {limit}.",
                hint="shorten the text.",
            )


@torch.inference_mode()
def _score_words(
    backbone: Backbone, prefix: Prefix | None, prompts: Sequence[Sequence[int]], answers: Sequence[tuple[int, ...]]
) -> torch.Tensor:
    """How likely the model finds each answer after each prompt: (texts, labels), logarithms."""
    batch = collate(backbone, [Encoded(tuple(prompt), tuple(answers)) for prompt in prompts])
    losses = batch_loss(backbone, prefix, batch)
    total = torch.zeros(batch.num_sentences, device=losses.device).index_add_(
        0, batch.sentences.to(losses.device), losses
    )
    return -total.reshape(len(prompts), len(answers))


@torch.inference_mode()
def _score_head(
    backbone: Backbone, prefix: Prefix | None, prompts: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
) -> torch.Tensor:
    """The head's scores at every place of every prompt: (places, labels)."""
    if prefix is None or prefix.head is None:
        raise ConfigError("the prefix has no head.", hint="get the file again; its header speaks of one.")
    zipped = zip(prompts, places, strict=True)
    batch = collate(backbone, [Encoded(tuple(p), (tuple(0 for _ in at),), tuple(at)) for p, at in zipped])
    return prefix.head(_hidden(backbone, prefix, batch))


def _hidden(backbone: Backbone, prefix: Prefix | None, batch: Batch) -> torch.Tensor:
    """The hidden states at a batch's labels: (N, d)."""
    hidden: torch.Tensor = backbone.hidden_states(**batch.inputs(backbone.device), prefixes=prefix)
    positions = batch.label_positions.to(hidden.device)
    return hidden[positions // batch.width, positions % batch.width]


@torch.no_grad()
def sample_hidden(
    backbone: Backbone, prefix: Prefix, examples: Sequence[Encoded], count: int = 64, batch_size: int = 16
) -> torch.Tensor:
    """Hidden states where the first examples have their labels: (N, d), to standardize a head by."""
    chosen = examples[:count]
    chunks = [collate(backbone, chosen[n : n + batch_size]) for n in range(0, len(chosen), batch_size)]
    return torch.cat([_hidden(backbone, prefix, batch) for batch in chunks])


def _predict(scores: torch.Tensor, names: Sequence[str]) -> Prediction:
    shares = scores.float().softmax(-1).tolist()
    return Prediction(names[max(range(len(names)), key=shares.__getitem__)], dict(zip(names, shares, strict=True)))
