"""Continuous batching: many requests over one frozen model, each with its own prefix, in one running batch.

A *request* asks for one or several *sequences*, which join and leave the batch between steps. A *slot* is a place in
the batch, and the *KV cache* the memory for keys and values. Each step, the *scheduler* chooses what to compute, the
*model runner* computes it, and the *sampler* picks the next tokens. The *worker* runs an engine in a thread of its own;
`base` says what every engine offers. Knows no HTTP and no files.
"""

from prefixtune.engine.base import Snapshot
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import Engine
from prefixtune.engine.request import EngineFull, Request, SamplingParams, SequenceOutput, Token
from prefixtune.engine.worker import EngineWorker
from prefixtune.errors import ContextLengthError

__all__ = [
    "ContextLengthError",
    "Engine",
    "EngineConfig",
    "EngineFull",
    "EngineWorker",
    "Request",
    "SamplingParams",
    "SequenceOutput",
    "Snapshot",
    "Token",
]
