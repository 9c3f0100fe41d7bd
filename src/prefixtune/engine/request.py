"""What the engine takes and returns: requests with their sampling parameters, and outputs."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from prefixtune.backbone.prefixes import as_prefix
from prefixtune.errors import ConfigError, RequestError, describe_value
from prefixtune.prefix.prefix import Prefix
from prefixtune.utils.options import check_names, fit_types

__all__ = [
    "ContextLengthError",
    "EngineFull",
    "FinishReason",
    "Request",
    "SamplingParams",
    "SequenceOutput",
    "Token",
    "join_outputs",
]


FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]
"""Why a sequence ended: the end token or a stop string; `max_new_tokens`; its request was cancelled, or its deadline
passed; an error."""

_request_numbers = itertools.count(1)


class EngineFull(RequestError):
    """The engine accepts no request now; the same one may be accepted later."""


class ContextLengthError(RequestError):
    """A request needs more positions than a slot has."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are sampled.

    Attributes:
        max_new_tokens: Most tokens to generate.
        min_new_tokens: Fewest before the end token may come; with `max_new_tokens`: exactly so many.
        temperature: 0: greedy; above: sample.
        top_k: Sample from the k likeliest; 0: all.
        top_p: Sample from the likeliest that together reach p.
        seed: Of sampling; None: not reproducible.
        stop: Strings that end a text, and are left out of it.
        repetition_penalty: Above 1 discourages tokens that the prompt or the text already has.
        logprobs: Return log-probabilities: of each token, and of that many of the likeliest ones; None: return none.
        banned: Tokens that are never sampled.

    Raises:
        RequestError: Values that are not allowed; all faults at once.
    """

    max_new_tokens: int = 100
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    banned: tuple[int, ...] = ()

    def __new__(cls, *_: Any, **values: Any) -> SamplingParams:
        """Refuse unknown names, with the nearest known one."""
        try:
            check_names(cls, values, "there is no such sampling option", "leave it out.")
        except ConfigError as error:
            raise RequestError(error.message, hint=error.hint) from None
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if wrong := fit_types(self):
            raise RequestError("; ".join(wrong.values()) + ".", hint="leave the option out to use its default.")
        rules = [
            (self.max_new_tokens >= 1, "max_new_tokens", "at least 1"),
            (0 <= self.min_new_tokens <= self.max_new_tokens, "min_new_tokens", "between 0 and max_new_tokens"),
            (math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "0 (greedy) or above"),
            (self.top_k >= 0, "top_k", "0 (all) or above"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (all(self.stop), "stop", "strings that are not empty"),
            (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0, "repetition_penalty", "above 0"),
            (all(token >= 0 for token in self.banned), "banned", "token ids"),
            (self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs", "between 0 and 20"),
        ]
        faults = [
            f"{name} is {getattr(self, name)!r}, but must be {allowed}" for good, name, allowed in rules if not good
        ]
        if faults:
            raise RequestError("; ".join(faults) + ".", hint="leave the option out to use its default.")


@dataclass(frozen=True, eq=False)
class Request:
    """One or several texts to generate after a prompt, with one prefix.

    Attributes:
        prompt: Token ids to continue (encoder-decoder: for the encoder to read).
        prefix: In front of the prompt: a `Prefix`, or a path, which is read; None: the bare model.
        sampling: How tokens are sampled: a `SamplingParams`, or a dict of its fields.
        n: How many texts; each is sampled from its own seed.
        tenant: Who sends it; tenants share the slots fairly.
        prefix_name: The prefix's name, shown in the status of the running batch.
        verbatim: Keep the white space around a text.
        id: Its id; generated if none is given.

    Raises:
        RequestError: The prompt is empty or holds no token ids, n is below 1, or `sampling` is something else.
    """

    prompt: tuple[int, ...]
    prefix: Prefix | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    tenant: str = ""
    prefix_name: str = ""
    verbatim: bool = False
    id: str = field(default_factory=lambda: f"request-{next(_request_numbers)}")

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "prompt", tuple(map(operator.index, self.prompt)))
        except TypeError:
            raise RequestError(
                f"the prompt is {describe_value(self.prompt)}, but must be a list of token ids.",
                hint="encode a text with the backbone: `backbone.encode(text)`.",
            ) from None
        object.__setattr__(self, "prefix", as_prefix(self.prefix))
        if isinstance(self.sampling, Mapping):
            object.__setattr__(self, "sampling", SamplingParams(**self.sampling))
        if not isinstance(self.sampling, SamplingParams):
            raise RequestError(
                f"sampling is {describe_value(self.sampling)}, but must be a SamplingParams or a dict.",
                hint="write SamplingParams(max_new_tokens=20), for example.",
            )
        if not self.prompt:
            raise RequestError("the prompt has no token.", hint="give some text.")
        if self.n < 1:
            raise RequestError(f"n is {self.n}, but must be at least 1.", hint="leave it out for one text.")

    @property
    def prefix_length(self) -> int:
        """P, of the decoder; 0 without a prefix."""
        return 0 if self.prefix is None else self.prefix.length()


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
        id: Its token id.
        logprob: Its log-probability under the model, before temperature; None: not requested.
        top_logprobs: The likeliest tokens at its position and their log-probabilities, the best first.
    """

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class SequenceOutput:
    """What a step added to one sequence of a request.

    Attributes:
        request_id: The request's id.
        index: Which of its n sequences.
        tokens: The new tokens; the end token is not among them.
        text: The new text, as far as later tokens can no longer change it.
        finish_reason: None: the sequence goes on.
        error: What went wrong, if `finish_reason` is `error`.
        engine_crashed: The whole engine failed, not this request: it may be sent again.
    """

    request_id: str
    index: int
    tokens: tuple[Token, ...]
    text: str
    finish_reason: FinishReason | None = None
    error: str = ""
    engine_crashed: bool = False


def join_outputs(outputs: Sequence[SequenceOutput]) -> SequenceOutput:
    """All outputs of one sequence, in order, as one."""
    last = outputs[-1]
    tokens = tuple(token for output in outputs for token in output.tokens)
    text = "".join(output.text for output in outputs)
    return replace(last, tokens=tokens, text=text)
