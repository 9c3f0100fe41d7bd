"""Continuous batching: many requests over one frozen model, each with its own prefix, in one running batch.

A *request* asks for one or several *sequences*, which join and leave the batch between steps. A *slot* is a place in
the batch, and the *KV cache* the memory for keys and values. Each step, the *scheduler* chooses what to compute, the
*model runner* computes it, and the *sampler* picks the next tokens. `base` says what every engine offers. Knows no HTTP
and no files.
"""

from prefixtune.engine.base import Snapshot
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import TorchEngine
from prefixtune.engine.request import EngineFull, Request, SamplingParams, SequenceOutput, Token
from prefixtune.errors import ContextLengthError

__all__ = [
    "ContextLengthError",
    "EngineConfig",
    "EngineFull",
    "Request",
    "SamplingParams",
    "SequenceOutput",
    "Snapshot",
    "Token",
    "TorchEngine",
]
