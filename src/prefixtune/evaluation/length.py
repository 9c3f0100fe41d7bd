"""How long a prefix should be, from one run: its loss at every length, and the shortest that is as good as the best.

The run is nested, so that its first p positions are a prefix of length p. Losses are compared on the same development
sources, with a bootstrap interval and paired approximate randomization.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from prefixtune.backbone.prefixes import load_prefix
from prefixtune.errors import ConfigError
from prefixtune.evaluation.metrics.measurement import METHOD, Array, Measurement, bootstrap, randomize, ratio
from prefixtune.prefix.compose import cut
from prefixtune.prefix.prefix import Prefix, save_prefix
from prefixtune.training.config import MOST_LENGTHS, TrainConfig
from prefixtune.training.loop import TrainLoop
from prefixtune.training.run_folder import PREFIX_FILE
from prefixtune.training.score import score_targets
from prefixtune.training.train import train
from prefixtune.utils.files import write_text

LENGTH_FILE = "length.json"


class Point(BaseModel):
    """A length on the curve.

    Attributes:
        prefix_length: p.
        loss: Development loss in nats per token, of the first p positions.
        interval: Its bootstrap interval.
        difference: This loss minus that of the best length.
        difference_interval: The bootstrap interval of the difference, on the same sources.
        p_value: Of the difference, by paired randomization; 1 at the best length.
        num_bytes: Of the stored tensors at this length.
    """

    prefix_length: int
    loss: float
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    p_value: float
    num_bytes: int


class LengthResult(BaseModel):
    """What measuring the lengths of a run leaves, as in `length.json`.

    Attributes:
        backbone: Its name.
        prefix_length: Of the whole.
        best: The length with the lowest loss.
        chosen: The shortest whose loss is not significantly higher than the best one's.
        file: The name of the artifact that is cut to it, in the run's folder.
        significance: A length is worse than the best where the p-value of their difference is below this.
        test: The name of the test.
        num_sources: Development sources that were compared.
        num_targets: Their targets.
        lengths: The curve, from the shortest.
        config: Of the run.
    """

    backbone: str
    prefix_length: int
    best: int
    chosen: int
    file: str
    significance: float
    test: str = METHOD
    num_sources: int
    num_targets: int
    lengths: list[Point]
    config: dict[str, Any]

    @property
    def path(self) -> Path:
        """Of the artifact that is cut to the chosen length."""
        return Path(self.config["output"]) / self.file


def find_length(
    config: TrainConfig,
    *,
    lengths: Sequence[int] = (),
    significance: float = 0.05,
    resume: bool = False,
    on_length: Callable[[int], None] = lambda length: None,
    **arguments: Any,
) -> LengthResult:
    """Train one nested prefix, measure its loss at several lengths, and cut it to the shortest that is good enough.

    Args:
        config: The run; it is trained nested, whatever it says.
        lengths: To measure, besides the whole; empty: about two for each doubling.
        significance: A length is worse than the best where the p-value of their difference is below this.
        resume: Go on with the run in `config.output`, and measure its curve.
        on_length: Called with each length before it is measured.
        **arguments: For `train`, such as `examples`, `dev_examples`, `backbone` and `on_event`.

    Raises:
        ConfigError: There is no development file, or the run trains no prefix; or as `train`.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the state is saved.
    """
    if not (config.dev or config.hold_out or arguments.get("dev_examples") is not None):
        raise ConfigError("lengths are compared on development data, but there is none.", hint="set dev (--dev FILE).")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("lengths are compared in one process.", hint="start it without torchrun.")
    if not config.trains_prefix:
        raise ConfigError(f"method {config.method!r} trains no prefix.", hint="use method = 'prefix'.")
    found: list[LengthResult] = []

    def measure(loop: TrainLoop, stop: threading.Event) -> None:
        found.append(_measure_run(loop, stop, lengths, significance, on_length))

    def check(loop: TrainLoop) -> None:
        curve_lengths(max(loop.site_lengths.values()), lengths)

    train(config.replace(nested=True), resume=resume, check=check, after=measure, **arguments)
    return found[0]


def _measure_run(
    loop: TrainLoop,
    stop: threading.Event,
    lengths: Sequence[int],
    significance: float,
    on_length: Callable[[int], None],
) -> LengthResult:
    """The curve of a run that has ended, as files in its folder."""
    config, dev = loop.config, loop.data.dev
    assert dev is not None
    folder = Path(config.output)
    prefix = load_prefix(folder / PREFIX_FILE)

    def check_stop(done: int) -> None:
        if stop.is_set():
            raise KeyboardInterrupt("the run is saved")

    # A source's targets are no independent measurements.
    owners = dev.origins or range(len(dev.examples))
    ends = np.cumsum(np.bincount(owners, [example.num_targets for example in dev.examples]).astype(int))
    by_source: dict[int, Array] = {}
    for length in curve_lengths(prefix.prefix_length, lengths):
        on_length(length)
        losses = score_targets(loop.backbone, prefix[:length], dev.examples, config.batch_size, check_stop)
        by_source[length] = np.add.reduceat(losses.numpy(), [0, *ends[:-1]], axis=0)
    points = measure_lengths(by_source, prefix, seed=config.seed)
    best, chosen = choose(points, significance)
    kept = prefix
    if chosen.prefix_length < prefix.prefix_length:
        short = cut(prefix, chosen.prefix_length)
        training = {**(short.header.get("training") or {}), "dev_loss": chosen.loss}
        kept = Prefix(short.layers, {**short.header, "training": training}, short.head)
    path = save_prefix(folder / f"prefix-{chosen.prefix_length}.safetensors", kept, dtype=prefix.dtype)
    result = LengthResult(
        backbone=prefix.header["backbone"]["name"],
        prefix_length=prefix.prefix_length,
        best=best.prefix_length,
        chosen=chosen.prefix_length,
        file=path.name,
        significance=significance,
        num_sources=dev.num_sources,
        num_targets=dev.num_targets,
        lengths=points,
        config=config.to_dict(),
    )
    write_text(folder / LENGTH_FILE, result.model_dump_json(indent=1) + "\n")
    return result


# --- the curve -------------------------------------------------------------------------------------------------------


def curve_lengths(longest: int, wanted: Sequence[int] = ()) -> list[int]:
    """The lengths of a curve: those that are wanted, or 1, 2, 3, 4, 6, 8, 12 and so on; and the longest.

    >>> curve_lengths(20)
    [1, 2, 3, 4, 6, 8, 12, 16, 20]

    Raises:
        ConfigError: One is longer than the prefix, or they are too many.
    """
    if len(wanted) > MOST_LENGTHS or not all(1 <= length <= longest for length in wanted):
        what = f"lengths is {', '.join(map(str, wanted[: MOST_LENGTHS + 1]))}"
        raise ConfigError(f"{what}.", hint=f"choose at most {MOST_LENGTHS}, from 1 to {longest}.")
    powers = [2**power for power in range(longest.bit_length())]
    usual = {*powers, *(3 * power // 2 for power in powers[1:])}
    return sorted({*(wanted or (length for length in usual if 1 <= length < longest)), longest})


def measure_lengths(by_source: Mapping[int, Array], prefix: Prefix, *, seed: int = 0) -> list[Point]:
    """The points of a curve.

    Args:
        by_source: Length -> loss and number of tokens of each source, (sources, 2).
        prefix: The whole.
        seed: Of the draws of bootstrap and randomization.
    """
    measured = {length: _measurement(values) for length, values in by_source.items()}
    best = measured[min(measured, key=lambda length: (measured[length].score, length))]
    points = []
    for length in sorted(measured):
        one, values = measured[length], by_source[length]
        paired = _measurement(np.stack([values[:, 0] - best.values[:, 0], values[:, 1]], axis=1))
        points.append(
            Point(
                prefix_length=length,
                loss=one.score,
                interval=bootstrap(one, seed=seed),
                difference=paired.score,
                difference_interval=bootstrap(paired, seed=seed),
                p_value=randomize(one, best, seed=seed).p_value,
                num_bytes=prefix[:length].num_bytes,
            )
        )
    return points


def _measurement(values: Array) -> Measurement:
    return Measurement(values, ratio, "development loss in nats per token", "loss", higher_is_better=False)


def choose(points: Sequence[Point], significance: float = 0.05) -> tuple[Point, Point]:
    """The best point, and the shortest whose loss is not significantly higher."""
    best = min(points, key=lambda point: (point.loss, point.prefix_length))
    good = [point for point in points if point.p_value >= significance or point.loss <= best.loss]
    return best, min(good, key=lambda point: point.prefix_length)
