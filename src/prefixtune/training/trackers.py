"""Experiment trackers: the figures of a run in trackio, Weights & Biases, TensorBoard or MLflow.

A tracker that fails is left out from then on; the training goes on.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import io
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prefixtune.errors import ConfigError, first_line
from prefixtune.training.run_folder import Event

if TYPE_CHECKING:
    from prefixtune.training.loop import TrainLoop


class Tracker(NamedTuple):
    """A run in a tracker: `log` takes figures and their step, `finish` whether the run failed; both may raise."""

    log: Callable[[Mapping[str, float], int], Any]
    finish: Callable[[bool], Any]


def check_installed(names: Iterable[str]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        ConfigError: One is not.
    """
    for name in names:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise ConfigError(f"the tracker {name} is not installed.", hint=f"pip install {name}, or leave it out.")


@contextlib.contextmanager
def tracking(loop: TrainLoop) -> Iterator[dict[str, Tracker]]:
    """The trackers that a run reports to, by name, while it trains; none in other processes than the first.

    Raises:
        ConfigError: A tracker does not start, or is not installed.
    """
    trackers: dict[str, Tracker] = {}
    try:
        for name in loop.config.trackers if loop.processes.is_main else ():
            try:
                trackers[name] = _STARTS[name](loop)
            except Exception as error:
                raise ConfigError(
                    f"the tracker {name} does not start: {first_line(error)}",
                    hint=f"install or mend it, or leave {name} out of report_to.",
                ) from error
        yield trackers
    finally:
        # A run that is stopped, by a `KeyboardInterrupt`, has not failed.
        failed = isinstance(sys.exception(), Exception) and not loop.ended
        _call(trackers, lambda tracker: tracker.finish(failed))


def report(trackers: dict[str, Tracker], loop: TrainLoop, event: Event) -> None:
    """Tell the trackers of an event."""
    values: dict[str, float] = {}
    if event["event"] == "evaluation":
        values = {f"eval/{name}": event[name] for name in ("loss", "best_loss") if event.get(name) is not None}
    elif event["event"] == "step":
        values = {
            "train/loss": event["loss_per_token"],
            "train/learning_rate": event["lr"],
            "train/grad_norm": event["grad_norm"],
            "train/tokens_per_second": event["target_tokens"] / max(event["seconds"], 1e-9),
            "train/epoch": event["step"] / loop.steps_per_epoch,
        }
    if values:
        _call(trackers, lambda tracker: tracker.log(dict(values), event["step"]))


def _call(trackers: dict[str, Tracker], tell: Callable[[Tracker], Any]) -> None:
    """Tell each tracker something; of one that fails, warn and go on without it."""
    for name, tracker in list(trackers.items()):
        try:
            tell(tracker)
        except Exception as error:
            del trackers[name]
            what = f"the tracker {name} failed and is left out: {first_line(error)}"
            warnings.warn(what, RuntimeWarning, stacklevel=3)


# --- the four trackers -----------------------------------------------------------------------------------------------


def _names(loop: TrainLoop, variable: str) -> tuple[str, str]:
    """Project and name of a run."""
    config = loop.config
    project = config.project or os.environ.get(variable) or "prefixtune"
    return project, config.run_name or Path(config.output).resolve().name


def _start_tensorboard(loop: TrainLoop) -> Tracker:
    from torch.utils.tensorboard.writer import SummaryWriter

    folder, purge = Path(loop.config.output) / "tensorboard", loop.state.step + 1 if loop.resumed else None
    writer = SummaryWriter(str(folder), purge_step=purge)

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(log, lambda failed: writer.close())


def _start_wandb(loop: TrainLoop) -> Tracker:
    # Reports of wandb's own errors go to its makers; not without being asked.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    project, name = _names(loop, "WANDB_PROJECT")
    mode: Any = os.environ.get("WANDB_MODE", "offline")
    run = wandb.init(
        project=project,
        name=name,
        dir=os.environ.get("WANDB_DIR", loop.config.output),
        mode=mode,
        config=loop.config.to_dict(),
        # Several runs may be open, also the user's own.
        reinit="create_new",
        settings=wandb.Settings(console="off", silent=True),
    )
    return Tracker(run.log, lambda failed: run.finish(exit_code=int(failed)))


def _start_mlflow(loop: TrainLoop) -> Tracker:
    # By default a server that does not answer is asked again for minutes, while training waits; and MLflow refuses
    # folders, which it develops no further.
    usual = {"DISABLE_TELEMETRY": "true", "HTTP_REQUEST_TIMEOUT": "10", "HTTP_REQUEST_MAX_RETRIES": "2"}
    for variable, value in {**usual, "ALLOW_FILE_STORE": "true"}.items():
        os.environ.setdefault(f"MLFLOW_{variable}", value)
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    uri = os.environ.get("MLFLOW_TRACKING_URI") or (Path(loop.config.output).resolve() / "mlflow").as_uri()
    client = MlflowClient(tracking_uri=uri)
    project, name = _names(loop, "MLFLOW_EXPERIMENT_NAME")
    found = client.get_experiment_by_name(project)
    experiment = client.create_experiment(project) if found is None else found.experiment_id
    run = client.create_run(experiment, run_name=name).info.run_id
    client.log_batch(run, params=[Param(key, str(value)[:500]) for key, value in loop.config.to_dict().items()])

    def log(values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run, metrics=[Metric(key, value, now, step) for key, value in values.items()])

    return Tracker(log, lambda failed: client.set_terminated(run, "FAILED" if failed else "FINISHED"))


def _start_trackio(loop: TrainLoop) -> Tracker:
    import trackio
    from huggingface_hub import constants

    project, name = _names(loop, "TRACKIO_PROJECT")
    options: dict[str, Any] = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
    options |= {"resume": "allow" if loop.resumed else "never", "config": loop.config.to_dict()}
    # It writes messages, which are no result.
    silent = contextlib.redirect_stdout(io.StringIO())
    # It asks the hub for the user's name, wherever a token is stored, and has no option for that.
    before, remote = constants.HF_HUB_OFFLINE, any(map(os.environ.get, ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")))
    constants.HF_HUB_OFFLINE = before or not remote
    try:
        with silent:
            # It ends the run that is current; in a context of its own, there is none.
            run = contextvars.Context().run(trackio.init, project, name, **options)
    finally:
        constants.HF_HUB_OFFLINE = before

    def finish(failed: bool) -> None:
        with silent:
            run.finish()

    return Tracker(run.log, finish)


_STARTS: dict[str, Callable[[TrainLoop], Tracker]] = {
    "trackio": _start_trackio,
    "wandb": _start_wandb,
    "tensorboard": _start_tensorboard,
    "mlflow": _start_mlflow,
}
