"""Stream one output in pieces, as it is generated."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from typing import Any

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone
from prefixtune.backbone.prefixes import PrefixLike, as_prefix
from prefixtune.data.chat import Source
from prefixtune.data.encoding import TextFormatLike, as_text_format, check_texts
from prefixtune.errors import ConfigError, RequestError, describe_value
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids, read_output
from prefixtune.inference.prompts import prepare_prompts
from prefixtune.prefix.prefix import Prefix
from prefixtune.sampling.detokenizer import Detokenizer

__all__ = ["check_streams", "stream", "stream_ids"]


def stream(
    backbone: BackboneLike,
    text: Source,
    prefix: PrefixLike | None = None,
    *,
    text_format: TextFormatLike | None = None,
    config: GenerateConfig | Mapping[str, Any] | None = None,
    on_cut: Callable[[Sequence[int]], None] | None = None,
    **options: Any,
) -> Generator[str, None, None]:
    """Continue one text, or answer one conversation, yielding pieces as they become certain.

    Joined, they are `generate`'s output. Arguments as for `generate`; beam search cannot stream.

    Raises:
        ConfigError: The configuration uses beam search.
    """
    config = GenerateConfig.from_arguments(config, options)
    check_streams(config)
    several = isinstance(text, list | tuple) and any(isinstance(part, str) for part in text)
    if several or not isinstance(text, str | list | tuple):
        raise RequestError(f"text is {describe_value(text)}, but must be one string.", hint="stream one at a time.")
    check_texts([text])
    backbone = as_backbone(backbone)
    prefix = as_prefix(prefix, backbone)
    prompts = prepare_prompts(backbone, [text], [prefix], config, as_text_format(text_format), on_cut=on_cut)
    form, prompt = prompts.formats[0], prompts.ids[0]
    if any(form.target_words):
        # Words around the target can only be removed from the whole output.
        (ids,) = generate_ids(
            backbone, [prompt], [prefix], config=config, new_tokens=prompts.new_tokens, ends=prompts.ends
        )
        yield read_output(backbone, ids, form, config)
        return
    limit, ends = prompts.new_tokens[0], prompts.ends[0]
    yield from stream_ids(backbone, prompt, prefix, config=config, new_tokens=limit, ends=ends)


def stream_ids(
    backbone: Backbone,
    prompt: Sequence[int],
    prefix: Prefix | None,
    *,
    config: GenerateConfig,
    new_tokens: int | None = None,
    ends: Sequence[int] = (),
) -> Generator[str, None, None]:
    """`stream` for a prompt that is already token ids.

    `new_tokens` replaces `config.max_new_tokens`; `ends` are the tokens, besides the tokenizer's end token, at which
    the text ends.

    Raises:
        PrefixError: The prompt does not fit, or the configuration cannot stream.
    """
    check_streams(config)
    streamer = _Streamer(backbone, config.stop, {backbone.eos_id, *ends})

    def run() -> None:
        try:
            limits = [config.max_new_tokens if new_tokens is None else new_tokens]
            generate_ids(backbone, [prompt], [prefix], config=config, new_tokens=limits, ends=[ends], streamer=streamer)
        except BaseException as error:
            streamer.fail(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        streamer.cancelled = True
        thread.join()


def check_streams(config: GenerateConfig) -> None:
    """Refuse a configuration that cannot stream.

    Raises:
        ConfigError: The configuration uses beam search.
    """
    if config.num_beams > 1:
        raise ConfigError(
            "beam search cannot stream: the best beam is known only at the end.",
            hint="set num_beams to 1 (--num-beams 1).",
        )


class _Cancelled(Exception):
    """The stream's reader left."""


class _Streamer:
    """A streamer of transformers: takes tokens from its loop, and yields text that can no longer change."""

    def __init__(self, backbone: Backbone, stop: Sequence[str], ends: Set[int]) -> None:
        self.cancelled = False
        self._text = Detokenizer(backbone.decode, stop)
        self._ends = ends
        self._prompt_seen = self._ended = False
        self._pieces: queue.Queue[str | BaseException | None] = queue.Queue()

    def put(self, value: torch.Tensor) -> None:
        if self.cancelled:
            raise _Cancelled
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        tokens = value.reshape(-1).tolist()
        if self._ended:
            return
        end = next((index for index, token in enumerate(tokens) if token in self._ends), None)
        if end is not None:
            self._ended = True
            tokens = tokens[:end]
        self._emit(self._text.add(*tokens))

    def end(self) -> None:
        self._emit(self._text.finish())
        self._pieces.put(None)

    def fail(self, error: BaseException) -> None:
        self._pieces.put(None if isinstance(error, _Cancelled) else error)

    def _emit(self, piece: str) -> None:
        if piece:
            self._pieces.put(piece)

    def __iter__(self) -> Iterator[str]:
        while (piece := self._pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
