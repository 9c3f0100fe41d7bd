"""How well a model predicts texts that it is given whole: perplexity per token, and bits per byte.

These are for texts alone (language modelling), which have no source to answer. Long ones are read in windows, as in
training (see `data.encoding.text_windows`); every token counts once, and the end token, too.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.encoding import DEFAULT_WINDOW, TEXT_FORMAT, encode_examples
from prefixtune.data.examples import Example
from prefixtune.data.truncation import position_limit
from prefixtune.errors import ConfigError
from prefixtune.evaluation.metrics.base import Array, ItemStatistics
from prefixtune.evaluation.metrics.significance import Measurement
from prefixtune.evaluation.scores import LEVEL, score_groups
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat, read_text_format
from prefixtune.results import Evaluation
from prefixtune.training.score import score_targets

_BATCH_SIZE = 4
"""Windows in a pass: each may have hundreds of labels."""


def evaluate_texts(
    backbone: Backbone,
    examples: Sequence[Example],
    prefix: Prefix | None,
    text_format: TextFormat | None,
    *,
    max_length: int = 0,
    intervals: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Compute the losses of texts.

    Args:
        backbone: The frozen model, decoder-only.
        examples: Texts as their only targets, without sources.
        prefix: In front; None: the bare model.
        text_format: None: the prefix's, else the token that begins texts and the text.
        max_length: Positions of a window; 0: those of the text format, else 512. Never more than the model has, or had
            before LongRoPE.
        intervals: Also compute bootstrap intervals over texts.
        on_batch: Called with the number of texts done so far.

    Raises:
        ConfigError: The model is not decoder-only.
    """
    if backbone.kind != "decoder":
        raise ConfigError(
            f"{backbone.name!r} is an {backbone.kind}, which does not go on with a text, but the data is texts alone.",
            hint="choose a decoder-only model, or give sources and targets.",
        )
    begun = time.perf_counter()
    stored = None if prefix is None else read_text_format(prefix.header)
    chosen = (text_format or stored or TEXT_FORMAT).with_lengths(max_length)
    length = 0 if prefix is None else prefix.length("decoder")
    longest = chosen.max_length
    if backbone.longrope_limit is not None:
        # A longer window would turn the keys of the shorter ones in its batch.
        longest = min(longest or DEFAULT_WINDOW, backbone.longrope_limit)
    window = min(position_limit(backbone, length, longest), longest or DEFAULT_WINDOW)
    limits: dict[str, Any] = {"prefix_length": length, "max_length": longest}
    tokenized = [encode_examples(backbone, [example], chosen, **limits).examples for example in examples]
    ends = np.cumsum([len(windows) for windows in tokenized], dtype=np.int64)

    def report(windows: int) -> None:
        if on_batch is not None:
            on_batch(int(np.searchsorted(ends, windows, side="right")))

    rows = score_targets(backbone, prefix, list(itertools.chain(*tokenized)), _BATCH_SIZE, report).numpy()
    sums = np.add.reduceat(rows, np.concatenate([[0], ends[:-1]]).astype(np.int64), axis=0)
    num_bytes = np.array([[len(example.targets[0].encode())] for example in examples], dtype=float)
    values = np.concatenate([sums, num_bytes], axis=1)
    metrics: dict[str, tuple[str, Callable[[Array], float], str]] = {
        "perplexity": ("perplexity", _perplexity, "exp of the mean loss per token, the end token included"),
        "bits_per_byte": ("bits per byte", _bits_per_byte, "summed loss in bits per byte of UTF-8"),
    }
    measured = {
        name: Measurement(
            title, False, ItemStatistics(values, total, f"prefixtune: {how}, windows of {window} positions")
        )
        for name, (title, total, how) in metrics.items()
    }
    level = LEVEL if intervals else None
    return Evaluation(
        scores={name: one.to_score(level=level) for name, one in measured.items()},
        outputs=tuple(f"perplexity {_perplexity(row):.3f} of {int(row[1]):,} tokens" for row in values),
        num_examples=len(examples),
        groups=score_groups(measured, examples),
        seconds=time.perf_counter() - begun,
    )


def _perplexity(sums: Array) -> float:
    return math.exp(min(sums[0] / sums[1], 700))  # a larger one is no float


def _bits_per_byte(sums: Array) -> float:
    return float(sums[0] / math.log(2) / sums[2])
