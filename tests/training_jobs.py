"""Jobs of a queue over a tiny model, and `prefixtune worker` in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefixtune.jobs.folder import DataFolder
from prefixtune.jobs.job import Job, JobState, JobStatus, new_job_id
from prefixtune.jobs.queue import JobQueue

ROWS = [{"prompt": f"n : {letter}", "completion": f" {letter}{letter} it is."} for letter in "abcdefgh"]
CONFIG: dict[str, Any] = {"prefix_length": 2, "init_text": "ab", "batch_size": 4, "max_steps": 6, "warmup_steps": 2}

_COMMAND = """
import sys
from prefixtune.cli.main import main
sys.exit(main(["worker", *sys.argv[1:]]))
"""


def make_job(
    data: DataFolder, name: str = "answers", *, rows: list[dict[str, Any]] | None = ROWS, **fields: Any
) -> Job:
    """A job with its folder, not queued yet; `config` adds to `CONFIG`, `dev` are rows to validate on."""
    config, dev = {**CONFIG, **fields.pop("config", {})}, fields.pop("dev", None)
    document = fields.pop("document", None)
    if config.get("initialization") == "text":
        # It starts from the document.
        del config["init_text"]
    fields = {"kind": "document", **fields} if document else fields
    job = Job(
        id=new_job_id(),
        owner=fields.pop("owner", "ann"),
        created=int(time.time()),
        model="tiny",
        name=name,
        config=config,
        training_file=f"file-{'0' * 24}",
        **fields,
    )
    uploads = data.root / "uploads"
    uploads.mkdir(parents=True, exist_ok=True)
    inputs: Any = {}
    if document is not None:
        source = uploads / f"{job.id}.txt"
        source.write_text(document)
        inputs["document"] = (source, ".txt")
    for part, some in (("questions" if document else "train", rows), ("dev", dev)):
        if some is not None:
            source = uploads / f"{job.id}-{part}.jsonl"
            source.write_text("".join(json.dumps(row) + "\n" for row in some))
            inputs[part] = (source, ".jsonl")
    data.make_job(job.id, inputs)
    return job


def start_worker(
    data: DataFolder, model: Path, prefixes: Path, *options: str, **settings: Any
) -> subprocess.Popen[str]:
    """A worker; its lines are in `stdout`."""
    command = [sys.executable, "-c", _COMMAND, "--data-folder", str(data.root), "--backbone", str(model)]
    command += ["--prefixes", str(prefixes), "--threads", "1", "--device", "cpu", *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, **settings}
    return subprocess.Popen(command, env=environment, text=True, **settings)


def wait_for(queue: JobQueue, job: Job, *statuses: JobStatus, seconds: float = 180.0) -> JobState:
    """How a job stands once it stands at one of these."""
    wait_until(lambda: queue.get(job.id).status in statuses, seconds)
    return queue.get(job.id)


def wait_until(is_so: Callable[[], object], seconds: float = 180.0) -> None:
    """Wait until a function returns something true."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
