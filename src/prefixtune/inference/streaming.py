"""Streaming."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone
from prefixtune.backbone.prefixes import PrefixLike, as_prefix
from prefixtune.data.encoding import TextFormatLike, as_text_format
from prefixtune.errors import ConfigError, RequestError, describe_value
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.decoding import cut_at_stop
from prefixtune.inference.generate import generate_ids, prepare_prompts, read_output
from prefixtune.utils.options import as_config

__all__ = ["stream"]


def stream(
    backbone: BackboneLike,
    text: str,
    prefix: PrefixLike | None = None,
    *,
    text_format: TextFormatLike | None = None,
    config: GenerateConfig | Mapping[str, Any] | None = None,
    on_cut: Callable[[Sequence[int]], None] | None = None,
    **options: Any,
) -> Iterator[str]:
    """Continue one text, yielding pieces as they are decided; the pieces joined equal `generate`'s output.

    Arguments as for `generate`; beam search cannot stream.

    Raises:
        ConfigError: Beam search was asked for.
    """
    chosen = as_config(GenerateConfig, config, options)
    check_streams(chosen)
    if not isinstance(text, str):
        raise RequestError(f"text is {describe_value(text)}, but must be one string.", hint="stream one at a time.")
    backbone = as_backbone(backbone)
    prefix = as_prefix(prefix, backbone)
    prompts = prepare_prompts(backbone, [text], [prefix], chosen, as_text_format(text_format), on_cut=on_cut)
    form, prompt = prompts.formats[0], prompts.ids[0]
    shared: dict[str, Any] = {"config": chosen, "new_tokens": prompts.new_tokens}
    if any(form.target_words):
        # Words around the target can be taken off the whole output only.
        (ids,) = generate_ids(backbone, [prompt], [prefix], **shared)
        yield read_output(backbone, ids, form, chosen)
        return
    streamer = _Streamer(backbone, chosen.stop)

    def work() -> None:
        try:
            generate_ids(backbone, [prompt], [prefix], streamer=streamer, **shared)
        except BaseException as error:
            streamer.fail(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        streamer.cancelled = True
        thread.join()


def check_streams(config: GenerateConfig) -> None:
    """Refuse a way of decoding that cannot stream.

    Raises:
        ConfigError: Beam search was asked for.
    """
    if config.num_beams > 1:
        raise ConfigError(
            "beam search cannot stream: its best beam is known at the end only.",
            hint="set num_beams to 1 (--num-beams 1).",
        )


class _Cancelled(Exception):
    """The reader of a stream went away."""


class _Streamer:
    """Takes tokens from transformers' loop and gives text that can no longer change.

    Held back: a piece that may be part of a character still, of a stop string, or of the stripped space around.
    """

    def __init__(self, backbone: Backbone, stop: Sequence[str]) -> None:
        self.backbone, self.stop = backbone, stop
        self.ids: list[int] = []
        self.given = 0
        self.cancelled = False
        self.pieces: queue.Queue[str | BaseException | None] = queue.Queue()
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.cancelled:
            raise _Cancelled
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids.extend(value.reshape(-1).tolist())
        text = self._text().rstrip()
        if text.endswith("\ufffd"):
            return
        held = max((n for s in self.stop for n in range(len(s)) if n and text.endswith(s[:n])), default=0)
        self._give(text[: len(text) - held].rstrip())

    def end(self) -> None:
        self._give(self._text().rstrip())
        self.pieces.put(None)

    def fail(self, error: BaseException) -> None:
        self.pieces.put(None if isinstance(error, _Cancelled) else error)

    def _text(self) -> str:
        ids = self.ids[: self.ids.index(self.backbone.eos_id)] if self.backbone.eos_id in self.ids else self.ids
        return cut_at_stop(self.backbone.decode(ids), self.stop).lstrip()

    def _give(self, text: str) -> None:
        if len(text) > self.given:
            self.pieces.put(text[self.given :])
            self.given = len(text)

    def __iter__(self) -> Iterator[str]:
        while (piece := self.pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
