"""What every engine offers: requests in, pieces of text out."""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.engine.request import Request, SequenceOutput
from prefixtune.errors import ContextLengthError, RequestError

_log = logging.getLogger(__name__)
CLOSE_SECONDS = 10.0
"""Most that a step or slow callbacks may still take when an engine is closed."""
Receive = Callable[[SequenceOutput], None]
"""Takes a request's outputs, in order, in a thread of the engine."""


@dataclass(frozen=True)
class RunningSequence:
    """A snapshot of a sequence that has a slot.

    Attributes:
        slot: Its slot.
        request: The request that it is of.
        new_tokens: Tokens generated so far.
    """

    slot: int
    request: Request
    new_tokens: int


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


class Limits:
    """What a request may ask of a model: the checks that all engines share.

    Attributes:
        backbone: The model, or its tokenizer and shapes.
        max_length: Most positions of a text.
        lacks: Sampling parameters of which it takes only the default, which asks for nothing.
        remedy: What to do if a text is too long.
    """

    backbone: Backbone
    max_length: int
    lacks: Sequence[str] = ()
    remedy = "shorten the text or lower max_new_tokens."

    def available_tokens(self, prompt_tokens: int, prefix_length: int) -> int:
        """Most tokens that can be generated after a prompt; 0 or less: the prompt itself is too long."""
        # An encoder-decoder's start token takes the position that the last token does not.
        if self.backbone.kind == "encoder-decoder":
            return self.max_length if prompt_tokens <= self.max_length else 0
        # The last token takes no position.
        return self.max_length - prefix_length - prompt_tokens + 1

    def check_length(self, prompt_tokens: int, prefix_length: int, new_tokens: int) -> None:
        """Refuse a request that needs more positions than a text may have.

        Raises:
            ContextLengthError: It does.
        """
        # Without new tokens the prompt's last one takes a position all the same.
        if max(1, new_tokens) > self.available_tokens(prompt_tokens, prefix_length):
            side = " on either side" if self.backbone.kind == "encoder-decoder" else ""
            needs = f"{prefix_length} (prefix), {prompt_tokens} (text) and {new_tokens} (new) positions"
            limit = f"the limit is {self.max_length}{side}"
            raise ContextLengthError(f"the request needs {needs}, but {limit}.", hint=self.remedy)

    def check(self, request: Request) -> None:
        """Refuse what the engine cannot run.

        Raises:
            RequestError: The engine refuses it.
            ContextLengthError: It needs more positions than a text may have.
            BackboneError: Its prefix does not fit the backbone, or was trained for other weights.
        """
        sampling = request.sampling
        for name in self.lacks:
            if getattr(sampling, name) != sampling.default(name):
                what = f"{self.backbone.name!r} has no {name} in this engine."
                raise RequestError(what, hint="leave it out, or use another engine.")
        if request.prefix is not None:
            load_prefix(request.prefix, self.backbone)
        self.check_length(len(request.prompt), request.prefix_length, sampling.max_new_tokens)
        tokens, size = (*request.prompt, *sampling.banned, *sampling.logit_bias), self.backbone.num_embeddings
        unknown = [token for token in tokens if not 0 <= token < size]
        if unknown:
            what = f"there is no token {unknown[0]}: the model has {size:,}."
            raise RequestError(what, hint="encode the text with the backbone's own tokenizer.")


class Engine(Limits, abc.ABC):
    """Generates text for many requests at once. May be used from any thread.

    A request is token ids, a prefix, sampling parameters and a tenant. Who uses an engine knows nothing else of it.

    Attributes:
        name: What computes, for people and for the settings of an evaluation.
        failed: Whether it has failed for good.
        on_failure: Called, in a thread of the engine, after it has failed and all requests know it.
    """

    name: str
    failed = False
    on_failure: Callable[[], None] = staticmethod(lambda: None)

    @property
    @abc.abstractmethod
    def healthy(self) -> bool:
        """Whether requests are computed now."""

    @property
    @abc.abstractmethod
    def num_unfinished(self) -> int:
        """Requests that have not ended."""

    @abc.abstractmethod
    def submit(self, request: Request, receive: Receive, deadline: float | None = None) -> None:
        """Submit a request.

        Args:
            request: The request.
            receive: Called with all its outputs. A slow one delays the outputs of other requests; if it raises, the
                request is cancelled.
            deadline: Seconds from now until the request must be done; then its sequences end with `timeout`.

        Raises:
            EngineFull: The engine is closing or has failed.
            PrefixError: As `check`.
        """

    def submit_all(self, requests: Iterable[Request], receive: Receive) -> None:
        """Submit several requests, as `submit`; where the engine can, none is computed before all are there."""
        for request in requests:
            self.submit(request, receive)

    @abc.abstractmethod
    def cancel(self, request_id: str) -> None:
        """Cancel a request; its sequences end with `cancelled`. Unknown ids are ignored."""

    @abc.abstractmethod
    def snapshot(self) -> Snapshot:
        """What the engine is doing now, and its counters."""

    @abc.abstractmethod
    def close(self) -> None:
        """Cancel what still runs, and stop within `CLOSE_SECONDS`."""

    def _give(self, caller: Any, output: SequenceOutput) -> None:
        """Give an output to `caller.receive`; one that raises gets no more, and its request is cancelled."""
        try:
            caller.receive(output)
        except BaseException:
            _log.exception("the callback of request %s failed; the request is cancelled.", output.request_id)
            caller.receive = lambda _: None
            self.cancel(output.request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()
