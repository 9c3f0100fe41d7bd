"""`/classify`: labels of texts, by a prefix that classifies or tags, in vLLM's shape.

The model works on a batch of texts at a time, between two steps of the engine, so that streams go on.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field
from torch import Tensor

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.labels import labels_of
from prefixtune.engine.request import ContextLengthError, EngineFull
from prefixtune.errors import ConfigError, PrefixError, RequestError, short_repr
from prefixtune.inference.classify import (
    EncodedTexts,
    Prediction,
    encode_to_classify,
    encode_to_tag,
    first_duplicate,
)
from prefixtune.inference.config import ClassifyConfig
from prefixtune.server.api.endpoint import GenerationContext, RequestContext
from prefixtune.server.api.generation import deadline_exceeded, engine_error
from prefixtune.server.api.prompting import tokenize
from prefixtune.server.api.protocol import Body, Text, Texts
from prefixtune.server.api.streaming import run_until_disconnect
from prefixtune.server.limits import Limits
from prefixtune.server.models.catalog import ServedModel
from prefixtune.server.responses import bad_request, json_response, unavailable

__all__ = ["router"]


router = APIRouter()
_FEW_PROBABILITIES = 5_000
"""Of a response that is written at once; of others a thread makes it."""
_MOST_PROBABILITIES = 500_000
"""Probabilities of a response: some 12 MB, and two seconds of a thread."""


class ClassifyRequest(Body):
    """A body of `/classify`."""

    model: Text = Field(description="A prefix that classifies or tags; or the bare backbone, with labels.")
    input: Text | Annotated[list[Text | Texts], Field(min_length=1, fail_fast=True)] = Field(
        description="One or several texts. For a prefix that tags, a text is split at white space.",
        examples=["a fine film"],
    )
    labels: Annotated[list[Text], Field(min_length=2, max_length=1000, fail_fast=True)] | None = Field(
        None, description="With the bare backbone: the labels to choose from, each once, by their own words."
    )
    user: Any = Field(None, description="Ignored.")
    priority: Any = Field(None, description="Ignored.")

    @property
    def texts(self) -> list[str | list[str]]:
        """The texts, as a list."""
        return [self.input] if isinstance(self.input, str) else list(self.input)

    def check(self, limits: Limits) -> None:
        """As `Body.check`."""
        if len(self.texts) > limits.max_texts:
            raise bad_request(f"there are {len(self.texts)} texts; at most {limits.max_texts} are allowed.", "input")
        if label := first_duplicate(self.labels or ()):
            raise bad_request(f"the label {short_repr(label)} is given twice.", "labels")


@router.post("/classify", name="classify")
async def create_classification(request: ClassifyRequest, context: GenerationContext) -> Response:
    """Classify or tag texts.

    `labels`, `probs` and `num_classes` are vLLM's; a prefix that tags gives `tokens`, each with these.
    """
    state = context.state
    request.check(state.limits)
    context.admit(len(request.texts))
    model = await run_in_threadpool(state.catalog.load, request.model, context.caller)
    if state.config.log_prompts:
        context.log_fields["input"] = request.texts
    _check_kind(request, model)
    texts = request.texts
    encoded = await _encode(context, request, model)
    num_tokens = sum(map(len, encoded.prompts))
    context.log_fields |= {"model": model.name, "prompt_tokens": num_tokens}
    state.metrics.prompt(model.names, num_tokens)
    scores = await _score(context, encoded)
    is_large = _num_probabilities(encoded) > _FEW_PROBABILITIES

    def respond() -> Response:
        try:
            data = [_item(encoded, index, texts[index], one) for index, one in enumerate(scores)]
        except PrefixError as error:
            raise engine_error(context, error.message) from None
        body = {
            "id": f"classify-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": model.name,
            "data": data,
            "usage": {"prompt_tokens": num_tokens, "completion_tokens": 0, "total_tokens": num_tokens},
        }
        return json_response(body, headers=context.headers)

    # Of thousands of words it takes a second.
    return await run_in_threadpool(respond) if is_large else respond()


def _check_kind(request: ClassifyRequest, model: ServedModel) -> None:
    """Refuse a model that gives no labels, and labels or lists of words where there is no use for them."""
    stored = labels_of(model.prefix)
    if model.prefix is not None and stored is None:
        raise bad_request(
            f"the prefix {model.name!r} generates texts and gives no labels.",
            "model",
            "not_a_classifier",
            hint="use /v1/completions or /v1/tasks, or name a prefix that was trained for classification or tagging.",
        )
    if model.prefix is None and not request.labels:
        raise bad_request(
            f"{model.name!r} is the bare backbone, which needs labels to choose from.",
            "labels",
            hint='give "labels": ["a", "b"], or name a prefix that was trained for classification or tagging.',
        )
    if model.prefix is not None and request.labels:
        raise bad_request(f"the prefix {model.name!r} has labels of its own.", "labels", hint="leave it out.")
    if (stored is None or stored.kind != "tagging") and not all(isinstance(text, str) for text in request.texts):
        raise bad_request(f"{model.name!r} classifies whole texts.", "input", hint="give texts, not lists of words.")


def _words(text: str | Sequence[str]) -> list[str]:
    return text.split() if isinstance(text, str) else list(text)


async def _encode(context: RequestContext, request: ClassifyRequest, model: ServedModel) -> EncodedTexts:
    """The texts as token ids, in the prefix's text format.

    Raises:
        ApiError: A text cannot be labelled.
    """
    backbone, stored = context.state.backbone, labels_of(model.prefix)
    positions = context.state.worker.max_length
    config = ClassifyConfig(on_too_long=context.state.config.on_too_long)
    cut: list[int] = []

    def encode() -> EncodedTexts:
        if model.prefix is not None and stored is not None and stored.kind == "tagging":
            return encode_to_tag(backbone, [_words(text) for text in request.texts], model.prefix, positions=positions)
        texts = [str(text) for text in request.texts]
        labels = request.labels
        return encode_to_classify(
            backbone, texts, model.prefix, labels=labels, config=config, positions=positions, on_cut=cut.extend
        )

    try:
        encoded = await tokenize(context, encode)
    except (RequestError, ConfigError) as error:
        raise bad_request(error.message, "input", hint=error.hint) from None
    _check_lengths(context, encoded, model)
    if (count := _num_probabilities(encoded)) > _MOST_PROBABILITIES:
        raise bad_request(
            f"the response would have {count:,} probabilities; at most {_MOST_PROBABILITIES:,} are allowed.",
            "input",
            "too_many_probabilities",
            hint="send fewer texts at once.",
        )
    if cut:
        context.headers["x-prefixtune-cut-texts"] = context.log_fields["cut_texts"] = str(len(cut))
    return encoded


def _check_lengths(context: RequestContext, encoded: EncodedTexts, model: ServedModel) -> None:
    """Refuse texts that are longer than this server allows, though the model could read them."""
    state = context.state
    longest = max(map(len, encoded.prompts))
    most = state.config.max_prompt_tokens
    if most and longest > most:
        raise bad_request(f"a text has {longest} tokens, but {most} are allowed.", "input", "context_length_exceeded")
    try:
        state.worker.check_length(longest, model.prefix_length, max(map(len, encoded.words), default=0))
    except ContextLengthError as error:
        raise bad_request(error.message, "input", "context_length_exceeded", hint="shorten the text.") from None


async def _score(context: RequestContext, encoded: EncodedTexts) -> list[Tensor]:
    """The scores of all texts, a batch and a part of the labels at a time between two steps of the engine.

    Raises:
        ApiError: The time is over, or the engine accepts no work.
        ClientDisconnect: The client disconnected.
    """
    state, max_tokens = context.state, context.state.torch_worker.engine.prefill_tokens
    scores: dict[int, list[Tensor]] = {row: [] for row in range(len(encoded.prompts))}

    def score(_: Backbone, rows: Sequence[int], part: slice) -> list[Tensor]:
        return [one.cpu() for one in encoded.score(rows, part)]

    async def score_all() -> None:
        for rows in _batches(encoded, max_tokens):
            for part in encoded.parts(rows, max_tokens):
                found = await asyncio.wrap_future(state.torch_worker.call(partial(score, rows=rows, part=part)))
                for row, one in zip(rows, found, strict=True):
                    scores[row].append(one)

    try:
        async with asyncio.timeout(context.remaining):
            await run_until_disconnect(context.request.receive, score_all())
    except TimeoutError:
        raise deadline_exceeded(context) from None
    except EngineFull as error:
        raise unavailable(error.message, "engine_unavailable", retry_after=5) from None
    return [torch.cat(of_one, dim=-1) for of_one in scores.values()]


def _batches(encoded: EncodedTexts, max_tokens: int) -> Iterator[list[int]]:
    """Texts of similar length together, with padding at most that many tokens; at least one text."""
    # Where the labels' words alone are more, they are scored in parts, one text at a time.
    extra = sum(map(len, encoded.words))
    batch: list[int] = []
    for row in sorted(range(len(encoded.prompts)), key=lambda row: len(encoded.prompts[row])):
        if batch and (len(batch) + 1) * (len(encoded.prompts[row]) + extra) > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _num_probabilities(encoded: EncodedTexts) -> int:
    """Of all texts together: one for every label, of a text or of each of its words."""
    labelled = sum(map(len, encoded.positions)) if encoded.positions else len(encoded.prompts)
    return labelled * len(encoded.labels.names)


def _item(encoded: EncodedTexts, index: int, text: str | Sequence[str], scores: Tensor) -> dict[str, Any]:
    """A text of the response."""
    predictions = encoded.predict(index, scores)
    tags = encoded.labels.kind == "tagging"
    return {"index": index, **(_tagged(_words(text), predictions) if tags else _label(predictions[0]))}


def _label(prediction: Prediction) -> dict[str, Any]:
    probabilities = list(prediction.probabilities.values())
    return {"label": prediction.label, "probs": probabilities, "num_classes": len(probabilities)}


def _tagged(words: Sequence[str], predictions: Sequence[Prediction]) -> dict[str, Any]:
    tokens = [{"token": word, **_label(one)} for word, one in zip(words, predictions, strict=True)]
    num_classes = tokens[0]["num_classes"]
    return {"label": None, "probs": None, "num_classes": num_classes, "tokens": tokens}
