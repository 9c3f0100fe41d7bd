"""The connector's options, as vLLM's `kv_connector_extra_config` holds them.

The server, the scheduler and the workers all read them from vLLM's configuration, so they agree without talking to each
other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.errors import ConfigError

__all__ = ["SECRET_VARIABLE", "Settings"]


SECRET_VARIABLE = "PREFIXTUNE_VLLM_SECRET"
"""The environment variable of a secret that several processes share."""

_MIB_DEFAULTS = {"cache_mib": 1024, "max_body_mib": 16}
_SWITCHES = ("allow_other_backbone", "raw_completions")
_CHOICES = {"earlier_messages": ("refuse", "drop"), "on_too_long": ("", "cut", "error")}
_OPTIONS = ("prefixes", "secret", *_MIB_DEFAULTS, *_SWITCHES, *_CHOICES)


@dataclass(frozen=True)
class Settings:
    """The checked options.

    Attributes:
        folder: The folder of prefixes.
        secret: Signs references to prefixes, so that a client cannot forge one.
        cache_bytes: Most memory for a worker's loaded prefixes.
        allow_other_backbone: Accept prefixes of a related model with the same shapes.
        max_body_bytes: Longest request body that is read.
        raw_completions: Send a completion's prompt to a prefix as it is, without its text format.
        earlier_messages: `refuse` a chat with several messages for a prefix that reads one text, or `drop` all but the
            last.
        on_too_long: `cut` a source that is too long, or refuse it (`error`); empty: as in the prefix's training.
    """

    folder: Path
    secret: bytes
    cache_bytes: int = 2**30
    allow_other_backbone: bool = False
    max_body_bytes: int = 2**24
    raw_completions: bool = False
    earlier_messages: str = "refuse"
    on_too_long: str = ""

    @classmethod
    def from_vllm(cls, config: Any) -> Settings:
        """Read them from vLLM's `VllmConfig`.

        Raises:
            ConfigError: An option is unknown, missing or wrong, or vLLM would recompute a prefix that cannot be loaded.
        """
        transfer = config.kv_transfer_config
        extra: Mapping[str, Any] = transfer.kv_connector_extra_config
        secret = extra.get("secret") or os.environ.get(SECRET_VARIABLE) or ""
        faults = _find_faults(extra)
        if transfer.kv_load_failure_policy != "fail":
            # Placeholders would run as ordinary tokens.
            faults.append("kv_load_failure_policy must be 'fail', or a prefix that cannot be loaded would go unnoticed")
        if not secret and _has_several_processes(config.parallel_config):
            # Each process would draw its own secret, and prefixes would be ignored.
            faults.append(f"several servers or engines need one secret: set it here, or {SECRET_VARIABLE} for all")
        if faults:
            raise ConfigError(f"kv_transfer_config: {'; '.join(faults)}.", hint="see docs/serving.md.")
        mib = {name: extra.get(name, default) for name, default in _MIB_DEFAULTS.items()}
        return cls(
            Path(str(extra["prefixes"])).absolute(),
            # vLLM draws a new engine id at every start.
            str(secret or transfer.engine_id).encode(),
            cache_bytes=mib["cache_mib"] * 2**20,
            max_body_bytes=mib["max_body_mib"] * 2**20,
            **{name: extra[name] for name in (*_SWITCHES, *_CHOICES) if name in extra},
        )


def _find_faults(extra: Mapping[str, Any]) -> list[str]:
    """What is wrong with the options, in words."""
    faults = [f"unknown option {name!r} (known: {', '.join(_OPTIONS)})" for name in extra if name not in _OPTIONS]
    folder = extra.get("prefixes")
    if not isinstance(folder, str) or not Path(folder).is_dir():
        faults.append(f"prefixes is {folder!r}, but must be an existing folder")
    for name, default in _MIB_DEFAULTS.items():
        value = extra.get(name, default)
        if type(value) is not int or value < 1:
            faults.append(f"{name} is {value!r}, but must be a whole number of MiB")
    for name in _SWITCHES:
        if not isinstance(extra.get(name, False), bool):
            faults.append(f"{name} is {extra[name]!r}, but must be true or false")
    for name, choices in _CHOICES.items():
        if extra.get(name, choices[0]) not in choices:
            faults.append(f"{name} is {extra[name]!r}, but must be one of {', '.join(filter(None, choices))}")
    return faults


def _has_several_processes(parallel_config: Any) -> bool:
    return bool(parallel_config.data_parallel_size > 1 or getattr(parallel_config, "_api_process_count", 1) > 1)
