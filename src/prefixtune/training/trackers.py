"""Experiment trackers: the figures of a run in trackio, Weights & Biases, TensorBoard or MLflow.

A tracker that fails is left out from then on; the training goes on. A resumed run continues the tracked one, which may
have a gap or steps twice.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import io
import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prefixtune.errors import ConfigError, first_line
from prefixtune.training.run_folder import Event
from prefixtune.utils.files import write_text

if TYPE_CHECKING:
    from prefixtune.training.loop import TrainLoop


class Tracker(NamedTuple):
    """A run in a tracker: `log` takes figures and their step, `finish` whether the run failed; both may raise."""

    log: Callable[[Mapping[str, float], int], Any]
    finish: Callable[[bool], Any]


def check_installed(names: Iterable[str]) -> None:
    """Refuse trackers that are not installed; all at once.

    Raises:
        ConfigError: One or more are missing.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"report_to names {' and '.join(missing)}: not installed.", hint=f"pip install {' '.join(missing)}."
        )


@contextlib.contextmanager
def tracking(loop: TrainLoop) -> Iterator[dict[str, Tracker]]:
    """The trackers that a run reports to, by name, while it trains; none in other processes than the first.

    Raises:
        ConfigError: A tracker does not start.
    """
    trackers: dict[str, Tracker] = {}
    failed = True
    try:
        for name in loop.config.trackers if loop.processes.is_main else ():
            try:
                trackers[name] = _STARTS[name](loop)
            except Exception as error:
                raise ConfigError(
                    f"the tracker {name} does not start: {first_line(error)}",
                    hint=f"mend that, or leave {name} out of report_to.",
                ) from error
        yield trackers
        failed = False
    except KeyboardInterrupt:
        failed = False
        raise
    finally:
        for name in list(trackers):
            with _leaving_out(name, trackers):
                trackers[name].finish(failed and not loop.ended)


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
    for name in list(trackers) if values else ():
        with _leaving_out(name, trackers):
            trackers[name].log(values, event["step"])


@contextlib.contextmanager
def _leaving_out(name: str, trackers: dict[str, Tracker]) -> Iterator[None]:
    """Where a tracker fails, warn of it and go on without it."""
    try:
        yield
    except Exception as error:
        trackers.pop(name, None)
        warnings.warn(f"the tracker {name} failed and is left out: {first_line(error)}", RuntimeWarning, stacklevel=4)


# --- the four trackers -----------------------------------------------------------------------------------------------


def _about(loop: TrainLoop, variable: str) -> tuple[str, str, dict[str, Any]]:
    """Project, name and configuration of a run, as trackers take it: numbers, texts, and lists as texts."""
    config = loop.config
    values = config.to_dict().items()
    flat = {key: value if isinstance(value, int | float | str) else ",".join(map(str, value)) for key, value in values}
    project = config.project or os.environ.get(variable) or "prefixtune"
    return project, config.run_name or Path(config.output).resolve().name, flat


def _identity(loop: TrainLoop, file: str, make: Callable[[], str]) -> str:
    """What a tracker calls the run, which a file of the run's folder keeps for a resumed one."""
    path = Path(loop.config.output) / file
    if not (loop.resumed and path.exists()):
        write_text(path, make())
    return path.read_text(encoding="utf-8").strip()


def _start_tensorboard(loop: TrainLoop) -> Tracker:
    from torch.utils import tensorboard

    module: Any = tensorboard  # which has no types
    purge = loop.state.step + 1 if loop.resumed else None
    writer = module.SummaryWriter(str(Path(loop.config.output) / "tensorboard"), purge_step=purge)

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(log, lambda failed: writer.close())


def _start_wandb(loop: TrainLoop) -> Tracker:
    # Reports of wandb's own errors go to its makers; not without being asked.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    module: Any = wandb
    mode = os.environ.get("WANDB_MODE", "offline")
    project, name, values = _about(loop, "WANDB_PROJECT")
    run = module.init(
        project=project,
        name=name,
        id=_identity(loop, "wandb.txt", lambda: secrets.token_hex(4)),
        dir=os.environ.get("WANDB_DIR") or loop.config.output,
        mode=mode,
        config=values,
        resume="allow" if loop.resumed and mode == "online" else None,
        # Several runs may be open, also the user's own.
        reinit="create_new",
        settings=module.Settings(console="off", silent=True),
    )
    return Tracker(
        lambda values, step: run.log(dict(values), step=step), lambda failed: run.finish(exit_code=int(failed))
    )


def _start_mlflow(loop: TrainLoop) -> Tracker:
    # By default a server that does not answer is asked again for minutes, while training waits.
    usual = {"DISABLE_TELEMETRY": "true", "HTTP_REQUEST_TIMEOUT": "10", "HTTP_REQUEST_MAX_RETRIES": "2"}
    # MLflow refuses folders, which it develops no further, without this.
    for variable, value in {**usual, "ALLOW_FILE_STORE": "true"}.items():
        os.environ.setdefault(f"MLFLOW_{variable}", value)
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    uri = os.environ.get("MLFLOW_TRACKING_URI") or (Path(loop.config.output).resolve() / "mlflow").as_uri()
    client: Any = MlflowClient(tracking_uri=uri)
    project, name, values = _about(loop, "MLFLOW_EXPERIMENT_NAME")

    def create() -> str:
        found = client.get_experiment_by_name(project)
        experiment = client.create_experiment(project) if found is None else found.experiment_id
        run = client.create_run(experiment, run_name=name).info.run_id
        for key, value in values.items():
            client.log_param(run, key, str(value)[:500])
        return str(run)

    run = _identity(loop, "mlflow.txt", create)
    client.update_run(run, status="RUNNING")

    def log(values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run, metrics=[Metric(key, value, now, step) for key, value in values.items()])

    return Tracker(log, lambda failed: client.set_terminated(run, "FAILED" if failed else "FINISHED"))


def _start_trackio(loop: TrainLoop) -> Tracker:
    import trackio
    from huggingface_hub import constants

    module: Any = trackio
    project, name, values = _about(loop, "TRACKIO_PROJECT")
    # trackio ends the run that is current; in a context of its own, there is none.
    context = contextvars.copy_context()
    context.run(module.context_vars.current_run.set, None)
    resume = "allow" if loop.resumed else "never"
    quiet: dict[str, Any] = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
    # It asks the hub for the user's name, wherever a token is stored, and has no option for that.
    before, remote = constants.HF_HUB_OFFLINE, any(map(os.environ.get, ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")))
    constants.HF_HUB_OFFLINE = before or not remote
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run = context.run(module.init, project=project, name=name, config=values, resume=resume, **quiet)
    finally:
        constants.HF_HUB_OFFLINE = before

    def finish(failed: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            run.finish()

    return Tracker(lambda values, step: run.log(dict(values), step=step), finish)


_STARTS: dict[str, Callable[[TrainLoop], Tracker]] = {
    "trackio": _start_trackio,
    "wandb": _start_wandb,
    "tensorboard": _start_tensorboard,
    "mlflow": _start_mlflow,
}
