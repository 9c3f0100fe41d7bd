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
import torch
from pydantic import BaseModel

from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data.encoding import TokenizedExample
from prefixtune.errors import ConfigError
from prefixtune.evaluation.metrics.base import Array, ItemStatistics
from prefixtune.evaluation.metrics.significance import METHOD, Measurement, bootstrap, randomize
from prefixtune.pages.document import Chart, Series, Table
from prefixtune.pages.figures import save_figure
from prefixtune.prefix.compose import cut
from prefixtune.prefix.prefix import Prefix, save_prefix
from prefixtune.training.config import MOST_LENGTHS, TrainConfig
from prefixtune.training.loop import TrainLoop
from prefixtune.training.run_folder import PREFIX_FILE
from prefixtune.training.score import score_targets
from prefixtune.training.train import train
from prefixtune.utils.files import write_text

LENGTH_FILE, FIGURE_NAME = "length.json", "length"


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
    difference: float = 0.0
    difference_interval: tuple[float, float] = (0.0, 0.0)
    p_value: float = 1.0
    num_bytes: int = 0


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
        samples: Its draws.
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
    samples: int
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
    samples: int = 1000,
    resume: bool = False,
    on_length: Callable[[int], None] | None = None,
    **arguments: Any,
) -> LengthResult:
    """Train one nested prefix, measure its loss at several lengths, and cut it to the shortest that is good enough.

    Args:
        config: The run; it is trained nested, whatever it says.
        lengths: To measure, besides the whole; empty: about two for each doubling.
        significance: A length is worse than the best where the p-value of their difference is below this.
        samples: Draws of the bootstrap and of the randomization.
        resume: Go on with the run in `config.output`, and measure its curve.
        on_length: Called with each length before it is measured.
        **arguments: For `train`, such as `examples`, `dev_examples`, `backbone` and `on_event`.

    Raises:
        ConfigError: There is no development file, or the run trains no prefix; or as `train`.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the state is saved.
    """
    config = config.replace(nested=True)
    _check(config, has_dev=arguments.get("dev_examples") is not None)
    found: list[LengthResult] = []

    def measure(loop: TrainLoop, stop: threading.Event) -> None:
        found.append(_measure_run(loop, stop, lengths, significance, samples, on_length))

    def check(loop: TrainLoop) -> None:
        curve_lengths(max(loop.site_lengths.values()), lengths)

    train(config, resume=resume, check=check, after=measure, **arguments)
    return found[0]


def _check(config: TrainConfig, *, has_dev: bool) -> None:
    """Refuse a run whose lengths cannot be compared.

    Raises:
        ConfigError: It has nothing to compare on, or nothing to cut, or it is one of several processes.
    """
    if not config.dev and not has_dev and not config.hold_out:
        raise ConfigError(
            "lengths are compared on development data, but there is none.",
            hint="set dev (--dev FILE), or hold_out to a share of the training data.",
        )
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "lengths are compared in one process, but this is one of several.",
            hint="start it without torchrun and accelerate launch.",
        )
    if not config.trains_prefix:
        raise ConfigError(
            f"method {config.method!r} trains no prefix, which could be cut.", hint="use method = 'prefix'."
        )


def _measure_run(
    loop: TrainLoop,
    stop: threading.Event,
    lengths: Sequence[int],
    significance: float,
    samples: int,
    on_length: Callable[[int], None] | None,
) -> LengthResult:
    """The curve of a run that has ended, as files in its folder."""
    config, dev, backbone = loop.config, loop.data.dev, loop.backbone
    assert dev is not None
    folder = Path(config.output)
    prefix = load_prefix(folder / PREFIX_FILE)

    def check_stop(done: int) -> None:
        if stop.is_set():
            raise KeyboardInterrupt("the run is saved")

    by_source: dict[int, Array] = {}
    for length in curve_lengths(prefix.prefix_length, lengths):
        if on_length is not None:
            on_length(length)
        losses = score_targets(backbone, prefix[:length], dev.examples, config.batch_size, check_stop)
        by_source[length] = sum_by_source(losses, dev.examples)
    points = measure_lengths(by_source, prefix, samples=samples, seed=config.seed)
    best, chosen = choose(points, significance)
    path = save_prefix(
        folder / f"prefix-{chosen}.safetensors",
        prefix if chosen == prefix.prefix_length else _with_loss(cut(prefix, chosen), points),
        dtype=prefix.dtype,
    )
    result = LengthResult(
        backbone=prefix.header["backbone"]["name"],
        prefix_length=prefix.prefix_length,
        best=best,
        chosen=chosen,
        file=path.name,
        significance=significance,
        samples=samples,
        num_sources=len(dev.examples),
        num_targets=dev.num_targets,
        lengths=points,
        config=config.to_dict(),
    )
    write_text(folder / LENGTH_FILE, result.model_dump_json(indent=1) + "\n")
    save_figure(draw_curve(result), folder / FIGURE_NAME)
    return result


def _with_loss(prefix: Prefix, points: Sequence[Point]) -> Prefix:
    """A cut prefix whose header has the development loss that was measured at its length."""
    loss = next(point.loss for point in points if point.prefix_length == prefix.prefix_length)
    training = {**(prefix.header.get("training") or {}), "dev_loss": loss}
    return Prefix(prefix.layers, {**prefix.header, "training": training}, prefix.head)


# --- the curve -------------------------------------------------------------------------------------------------------


def curve_lengths(longest: int, wanted: Sequence[int] = ()) -> list[int]:
    """The lengths of a curve: those that are wanted, or 1, 2, 3, 4, 6, 8, 12 and so on; and the longest.

    >>> curve_lengths(20)
    [1, 2, 3, 4, 6, 8, 12, 16, 20]

    Raises:
        ConfigError: One is longer than the prefix, or they are too many.
    """
    too_long = [length for length in wanted if not 1 <= length <= longest]
    if too_long:
        raise ConfigError(
            f"lengths has {too_long[0]}, but the prefix has {longest} positions.", hint=f"choose from 1 to {longest}."
        )
    if len(wanted) > MOST_LENGTHS:
        raise ConfigError(
            f"lengths has {len(wanted)} numbers, but at most {MOST_LENGTHS} are measured.", hint="choose fewer."
        )
    powers = [2**power for power in range(longest.bit_length())]
    usual = {*powers, *(3 * power // 2 for power in powers[1:])}
    return sorted({*(wanted or (length for length in usual if 1 <= length < longest)), longest})


def sum_by_source(losses: torch.Tensor, examples: Sequence[TokenizedExample]) -> Array:
    """Losses and tokens of each source: its targets are no independent measurements. Shape (sources, 2)."""
    counts = [example.num_targets for example in examples]
    return np.stack([part.sum(0).numpy() for part in losses.split(counts) if len(part)])


def measure_lengths(
    by_source: Mapping[int, Array], prefix: Prefix, *, samples: int = 1000, seed: int = 0
) -> list[Point]:
    """The points of a curve.

    Args:
        by_source: Length -> loss and number of tokens of each source, (sources, 2).
        prefix: The whole.
        samples: Draws of bootstrap and randomization.
        seed: Of these draws.
    """
    measured = {length: _measurement(values) for length, values in by_source.items()}
    best = min(measured, key=lambda length: (measured[length].score, length))
    points = []
    for length in sorted(measured):
        one, values = measured[length], by_source[length]
        paired = _measurement(np.stack([values[:, 0] - by_source[best][:, 0], values[:, 1]], axis=1))
        point = Point(
            prefix_length=length,
            loss=one.score,
            interval=bootstrap(one, samples=samples, seed=seed),
            num_bytes=prefix[:length].num_bytes,
        )
        if length != best:
            test = randomize(one, measured[best], samples=samples, seed=seed)
            span = bootstrap(paired, samples=samples, seed=seed)
            changes = {"difference": paired.score, "difference_interval": span, "p_value": test.p_value}
            point = point.model_copy(update=changes)
        points.append(point)
    return points


def _measurement(values: Array) -> Measurement:
    statistics = ItemStatistics(values, lambda sums: float(sums[0] / sums[1]), "development loss in nats per token")
    return Measurement("loss", False, statistics)


def choose(points: Sequence[Point], significance: float = 0.05) -> tuple[int, int]:
    """The best length, and the shortest whose loss is not significantly higher."""
    best = min(points, key=lambda point: (point.loss, point.prefix_length))
    good = [point.prefix_length for point in points if point.p_value >= significance or point.loss <= best.loss]
    return best.prefix_length, min(good)


def draw_curve(result: LengthResult) -> Chart:
    """The curve as a picture."""
    points = [(point.prefix_length, point.loss) for point in result.lengths]
    chosen = f"p = {result.chosen}, not significantly worse than the best"
    series = [
        Series("first p positions", points, 0, [point.interval for point in result.lengths]),
        Series(chosen, [(length, loss) for length, loss in points if length == result.chosen], 1),
    ]
    text = f"Loss per token with 95 % intervals at {len(points)} lengths; the best is {result.best}; {chosen}."
    title, y_label = "Development loss over the length of the prefix", "development loss, nats per token"
    return Chart(title, text, series, "prefix length p", y_label, Table("", []))
