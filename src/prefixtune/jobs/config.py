"""What whoever asks for training and whoever trains must agree on: where data and the queue are."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from prefixtune.utils.config import Config, DTypeName, option_group
from prefixtune.utils.folders import data_folder as user_data

DATA_FOLDER_HELP = (
    "folder of uploaded files and jobs; made when it is first needed (default: in the user's data folder, one for each "
    "folder of prefixes)"
)
DATABASE_URL_HELP = (
    "queue of jobs: postgresql://... where several machines serve and train, or sqlite:///FILE; "
    "empty: jobs.sqlite in the data folder"
)
_SCHEMES = ("sqlite:///", "postgresql://", "postgresql+psycopg://")


def jobs_folder(data_folder: str, prefixes: str) -> Path:
    """Where uploaded files and jobs are kept.

    Args:
        data_folder: As configured; empty: a folder of the user's data folder.
        prefixes: The folder of prefixes; servers and workers of another one have other jobs.
    """
    if data_folder:
        return Path(data_folder).absolute()
    folder = Path(prefixes).resolve()
    mark = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    return user_data() / "jobs" / f"{folder.name}-{mark}"


def _check_url(url: str) -> str:
    # No message repeats it: it may hold a password.
    if url and not url.startswith(_SCHEMES):
        raise ValueError("must begin with postgresql:// or sqlite:///")
    return url


DatabaseUrl = Annotated[str, AfterValidator(_check_url)]
"""Where the queue of jobs is; empty: in the data folder."""


WORKER_ENVIRONMENT = "PREFIXTUNE_WORKER_"
"""A worker's setting may be a variable with this before its name, as a password is not to be seen among processes."""

_model, _jobs, _machine = option_group("model"), option_group("jobs"), option_group("machine")


class WorkerConfig(Config):
    """How a worker trains what servers are asked for.

    Raises:
        ConfigError: One or more values are not allowed; all faults are listed at once.
    """

    backbone: str = _model("smollm2-135m", description="embedded name, hub id, local folder or .gguf file")
    backbone_id: str = _model("", description="what results call a local backbone; empty: the last part of its path")
    dtype: DTypeName = _model("auto", description="dtype of the frozen weights")
    device: str = _model("auto", description="cpu, cuda, cuda:0, mps or auto")
    quantize: Literal["", "int8", "int4"] = _model(
        "", description="quantize the frozen weights (torchao): int8 or int4"
    )

    data_folder: str = _jobs("", description=DATA_FOLDER_HELP)
    database_url: DatabaseUrl = _jobs("", description=DATABASE_URL_HELP)
    prefixes: str = _jobs("prefixes", min_length=1, description="folder that servers serve prefixes from")
    cache_mib: Annotated[int, Field(ge=1, le=1_000_000_000)] = _jobs(
        1024, description="largest result, in MiB: cache_mib of the servers, which refuse larger prefixes"
    )
    idle_seconds: float = _jobs(0.0, ge=0, description="end after this many seconds without a job; 0: never")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{0,40}$")] = _machine(
        "",
        description="of this worker, which no other one has: letters, digits and -; started again under it, it goes on "
        "with its jobs (default: this machine's name and some digits)",
    )
    threads: int = _machine(0, ge=0, le=1_000_000, description="threads that train; 0: as many as cores")
    nice: int = _machine(0, ge=0, le=19, description="how far this process steps back where the processor is busy")
    log_level: Literal["debug", "info", "warning", "error"] = _machine(
        "info", description="lowest level of the lines on stdout, which are JSON"
    )
