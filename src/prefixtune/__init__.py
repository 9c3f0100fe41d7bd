"""Train, evaluate and serve prefixes for frozen language models (prefix-tuning, Li & Liang 2021).

The few names that most programs need; everything else is in the modules. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "EngineConfig",
    "Example",
    "GenerateConfig",
    "Model",
    "Prefix",
    "PrefixError",
    "PrefixWarning",
    "ServeConfig",
    "TorchEngine",
    "TrainConfig",
    "__version__",
    "evaluate",
    "generate",
    "load",
    "load_backbone",
    "load_prefix",
    "save_prefix",
    "train",
]


__version__ = "0.1.0"

_HOMES = {
    "EngineConfig": "engine",
    "Example": "data",
    "GenerateConfig": "inference.config",
    "Model": "inference.model",
    "Prefix": "prefix.prefix",
    "PrefixError": "errors",
    "PrefixWarning": "errors",
    "ServeConfig": "server.settings",
    "TorchEngine": "engine",
    "TrainConfig": "training.config",
    "evaluate": "evaluation.evaluate",
    "generate": "inference.generate",
    "load": "inference.model",
    "load_backbone": "backbone.load",
    "load_prefix": "backbone.prefixes",
    "save_prefix": "prefix.prefix",
    "train": "training.train",
}

if TYPE_CHECKING:
    from prefixtune.backbone.load import load_backbone
    from prefixtune.backbone.prefixes import load_prefix
    from prefixtune.data import Example
    from prefixtune.engine import EngineConfig, TorchEngine
    from prefixtune.errors import PrefixError, PrefixWarning
    from prefixtune.evaluation.evaluate import evaluate
    from prefixtune.inference.config import GenerateConfig
    from prefixtune.inference.generate import generate
    from prefixtune.inference.model import Model, load
    from prefixtune.prefix.prefix import Prefix, save_prefix
    from prefixtune.server.settings import ServeConfig
    from prefixtune.training.config import TrainConfig
    from prefixtune.training.train import train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prefixtune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"prefixtune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
