"""Stream one output in pieces, as it is generated."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone
from prefixtune.backbone.prefixes import PrefixLike, as_prefix
from prefixtune.data.chat import Source
from prefixtune.data.encoding import TextFormatLike, as_text_format, check_texts
from prefixtune.errors import ConfigError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import write
from prefixtune.inference.prompts import Prompt, prepare_prompts

__all__ = ["check_streams", "stream", "stream_prompt"]


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

    Joined, they are `generate`'s output. Arguments as for `generate`; beam search cannot stream. A model that the
    engine cannot run, such as a hybrid with state-space layers, yields its output as one piece.

    Raises:
        ConfigError: The configuration uses beam search.
    """
    config = GenerateConfig.from_arguments(config, options)
    check_streams(config)
    check_texts([text])
    backbone = as_backbone(backbone)
    prefixes = [as_prefix(prefix, backbone)]
    (prompt,) = prepare_prompts(backbone, [text], prefixes, config, as_text_format(text_format), on_cut=on_cut)
    yield from stream_prompt(backbone, prompt, config)


def stream_prompt(backbone: Backbone, prompt: Prompt, config: GenerateConfig) -> Generator[str, None, None]:
    """`stream` of a checked prompt."""
    pieces: Iterator[str] = (output.text for _, output in write(backbone, [prompt], config))
    if any(prompt.text_format.target_words):
        # Words around the target can only be removed from the whole output.
        pieces = iter([prompt.text_format.extract_target("".join(pieces))])
    yield from filter(None, pieces)


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
