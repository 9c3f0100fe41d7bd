"""Jobs of a queue over a tiny model, and `prefixtune worker` in a process of its own."""

import json
import os
import secrets
import subprocess
import time

from forked_command import ForkedCommand
from prefixtune.jobs.job import Job

ROWS = [{"prompt": f"n : {letter}", "completion": f" {letter}{letter} it is."} for letter in "abcdefgh"]
CONFIG = {"prefix_length": 2, "init_text": "ab", "batch_size": 4, "max_steps": 6, "warmup_steps": 2}


def new_job_id():
    """An id of a job that there is not."""
    return f"ftjob-{secrets.token_hex(12)}"


def make_job(data, name="answers", *, rows=ROWS, **fields):
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
    inputs = {}
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


def start_worker(data, model, prefixes, *options, **streams):
    """A worker; its lines are in `stdout`."""
    places = ("--data-folder", str(data.root), "--backbone", str(model), "--prefixes", str(prefixes))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    streams = {"stderr": subprocess.STDOUT, **streams}
    return ForkedCommand("worker", *places, "--threads", "1", "--device", "cpu", *options, env=environment, **streams)


def wait_for(queue, job, *statuses, seconds=180.0):
    """How a job stands once it stands at one of these."""
    wait_until(lambda: queue.get(job.id).status in statuses, seconds)
    return queue.get(job.id)


def wait_until(is_so, seconds=180.0):
    """Wait until a function returns something true."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
