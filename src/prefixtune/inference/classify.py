"""Classification and tagging: labels instead of texts.

Two ways. A *head*: a linear layer on the last hidden state, trained and stored with the prefix (P-tuning v2). *Words*:
each label has a word, and the language model itself says how likely each word is after the text; no head is needed. An
encoder needs a head, because it generates no words; tagging always needs one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
    as_text_format,
    check_texts,
    encode_prompts,
    format_of,
    plain_format,
)
from prefixtune.data.examples import TaskKind
from prefixtune.data.labels import Labels, encode_labelled_prompt, labels_of
from prefixtune.data.tokenized import TokenizedExample
from prefixtune.data.truncation import report_truncated, truncate_prompt
from prefixtune.errors import ConfigError, RequestError, short_repr
from prefixtune.inference.beams import check_finite
from prefixtune.inference.config import ClassifyConfig, texts_at_once
from prefixtune.inference.prompts import Prompt, check_positions
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat

_MOST_SCORED = 4096
"""Tokens of labels' words in one batch."""


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
    labels: Sequence[str] | Labels | None = None,
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
        labels: For the bare model: the labels to choose from, each once; or `Labels`, whose words it chooses from.
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
    sources = check_texts(texts)
    backbone = as_backbone(backbone)
    loaded, form = as_prefix(prefix, backbone), as_text_format(text_format)
    options = {"labels": labels, "text_format": form, "config": config, "on_cut": on_cut}
    encoded = encode_to_label("classification", backbone, sources, loaded, **options)
    return [one for (one,) in encoded.predict_all(config, on_batch)]


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

    def predict_all(self, config: ClassifyConfig, on_batch: Callable[[int], None] | None) -> list[list[Prediction]]:
        """The labels of all texts: of each text one, or one for each tagged token."""
        predictions: list[list[Prediction]] = []
        size = texts_at_once(config.batch_size)
        for start in range(0, len(self.prompts), size):
            rows = range(len(self.prompts))[start : start + size]
            scores = zip(*(self.score(rows, part) for part in self.parts(rows, _MOST_SCORED)), strict=True)
            predictions += [self.predict(row, torch.cat(one, dim=-1)) for row, one in zip(rows, scores, strict=True)]
            if on_batch is not None:
                on_batch(len(predictions))
        return predictions

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

    @torch.inference_mode()
    def score(self, rows: Sequence[int], part: slice = slice(None)) -> list[Float[Tensor, "at labels"]]:
        """The scores of some texts, computed in one batch: of each text a row, or one for each tagged token.

        Args:
            rows: The texts.
            part: By words: the labels to score; a head scores all.
        """
        if self.words:
            words = tuple(self.words[part])
            batch = collate(self.backbone, [TokenizedExample(tuple(self.prompts[row]), words) for row in rows])
            losses = batch_loss(self.backbone, self.prefix, batch)
            total = losses.new_zeros(batch.num_targets).index_add_(0, batch.target_index.to(losses.device), losses)
            return list(-total.reshape(len(rows), 1, len(words)))
        if self.prefix is None or self.prefix.head is None:
            raise ConfigError("the prefix has no head, though its header says so.", hint="get the file again.")
        places = [tuple(self.positions[row]) for row in rows]
        asked = [(tuple(self.prompts[row]), at) for row, at in zip(rows, places, strict=True)]
        examples = [TokenizedExample(prompt, ((0,) * len(at),), at) for prompt, at in asked]
        scores = self.prefix.head(hidden_states_at(self.backbone, self.prefix, collate(self.backbone, examples)))
        return list(scores.split(list(map(len, places))))

    def predict(self, row: int, scores: Float[Tensor, "at labels"]) -> list[Prediction]:
        """What the scores of all labels say of a text.

        Raises:
            PrefixError: They are not finite.
        """
        check_finite(scores, [row] * len(scores))
        names = self.labels.names
        shares = scores.float().softmax(-1)
        found = zip(shares.argmax(-1).tolist(), shares.tolist(), strict=True)
        return [Prediction(names[best], dict(zip(names, one, strict=True))) for best, one in found]


def encode_to_label(
    kind: TaskKind,
    backbone: Backbone,
    texts: Sequence[Any],
    prefix: Prefix | None,
    *,
    labels: Sequence[str] | Labels | None = None,
    text_format: TextFormat | None = None,
    config: ClassifyConfig | None = None,
    positions: int | None = None,
    on_cut: Callable[[Sequence[int]], None] | None = None,
) -> EncodedTexts:
    """Texts to classify, or lists of tokens to tag, as token ids; the rest as for `classify` and `tag`.

    `positions` are those of a whole text, the prefix included; None: the backbone's.
    """
    config = config or ClassifyConfig()
    chosen, length = _labels_for(kind, prefix, labels), 0 if prefix is None else prefix.length()
    if prefix is None and text_format is None and backbone.kind == "decoder":
        # The bare model continues a text.
        text_format = replace(plain_format(backbone), target=" {target}")
    form = format_of(backbone, prefix, text_format).with_lengths(config.max_total_length, config.on_too_long)
    most = positions or backbone.max_positions_with(length)
    if chosen.by == "words" and backbone.kind == "encoder":
        raise ConfigError(f"{backbone.name!r} is an encoder and generates no words.", hint="train a head with it.")
    targets = [form.format_target(word) for word in chosen.words] if chosen.by == "words" else []
    words = [tuple(ids) for ids in backbone.encode_targets(targets)] if targets else []
    # Room is left for the longest word.
    longest = max((len(word) for word in words), default=0) if backbone.kind == "decoder" else 0
    if kind == "tagging":
        for number, tokens in enumerate(texts, start=1):
            if isinstance(tokens, str) or not tokens or not all(isinstance(token, str) for token in tokens):
                given = short_repr(tokens)
                raise RequestError(f"text {number} is {given}, no list of tokens.", hint="write text.split().")
        # A prompt, and the positions of its tokens that are tagged.
        encoded = [encode_labelled_prompt(backbone, form, " ".join(tokens), tokens, most) for tokens in texts]
        prompts, places = [prompt for prompt, _ in encoded], [at for _, at in encoded]
    else:
        whole = encode_prompts(backbone, form, list(texts), positions=most) if texts else []
        limits: dict[str, Any] = {"prefix_length": length, "new_tokens": longest, "positions": most}
        prompts = [
            truncate_prompt(backbone, form, prompt, name=f"text {number}", source=text, **limits)
            for number, (text, prompt) in enumerate(zip(texts, whole, strict=True), start=1)
        ]
        report_truncated(whole, prompts, on_cut)
        # An encoder's first token stands for the text, a decoder's last one.
        places = [] if words else [[0 if backbone.kind == "encoder" else len(prompt) - 1] for prompt in prompts]
    check_positions(backbone, [Prompt(ids, prefix, longest) for ids in prompts], "shorten the text.", together=True)
    return EncodedTexts(backbone, prefix, chosen, prompts, places, words)


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
    if config.max_total_length or config.on_too_long == "cut":
        what = "texts to be tagged are never cut: every token gets its tag."
        raise ConfigError(what, hint="leave max_length and on_too_long out.")
    if isinstance(texts, str):
        raise RequestError(f"texts is one string, {short_repr(texts)}, no list of lists.", hint="write [text.split()].")
    backbone = as_backbone(backbone)
    loaded = as_prefix(prefix, backbone)
    if loaded is None:
        raise ConfigError("the bare model cannot tag.", hint="give a prefix that was trained for tagging.")
    encoded = encode_to_label("tagging", backbone, texts, loaded, text_format=as_text_format(text_format))
    return encoded.predict_all(config, on_batch)


def _labels_for(kind: TaskKind, prefix: Prefix | None, requested: Sequence[str] | Labels | None) -> Labels:
    """The labels that a prefix was trained with, or for the bare model the requested ones."""
    stored = labels_of(prefix)
    if isinstance(requested, Iterable) and not isinstance(requested, Labels | str):
        # Of numpy, too.
        requested = list(requested)
    if stored is not None and stored.kind == kind and requested is None:
        return stored
    if prefix is None and isinstance(requested, Labels):
        return Labels(kind, "words", requested.names, requested.words)
    if prefix is None and requested and not isinstance(requested, Labels):
        are_texts = isinstance(requested, Iterable) and all(isinstance(label, str) for label in requested)
        if isinstance(requested, str) or not are_texts:
            raise ConfigError(f"labels is {short_repr(requested)}, no list of strings.", hint="write [a, b].")
        names = tuple(requested)
        if (label := first_duplicate(names)) is not None:
            raise ConfigError(f"labels has {short_repr(label)} more than once.", hint="give every label once.")
        return Labels(kind, "words", names, names)
    what = "the bare model" if prefix is None else f"a prefix for {stored.kind if stored else 'generation'}"
    hint = f"give a prefix that was trained for {kind}, or for the bare model a list of labels."
    raise ConfigError(f"{what} cannot be used for {kind}{' with given labels' if requested else ''}.", hint=hint)


def first_duplicate(labels: Iterable[str]) -> str | None:
    """The first label that is there more than once; None: all differ.

    >>> first_duplicate(["yes", "no", "yes"])
    'yes'
    """
    return next((label for label, count in Counter(labels).items() if count > 1), None)
