"""Run a study on a Ray cluster: several workers, each with one backbone, share the study's folder.

A worker is `run_study` itself, so the rules for several processes on one machine hold here, too: cells are claimed by
locks, a cell that was stopped goes on from its last save, and what is done is not done again. The folder and the data
must be on a disk that all machines see under the same path, with working file locks.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.data import TASKS
from prefixtune.errors import ConfigError, PrefixError, first_line
from prefixtune.studies.config import StudyConfig
from prefixtune.studies.records import Event, OnEvent, Outcome
from prefixtune.studies.runner import outcome_of, run_study
from prefixtune.utils.extras import needs_extra

__all__ = ["run_on_ray", "share_resources"]


_RETRIES = 3
"""How often a worker whose process or machine was lost is started again."""


def run_on_ray(
    config: StudyConfig,
    workers: int,
    *,
    address: str | None = None,
    on_event: OnEvent | None = None,
    command: str = "",
) -> Outcome:
    """Run what is still to be done of a study, on workers of a Ray cluster.

    The CPUs and GPUs of the cluster are divided evenly; a worker without a GPU of its own runs on CPUs.

    Args:
        config: The study.
        workers: How many.
        address: Of a running cluster, as `ray.init` takes it (`auto`: the one that this machine belongs to); None: one
            on this machine alone, for as long as the study runs.
        on_event: Called with every event, with `worker` added.
        command: How it was started, for the report.

    Raises:
        ConfigError: Ray is missing, its cluster cannot be reached or is too small, this machine has too few CPUs, or a
            worker was lost too often; what is done is kept.
        PrefixError: What `run_study` raises.
        KeyboardInterrupt: Ctrl-C; everything done so far is kept.
    """
    if workers < 1:
        raise ConfigError(f"there are {workers} workers, but a study needs at least one.", hint="give a larger number.")
    known = sys.modules.get("ray")
    is_connected = known is not None and known.is_initialized()
    if not is_connected and address is None and workers > (available := os.cpu_count() or 1):
        raise ConfigError(
            f"there are {workers} workers, but this machine has {available} CPUs.",
            hint=f"give at most {available}, or the address of a cluster.",
        )
    # Usage statistics are only sent where the user has switched them on.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with needs_extra("ray", "a study on a cluster"):
        import ray
        from ray.util.queue import Queue
    absolute = _with_absolute_paths(config)
    must_connect = not ray.is_initialized()
    if must_connect:
        _connect(ray, address)
    try:
        cpus, gpus = share_resources([node["Resources"] for node in ray.nodes() if node["Alive"]], workers)
        events = Queue(actor_options={"num_cpus": 0})
        work = ray.remote(_work).options(num_cpus=cpus, num_gpus=gpus, max_retries=_RETRIES)
        running = [work.remote(absolute, index, events, command, os.getcwd()) for index in range(workers)]
        try:
            _forward_events(ray, running, events, on_event or (lambda event: None))
        except BaseException:
            for task in running:
                ray.cancel(task, force=True)
            raise
        return outcome_of(config)
    finally:
        if must_connect:
            ray.shutdown()


def _work(config: StudyConfig, index: int, events: Any, command: str, folder: str) -> None:
    """One worker, in a process of its own, as if it had been started in the study's working folder."""
    with contextlib.suppress(OSError):
        os.chdir(folder)
    run_study(config, on_event=lambda event: events.put({**event, "worker": index}), command=command)


def _connect(ray: Any, address: str | None) -> None:
    cpus = None if address else os.cpu_count()
    try:
        host, colon, port = (address or "").rpartition(":")
        if colon and port.isdigit() and "://" not in host:
            # Ray itself would try for minutes.
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, num_cpus=cpus, log_to_driver=False, include_dashboard=None if address else False)
    except (OSError, RuntimeError, ValueError) as error:
        where = f"the cluster {address!r}" if address else "Ray on this machine"
        raise ConfigError(
            f"cannot start or reach {where}: {first_line(error)}", hint="see `ray status` and `ray start`."
        ) from error


def share_resources(nodes: Sequence[Mapping[str, float]], workers: int) -> tuple[int, int]:
    """CPUs and GPUs of each worker: the most with which all workers run at once, each on one machine.

    >>> share_resources([{"CPU": 8.0}] * 3, 2), share_resources([{"CPU": 4.0, "GPU": 2.0}, {"CPU": 12.0}], 2)
    ((8, 0), (6, 0))

    Raises:
        ConfigError: There is not a CPU for each.
    """
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    largest = max(cpus, default=0)
    count = next((c for c in range(largest, 0, -1) if sum(available // c for available in cpus) >= workers), 0)
    if not count:
        raise ConfigError(
            f"the cluster has {sum(cpus)} CPUs, too few for {workers} workers.",
            hint="give fewer workers, or add machines.",
        )
    # A training runs on one device.
    gpu_workers = sum(min(int(node.get("CPU", 0)) // count, int(node.get("GPU", 0))) for node in nodes)
    return count, int(gpu_workers >= workers)


def _forward_events(ray: Any, running: list[Any], events: Any, on_event: OnEvent) -> None:
    """Pass the workers' events on until every worker is done."""

    def drain() -> None:
        batch: list[Event] = events.get_nowait_batch(events.size())
        for event in batch:
            on_event(event)

    left = list(running)
    while left:
        done, left = ray.wait(left, num_returns=1, timeout=0.2)
        drain()
        for task in done:
            try:
                ray.get(task)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, PrefixError):
                    raise error.cause from None
                raise
            except (
                ray.exceptions.WorkerCrashedError,
                ray.exceptions.NodeDiedError,
                ray.exceptions.OutOfMemoryError,
            ) as error:
                raise ConfigError(
                    f"a worker was lost {_RETRIES + 1} times: {first_line(error)}", hint="start it again."
                ) from error
    drain()


def _with_absolute_paths(config: StudyConfig) -> StudyConfig:
    """The same study, whatever a worker's own folder is."""

    def absolute(text: str) -> str:
        return str(Path(text).absolute()) if text and Path(text).exists() else text

    # Of a set that is made, not read, these are names of parts.
    names = () if TASKS[config.task].parts else ("data", "train", "dev", "test")
    data: dict[str, Any] = {name: absolute(getattr(config, name)) for name in names}
    return config.replace(output=str(config.folder.absolute()), **data)
