"""Classification and tagging: labels instead of texts.

Two ways. A *head*: a linear layer on the last hidden state, trained with the prefix and stored with it (P-tuning v2).
*Words*: each label has a word, and the language model itself tells how likely each is after the text; no head is
needed. An encoder takes a head, as it writes no words; tagging always does.

Knows nothing of files and of training's steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

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
from prefixtune.data.truncation import report_truncated, truncate_prompt
from prefixtune.errors import ConfigError, RequestError, describe_value
from prefixtune.prefix.prefix import Prefix, check_fits

__all__ = ["Prediction", "classify", "tag"]


@dataclass(frozen=True)
class Prediction:
    """What was told of one text, or of one token of it.

    Attributes:
        label: The likeliest.
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
    chosen = labels_for("classification", prefix, labels)
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
        truncate_prompt(backbone, form, prompt, prefix_length=length, new_tokens=room, name=f"text {number}")
        for number, prompt in enumerate(whole, start=1)
    ]
    report_truncated(whole, prompts, on_cut)
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
    chosen = labels_for("tagging", loaded, None)
    form = format_of(backbone, loaded, as_text_format(text_format))
    check_fits(loaded, backbone.geometry, backbone.name)
    for number, tokens in enumerate(texts):
        if isinstance(tokens, str) or not tokens or not all(isinstance(token, str) for token in tokens):
            raise RequestError(f"text {number + 1} is {tokens!r}, not a list of tokens.", hint="write text.split().")
    pairs = [encode_labelled_prompt(backbone, form, " ".join(tokens), tokens) for tokens in texts]
    _check_lengths(backbone, loaded, [len(prompt) for prompt, _ in pairs])
    tagged: list[list[Prediction]] = []
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        scores = iter(_score_head(backbone, loaded, [prompt for prompt, _ in chunk], [places for _, places in chunk]))
        tagged.extend([_predict(next(scores), chosen.names) for _ in places] for _, places in chunk)
        if on_batch is not None:
            on_batch(len(tagged))
    return tagged


def labels_for(kind: TaskKind, prefix: Prefix | None, given: Sequence[str] | None) -> Labels:
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
    taken = backbone.prefix_positions(0 if prefix is None else prefix.length())
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
    batch = collate(backbone, [TokenizedExample(tuple(prompt), tuple(answers)) for prompt in prompts])
    losses = batch_loss(backbone, prefix, batch)
    total = torch.zeros(batch.num_targets, device=losses.device).index_add_(
        0, batch.target_index.to(losses.device), losses
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
    batch = collate(backbone, [TokenizedExample(tuple(p), (tuple(0 for _ in at),), tuple(at)) for p, at in zipped])
    return prefix.head(hidden_states_at(backbone, prefix, batch))


def _predict(scores: torch.Tensor, names: Sequence[str]) -> Prediction:
    shares = scores.float().softmax(-1).tolist()
    return Prediction(names[max(range(len(names)), key=shares.__getitem__)], dict(zip(names, shares, strict=True)))
