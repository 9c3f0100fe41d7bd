"""A tiny model, a folder of prefixes, and a server's application over a real engine."""

import pytest
import torch

from prefixtune.engine.engine import TorchEngine
from prefixtune.server.app import make_app
from prefixtune.server.prefixes import PrefixFolder
from prefixtune.server.settings import ServeConfig
from prefixtune.server.state import ServerState

FORMAT = {"prompt": " {source} {separator}", "target": " {target} ", "source": "{name}"}


@pytest.fixture
def text_format():
    """The text format of the prefixes `a` and `b`."""
    return dict(FORMAT)


@pytest.fixture(scope="module")
def backbone(tiny_backbone):
    """A tiny backbone of 512 positions that never generates its end token."""
    backbone = tiny_backbone("llama", max_position_embeddings=512)
    with torch.no_grad():
        # The end token is never the likeliest: every text is as long as requested.
        backbone.model.lm_head.weight[backbone.eos_id] = 0.0
    return backbone


@pytest.fixture
def make_server(backbone, tmp_path, save_random_prefix):
    """A factory: `make_server(**options)` makes an application and its state, with the prefixes `a` and `b`."""
    states = []

    def make(**options):
        folder = tmp_path / "prefixes"
        folder.mkdir(exist_ok=True)
        for seed, name in enumerate(("a", "b")):
            facts = {"task": "records", "text_format": FORMAT}
            save_random_prefix(folder / f"{name}.safetensors", backbone, seed=seed, **facts)
        folders = {"prefixes": str(folder), "data_folder": str(tmp_path / "data")}
        config = ServeConfig(**{"backbone": "tiny", **folders, "num_slots": 4, **options})
        engine = TorchEngine(backbone, num_slots=4, max_length=config.max_length, prefill_tokens=config.prefill_tokens)
        state = ServerState(config, backbone, PrefixFolder(folder, backbone), engine)
        states.append(state)
        return make_app(state), state

    yield make
    for state in states:
        state.close()


@pytest.fixture
def save(tmp_path, llama, save_random_prefix):
    """A function: `save(name, seed, **facts)` writes a prefix into the folder."""

    def write(name, seed=0, *, length=3, folder=tmp_path, **facts):
        return save_random_prefix(folder / f"{name}.safetensors", llama, length, seed, **facts)

    return write
