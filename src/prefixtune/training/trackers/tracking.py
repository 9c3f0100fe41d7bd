"""A run's trackers: started, told of every event, never allowed to end the training, and continued on resuming.

The libraries are called directly. accelerate's wrappers of them start its own process group, end one tracked run when
another one starts in the same program, and drop texts.
"""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from prefixtune.errors import CheckpointError, ConfigError
from prefixtune.training.folder import TRACKERS_FILE, Event
from prefixtune.training.trackers.mlflow import MLflow
from prefixtune.training.trackers.samples import as_markdown, write_samples
from prefixtune.training.trackers.tensorboard import TensorBoard
from prefixtune.training.trackers.tracker import KINDS, Outcome, TrackedRun, Tracker
from prefixtune.training.trackers.trackio import Trackio
from prefixtune.training.trackers.wandb import WeightsAndBiases
from prefixtune.utils.files import write_text
from prefixtune.utils.machine import peak_memory_mib

if TYPE_CHECKING:
    from prefixtune.training.loop import TrainLoop

__all__ = ["TRACKERS", "Tracking", "last_logged", "tracking"]


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "trackio": Trackio,
    "wandb": WeightsAndBiases,
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
}

_MAX_FILE = 64 * 1024


@contextlib.contextmanager
def tracking(loop: TrainLoop, events: Sequence[Event], logged: Mapping[str, int]) -> Iterator[Tracking]:
    """The trackers that a run reports to, while it trains; none in other processes than the first.

    Args:
        loop: Ready to train; its folder is there.
        events: Those of its log, up to the step that it is resumed after.
        logged: The last step of each kind of event that the run's log had.

    Raises:
        CheckpointError: The run's file of trackers is damaged.
        ConfigError: A tracker of a new run does not start.
    """
    run = Tracking(loop)
    try:
        run.start(events, logged)
        yield run
    except BaseException as error:
        run.finish("stopped" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    else:
        run.finish("stopped")


def last_logged(events: Sequence[Event]) -> dict[str, int]:
    """The last step of each kind of event in a log."""
    return {kind: max((event["step"] for event in events if event["event"] == kind), default=0) for kind in KINDS}


class Tracking:
    """The trackers of a run.

    A tracker that fails is left alone until the next evaluation, where it is tried again; the training goes on.
    """

    def __init__(self, loop: TrainLoop) -> None:
        self._loop = loop
        self._trackers: dict[str, Tracker] = {}
        self._identities: dict[str, dict[str, str]] = {}
        self._paused: set[str] = set()
        self._warned: set[str] = set()
        self._samples = loop.config.report_examples
        self._news: list[Event] = []

    def start(self, events: Sequence[Event], logged: Mapping[str, int]) -> None:
        """Start or continue the tracked runs, and report what they lack of the run so far."""
        config = self._loop.config
        if not (config.trackers and self._loop.processes.is_main):
            return
        self._identities = _read_identities(self._path) if self._loop.resumed else {}
        for name in config.trackers:
            self._start(name, self._identities.get(name, {}), logged)
        self._store()
        for event in events:
            self._report(event)

    @property
    def _path(self) -> Path:
        return Path(self._loop.config.output) / TRACKERS_FILE

    def _store(self) -> None:
        """Write down what continues the tracked runs, also those that the run no longer reports to."""
        self._identities |= {name: dict(tracker.identity) for name, tracker in self._trackers.items()}
        write_text(self._path, json.dumps(self._identities, indent=1) + "\n")

    def _start(self, name: str, identity: Mapping[str, str], logged: Mapping[str, int]) -> None:
        config = self._loop.config
        run = TrackedRun(
            Path(config.output),
            config.project,
            config.run_name or Path(config.output).resolve().name,
            _hyperparameters(config.to_dict()),
            identity,
            self._loop.state.step,
            logged if identity else dict.fromkeys(KINDS, 0),
        )
        try:
            self._trackers[name] = tracker = TRACKERS[name](run)
        except Exception as error:
            if not self._loop.resumed:
                raise ConfigError(
                    f"the tracker {name} does not start: {_first_line(error)}",
                    hint=f"mend that, or leave {name} out of report_to.",
                ) from error
            self._tell(name, f"{name} does not start, so this run goes on without it: {_first_line(error)}")
        else:
            self._tell(name, f"reporting to {name}" + (f"; see it: {tracker.how_to_see}" if tracker.how_to_see else ""))

    def _tell(self, name: str, message: str) -> None:
        step = self._loop.state.step
        self._news.append({"event": "tracking", "step": step, "tracker": name, "message": message})

    def record(self, event: Event) -> list[Event]:
        """Report an event; returns what there is to say of it, and the texts that were written for it."""
        news = self._take_news()
        if event["event"] == "evaluation":
            self._paused.clear()
        self._report(event, _memory(self._loop) if event["event"] == "step" and self._trackers else {})
        if event["event"] == "evaluation" and self._waiting("examples", event["step"]):
            news += self._write_samples(event["step"])
        return [*news, *self._take_news()]

    def _report(self, event: Event, more: Mapping[str, float] = MappingProxyType({})) -> None:
        """Report an event to all trackers that do not hold it yet, with more figures."""
        kind, step = event["event"], event.get("step", 0)
        if kind == "examples":
            text = as_markdown(event["examples"])
            self._each(self._waiting(kind, step), lambda tracker: tracker.log_text("eval/examples", text, step))
        elif values := _values(self._loop, event):
            self._each(self._waiting(kind, step), lambda tracker: tracker.log({**values, **more}, step))

    def _waiting(self, kind: str, step: int) -> set[str]:
        """The trackers that do not hold an event yet."""
        return {name for name, tracker in self._trackers.items() if step > tracker.logged.get(kind, 0)}

    def _take_news(self) -> list[Event]:
        news, self._news = self._news, []
        return news

    def _each(self, names: set[str], do: Callable[[Tracker], None]) -> None:
        """Call something of some trackers; an error ends nothing."""
        for name in [name for name in self._trackers if name in names and name not in self._paused]:
            try:
                do(self._trackers[name])
            except Exception as error:
                self._paused.add(name)
                if name not in self._warned:
                    self._warned.add(name)
                    message = f"{name} failed and is tried again at the next evaluation: {_first_line(error)}"
                    self._tell(name, message)

    def _write_samples(self, step: int) -> list[Event]:
        """Let the run write texts, and report them; returns their event."""
        if not self._samples:
            return []
        started = time.perf_counter()
        try:
            samples = write_samples(self._loop, self._samples)
        except Exception as error:
            self._samples = 0
            self._tell("", f"no example texts are reported: {_first_line(error)}")
            return []
        seconds = round(time.perf_counter() - started, 4)
        event = {"event": "examples", "step": step, "seconds": seconds, "examples": samples}
        if not samples:
            return []
        self._report(event)
        return [event]

    def finish(self, outcome: Outcome) -> None:
        """Finish all tracked runs; a run that took all its steps is finished, whatever happened to others."""
        if self._loop.ended:
            outcome = "finished"
        for name, tracker in self._trackers.items():
            with _warning(name):
                tracker.finish(outcome)
        with _warning(TRACKERS_FILE):
            if self._trackers:
                self._store()


@contextlib.contextmanager
def _warning(name: str) -> Iterator[None]:
    """Make a warning of an error at a run's end."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"{name} did not finish: {_first_line(error)}", RuntimeWarning, stacklevel=4)


def _values(loop: TrainLoop, event: Event) -> dict[str, float]:
    """The figures of an event; empty: it has none."""
    if event["event"] == "evaluation":
        names = {"loss": "eval/loss", "best_loss": "eval/best_loss"}
        return {name: event[key] for key, name in names.items() if event.get(key) is not None}
    if event["event"] != "step":
        return {}
    return {
        "train/loss": event["loss_per_token"],
        "train/learning_rate": event["lr"],
        "train/grad_norm": event["grad_norm"],
        "train/tokens_per_second": event["target_tokens"] / max(event["seconds"], 1e-9),
        "train/epoch": event["step"] / loop.steps_per_epoch,
    }


def _memory(loop: TrainLoop) -> dict[str, float]:
    """The most memory so far, in MiB."""
    values: dict[str, float] = {}
    if (peak := peak_memory_mib()) is not None:
        values["train/memory_mib"] = peak
    if loop.backbone.device.type == "cuda":
        values["train/gpu_memory_mib"] = torch.cuda.max_memory_allocated(loop.backbone.device) / 2**20
    return values


def _hyperparameters(values: Mapping[str, Any]) -> dict[str, str | int | float]:
    """A configuration as trackers take it: numbers, texts, and lists as texts."""
    return {
        key: value if isinstance(value, int | float | str) else ",".join(map(str, value))
        for key, value in values.items()
        if value is not None
    }


def _read_identities(path: Path) -> dict[str, dict[str, str]]:
    """What each tracker stored of a run.

    Raises:
        CheckpointError: The file is damaged.
    """
    if not path.exists():
        return {}
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read(_MAX_FILE))
        if all(isinstance(value, str) for identity in content.values() for value in identity.values()):
            return {name: dict(identity) for name, identity in content.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        pass
    raise CheckpointError(
        f"{str(path)!r} names no tracked runs.", hint="delete the file: tracked runs start anew from this step."
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
