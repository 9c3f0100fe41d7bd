"""`prefixtune serve --engine vllm` with a stand-in for vLLM: training by vLLM's public port, and who ends with whom."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from fake_vllm_server import write_vllm
from live_server import COMMAND, HttpClient, make_model

KEY = "vllms-key"
TESTS = Path(__file__).parents[1]
ROWS = [{"prompt": f"night train {number}", "completion": f"leaves at {number}"} for number in range(12)]


class Served(HttpClient):
    """The command, with the stand-in in place of vLLM."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        super().__init__(f"http://127.0.0.1:{port}")
        self.folder = folder
        (folder / "prefixes").mkdir()
        self.log = folder / "log"
        paths = [str(write_vllm(folder / "fake")), str(TESTS), *sys.path]
        flags = ["--engine", "vllm", "--backbone", str(make_model(folder / "model")), "--backbone-id", "base"]
        flags += ["--prefixes", str(folder / "prefixes"), "--data-folder", str(folder / "data"), "--port", str(port)]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, *flags, "--dtype", "float32"],
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(paths),
                    "VLLM_API_KEY": KEY,
                    "OMP_NUM_THREADS": "1",
                    # Settings of vLLM's address, which the training server must not take for its own.
                    "PREFIXTUNE_SERVE_ENGINE": "vllm",
                },
            )
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def answers(self, path: str) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.get(path, key=KEY)[0] == 200
        except OSError:
            return False

    def training_server(self) -> psutil.Process:
        """The server beside vLLM's."""
        found = [child for child in psutil.Process(self.process.pid).children() if "none" in child.cmdline()]
        assert len(found) == 1, self.log.read_text()
        return found[0]

    def socket_file(self) -> Path:
        """What that one listens on."""
        return next(Path(part.removeprefix("unix:")) for part in self.training_server().cmdline() if "unix:" in part)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """It, once both servers answer."""
    served = Served(tmp_path_factory.mktemp("served"))
    try:
        served.until(lambda: served.answers("/v1/models"), 180)
        served.until(lambda: served.answers("/train"), 180)
        socket_file = served.socket_file()
        yield served
    finally:
        children = psutil.Process(served.process.pid).children(recursive=True) if served.process.poll() is None else []
        served.process.terminate()
        code = served.process.wait(60)
        psutil.wait_procs(children, 20)
        assert not [child for child in children if child.is_running()]
    # Of uvicorn, in place of vLLM's.
    assert code in (0, 128 + signal.SIGTERM)
    assert not socket_file.parent.exists()


def test_a_file_is_uploaded_by_vllms_port(served: Served):
    data = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    stored = served.client.files.create(file=("trains.jsonl", data), purpose="fine-tune")
    assert (stored.filename, stored.bytes, stored.status) == ("trains.jsonl", len(data), "processed")
    assert [file.id for file in served.client.files.list()] == [stored.id]
    assert served.client.files.content(stored.id).content == data
    assert served.client.files.delete(stored.id).deleted


def test_a_key_is_needed_but_for_the_page(served: Served):
    assert served.get("/v1/files")[0] == 401
    assert served.post("/v1/fine_tuning/jobs", {})[0] == 401
    assert served.request("DELETE", "/v1/models/a")[0] == 401
    assert served.get("/train")[0] == 200


def test_a_job_is_trained_and_its_result_is_a_model_of_vllms_at_once(served: Served):
    client = served.client
    data = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    file = client.files.create(file=("trains.jsonl", data), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="base",
        training_file=file.id,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
        extra_body={"prefixtune": {"name": "trains", "prefix_length": 3}},
    )
    served.until(lambda: client.fine_tuning.jobs.retrieve(job.id).status not in ("queued", "running"), 180)
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.fine_tuned_model) == ("succeeded", "trains"), served.log.read_text()
    assert "trains" in [model.id for model in client.models.list()]
    assert client.completions.create(model="trains", prompt="night train 3").model == "trains"
    status, _, headers = served.request("HEAD", "/v1/models/trains/file", key=KEY)
    assert (status, int(headers["content-length"])) == (
        200,
        (served.folder / "prefixes" / "trains.safetensors").stat().st_size,
    )
    assert client.models.delete("trains").deleted
    assert "trains" not in [model.id for model in client.models.list()]


def test_a_training_server_that_is_killed_is_started_again(served: Served):
    killed = served.training_server()
    killed.kill()
    served.until(lambda: served.get("/train")[0] == 503, 5)
    assert served.get("/v1/files", key=KEY)[1]["error"]["type"] == "server_error"
    assert served.get("/v1/models", key=KEY)[0] == 200
    served.until(lambda: served.answers("/train"), 180)
    assert served.training_server().pid != killed.pid
    assert isinstance(list(served.client.files.list()), list)
