"""The four trackers themselves, offline: what they have stored of a run that was killed and resumed, read back."""

import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest

STEPS, SAVED, KILLED, EVERY = 10, 4, 7, 3

_RUN = f"""
import os, signal, socket, sys, threading
import prefixtune as pt
from prefixtune.backbone.backbone import Backbone
from zoo import make_model, make_tokenizer

def guard(name):
    real = getattr(socket.socket, name)
    def connect(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
            print("NETWORK", address, file=sys.stderr)
        return real(self, address)
    setattr(socket.socket, name, connect)

guard("connect"); guard("connect_ex")
lookup = socket.getaddrinfo
def getaddrinfo(host, *rest, **more):
    if host not in ("127.0.0.1", "::1", "localhost", None):
        print("NETWORK", host, file=sys.stderr)
    return lookup(host, *rest, **more)
socket.getaddrinfo = getaddrinfo

tokenizer = make_tokenizer()
backbone = Backbone.from_model(make_model("llama", tokenizer, 0), tokenizer, "tiny")
examples = [pt.Example(f"n : {{letter}}", (f"{{letter}} it is.",)) for letter in "abcd"]

def kill(event):
    if event["event"] == "step" and event["step"] == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

pt.train(
    backbone=backbone, examples=examples, dev_examples=examples[:2], output=sys.argv[1], resume=sys.argv[3] == "resume",
    prefix_length=2, init_text="ab", max_steps={STEPS}, save_every={SAVED}, eval_every={EVERY}, report_to="all",
    project="meals", run_name="lunch", progress=False, on_event=kill,
)
left = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread() and not thread.daemon]
print("THREADS", left)
"""


def run(folder, *, kill_at, resume):
    """Train in a program of its own, as a user without any of the trackers' variables; a token of the hub is there."""
    root = Path(__file__).parents[2]
    own = ("TRACKIO_", "WANDB_", "MLFLOW_", "HF_HUB_OFFLINE", "PYTEST_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(own)}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root / "tests")]),
        "HF_TOKEN": "hf_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "HOME": str(folder.parent),
        "TRACKIO_DIR": str(folder / "trackio"),
    }
    words = [sys.executable, "-c", _RUN, str(folder), str(kill_at), "resume" if resume else "new"]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a run that was killed after step 7, with its state of step 4, and resumed."""
    folder = tmp_path_factory.mktemp("trackers") / "run"
    killed = run(folder, kill_at=KILLED, resume=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(folder, kill_at=0, resume=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "NETWORK" not in killed.stderr + resumed.stderr
    assert resumed.stdout == "THREADS []\n", "standard output is for results, and no thread keeps the program alive"
    assert "Traceback" not in resumed.stderr
    return folder


@pytest.fixture(scope="module")
def losses(folder):
    """Of each step, by the run's own log."""
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    losses = {event["step"]: event["loss_per_token"] for event in events if event["event"] == "step"}
    assert sorted(losses) == list(range(1, STEPS + 1))
    return losses


EVALUATIONS = [3, 6, 9, 10]


def assert_losses(stored, losses):
    """A kill may lose some steps before it, and no step behind the state."""
    assert set(range(SAVED + 1, STEPS + 1)) <= stored.keys()
    assert stored == pytest.approx({step: losses[step] for step in stored})


def test_tensorboard(folder, losses):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    stored = [(event.step, event.value) for event in reader.Scalars("train/loss")]
    assert [step for step, _ in stored] == sorted(losses)
    assert [value for _, value in stored] == pytest.approx([losses[step] for step, _ in stored])
    assert [event.step for event in reader.Scalars("eval/loss")] == EVALUATIONS
    assert not [path for path in (folder / "tensorboard").iterdir() if path.is_dir()]


def test_trackio(folder, losses):
    with sqlite3.connect(folder / "trackio" / "meals.db") as database:
        rows = database.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        ((config,),) = database.execute("SELECT config FROM configs").fetchall()
    database.close()
    assert {name for _, name, _, _ in rows} == {"lunch"}
    assert len({identity for identity, _, _, _ in rows}) == 1
    metrics = [(step, json.loads(text)) for _, _, step, text in rows]
    # The last half second before a kill may be lost to it; steps behind the state are logged again.
    assert_losses({step: row["train/loss"] for step, row in metrics if "train/loss" in row}, losses)
    assert {9, 10} <= {step for step, row in metrics if "eval/loss" in row} <= set(EVALUATIONS)
    assert json.loads(config)["prefix_length"] == 2


def test_mlflow(folder, losses, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(tracking_uri=(folder / "mlflow").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'meals'")
    resumed, killed = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])
    assert (resumed.info.run_name, resumed.info.status, killed.info.run_name) == ("lunch", "FINISHED", "lunch")
    history = [m for one in (killed, resumed) for m in client.get_metric_history(one.info.run_id, "train/loss")]
    assert_losses({metric.step: metric.value for metric in history}, losses)
    evaluations = [m for one in (killed, resumed) for m in client.get_metric_history(one.info.run_id, "eval/loss")]
    assert {m.step for m in evaluations} == set(EVALUATIONS)
    assert resumed.data.params["prefix_length"] == "2"


def test_wandb(folder, losses):
    from wandb.proto import wandb_internal_pb2

    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2, "one of the run that was killed, one of the resumed one"
    history = []
    names = set()
    for file in files:
        for content in read_records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.HasField("run"):
                names.add((record.run.project, record.run.display_name))
            if record.HasField("history"):
                items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                history.append((items["_step"], items))
    assert names == {("meals", "lunch")}
    assert_losses({step: row["train/loss"] for step, row in history if "train/loss" in row}, losses)
    assert {9, 10} <= {step for step, row in history if "eval/loss" in row} <= set(EVALUATIONS)


def read_records(path):
    """The records of a file of wandb: a log of LevelDB after 7 bytes; a torn end is left out."""
    content, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # A whole record, or the last part of one.
            yield parts
            parts = b""
