"""Run a study on a Ray cluster: so many workers, each with one backbone, sharing the study's folder.

A worker is `run_study` itself, so what holds for several processes on one machine holds here: cells are claimed by
locks, a cell that was cut off goes on from its last save, and what is done is not done again. The folder and the data
must lie on a disk that all machines see under the same path, with working file locks. Knows nothing of cells.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.errors import ConfigError, PrefixError
from prefixtune.studies.config import StudyConfig
from prefixtune.studies.records import Outcome
from prefixtune.studies.runner import outcome_of, run_study
from prefixtune.utils.extras import require

__all__ = ["run_on_ray", "share"]


Event = dict[str, Any]
_RETRIES = 3
"""How often a worker whose process or machine was lost is started again."""


def run_on_ray(
    config: StudyConfig,
    workers: int,
    *,
    address: str | None = None,
    on_event: Callable[[Event], None] | None = None,
    command: str = "",
) -> Outcome:
    """Run what is still to be done of a study, on workers of a Ray cluster.

    CPUs and GPUs of the cluster are dealt out evenly; a worker without a GPU of its own runs on CPUs.

    Args:
        config: The study.
        workers: How many.
        address: Of a running cluster, as `ray.init` takes it (`auto`: the one that this machine belongs to); None: one
            on this machine alone, for as long as the study runs.
        on_event: Called with every event, `worker` added.
        command: How it was started, for the report.

    Raises:
        ConfigError: Ray is missing, its cluster cannot be reached or is too small, or a worker was lost too often; what
            is done is kept.
        PrefixError: What `run_study` raises.
        KeyboardInterrupt: Ctrl-C; everything done so far is kept.
    """
    if workers < 1:
        raise ConfigError(f"{workers} workers can do nothing.", hint="give at least one.")
    # What it may send home is for its users to say.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = require("ray", "a study on a cluster")
    queues = require("ray.util.queue", "a study on a cluster")
    shared, tell = _absolute(config), on_event or (lambda event: None)
    began = not ray.is_initialized()
    if began:
        _connect(ray, address, workers)
    try:
        cpus, gpus = share([node["Resources"] for node in ray.nodes() if node["Alive"]], workers)
        heard = queues.Queue(actor_options={"num_cpus": 0})
        work = ray.remote(_work).options(num_cpus=cpus, num_gpus=gpus, max_retries=_RETRIES)
        running = [work.remote(shared, number, heard, command, os.getcwd()) for number in range(workers)]
        try:
            _follow(ray, running, heard, tell)
        except BaseException:
            for each in running:
                ray.cancel(each, force=True)
            raise
        return outcome_of(config)
    finally:
        if began:
            ray.shutdown()


def _work(config: StudyConfig, number: int, heard: Any, command: str, place: str) -> None:
    """One worker, in a process of its own, as if it had been started where the study was."""
    with contextlib.suppress(OSError):
        os.chdir(place)
    run_study(config, on_event=lambda event: heard.put({**event, "worker": number}), command=command)


def _connect(ray: Any, address: str | None, workers: int) -> None:
    cpus = None if address else max(workers, os.cpu_count() or 1)
    try:
        host, colon, port = (address or "").rpartition(":")
        if colon and port.isdigit() and "://" not in host:
            # Ray itself would go on trying for minutes.
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, num_cpus=cpus, log_to_driver=False, include_dashboard=None if address else False)
    except (OSError, RuntimeError, ValueError) as error:
        where = f"the cluster {address!r}" if address else "Ray on this machine"
        told = str(error).strip().split("\n", 1)[0]
        raise ConfigError(f"cannot start or reach {where}: {told}", hint="see `ray status` and `ray start`.") from error


def share(nodes: Sequence[Mapping[str, float]], workers: int) -> tuple[int, int]:
    """CPUs and GPUs of each worker: as many as leave room for all of them at once, each on one machine.

    >>> share([{"CPU": 8.0}] * 3, 2), share([{"CPU": 4.0, "GPU": 2.0}, {"CPU": 12.0}], 2)
    ((8, 0), (6, 0))

    Raises:
        ConfigError: There is not a CPU for each.
    """
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    most = max(cpus, default=0)
    count = next((c for c in range(most, 0, -1) if sum(each // c for each in cpus) >= workers), 0)
    if not count:
        raise ConfigError(
            f"the cluster has {sum(cpus)} CPUs, too few for {workers} workers.",
            hint="ask for fewer workers, or add machines.",
        )
    # A training runs on one device.
    places = sum(min(int(node.get("CPU", 0)) // count, int(node.get("GPU", 0))) for node in nodes)
    return count, int(places >= workers)


def _follow(ray: Any, running: list[Any], heard: Any, tell: Callable[[Event], None]) -> None:
    """Tell events until every worker is done."""
    left = list(running)
    while left:
        done, left = ray.wait(left, num_returns=1, timeout=0.2)
        for event in heard.get_nowait_batch(heard.size()):
            tell(event)
        for each in done:
            try:
                ray.get(each)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, PrefixError):
                    raise error.cause from None
                raise
            except (
                ray.exceptions.WorkerCrashedError,
                ray.exceptions.NodeDiedError,
                ray.exceptions.OutOfMemoryError,
            ) as error:
                told = str(error).strip().split("\n", 1)[0]
                raise ConfigError(f"a worker was lost {_RETRIES + 1} times: {told}", hint="start it again.") from error
    for event in heard.get_nowait_batch(heard.size()):
        tell(event)


def _absolute(config: StudyConfig) -> StudyConfig:
    """The same study wherever a worker's own folder is."""

    def place(text: str) -> str:
        return str(Path(text).absolute()) if text and Path(text).exists() else text

    data: dict[str, Any] = {name: place(getattr(config, name)) for name in ("data", "train", "dev", "test")}
    return dataclasses.replace(config, output=str(config.folder.absolute()), **data)
