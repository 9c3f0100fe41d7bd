"""How much the engine does at once."""

from __future__ import annotations

from prefixtune.utils.config import Config, option_group

MAX_SLOTS = 65_536
"""Texts that run at once at most."""
_engine = option_group("engine")


class EngineConfig(Config):
    """How much the engine does at once.

    Raises:
        ConfigError: An unknown option, or a value out of range; all faults at once.
    """

    num_slots: int = _engine(32, ge=1, le=MAX_SLOTS, description="texts that run at once")
    max_length: int = _engine(
        0,
        ge=0,
        description="most positions of a text, prefix included (encoder-decoder: of the source and of the output each, "
        "without the prefix); 0: the backbone's limit, with llama.cpp 4,096 at most",
    )
    prefill_tokens: int = _engine(
        0,
        ge=0,
        description="most prompt tokens computed in a step while other texts are being generated: bounds how long a "
        "long prompt delays them; if none is, four times as many; 0: 256 on a CPU, 2048 on a GPU",
    )
    kv_cache_mib: int = _engine(
        0,
        ge=0,
        description="memory for keys and values of all running texts, in MiB; a text that finds no room waits; 0: half "
        "of what is free on a CPU, 0.8 of it on a GPU",
    )
