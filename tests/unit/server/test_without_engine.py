"""A server without an engine: files and training only."""

import asyncio
import io
from pathlib import Path

import pytest

from asgi_client import send
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import load_backbone, load_tokenizer
from prefixtune.engine.engine import DEFAULT_MAX_LENGTH
from prefixtune.server.api.models import _UPLOAD_FOLDER
from prefixtune.server.app import make_app
from prefixtune.server.launch import _load
from prefixtune.server.prefixes import PrefixFolder
from prefixtune.server.settings import ServeConfig
from prefixtune.server.state import ServerState
from prefixtune.utils.console import Console


@pytest.fixture
def state(tmp_path, save_model, save_random_prefix):
    """A server's state over a tiny model's folder without its weights, with the prefix `a`."""
    model, prefixes = save_model(tmp_path / "model"), tmp_path / "prefixes"
    job = {"id": "ftjob-1", "owner": "local"}
    save_random_prefix(prefixes / "a.safetensors", load_backbone(model), job=job)
    (model / "model.safetensors").unlink()
    config = ServeConfig(engine="none", backbone=str(model), prefixes=str(prefixes), data_folder=str(tmp_path / "data"))
    unloaded = load_tokenizer(config.backbone)
    return ServerState(config, unloaded, PrefixFolder(prefixes, unloaded), None)


def test_it_lists_results_and_says_that_it_is_well(state):
    app = make_app(state)
    listed = asyncio.run(send(app, "GET", "/v1/models")).json["data"]
    assert [model["id"] for model in listed] == ["model", "a"]
    assert listed[1]["prefix_length"] == {"decoder": 4}
    for path in ("/healthz", "/readyz", "/metrics", "/train", "/docs", "/openapi.json", "/v1/models/a/file"):
        assert asyncio.run(send(app, "GET", path)).status == 200, path
    assert b"Playground</a>" not in asyncio.run(send(app, "GET", "/train")).body


def test_a_model_without_a_limit_of_its_own_is_trained(state, monkeypatch):
    """T5 reads texts of any length; an engine of it would have slots of `DEFAULT_MAX_LENGTH`."""
    monkeypatch.setattr(Backbone, "max_positions", None)
    state = ServerState(state.config, state.backbone, state.store, None)
    app = make_app(state)
    assert asyncio.run(send(app, "GET", "/v1/models/model")).json["max_model_len"] == DEFAULT_MAX_LENGTH
    rows = io.BytesIO(b'{"prompt": "a", "completion": "b"}\n' * 20)
    file = state.training.files.put("local", rows, "rows.jsonl", "fine-tune").id
    for model in ("model", "a"):
        body = {"model": model, "training_file": file}
        created = asyncio.run(send(app, "POST", "/v1/fine_tuning/jobs", body))
        assert created.status == 200, created.json
    state.close()


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/completions"), ("GET", "/v1/status"), ("GET", "/")])
def test_nothing_needs_an_engine(state, method, path):
    assert asyncio.run(send(make_app(state), method, path, {})).status == 404


def test_its_start_removes_what_a_killed_upload_left(state):
    # What one of a training file left goes with the next upload.
    left = Path(state.config.prefixes) / f".{_UPLOAD_FOLDER}.x.tmp"
    left.mkdir()
    (left / ".lock").touch()
    _load(state.config, Console(quiet=True)).close()
    assert not left.exists()
