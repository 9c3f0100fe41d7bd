"""How well a model predicts texts that it is given whole: perplexity per token, and bits per byte.

These are for texts alone (language modelling), which have no source to answer. Long ones are read in windows, as in
training (see `data.windows`); every token counts once, and the end token, too.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.encoding import encode_examples
from prefixtune.data.examples import Example
from prefixtune.data.truncation import position_limit
from prefixtune.data.windows import DEFAULT_WINDOW, TEXT_FORMAT
from prefixtune.errors import ConfigError
from prefixtune.evaluation.metrics.base import Array, ItemStatistics
from prefixtune.evaluation.metrics.significance import Measurement
from prefixtune.evaluation.records import Evaluation, score_groups
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat, read_text_format
from prefixtune.training.losses import target_losses

__all__ = ["TEXT_METRICS", "evaluate_texts"]

TEXT_METRICS = ("perplexity", "bits_per_byte")
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
    tokenized = [
        encode_examples(backbone, [example], chosen, prefix_length=length, max_length=longest).examples
        for example in examples
    ]
    counts = [len(windows) for windows in tokenized]
    ends = np.cumsum(counts, dtype=np.int64)

    def report(windows: int) -> None:
        if on_batch is not None:
            on_batch(int(np.searchsorted(ends, windows, side="right")))

    rows = target_losses(backbone, prefix, list(itertools.chain(*tokenized)), _BATCH_SIZE, report).numpy()
    sums = np.add.reduceat(rows, np.concatenate([[0], ends[:-1]]).astype(np.int64), axis=0)
    num_bytes = np.array([[len(example.targets[0].encode())] for example in examples], dtype=float)
    values = np.concatenate([sums, num_bytes], axis=1)
    measured = {
        name: _measure(title, values, total, f"{what}, windows of {window} positions")
        for name, (title, total, what) in zip(
            TEXT_METRICS,
            (
                ("perplexity", _perplexity, "exp of the mean loss per token, the end token included"),
                ("bits per byte", _bits_per_byte, "summed loss in bits per byte of UTF-8"),
            ),
            strict=True,
        )
    }
    level = 0.95 if intervals else None
    return Evaluation(
        {name: one.to_score(level=level) for name, one in measured.items()},
        tuple(f"perplexity {_perplexity(row):.3f} of {int(row[1]):,} tokens" for row in values),
        score_groups(measured, examples),
        seconds=time.perf_counter() - begun,
    )


def _measure(title: str, values: Array, total: Callable[[Array], float], implementation: str) -> Measurement:
    statistics = ItemStatistics(values, total, f"prefixtune: {implementation}")
    return Measurement(title, False, statistics, lambda items: _measure_part(statistics, items))


def _measure_part(statistics: ItemStatistics, items: Sequence[int]) -> ItemStatistics:
    return ItemStatistics(statistics.values[list(items)], statistics.total, statistics.implementation)


def _perplexity(sums: Array) -> float:
    return math.exp(min(sums[0] / sums[1], 700))  # a larger one is no float


def _bits_per_byte(sums: Array) -> float:
    return float(sums[0] / math.log(2) / sums[2])
