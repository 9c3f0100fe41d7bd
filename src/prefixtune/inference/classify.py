"""Classification and tagging: labels instead of texts.

Two ways. A *head*: a linear layer on the last hidden state, trained and stored with the prefix (P-tuning v2). *Words*:
each label has a word, and the language model itself says how likely each word is after the text; no head is needed. An
encoder needs a head, because it generates no words; tagging always needs one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone
from prefixtune.backbone.loss import batch_loss, hidden_states_at
from prefixtune.backbone.prefixes import PrefixLike, as_prefix
from prefixtune.data.batching import collate
from prefixtune.data.encoding import (
    TextFormatLike,
    TokenizedExample,
    as_text_format,
    check_texts,
    encode_prompts,
    format_of,
)
from prefixtune.data.examples import TaskKind
from prefixtune.data.labels import Labels, encode_labelled_prompt, labels_of
from prefixtune.data.truncation import report_truncated
from prefixtune.errors import ConfigError, RequestError, describe_value, short_repr
from prefixtune.inference.config import ClassifyConfig
from prefixtune.inference.decoding import check_finite
from prefixtune.inference.prompts import check_positions, truncate_prompts
from prefixtune.prefix.prefix import Prefix, check_fits
from prefixtune.prefix.text_format import TextFormat

__all__ = [
    "EncodedTexts",
    "Prediction",
    "classify",
    "encode_to_classify",
    "encode_to_tag",
    "first_duplicate",
    "tag",
]


T = TypeVar("T")

_MOST_SCORED = 4096
"""Tokens of labels' words in one batch: each has a logit for every token of the vocabulary."""


@dataclass(frozen=True)
class Prediction:
    """The label of one text, or of one token of it.

    Attributes:
        label: The likeliest label.
        probabilities: Of every label; they sum to 1.
    """

    label: str
    probabilities: dict[str, float]


def classify(
    backbone: BackboneLike,
    texts: Sequence[str],
    prefix: PrefixLike | None = None,
    *,
    labels: Sequence[str] | None = None,
    text_format: TextFormatLike | None = None,
    config: ClassifyConfig | Mapping[str, Any] | None = None,
    on_batch: Callable[[int], None] | None = None,
    on_cut: Callable[[Sequence[int]], None] | None = None,
    **options: Any,
) -> list[Prediction]:
    """Predict each text's label, and how likely every label is.

    Args:
        backbone: The frozen model: a `Backbone`, a name or path, or a (model, tokenizer) pair.
        texts: Sources, as in training.
        prefix: Trained for classification: a `Prefix`, a path, or a repository of the hub; None: the bare model, by the
            labels' own words.
        labels: For the bare model: the labels to choose from, each once.
        text_format: The text around a source; None: what the prefix was trained with.
        config: How to batch and truncate: a `ClassifyConfig` (or `GenerateConfig`), or a dict of its fields.
        on_batch: Called after each batch with the number of texts that are done.
        on_cut: Called before the work with the indices of the truncated texts, if there are any; None: a warning says
            so.
        **options: Fields of `ClassifyConfig`, instead of `config`.

    Raises:
        ConfigError: The prefix is for something else, there are no labels, or an option is wrong.
        RequestError: A text does not fit the backbone's positions.
        BackboneError: The prefix does not fit the backbone.
        PrefixError: The scores are not finite.
    """
    config = ClassifyConfig.from_arguments(config, options)
    check_texts(texts)
    texts = list(texts)
    is_list = hasattr(labels, "__iter__") and not isinstance(labels, str)
    if labels is not None and not (is_list and all(isinstance(label, str) for label in labels)):
        raise ConfigError(f"labels is {describe_value(labels)}, but must be a list of strings.", hint="write [a, b].")
    backbone = as_backbone(backbone)
    loaded = as_prefix(prefix, backbone)
    form = as_text_format(text_format)
    encoded = encode_to_classify(backbone, texts, loaded, labels=labels, text_format=form, config=config, on_cut=on_cut)
    predictions: list[Prediction] = []
    for rows in _batches(range(len(texts)), config.batch_size):
        predictions.extend(one for (one,) in encoded.predict(rows))
        if on_batch is not None:
            on_batch(len(predictions))
    return predictions


@dataclass(frozen=True, eq=False)
class EncodedTexts:
    """Texts as token ids, ready to be labelled: classified as a whole, or tagged token by token.

    Attributes:
        backbone: The model.
        prefix: None: the bare model.
        labels: The labels to choose from.
        prompts: Token ids of each text.
        positions: Of each text, where the head's scores are read; by words: none.
        words: By words: the token ids of each label's word.
    """

    backbone: Backbone
    prefix: Prefix | None
    labels: Labels
    prompts: Sequence[Sequence[int]]
    positions: Sequence[Sequence[int]] = ()
    words: Sequence[tuple[int, ...]] = ()

    def on(self, backbone: Backbone) -> EncodedTexts:
        """The same for another copy of the model."""
        return replace(self, backbone=backbone)

    def predict(self, rows: Sequence[int]) -> list[list[Prediction]]:
        """The labels of some texts, computed in one batch: of each text one, or one for each tagged token."""
        scores = [self.score(rows, part) for part in self.parts(rows, _MOST_SCORED)]
        return [self.predictions(torch.cat(of_one, dim=-1)) for of_one in zip(*scores, strict=True)]

    def parts(self, rows: Sequence[int], max_tokens: int) -> Iterator[slice]:
        """The labels in parts, whose words after all of some texts have at most that many tokens; at least one label.

        The texts are computed once for each part; so a part may have as many tokens as they have, too.
        """
        most = max(max_tokens, sum(len(self.prompts[row]) for row in rows))
        first = num_tokens = 0
        for index, word in enumerate(self.words):
            if num_tokens and num_tokens + len(rows) * len(word) > most:
                yield slice(first, index)
                first, num_tokens = index, 0
            num_tokens += len(rows) * len(word)
        yield slice(first, len(self.words))

    def score(self, rows: Sequence[int], part: slice = slice(None)) -> list[Float[Tensor, "at labels"]]:
        """The scores of some texts, computed in one batch: of each text a row, or one for each tagged token.

        Args:
            rows: The texts.
            part: By words: the labels to score; a head scores all.
        """
        prompts = [self.prompts[row] for row in rows]
        if self.words:
            return list(_score_words(self.backbone, self.prefix, prompts, self.words[part])[:, None])
        positions = [self.positions[row] for row in rows]
        scores = _score_head(self.backbone, self.prefix, prompts, positions)
        return list(scores.split([len(at) for at in positions]))

    def predictions(self, scores: Float[Tensor, "at labels"]) -> list[Prediction]:
        """What the scores of all labels say of one text.

        Raises:
            PrefixError: They are not finite.
        """
        check_finite(scores)
        return [_predict(row, self.labels.names) for row in scores.float().softmax(-1).tolist()]


def encode_to_classify(
    backbone: Backbone,
    texts: Sequence[str],
    prefix: Prefix | None,
    *,
    labels: Sequence[str] | None = None,
    text_format: TextFormat | None = None,
    config: ClassifyConfig | None = None,
    on_cut: Callable[[Sequence[int]], None] | None = None,
) -> EncodedTexts:
    """Texts to classify as token ids; arguments and errors as those of `classify`."""
    config = config or ClassifyConfig()
    chosen = _labels_for("classification", prefix, labels)
    form = format_of(backbone, prefix, text_format).with_lengths(config.max_total_length, config.on_too_long)
    if prefix is not None:
        check_fits(prefix, backbone.geometry, backbone.name)
    words = _encode_label_words(backbone, form, chosen) if chosen.by == "words" else []
    prompts = _encode_texts(backbone, texts, prefix, form, words, on_cut)
    # An encoder's first token stands for the text, a decoder's last one.
    positions = [] if words else [[0 if backbone.kind == "encoder" else len(prompt) - 1] for prompt in prompts]
    return EncodedTexts(backbone, prefix, chosen, prompts, positions, words)


def encode_to_tag(
    backbone: Backbone, texts: Sequence[Sequence[str]], prefix: Prefix, *, text_format: TextFormat | None = None
) -> EncodedTexts:
    """Lists of tokens to tag as token ids; arguments and errors as those of `tag`."""
    labels = _labels_for("tagging", prefix, None)
    form = format_of(backbone, prefix, text_format)
    check_fits(prefix, backbone.geometry, backbone.name)
    for number, tokens in enumerate(texts, start=1):
        if isinstance(tokens, str) or not tokens or not all(isinstance(token, str) for token in tokens):
            raise RequestError(f"text {number} is {tokens!r}, not a list of tokens.", hint="write text.split().")
    # A prompt, and the positions of its tokens that are tagged.
    encoded = [encode_labelled_prompt(backbone, form, " ".join(tokens), tokens) for tokens in texts]
    prompts, positions = [prompt for prompt, _ in encoded], [at for _, at in encoded]
    nothing_new, prefixes = [0] * len(encoded), [prefix] * len(encoded)
    check_positions(backbone, prompts, prefixes, nothing_new, hint="shorten the text.")
    return EncodedTexts(backbone, prefix, labels, prompts, positions)


def _encode_label_words(backbone: Backbone, form: TextFormat, labels: Labels) -> list[tuple[int, ...]]:
    """Every label's word as token ids."""
    if backbone.kind == "encoder":
        raise ConfigError(f"{backbone.name!r} is an encoder and generates no words.", hint="train a head with it.")
    return [tuple(ids) for ids in backbone.encode_targets([form.format_target(word) for word in labels.words])]


def _encode_texts(
    backbone: Backbone,
    texts: Sequence[str],
    prefix: Prefix | None,
    form: TextFormat,
    words: Sequence[tuple[int, ...]],
    on_cut: Callable[[Sequence[int]], None] | None,
) -> list[list[int]]:
    """Prompts that leave room for the longest label word."""
    whole = encode_prompts(backbone, form, list(texts)) if texts else []
    longest = max((len(word) for word in words), default=0) if backbone.kind == "decoder" else 0
    count = len(whole)
    prefixes, new_tokens = [prefix] * count, [longest] * count
    prompts = truncate_prompts(backbone, whole, [form] * count, prefixes, new_tokens)
    report_truncated(whole, prompts, on_cut)
    check_positions(backbone, prompts, prefixes, new_tokens, hint="shorten the text.")
    return prompts


def tag(
    backbone: BackboneLike,
    texts: Sequence[Sequence[str]],
    prefix: PrefixLike,
    *,
    text_format: TextFormatLike | None = None,
    config: ClassifyConfig | Mapping[str, Any] | None = None,
    on_batch: Callable[[int], None] | None = None,
    **options: Any,
) -> list[list[Prediction]]:
    """Predict each token's tag, and how likely every tag is.

    Args:
        backbone: The frozen model: a `Backbone`, a name or path, or a (model, tokenizer) pair.
        texts: Each a list of tokens without inner space, as in training.
        prefix: Trained for tagging: a `Prefix`, a path, or a repository of the hub.
        text_format: The text around a source; None: what the prefix was trained with.
        config: How to batch: a `ClassifyConfig` (or `GenerateConfig`), or a dict of its fields.
        on_batch: Called after each batch with the number of texts that are done.
        **options: Fields of `ClassifyConfig`, instead of `config`.

    Raises:
        ConfigError: The prefix is for something else, or an option is wrong or would truncate texts.
        RequestError: A text is empty or does not fit the backbone's positions.
        BackboneError: The prefix does not fit the backbone.
    """
    config = ClassifyConfig.from_arguments(config, options)
    _check_whole_texts(config)
    if isinstance(texts, str):
        raise RequestError(f"texts is one string, {texts[:40]!r}, not a list of lists.", hint="write [text.split()].")
    backbone = as_backbone(backbone)
    loaded = as_prefix(prefix, backbone)
    if loaded is None:
        raise ConfigError("the bare model cannot tag.", hint="give a prefix that was trained for tagging.")
    encoded = encode_to_tag(backbone, texts, loaded, text_format=as_text_format(text_format))
    predictions: list[list[Prediction]] = []
    for rows in _batches(range(len(texts)), config.batch_size):
        predictions.extend(encoded.predict(rows))
        if on_batch is not None:
            on_batch(len(predictions))
    return predictions


def _check_whole_texts(config: ClassifyConfig) -> None:
    """Refuse to truncate texts that are tagged.

    Raises:
        ConfigError: The configuration limits or truncates texts.
    """
    if config.max_total_length or config.on_too_long == "cut":
        raise ConfigError(
            "texts to be tagged are never cut: every token gets its tag.", hint="leave max_length and on_too_long out."
        )


def _labels_for(kind: TaskKind, prefix: Prefix | None, requested: Sequence[str] | None) -> Labels:
    """The labels that a prefix was trained with, or for the bare model the requested ones."""
    stored = labels_of(prefix)
    if stored is not None and stored.kind == kind and requested is None:
        return stored
    if prefix is None and requested:
        names = tuple(requested)
        if (label := first_duplicate(names)) is not None:
            raise ConfigError(f"labels has {short_repr(label)} more than once.", hint="give every label once.")
        return Labels(kind, "words", names, names)
    what = "the bare model" if prefix is None else f"a prefix for {stored.kind if stored else 'generation'}"
    raise ConfigError(
        f"{what} cannot be used for {kind}{' with given labels' if requested else ''}.",
        hint=f"give a prefix that was trained for {kind}, or for the bare model a list of labels.",
    )


def first_duplicate(labels: Iterable[str]) -> str | None:
    """The first label that is there more than once; None: all differ.

    >>> first_duplicate(["yes", "no", "yes"])
    'yes'
    """
    return next((label for label, count in Counter(labels).items() if count > 1), None)


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


@torch.inference_mode()
def _score_words(
    backbone: Backbone, prefix: Prefix | None, prompts: Sequence[Sequence[int]], words: Sequence[tuple[int, ...]]
) -> Float[Tensor, "N labels"]:
    """The log-probability of each label's word after each prompt."""
    batch = collate(backbone, [TokenizedExample(tuple(prompt), tuple(words)) for prompt in prompts])
    losses = batch_loss(backbone, prefix, batch)
    total = torch.zeros(batch.num_targets, device=losses.device).index_add_(
        0, batch.target_index.to(losses.device), losses
    )
    return -total.reshape(len(prompts), len(words))


@torch.inference_mode()
def _score_head(
    backbone: Backbone, prefix: Prefix | None, prompts: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
) -> Float[Tensor, "N labels"]:
    """The head's scores at every given position of every prompt."""
    if prefix is None or prefix.head is None:
        raise ConfigError("the prefix has no head, though its header says so.", hint="get the file again.")
    examples = [
        TokenizedExample(tuple(prompt), ((0,) * len(at),), tuple(at))
        for prompt, at in zip(prompts, positions, strict=True)
    ]
    return prefix.head(hidden_states_at(backbone, prefix, collate(backbone, examples)))


def _predict(probabilities: Sequence[float], names: Sequence[str]) -> Prediction:
    best = max(range(len(names)), key=probabilities.__getitem__)
    return Prediction(names[best], dict(zip(names, probabilities, strict=True)))
