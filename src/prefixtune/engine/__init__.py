"""Many requests over one frozen model, each with its own prefix, in one running batch.

Requests join and leave between steps. The nouns: a *request* is what somebody asks for; a *sequence* is one text that
is being written for it; a *slot* holds a sequence's keys and values; the *scheduler* says who computes what in the next
step; the *runner* computes it; the *store* holds prefixes by name; the *worker* runs an engine in a thread of its own.
Knows nothing of HTTP.
"""

from prefixtune.engine.engine import Engine, EngineConfig, RunningSequence
from prefixtune.engine.request import EngineFull, Request, SamplingParams, SequenceOutput, Token
from prefixtune.engine.worker import EngineWorker, Snapshot

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineFull",
    "EngineWorker",
    "Request",
    "RunningSequence",
    "SamplingParams",
    "SequenceOutput",
    "Snapshot",
    "Token",
]
