"""Generate texts, each with its own prefix, mixed in one batch: greedy, sampling, or beam search."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone
from prefixtune.backbone.prefixes import PrefixLike, as_prefix
from prefixtune.data.chat import Source
from prefixtune.data.encoding import TextFormatLike, as_text_format, check_texts
from prefixtune.errors import RequestError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.decoding import generate_batch, seeded
from prefixtune.inference.prompts import check_requests, prepare_prompts
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat
from prefixtune.sampling.detokenizer import Detokenizer, text_until_stop
from prefixtune.utils.console import show_batches

__all__ = ["generate", "generate_ids", "read_output"]


def generate(
    backbone: BackboneLike,
    texts: Sequence[Source],
    prefix: PrefixLike | Sequence[PrefixLike | None] | None = None,
    *,
    text_format: TextFormatLike | None = None,
    config: GenerateConfig | Mapping[str, Any] | None = None,
    on_batch: Callable[[int], None] | None = None,
    on_cut: Callable[[Sequence[int]], None] | None = None,
    on_unended: Callable[[Sequence[int]], None] | None = None,
    progress: bool = False,
    **options: Any,
) -> list[str]:
    """Continue texts, each with its own prefix.

    Args:
        backbone: The frozen model: a `Backbone`, a name or path (loaded for this call), or a (model, tokenizer) pair.
        texts: Sources, as in training (linearized, without separators); or conversations, each a list of messages with
            `role` and `content`, of which the last is the user's. With a prefix that was trained with a chat template,
            a text is one user message.
        prefix: One for all texts, one per text, or None; within a list, None leaves that text to the bare model. A
            prefix is a `Prefix`, a path, or a repository of the hub.
        text_format: The text around a source: a `TextFormat`, or a dict of its fields; None: what each prefix was
            trained with, by its header.
        config: How to decode: a `GenerateConfig`, or a dict of its fields.
        on_batch: Called with the number of texts that are done, as they are.
        on_cut: Called before the work with the indices of the truncated sources, if there are any; None: a warning
            says so.
        on_unended: Called after the work with the indices of the outputs that took all tokens they may have and did not
            end, if there are any.
        progress: Show the progress on stderr.
        **options: Fields of `GenerateConfig`, instead of `config`.

    Returns:
        One output per text, in order, stripped of outer space.

    Raises:
        RequestError: A text with its prefix does not fit the backbone's positions (before any work is done), or the
            counts differ.
        BackboneError: A prefix does not fit the backbone.
        CheckpointError: A prefix cannot be read.
        ConfigError: A wrong option, or an argument of a wrong type.
        PrefixError: The model's logits are not finite.
    """
    config = GenerateConfig.from_arguments(config, options)
    check_texts(texts)
    texts = list(texts)
    backbone = as_backbone(backbone)
    prefixes = _per_text(prefix, len(texts), backbone)
    prompts = prepare_prompts(backbone, texts, prefixes, config, as_text_format(text_format), on_cut=on_cut)
    with show_batches("generating", len(texts), on_batch, progress) as show:
        outputs = generate_ids(
            backbone,
            prompts.ids,
            prefixes,
            config=config,
            new_tokens=prompts.new_tokens,
            ends=prompts.ends,
            on_batch=show,
        )
    if on_unended is not None:
        limits = enumerate(zip(outputs, prompts.new_tokens, strict=True))
        unended = [number for number, (ids, limit) in limits if not _has_ended(backbone, ids, limit, config)]
        if unended:
            on_unended(unended)
    return [read_output(backbone, ids, form, config) for ids, form in zip(outputs, prompts.formats, strict=True)]


def _has_ended(backbone: Backbone, ids: Sequence[int], limit: int, config: GenerateConfig) -> bool:
    """Whether an output ended by itself: by an end token, which is left out of its tokens, or by a stop string."""
    if len(ids) < limit:
        return True
    text = Detokenizer(backbone.decode, config.stop)
    text.add(*ids)
    return text.stopped


def read_output(backbone: Backbone, ids: list[int], text_format: TextFormat, config: GenerateConfig) -> str:
    """The target in generated tokens."""
    return text_format.extract_target(text_until_stop(backbone.decode, ids, config.stop))


def generate_ids(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    prefixes: Sequence[Prefix | None],
    *,
    config: GenerateConfig,
    new_tokens: Sequence[int] | None = None,
    ends: Sequence[Sequence[int]] = (),
    streamer: Any = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """`generate` on token ids: what follows each prompt, without the end token and padding.

    The results are in the order of the prompts. `new_tokens` limits each prompt; None: `config.max_new_tokens` limits
    all. `ends` are the tokens, besides the tokenizer's end token, at which each text ends.
    """
    limits = [config.max_new_tokens] * len(prompts) if new_tokens is None else new_tokens
    check_requests(backbone, prompts, prefixes, limits)
    own_ends = [tuple(own) for own in ends] or [()] * len(prompts)
    texts = [_Text(*fields) for fields in zip(prompts, prefixes, limits, own_ends, strict=True)]
    shared = [_shared(backbone, number, text) for number, text in enumerate(texts)]
    order = sorted(range(len(texts)), key=lambda n: (shared[n], len(texts[n].prompt)))
    results: dict[int, list[int]] = {}
    with seeded(config.seed, backbone.device):
        while order:
            rows = [n for n in order[: config.batch_size] if shared[n] == shared[order[0]]]
            outputs = _run_batch(backbone, [texts[n] for n in rows], config, streamer)
            results |= dict(zip(rows, outputs, strict=True))
            order = order[len(rows) :]
            if on_batch is not None:
                on_batch(len(results))
    return [results[n] for n in range(len(texts))]


class _Text(NamedTuple):
    """A text to generate.

    Attributes:
        prompt: Token ids.
        prefix: In front of them.
        new_tokens: Most tokens to generate.
        ends: The tokens, besides the tokenizer's end token, at which it ends.
    """

    prompt: Sequence[int]
    prefix: Prefix | None
    new_tokens: int
    ends: tuple[int, ...]


def _shared(backbone: Backbone, number: int, text: _Text) -> tuple[int, Sequence[int], int]:
    """What all texts of a batch have alike; in order, the longest outputs come first."""
    # One that may become longer than the model's original length is alone: it would turn the keys of the others.
    limit = backbone.longrope_limit
    is_alone = limit is not None and len(text.prompt) + text.new_tokens > limit
    return -text.new_tokens, text.ends, number if is_alone else -1


def _run_batch(backbone: Backbone, texts: Sequence[_Text], config: GenerateConfig, streamer: Any) -> list[list[int]]:
    """What follows each prompt of one batch."""
    limit = texts[0].new_tokens
    return generate_batch(
        backbone,
        [text.prompt for text in texts],
        [text.prefix for text in texts],
        config.replace(max_new_tokens=limit, min_new_tokens=min(config.min_new_tokens, limit)),
        streamer,
        (backbone.eos_id, *texts[0].ends),
    )


def _per_text(
    prefix: PrefixLike | Sequence[PrefixLike | None] | None, count: int, backbone: Backbone
) -> list[Prefix | None]:
    """One prefix per text; each is read and checked once."""
    if isinstance(prefix, str) or not isinstance(prefix, Sequence):
        return [as_prefix(prefix, backbone)] * count
    if len(prefix) != count:
        raise RequestError(
            f"{len(prefix)} prefixes for {count} texts.", hint="give one for all, or one (or None) per text."
        )
    keys = [str(item) if isinstance(item, str | os.PathLike) else id(item) for item in prefix]
    loaded = {key: as_prefix(item, backbone) for key, item in dict(zip(keys, prefix, strict=True)).items()}
    return [loaded[key] for key in keys]
