"""How much the engine does at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefixtune.errors import ConfigError
from prefixtune.utils.options import check_names, fit_types

__all__ = ["EngineConfig"]


_HINT = "leave the option out to use its default."
_MINIMA = {"num_slots": 1, "max_length": 0, "prefill_tokens": 1, "max_waiting": 1}


@dataclass(frozen=True)
class EngineConfig:
    """How much the engine does at once.

    Attributes:
        num_slots: Texts that run at once.
        max_length: Most positions of a text, prefix included (encoder-decoder: of the source and of the output each,
            without the prefix); 0: the backbone's limit.
        prefill_tokens: Most prompt tokens computed in a step while other texts are being generated: bounds how long a
            long prompt delays them. If none is, four times as many.
        max_waiting: Texts that may wait for a slot; a request beyond them is refused.
        prepack: On a CPU, keep a copy of a bf16 backbone's matrices in the layout its products are fastest with (see
            `prepack`).

    Raises:
        ConfigError: A value is out of range.
    """

    num_slots: int = 32
    max_length: int = 0
    prefill_tokens: int = 256
    max_waiting: int = 10_000
    prepack: bool = True

    def __new__(cls, *_: Any, **values: Any) -> EngineConfig:
        """Refuse unknown names, with the nearest known one."""
        check_names(cls, values, "EngineConfig has no such option", _HINT)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        wrong_types = fit_types(self)
        faults = [*wrong_types.values()] + [
            f"{name} is {getattr(self, name)}, but must be at least {minimum}"
            for name, minimum in _MINIMA.items()
            if name not in wrong_types and getattr(self, name) < minimum
        ]
        if faults:
            raise ConfigError("; ".join(faults) + ".", hint=_HINT)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EngineConfig:
        """From keys and values.

        Raises:
            ConfigError: An unknown key, with the nearest known one, or a value that is not allowed.
        """
        return cls(**values)
