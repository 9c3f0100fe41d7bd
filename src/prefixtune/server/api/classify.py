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
from fastapi import Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field
from torch import Tensor

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.examples import TaskKind
from prefixtune.data.labels import labels_of
from prefixtune.engine.engine import TorchEngine
from prefixtune.engine.request import EngineFull
from prefixtune.errors import ConfigError, ContextLengthError, PrefixError, RequestError, short_repr
from prefixtune.inference.classify import EncodedTexts, encode_to_label, first_duplicate
from prefixtune.inference.config import ClassifyConfig
from prefixtune.server.api.endpoint import GenerationContext, RequestContext, key_router
from prefixtune.server.api.generation import engine_error
from prefixtune.server.api.protocol import Body, Text, Texts
from prefixtune.server.catalog import ServedModel
from prefixtune.server.responses import ApiError, JsonAnswer, bad_request, unavailable
from prefixtune.server.settings import ServeConfig

router = key_router()


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

    def check(self, config: ServeConfig) -> None:
        """As `GenerationRequest.check`."""
        if len(self.texts) > config.max_texts:
            raise bad_request(f"there are {len(self.texts)} texts; at most {config.max_texts} are allowed.", "input")
        if label := first_duplicate(self.labels or ()):
            raise bad_request(f"the label {short_repr(label)} is given twice.", "labels")


@router.post("/classify", name="classify")
async def create_classification(request: ClassifyRequest, context: GenerationContext) -> Response:
    """Classify or tag texts.

    `labels`, `probs` and `num_classes` are vLLM's; a prefix that tags gives `tokens`, each with these.
    """
    state = context.state
    request.check(state.config)
    context.admit(len(request.texts))
    model = await state.run_loading(state.catalog.load, request.model, context.caller)
    _check_kind(request, model)
    encoded = await _encode(context, request, model)
    num_tokens = sum(map(len, encoded.prompts))
    context.log_fields |= {"model": model.name, "prompt_tokens": num_tokens}
    state.metrics.prompt(model.names, num_tokens)
    scores = await _score(context, encoded)

    def respond() -> Response:
        body = {
            "id": f"classify-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": model.name,
            "data": [_item(encoded, index, request.texts[index], one) for index, one in enumerate(scores)],
            "usage": {"prompt_tokens": num_tokens, "completion_tokens": 0, "total_tokens": num_tokens},
        }
        return JsonAnswer(body, headers=context.headers)

    try:
        # Of thousands of words it takes a second.
        return await run_in_threadpool(respond)
    except PrefixError as error:
        raise engine_error(context, error.message) from None


def _check_kind(request: ClassifyRequest, model: ServedModel) -> None:
    """Refuse a model that gives no labels, and labels or lists of words where there is no use for them."""
    stored, name = labels_of(model.prefix), repr(model.name)
    if model.prefix is not None and stored is None:
        message = f"the prefix {name} generates texts and gives no labels."
        raise bad_request(message, "model", "not_a_classifier", hint="use /v1/completions or /v1/tasks.")
    if (stored is None) != (request.labels is not None):
        message = f"{name} {'is the bare backbone, which needs labels' if stored is None else 'has labels of its own'}."
        raise bad_request(message, "labels", hint="give labels with the bare backbone only.")
    if (stored is None or stored.kind != "tagging") and not all(isinstance(text, str) for text in request.texts):
        raise bad_request(f"{name} classifies whole texts.", "input", hint="give texts, not lists of words.")


def _words(text: str | Sequence[str]) -> list[str]:
    return text.split() if isinstance(text, str) else list(text)


async def _encode(context: RequestContext, request: ClassifyRequest, model: ServedModel) -> EncodedTexts:
    """The texts as token ids, in the prefix's text format.

    Raises:
        ApiError: A text cannot be labelled, or is longer than this server allows, though the model could read it.
    """
    backbone, worker, stored = context.state.backbone, context.state.worker, labels_of(model.prefix)
    config, cut = ClassifyConfig(on_too_long=context.state.config.on_too_long), list[int]()

    def encode() -> EncodedTexts:
        kind: TaskKind = "classification" if stored is None else stored.kind
        texts = list(map(_words, request.texts)) if kind == "tagging" else request.texts
        options: dict[str, Any] = {"labels": request.labels, "positions": worker.max_length, "on_cut": cut.extend}
        options |= {} if kind == "tagging" else {"config": config}
        return encode_to_label(kind, backbone, texts, model.prefix, **options)

    try:
        encoded = await context.tokenize(encode)
        longest = max(map(len, encoded.prompts))
        worker.check_length(longest, model.prefix_length, max(map(len, encoded.words), default=0))
    except (RequestError, ConfigError) as error:
        code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
        raise bad_request(error.message, "input", code, hint=error.hint) from None
    if cut:
        context.headers["x-prefixtune-cut-texts"] = context.log_fields["cut_texts"] = str(len(cut))
    return encoded


async def _score(context: RequestContext, encoded: EncodedTexts) -> list[Tensor]:
    """The scores of all texts, a batch and a part of the labels at a time between two steps of the engine.

    Raises:
        ApiError: The time is over, or the engine accepts no work.
        ClientDisconnect: The client disconnected.
    """
    worker = context.state.worker
    if not isinstance(worker, TorchEngine):
        raise ApiError(501, "this server's engine writes text only: it gives no labels.", code="unsupported_engine")
    max_tokens = worker.prefill_tokens
    scores: dict[int, list[Tensor]] = {row: [] for row in range(len(encoded.prompts))}

    def score(_: Backbone, rows: Sequence[int], part: slice) -> list[Tensor]:
        return [one.cpu() for one in encoded.score(rows, part)]

    async def score_all() -> None:
        for rows in _batches(encoded, max_tokens):
            for part in encoded.parts(rows, max_tokens):
                found = await asyncio.wrap_future(worker.call(partial(score, rows=rows, part=part)))
                for row, one in zip(rows, found, strict=True):
                    scores[row].append(one)

    try:
        await context.run_in_time(score_all())
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


def _item(encoded: EncodedTexts, index: int, text: str | Sequence[str], scores: Tensor) -> dict[str, Any]:
    """A text of the response."""
    found = [
        {"label": one.label, "probs": list(one.probabilities.values()), "num_classes": len(one.probabilities)}
        for one in encoded.predict(index, scores)
    ]
    if encoded.labels.kind != "tagging":
        return {"index": index, **found[0]}
    tokens = [{"token": word, **one} for word, one in zip(_words(text), found, strict=True)]
    return {"index": index, "label": None, "probs": None, "num_classes": found[0]["num_classes"], "tokens": tokens}
