"""What every engine offers: requests in, pieces of text out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.request import Request, SequenceOutput
from prefixtune.engine.sequence import RunningSequence

__all__ = ["Engine", "Receive", "Snapshot"]


Receive = Callable[[SequenceOutput], None]
"""Takes a request's outputs, in order, in a thread of the engine."""


@dataclass(frozen=True)
class Snapshot:
    """What an engine is doing now, and its counters.

    Attributes:
        running: The sequences that have a slot, by slot.
        waiting: How many sequences wait for a slot.
        steps: Steps computed so far.
        texts: Sequences computed in them, one after the other; divided by steps: the mean batch.
        tokens: Tokens generated so far.
    """

    running: tuple[RunningSequence, ...]
    waiting: int
    steps: int
    texts: int
    tokens: int


class Engine(Protocol):
    """Generates text for many requests at once. May be used from any thread.

    A request is token ids, a prefix, sampling parameters and a tenant. Who uses an engine knows nothing else of it.
    """

    on_failure: Callable[[], None]
    """Called, in a thread of the engine, after it has failed and all requests know it."""

    @property
    def lacks(self) -> Mapping[str, Any]:
        """Sampling parameters that it refuses -> the value that asks for nothing, which it takes."""

    @property
    def backbone(self) -> Backbone:
        """The model, or its tokenizer and shapes."""

    @property
    def max_length(self) -> int:
        """Most positions of a text."""

    @property
    def vocab_size(self) -> int:
        """Tokens that the model can read."""

    @property
    def failed(self) -> bool:
        """Whether the engine has failed for good."""

    @property
    def healthy(self) -> bool:
        """Whether requests are computed now."""

    def submit(self, request: Request, receive: Receive, deadline: float | None = None) -> None:
        """Submit a request.

        Args:
            request: The request.
            receive: Called with all its outputs. A slow one delays the outputs of other requests; if it raises, the
                request is cancelled.
            deadline: Seconds from now until the request must be done; then its sequences end with `timeout`.

        Raises:
            EngineFull: Too many texts wait, or the engine is closing or has failed.
            RequestError: The engine refuses it.
            BackboneError: Its prefix does not fit the backbone.
        """

    def available_tokens(self, prompt_tokens: int, prefix_length: int) -> int:
        """Most tokens that can be generated after a prompt; 0 or less: the prompt itself is too long."""

    def check_length(self, prompt_tokens: int, prefix_length: int, new_tokens: int) -> None:
        """Refuse a request that needs more positions than a text may have.

        Raises:
            ContextLengthError: It does.
        """

    def cancel(self, request_id: str) -> None:
        """Cancel a request; its sequences end with `cancelled`. Unknown ids are ignored."""

    def snapshot(self) -> Snapshot:
        """What the engine is doing now, and its counters."""

    def close(self, timeout: float = 10.0) -> None:
        """Cancel what still runs, and stop within so many seconds."""
