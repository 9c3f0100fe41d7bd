"""Train, evaluate and serve prefixes for frozen language models (prefix-tuning, Li & Liang 2021).

The few names that most programs need; everything else is in the modules. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Engine": "engine",
    "EngineConfig": "engine",
    "Example": "tasks",
    "GenerateConfig": "generation",
    "Prefix": "prefix",
    "PrefixError": "errors",
    "ServeConfig": "server.config",
    "StudyConfig": "study.config",
    "TrainConfig": "config",
    "evaluate": "evaluation",
    "generate": "generation",
    "load_backbone": "backbone",
    "load_prefix": "checkpoint",
    "save_prefix": "checkpoint",
    "train": "training",
}

__all__ = [
    "Engine",
    "EngineConfig",
    "Example",
    "GenerateConfig",
    "Prefix",
    "PrefixError",
    "ServeConfig",
    "StudyConfig",
    "TrainConfig",
    "__version__",
    "evaluate",
    "generate",
    "load_backbone",
    "load_prefix",
    "save_prefix",
    "train",
]

if TYPE_CHECKING:
    from prefixtune.backbone import load_backbone
    from prefixtune.checkpoint import load_prefix, save_prefix
    from prefixtune.config import TrainConfig
    from prefixtune.engine import Engine, EngineConfig
    from prefixtune.errors import PrefixError
    from prefixtune.evaluation import evaluate
    from prefixtune.generation import GenerateConfig, generate
    from prefixtune.prefix import Prefix
    from prefixtune.server.config import ServeConfig
    from prefixtune.study.config import StudyConfig
    from prefixtune.tasks import Example
    from prefixtune.training import train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prefixtune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"prefixtune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
