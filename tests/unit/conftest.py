"""What tests of several parts begin with: a tiny LLaMA, a model's folder, a prefix file."""

from pathlib import Path

import pytest

from prefixtune.backbone.prefixes import make_header
from prefixtune.prefix.prefix import Prefix, save_prefix
from zoo import store_model


@pytest.fixture(scope="module")
def llama(tiny_backbone):
    """A tiny LLaMA, the same in a whole module."""
    return tiny_backbone("llama")


@pytest.fixture(scope="session")
def save_model():
    """A function: `save_model(folder, "llama", **changes)` writes a tiny model with its tokenizer, gives the folder."""
    return lambda folder, family="llama", **changes: Path(store_model(folder, family, **changes))


@pytest.fixture(scope="session")
def save_random_prefix(random_prefix):
    """A function: `save_random_prefix(path, backbone, 4, seed=0, **facts)` writes a prefix file; returns its path."""

    def save(path, backbone, length=4, seed=0, **facts):
        return save_prefix(path, Prefix(random_prefix(backbone, length, seed).layers, make_header(backbone, **facts)))

    return save
