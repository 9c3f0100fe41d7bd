"""A `pipeline` of transformers with a prefix in front of its model.

Texts and conversations become tokens as in `generate`, and transformers' own `generate` continues them: all of its
options work, but for those that keep a cache or guess tokens of their own.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, TextClassificationPipeline, TextGenerationPipeline
from transformers import pipeline as transformers_pipeline

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.chat import end_ids
from prefixtune.data.labels import labels_of
from prefixtune.errors import ConfigError, RequestError, did_you_mean
from prefixtune.inference.classify import classify
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.decoding import penalty_processor, put_prefixes, refuse_not_finite
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import read_text_format

__all__ = ["TASKS", "make_pipeline"]


TASKS = ("text-classification", "text-generation")
"""The pipelines that there are with a prefix."""

_WAYS_OUT = {
    "summarization": "transformers 5 has no such pipeline; use model.generate.",
    "translation": "transformers 5 has no such pipeline; use model.generate.",
    "text2text-generation": "transformers 5 has no such pipeline; use model.generate.",
    "token-classification": "use prefixtune.inference.classify.tag.",
    "ner": "use prefixtune.inference.classify.tag.",
    "sentiment-analysis": "it is called text-classification.",
    "conversational": "use text-generation with messages, or model.chat.",
}
_REFUSED = (
    *("assistant_model", "cache", "cache_implementation", "inputs_embeds", "past_key_values", "position_ids"),
    *("prefill_chunk_size", "prompt_lookup_num_tokens"),
)
"""Options of transformers' `generate` that would take the prefix's place."""


class Encode(Protocol):
    """Makes token ids of a text or messages, as `generate` does; and those that end an answer."""

    def __call__(self, text: Any, new_tokens: int, *, at_most: bool) -> tuple[list[int], tuple[int, ...]]:
        """For so many tokens to follow, or at most so many."""


def make_pipeline(
    backbone: Backbone, prefix: Prefix | None, encode: Encode, task: str, options: Mapping[str, Any]
) -> Any:
    """Transformers' pipeline for a task.

    Args:
        backbone: The frozen model.
        prefix: In front of every text; None: nothing.
        encode: Makes token ids of what the pipeline is called with.
        task: One of `TASKS`.
        options: Of transformers' `pipeline`, and defaults of its calls; `labels` for the bare model.

    Raises:
        ConfigError: There is no such pipeline with a prefix, or the prefix is for something else.
    """
    if task not in TASKS:
        raise ConfigError(
            f"there is no pipeline {task!r} with a prefix, only {' and '.join(TASKS)}.",
            hint=_WAYS_OUT.get(task) or did_you_mean(task, TASKS),
        )
    for name in ("device", "device_map", "model", "tokenizer", "dtype"):
        if name in options:
            raise ConfigError(
                f"{name} is an option of the pipeline, but the model is loaded.", hint=f"set {name} in prefixtune.load."
            )
    shared = {"tokenizer": _pipeline_tokenizer(backbone), "device": backbone.device, **options}
    if task == "text-classification":
        return _classifier(backbone, prefix, shared)
    if (labels := labels_of(prefix)) is not None:
        raise ConfigError(f"the prefix is for {labels.kind}, and writes no text.", hint="use text-classification.")
    if backbone.kind != "decoder" or (prefix is not None and prefix.placement != "front"):
        what = "an infix" if backbone.kind == "decoder" else f"{backbone.name!r}, of kind {backbone.kind}"
        raise ConfigError(f"transformers has no pipeline for {what}.", hint="use model.generate.")
    # The same modules, under an object of its own: the backbone stays as it is.
    model = copy.copy(backbone.model)
    model.generate = functools.partial(_generate, backbone, prefix)
    made = transformers_pipeline(task, model=model, pipeline_class=PrefixTextGeneration, **shared)
    made.encode = encode
    return made


class PrefixTextGeneration(TextGenerationPipeline):  # type: ignore[misc]
    """Text generation whose texts are formatted as the prefix was trained."""

    encode: Encode

    def preprocess(self, prompt_text: Any, **settings: Any) -> dict[str, Any]:
        """Token ids of a text or a conversation, as `generate` makes them."""
        # What the pipeline was made with does not come here.
        given = {**getattr(self, "_generate_kwargs", {}), **settings}
        limits = [given.get("max_new_tokens"), getattr(given.get("generation_config"), "max_new_tokens", None)]
        defaults = [self.model.generation_config.max_new_tokens, self._default_generation_config.max_new_tokens]
        new_tokens = next((limit for limit in (*limits, *defaults) if limit), 1)
        source = getattr(prompt_text, "messages", prompt_text)
        ids, ends = self.encode(source, new_tokens, at_most=not any(limits))
        rows = torch.tensor([ids])
        mask = torch.ones_like(rows)
        return {"input_ids": rows, "attention_mask": mask, "prompt_text": prompt_text, "ends": ends}

    def _forward(self, model_inputs: dict[str, Any], **options: Any) -> Any:
        ends = model_inputs.pop("ends")
        # In a batch, a list of each row's.
        flat = {end for row in ends for end in (row if isinstance(row, tuple) else (row,))}
        if flat and not getattr(options.get("generation_config"), "eos_token_id", None):
            options.setdefault("eos_token_id", sorted({self.tokenizer.eos_token_id, *flat}))
        return super()._forward(model_inputs, **options)


class PrefixTextClassification(TextClassificationPipeline):  # type: ignore[misc]
    """Text classification by a prefix's head or words."""

    predict: Callable[[list[str]], Tensor]

    def check_model_type(self, supported_models: Any) -> None:
        """Nothing: the labels come from `classify`, not from a class of transformers."""

    def preprocess(self, inputs: Any, **settings: Any) -> dict[str, Any]:
        """The text itself: it is formatted and cut as in training."""
        if not isinstance(inputs, str):
            raise RequestError(
                "the pipeline classifies one text at a time.", hint='write pipe("a text") or pipe([...]).'
            )
        if settings:
            raise ConfigError(
                f"{', '.join(settings)}: texts are cut as in training, and the tokenizer takes no options here.",
                hint="leave them out.",
            )
        return {"text": inputs}

    def _forward(self, model_inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        texts = model_inputs["text"]
        return {"logits": self.predict([texts] if isinstance(texts, str) else list(texts))}


def _pipeline_tokenizer(backbone: Backbone) -> Any:
    """A tokenizer of the pipeline's own, which sets its padding side."""
    tokenizer = copy.copy(backbone.tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _classifier(backbone: Backbone, prefix: Prefix | None, options: dict[str, Any]) -> Any:
    stored = labels_of(prefix)
    if stored is not None and stored.kind != "classification":
        raise ConfigError(f"the prefix is for {stored.kind}.", hint="use prefixtune.inference.classify.tag.")
    given = options.pop("labels", None)
    names = list(given or ()) if stored is None else list(stored.names)
    if not names or (stored is not None and given):
        raise ConfigError(
            "there are no labels to choose from." if not names else "the prefix has labels of its own.",
            hint="train a prefix for classification, or give labels=[...] with the bare model.",
        )

    def predict(texts: list[str]) -> Tensor:
        found = classify(backbone, texts, prefix, labels=names if stored is None else None)
        rows = [[math.log(max(row.probabilities[name], 1e-38)) for name in names] for row in found]
        return torch.tensor(rows, dtype=torch.float64).float()

    model = copy.copy(backbone.model)
    model.config = copy.deepcopy(backbone.model.config)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    model.config.problem_type = "single_label_classification"
    made = transformers_pipeline("text-classification", model=model, pipeline_class=PrefixTextClassification, **options)
    made.predict = predict
    return made


# --- transformers' generate -------------------------------------------------------------------------------------------


@torch.inference_mode()
def _generate(
    backbone: Backbone,
    prefix: Prefix | None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    generation_config: Any = None,
    streamer: Any = None,
    logits_processor: Sequence[Any] | None = None,
    **options: Any,
) -> Any:
    """`generate` of transformers with the prefix in front; ids and scores are as if it were not there.

    Raises:
        ConfigError: An option cannot be used with a prefix.
        RequestError: The text is empty.
        PrefixError: The model's logits are not finite.
    """
    if input_ids is None:
        raise RequestError("the text has no token.", hint="write some text.")
    config = _merge(backbone, prefix, generation_config, options)
    if config.eos_token_id is None:
        ends = end_ids(backbone, None if prefix is None else read_text_format(prefix.header))
        config.eos_token_id = [backbone.eos_id, *ends] if ends else backbone.eos_id
    repeats = max(config.num_beams or 1, config.num_return_sequences or 1)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    prompts = [ids[real.bool()].tolist() for ids, real in zip(input_ids, mask, strict=True)]
    length = 0 if prefix is None else prefix.length()
    limit = backbone.max_positions_with(length)
    if limit is not None:
        # No more than fit; the prompts do, or were refused.
        room = limit - backbone.prefix_positions(length)
        if config.max_new_tokens:
            config.max_new_tokens = max(1, min(config.max_new_tokens, room - max(map(len, prompts))))
        if config.max_length:
            config.max_length = min(config.max_length, room)
    arguments = {"input_ids": input_ids, "attention_mask": mask}
    context = put_prefixes(arguments, backbone, [prefix] * len(prompts), GenerateConfig(num_beams=repeats))
    start = arguments["input_ids"].shape[1]
    width = start - input_ids.shape[1]
    for name in ("max_length", "min_length"):
        # A set total length counts what is in the ids.
        if getattr(config, name, None):
            setattr(config, name, getattr(config, name) + width)
    processors = [refuse_not_finite, *(logits_processor or ())]
    if config.repetition_penalty and config.repetition_penalty != 1:
        penalties = GenerateConfig(num_beams=repeats, repetition_penalty=config.repetition_penalty)
        processors.append(penalty_processor(backbone, prompts, penalties, start))
        config.repetition_penalty = None
    if streamer is not None:
        options["streamer"] = _Shortened(streamer, width)
    with context, backbone.autocast():
        output = backbone.model.generate(
            **arguments, generation_config=config, logits_processor=LogitsProcessorList(processors), **options
        )
    if isinstance(output, Tensor):
        return output[:, width:]
    output.sequences = output.sequences[:, width:]
    return output


def _merge(backbone: Backbone, prefix: Prefix | None, given: Any, options: dict[str, Any]) -> Any:
    """One generation configuration of a call's own and its options, which are taken out.

    Raises:
        ConfigError: An option cannot be used with a prefix.
    """
    config = GenerationConfig() if given is None else copy.deepcopy(given)
    if prefix is not None and backbone.model.generation_config.use_cache is False:
        # The checkpoint's own setting, which nobody gave.
        config.use_cache = True
    known = vars(GenerationConfig())
    for name in [name for name in options if name in known]:
        setattr(config, name, options.pop(name))
    for name in _REFUSED:
        if options.get(name) is not None or getattr(config, name, None) is not None:
            raise ConfigError(
                f"{name} cannot be used in a pipeline with a prefix.", hint="leave it out, or use model.generate."
            )
    if prefix is not None and config.use_cache is False:
        raise ConfigError("a pipeline with a prefix needs the cache, but use_cache is False.", hint="set it to True.")
    config.pad_token_id = backbone.pad_id if config.pad_token_id is None else config.pad_token_id
    return config


class _Shortened:
    """A streamer that does not see a prefix's slots in the prompt."""

    def __init__(self, streamer: Any, width: int) -> None:
        self._streamer = streamer
        self._width = width

    def put(self, value: Tensor) -> None:
        # The prompt comes first, as rows.
        self._streamer.put(value[:, self._width :] if value.dim() > 1 else value)

    def end(self) -> None:
        self._streamer.end()
