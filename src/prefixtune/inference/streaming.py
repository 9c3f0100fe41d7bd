"""Stream one output in pieces, as it is generated."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone
from prefixtune.backbone.prefixes import PrefixLike, as_prefix
from prefixtune.data.encoding import TextFormatLike, as_text_format
from prefixtune.errors import ConfigError, RequestError, describe_value
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.detokenizer import Detokenizer
from prefixtune.inference.generate import generate_ids, read_output
from prefixtune.inference.prompts import prepare_prompts
from prefixtune.prefix.prefix import Prefix

__all__ = ["check_streams", "stream", "stream_ids"]


def stream(
    backbone: BackboneLike,
    text: str,
    prefix: PrefixLike | None = None,
    *,
    text_format: TextFormatLike | None = None,
    config: GenerateConfig | Mapping[str, Any] | None = None,
    on_cut: Callable[[Sequence[int]], None] | None = None,
    **options: Any,
) -> Generator[str, None, None]:
    """Continue one text, yielding pieces as they become certain; joined, they are `generate`'s output.

    Arguments as for `generate`; beam search cannot stream.

    Raises:
        ConfigError: The configuration uses beam search.
    """
    config = GenerateConfig.from_arguments(config, options)
    check_streams(config)
    if not isinstance(text, str):
        raise RequestError(f"text is {describe_value(text)}, but must be one string.", hint="stream one at a time.")
    backbone = as_backbone(backbone)
    prefix = as_prefix(prefix, backbone)
    prompts = prepare_prompts(backbone, [text], [prefix], config, as_text_format(text_format), on_cut=on_cut)
    form, prompt = prompts.formats[0], prompts.ids[0]
    if any(form.target_words):
        # Words around the target can only be removed from the whole output.
        (ids,) = generate_ids(backbone, [prompt], [prefix], config=config, new_tokens=prompts.new_tokens)
        yield read_output(backbone, ids, form, config)
        return
    yield from stream_ids(backbone, prompt, prefix, config=config, new_tokens=prompts.new_tokens[0])


def stream_ids(
    backbone: Backbone,
    prompt: Sequence[int],
    prefix: Prefix | None,
    *,
    config: GenerateConfig,
    new_tokens: int | None = None,
) -> Generator[str, None, None]:
    """`stream` for a prompt that is already token ids; `new_tokens` replaces `config.max_new_tokens`.

    Raises:
        PrefixError: The prompt does not fit, or the configuration cannot stream.
    """
    check_streams(config)
    streamer = _Streamer(backbone, config.stop)

    def run() -> None:
        try:
            limits = [config.max_new_tokens if new_tokens is None else new_tokens]
            generate_ids(backbone, [prompt], [prefix], config=config, new_tokens=limits, streamer=streamer)
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

    def __init__(self, backbone: Backbone, stop: Sequence[str]) -> None:
        self.cancelled = False
        self._text = Detokenizer(backbone.decode, stop)
        self._eos_id = backbone.eos_id
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
        if self._eos_id in tokens:
            self._ended = True
            tokens = tokens[: tokens.index(self._eos_id)]
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
