"""Generate texts, each with its own prefix, mixed in one batch: greedy, sampling, or beam search."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone
from prefixtune.backbone.native.linear import MOST_ROWS
from prefixtune.backbone.prefixes import PrefixLike, as_prefix
from prefixtune.data.chat import Source
from prefixtune.data.encoding import TextFormatLike, as_text_format, check_texts
from prefixtune.errors import RequestError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.decoding import generate_batch, seeded
from prefixtune.inference.detokenizer import text_until_stop
from prefixtune.inference.generation_config import check_supported
from prefixtune.inference.prompts import check_requests, prepare_prompts
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat
from prefixtune.utils.console import show_batches

__all__ = ["generate", "generate_ids", "read_output"]


def generate(
    backbone: BackboneLike,
    texts: Sequence[Source],
    prefix: PrefixLike | Sequence[PrefixLike | None] | None = None,
    *,
    text_format: TextFormatLike | None = None,
    config: GenerateConfig | Mapping[str, Any] | None = None,
    assistant: BackboneLike | None = None,
    on_batch: Callable[[int], None] | None = None,
    on_cut: Callable[[Sequence[int]], None] | None = None,
    progress: bool | None = None,
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
        assistant: A smaller model with the same tokenizer that guesses tokens for the backbone to check; the output is
            the same. Texts are generated one at a time.
        on_batch: Called after each batch with the number of texts that are done.
        on_cut: Called before the work with the indices of the truncated sources, if there are any; None: a warning
            says so.
        progress: Show the progress on stderr; None: only in a notebook, and only without `on_batch`.
        **options: Fields of `GenerateConfig`, instead of `config`.

    Returns:
        One output per text, in order, stripped of outer space.

    Raises:
        RequestError: A text with its prefix does not fit the backbone's positions (before any work is done), or the
            counts differ.
        BackboneError: A prefix does not fit the backbone.
        CheckpointError: A prefix cannot be read.
        ConfigError: A wrong option, or an argument of a wrong type.
    """
    config = GenerateConfig.from_arguments(config, options)
    check_texts(texts)
    backbone = as_backbone(backbone)
    assistant = None if assistant is None else as_backbone(assistant)
    prefixes = _per_text(prefix, len(texts), backbone)
    prompts = prepare_prompts(backbone, texts, prefixes, config, as_text_format(text_format), on_cut=on_cut)
    if progress is None and len(texts) <= config.batch_size:
        progress = False
    with show_batches("generating", len(texts), on_batch, progress) as show:
        outputs = generate_ids(
            backbone,
            prompts.ids,
            prefixes,
            config=config,
            new_tokens=prompts.new_tokens,
            ends=prompts.ends,
            assistant=assistant,
            on_batch=show,
        )
    return [read_output(backbone, ids, form, config) for ids, form in zip(outputs, prompts.formats, strict=True)]


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
    assistant: Backbone | None = None,
    streamer: Any = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """`generate` on token ids: what follows each prompt, without the end token and padding.

    Texts of similar length share a batch; the results are in the order of the prompts. `new_tokens` limits each prompt;
    None: `config.max_new_tokens` limits all. `ends` are the tokens, besides the tokenizer's end token, at which each
    text ends.
    """
    limits = [config.max_new_tokens] * len(prompts) if new_tokens is None else new_tokens
    check_requests(backbone, prompts, prefixes, limits)
    check_supported(backbone, config, assistant)
    batch_size = 1 if config.prompt_lookup or assistant is not None else config.batch_size
    infix = [prefix is not None and prefix.placement == "infix" for prefix in prefixes]
    # All rows of a batch have the same.
    shared = list(zip(infix, limits, [tuple(own) for own in ends] or [()] * len(prompts), strict=True))
    order = sorted(range(len(prompts)), key=lambda n: (infix[n], -limits[n], shared[n][2], len(prompts[n])))
    results: list[list[int]] = [[] for _ in prompts]
    done = 0
    with seeded(config.seed, backbone.device):
        while done < len(order):
            rows = order[done : done + batch_size]
            rows = [n for n in rows if shared[n] == shared[rows[0]]]
            limit = limits[rows[0]]
            batch_config = config.replace(max_new_tokens=limit, min_new_tokens=min(config.min_new_tokens, limit))
            few = len(rows) * config.num_beams <= MOST_ROWS and not config.compile and backbone.device.type == "cpu"
            outputs = generate_batch(
                backbone.for_single_texts if few else backbone,
                [prompts[n] for n in rows],
                [prefixes[n] for n in rows],
                batch_config,
                assistant,
                streamer,
                (backbone.eos_id, *shared[rows[0]][2]),
            )
            for row, ids in zip(rows, outputs, strict=True):
                results[row] = ids
            done += len(rows)
            if on_batch is not None:
                on_batch(done)
    return results


def _per_text(
    prefix: PrefixLike | Sequence[PrefixLike | None] | None, count: int, backbone: Backbone
) -> list[Prefix | None]:
    """One prefix per text; each file is read once."""
    if isinstance(prefix, str) or not isinstance(prefix, Sequence):
        return [as_prefix(prefix, backbone)] * count
    if len(prefix) != count:
        raise RequestError(
            f"{len(prefix)} prefixes for {count} texts.", hint="give one for all, or one (or None) per text."
        )
    loaded = {str(path): as_prefix(path, backbone) for path in prefix if isinstance(path, str | os.PathLike)}
    return [loaded[str(item)] if isinstance(item, str | os.PathLike) else as_prefix(item, backbone) for item in prefix]
