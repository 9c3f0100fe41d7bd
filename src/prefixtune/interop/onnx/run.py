"""Generate with an exported graph and its prefix, greedily: numpy, and something that runs the graph.

    python run.py "a source" "another source"

It is exported together with model.onnx. Anything may run the graph: `run` takes the inputs by name, and returns the
outputs in the graph's order. With ONNX Runtime it is `lambda feed: session.run(None, feed)`, with OpenVINO
`lambda feed: list(compiled(feed).values())`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[dict[str, Any]], Sequence[Any]]


@dataclass
class State:
    """The state of a batch between two steps.

    Attributes:
        mask: (B, S + T), 1 where a slot of the past or a token is real.
        positions: (B, T), of the tokens to be read next.
        past: (B, H, S, D) tensors, by the names of the inputs.
    """

    mask: Any
    positions: Any
    past: dict[str, Any]


def past_names(facts: Mapping[str, Any]) -> list[str]:
    """The inputs that hold the past, in order; the outputs that hold the present come in the same order."""
    return [f"past_key_values.{index}.{part}" for index in range(facts["num_layers"]) for part in ("key", "value")]


def pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Any, Any]:
    """Token ids and mask of texts, padded on the left."""
    longest = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return np.array(ids, dtype=np.int64), np.array(mask, dtype=np.int64)


def start(facts: Mapping[str, Any], prefix: Mapping[str, Any] | None, mask: Any) -> State:
    """The state before the prompts are read.

    Args:
        facts: The content of export.json.
        prefix: The first past, one row; None: an empty past, with which the graph is the bare backbone.
        mask: (B, T), of the prompts.
    """
    rows = mask.shape[0]
    if prefix is None:
        empty = np.zeros((rows, facts["num_kv_heads"], 0, facts["head_dim"]), dtype=np.float32)
        past = dict.fromkeys(past_names(facts), empty)
    else:
        past = {name: np.repeat(prefix[name], rows, axis=0) for name in past_names(facts)}
    length = next(iter(past.values())).shape[2]
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0) + length
    return State(np.concatenate([np.ones((rows, length), dtype=np.int64), mask], axis=1), positions, past)


def step(run: Run, state: State, ids: Any) -> Any:
    """Read tokens, and advance the state to the token after them; returns their logits, (B, T, vocabulary)."""
    feed = {"input_ids": ids, "attention_mask": state.mask, "position_ids": state.positions, **state.past}
    logits, *present = run(feed)
    state.past = dict(zip(state.past, present, strict=True))
    state.mask = np.concatenate([state.mask, np.ones((len(ids), 1), dtype=np.int64)], axis=1)
    state.positions = state.positions[:, -1:] + 1
    return logits


def generate(
    run: Run,
    facts: Mapping[str, Any],
    prefix: Mapping[str, Any] | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 100,
) -> list[list[int]]:
    """Each prompt's greedy continuation, up to an end token.

    Args:
        run: Runs the graph once.
        facts: The content of export.json.
        prefix: The first past; None: an empty one.
        prompts: Token ids, of any lengths.
        max_new_tokens: Most tokens to generate.
    """
    ids, mask = pad(prompts, facts["pad_id"])
    state = start(facts, prefix, mask)
    outputs: list[list[int]] = [[] for _ in prompts]
    ends = set(facts["end_ids"])
    while len(outputs[0]) < max_new_tokens and not all(map(ends.intersection, outputs)):
        ids = step(run, state, ids)[:, -1].argmax(axis=-1)[:, None]
        for output, token in zip(outputs, ids[:, 0].tolist(), strict=True):
            output.append(token)
    return [list(itertools.takewhile(lambda token: token not in ends, output)) for output in outputs]


def target_of(template: str, output: str) -> str:
    """The target within an output, without the text format's words and space around it."""
    head, _, tail = template.partition("{target}")
    return output.strip().removeprefix(head.strip()).removesuffix(tail.strip()).strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Generate from the command line."""
    parser = argparse.ArgumentParser(description="Generate with an exported graph and its prefix, greedily.")
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N")
    parser.add_argument("--folder", default=str(Path(__file__).resolve().parent), help="default: that of this file")
    options = parser.parse_args(arguments)
    import onnxruntime
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    folder = Path(options.folder)
    facts = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(str(folder / facts["file"]), providers=["CPUExecutionProvider"])
    prefix = load_file(str(folder / facts["prefix_file"]))
    if not (folder / "tokenizer.json").is_file():
        parser.error("there is no tokenizer.json: make token ids with transformers, and call `generate`")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # A checkpoint's file may say how its texts were cut and padded when it was trained.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = [facts["text_format"]["prompt"].replace("{source}", source) for source in options.sources]
    prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    if [] in prompts:
        parser.error(f"text {prompts.index([]) + 1} has no token")
    outputs = generate(
        lambda feed: session.run(None, feed), facts, prefix, prompts, max_new_tokens=options.max_new_tokens
    )
    for ids in outputs:
        print(target_of(facts["text_format"]["target"], tokenizer.decode(ids)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
