"""Texts that a run writes for a few fixed development examples: what its loss means in words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prefixtune.data.chat import end_ids
from prefixtune.data.encoding import TokenizedExample
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids, read_output

if TYPE_CHECKING:
    from prefixtune.training.loop import TrainLoop

__all__ = ["as_markdown", "write_samples"]

_MAX_NEW_TOKENS = 48
_MAX_TEXT = 1000
"""Characters that are shown of a prompt or a target."""


def write_samples(loop: TrainLoop, count: int) -> list[dict[str, str]]:
    """What the run writes now, greedily, at most 48 tokens each.

    Args:
        loop: The run.
        count: How many examples, evenly spaced over the development examples.

    Returns:
        Each with `prompt`, `target` and `output`; empty where nothing can be written: there are no development
        examples, a head or an encoder predicts labels, or the backbone is split among processes.
    """
    data, backbone = loop.data.dev, loop.backbone
    if data is None or not count or loop.data.has_head or backbone.kind == "encoder" or loop.config.shard:
        return []
    total = len(data.examples)
    chosen = [data.examples[index * total // min(count, total)] for index in range(min(count, total))]
    pairs = [_prompt_and_target(example) for example in chosen]
    prefix = loop.bake()
    room = [_room(loop, len(prompt), 0 if prefix is None else prefix.length()) for prompt, _ in pairs]
    config = GenerateConfig(max_new_tokens=_MAX_NEW_TOKENS, batch_size=len(pairs))
    prompts = [prompt for prompt, _ in pairs]
    ends = [end_ids(backbone, loop.data.text_format)] * len(prompts)
    prefixes = [prefix] * len(prompts)
    with _not_training(backbone.model):
        outputs = generate_ids(backbone, prompts, prefixes, config=config, new_tokens=room, ends=ends)
    return [
        {
            "prompt": _shorten(backbone.decode(prompt)),
            "target": _shorten(backbone.decode(target)),
            "output": read_output(backbone, output, loop.data.text_format, config),
        }
        for (prompt, target), output in zip(pairs, outputs, strict=True)
    ]


def as_markdown(samples: Sequence[dict[str, Any]]) -> str:
    """The texts as a page; each in a block of code, so that nothing in it is taken for Markdown."""
    parts: list[str] = []
    for number, sample in enumerate(samples, start=1):
        parts.append(f"### Example {number}")
        for title in ("prompt", "target", "output"):
            fence = "```"
            while fence in sample[title]:
                fence += "`"
            parts.append(f"{title}:\n\n{fence}text\n{sample[title].strip()}\n{fence}")
    return "\n\n".join(parts) + "\n"


@contextlib.contextmanager
def _not_training(model: Any) -> Iterator[None]:
    """While the block runs, no layer is marked as training.

    Those that are to be recomputed are; transformers 5.20 gives them no cache, and so no prefix, in generation either.
    """
    marked = [module for module in model.modules() if module.training]
    for module in marked:
        module.training = False
    try:
        yield
    finally:
        for module in marked:
            module.training = True


def _prompt_and_target(example: TokenizedExample) -> tuple[list[int], list[int]]:
    """What comes before the text to write, and that text: of a conversation, the last turn."""
    prompt, target = list(example.prompt), list(example.targets[0])
    if not example.turns:
        return prompt, target
    first, stop = example.turns[-1]
    return prompt + target[:first], target[first:stop]


def _room(loop: TrainLoop, prompt_length: int, prefix_length: int) -> int:
    """Tokens to write, at most: those that fit."""
    backbone = loop.backbone
    limit = backbone.max_positions
    if limit is None:
        return _MAX_NEW_TOKENS
    taken = 1 if backbone.kind == "encoder-decoder" else backbone.prefix_positions(prefix_length) + prompt_length
    return max(1, min(_MAX_NEW_TOKENS, limit - taken))


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} ..."
