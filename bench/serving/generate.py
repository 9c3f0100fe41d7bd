"""Part `generate`: the cost of a prefix at inference, against the same texts without one."""

from __future__ import annotations

import gc
import random
import time
from statistics import median

from bench.data import Data
from bench.results import Figure, Log, Results
from prefixtune.backbone.load import load_backbone
from prefixtune.data.encoding import encode_prompts
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from prefixtune.prefix.text_format import TextFormat
from prefixtune.training.starts.words import from_words

WORDS = "Describe the restaurant in one sentence:"
GOAL = 1.05


def run(
    data: Data,
    *,
    backbone_name: str,
    num_texts: int,
    new_tokens: int,
    repeats: int,
    prefix_length: int,
    seed: int,
    log: Log,
) -> Results:
    """Generate the same number of tokens with and without a prefix in turn, greedily."""
    backbone = load_backbone(backbone_name, dtype="auto", device="cpu")
    prefix = from_words(backbone, WORDS, prefix_length)
    config = GenerateConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, batch_size=num_texts)
    examples = random.Random(seed).choices(data.examples, k=num_texts * (repeats + 1))
    prompts = encode_prompts(backbone, TextFormat(), [example.source for example in examples])
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for index in range(repeats + 1):
        chosen = prompts[index * num_texts : (index + 1) * num_texts]
        for kind in ("without", "with") if index % 2 else ("with", "without"):
            gc.collect()
            began = time.perf_counter()
            outputs = generate_ids(backbone, chosen, [prefix if kind == "with" else None] * num_texts, config=config)
            taken = time.perf_counter() - began
            lengths = {len(ids) for ids in outputs}
            if lengths != {new_tokens}:
                raise RuntimeError(f"{new_tokens} new tokens were requested, but outputs have {sorted(lengths)}.")
            # The first round warms up.
            if index:
                seconds[kind].append(taken)
        if index:
            log(f"generate: {index}/{repeats}: " + ", ".join(f"{k} {s[-1]:.2f} s" for k, s in seconds.items()))
    ratios = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    tokens = num_texts * new_tokens
    dtype = str(backbone.dtype).removeprefix("torch.")
    title = f"{num_texts} texts, {new_tokens} new tokens, {dtype}"
    values = {
        "dtype": dtype,
        "texts": num_texts,
        "new_tokens": new_tokens,
        "prefix_length": prefix_length,
        "prompt_tokens": [len(prompt) for prompt in prompts[num_texts:]],
        "seconds": seconds,
        "ratios": ratios,
    }
    return values, [
        Figure("generate", f"{title}: without a prefix", tokens / median(seconds["without"]), "tokens/s"),
        Figure("generate", f"{title}: with P = {prefix_length}", tokens / median(seconds["with"]), "tokens/s"),
        Figure("generate", f"{title}: time with / without", median(ratios), "x", at_most=GOAL),
    ]
