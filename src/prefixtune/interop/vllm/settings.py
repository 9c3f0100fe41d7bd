"""The connector's options, as vLLM's `kv_connector_extra_config` holds them.

The server, the scheduler and the workers all read them from vLLM's configuration, so they agree without talking to each
other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from prefixtune.errors import ConfigError, short_repr
from prefixtune.prefix.chat_format import allow_named
from prefixtune.prefix.compose import MAX_PARTS
from prefixtune.utils.config import Config

__all__ = ["SECRET_VARIABLE", "Settings"]


SECRET_VARIABLE = "PREFIXTUNE_VLLM_SECRET"
"""The environment variable of a secret that several processes share."""


class Settings(Config):
    """The checked options."""

    hint = "see docs/serving.md."

    prefixes: Path = Field(description="The folder of prefixes.")
    secret: bytes = Field(repr=False, description="Signs references to prefixes, so that a client cannot forge one.")
    cache_mib: int = Field(1024, ge=1, description="Most memory for a worker's loaded prefixes, in MiB.")
    max_joined_prefixes: int = Field(
        8, ge=1, le=MAX_PARTS, description="Most prefixes that one request may join; 1: none."
    )
    chat_templates: tuple[str, ...] = Field(
        (), description="Files with the chat templates that prefixes may run besides the model's own."
    )
    allow_other_backbone: bool = Field(False, description="Accept prefixes of a related model with the same shapes.")
    max_body_mib: int = Field(16, ge=1, description="Longest request body that is read, in MiB.")
    raw_completions: bool = Field(
        False, description="Send a completion's prompt to a prefix as it is, without its text format."
    )
    earlier_messages: Literal["refuse", "drop"] = Field(
        "refuse",
        description="`refuse` a chat with several messages for a prefix that reads one text, or `drop` all but the "
        "last.",
    )
    on_too_long: Literal["", "cut", "error"] = Field(
        "", description="`cut` a source that is too long, or refuse it (`error`); empty: as in the prefix's training."
    )
    training_socket: str = Field(
        "", description="Path of the training server's Unix socket, which gets requests about training; empty: none."
    )

    @classmethod
    def from_vllm(cls, config: Any) -> Settings:
        """Read them from vLLM's `VllmConfig`.

        Raises:
            ConfigError: An option is unknown, missing or wrong, or vLLM would recompute a prefix that cannot be loaded.
        """
        transfer = config.kv_transfer_config
        options: Mapping[str, Any] = transfer.kv_connector_extra_config
        secret = options.get("secret") or os.environ.get(SECRET_VARIABLE) or ""
        faults = []
        if transfer.kv_load_failure_policy != "fail":
            # Placeholders would run as ordinary tokens.
            faults.append("kv_load_failure_policy must be 'fail', or a prefix that cannot be loaded would go unnoticed")
        if not secret and _has_several_processes(config.parallel_config):
            # Each process would draw its own secret, and prefixes would be ignored.
            faults.append(f"several servers or engines need one secret: set it here, or {SECRET_VARIABLE} for all")
        # vLLM draws a new engine id at every start.
        values = {**options, "secret": str(secret or transfer.engine_id).encode()}
        if faults:
            raise ConfigError(f"kv_transfer_config: {'; '.join(faults)}.", hint=cls.hint)
        settings = cls(**values)
        for file in settings.chat_templates:
            allow_named(file, ())
        return settings

    @field_validator("prefixes", mode="before")
    @classmethod
    def _check_folder(cls, folder: Any) -> Path:
        if not isinstance(folder, str) or not Path(folder).is_dir():
            raise ValueError(f"is {short_repr(folder)}, but must be an existing folder")
        return Path(folder).absolute()

    @property
    def cache_bytes(self) -> int:
        """Most memory for a worker's loaded prefixes."""
        return self.cache_mib * 2**20

    @property
    def max_body_bytes(self) -> int:
        """Longest request body that is read."""
        return self.max_body_mib * 2**20


def _has_several_processes(parallel_config: Any) -> bool:
    return bool(parallel_config.data_parallel_size > 1 or getattr(parallel_config, "_api_process_count", 1) > 1)
