"""What the engine takes and returns: requests with their sampling parameters, and outputs."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import PrefixError, RequestError, short_repr
from prefixtune.prefix.prefix import Prefix
from prefixtune.sampling.config import SamplingConfig
from prefixtune.sampling.detokenizer import Detokenizer
from prefixtune.sampling.grammar import Grammar
from prefixtune.utils.config import CommaList, option_group

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]
"""Why a sequence ended: the end token or a stop string; `max_new_tokens`; its request was cancelled, or its deadline
passed; an error."""

_sampling = option_group("decoding")
_request_numbers = itertools.count(1)
_CONTEXT_TOKENS = 4
"""Tokens of a prompt with which the first generated tokens are decoded."""


class EngineFull(RequestError):
    """The engine accepts no request now; the same one may be accepted later."""


class SamplingParams(SamplingConfig):
    """How the tokens of a request are sampled.

    Raises:
        RequestError: Values that are not allowed; all faults at once.
    """

    hint: ClassVar[str] = "leave the value out for its default; `help(SamplingParams)` explains every one."
    error_class: ClassVar[type[PrefixError]] = RequestError

    max_new_tokens: int = _sampling(
        100, ge=0, description="most tokens to generate; 0: none, for the log-probabilities of the prompt"
    )
    banned: CommaList[Annotated[int, Field(ge=0)]] = _sampling((), description="tokens that are never sampled")
    end_ids: CommaList[Annotated[int, Field(ge=0)]] = _sampling(
        (), description="tokens that end a text, besides the tokenizer's end token"
    )
    logit_bias: Annotated[
        dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)
    ] = _sampling(default_factory=dict, description="added to the scores of tokens, by token id; 1024 at most")
    logprobs: int | None = _sampling(
        None,
        ge=0,
        le=20,
        description="return log-probabilities: of each token, and of that many of the likeliest ones; None: none",
    )
    prompt_logprobs: int | None = _sampling(
        None, ge=0, le=20, description="the same for the tokens of the prompt (decoder-only models)"
    )


@dataclass(frozen=True, eq=False)
class Request:
    """One or several texts to generate after a prompt, with one prefix.

    Attributes:
        prompt: Token ids to continue (encoder-decoder: for the encoder to read).
        prefix: In front of the prompt; None: the bare model.
        sampling: How tokens are sampled: a `SamplingParams`, or a dict of its fields.
        n: How many texts; each is sampled from its own seed.
        tenant: Who sends it; tenants share the slots fairly.
        prefix_name: The prefix's name, shown in the status of the running batch.
        verbatim: Keep the white space around a text.
        grammar: What a text must follow, by `compile_json_schema`; it ends where nothing may follow.
        id: Its id; generated if none is given.

    Raises:
        RequestError: The prompt is empty or holds no token ids, n is below 1, or another value is of a wrong type.
    """

    prompt: tuple[int, ...]
    prefix: Prefix | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    tenant: str = ""
    prefix_name: str = ""
    verbatim: bool = False
    grammar: Grammar | None = None
    id: str = field(default_factory=lambda: f"request-{next(_request_numbers)}")

    def __post_init__(self) -> None:
        if isinstance(self.sampling, Mapping):
            object.__setattr__(self, "sampling", SamplingParams(**self.sampling))
        with contextlib.suppress(TypeError):
            object.__setattr__(self, "prompt", tuple(map(operator.index, self.prompt)))
        for name, is_right, needed in (
            ("prompt", isinstance(self.prompt, tuple) and self.prompt, "token ids: `backbone.encode(text)`"),
            ("prefix", isinstance(self.prefix, Prefix | None), "a Prefix, as load_prefix(path, backbone) gives it"),
            ("sampling", isinstance(self.sampling, SamplingParams), "a SamplingParams or a dict"),
            ("tenant", isinstance(self.tenant, str), "a text"),
            ("grammar", isinstance(self.grammar, Grammar | None), "what compile_json_schema gives"),
            ("n", type(self.n) is int and self.n >= 1, "a whole number of at least 1"),
        ):
            if not is_right:
                raise RequestError(f"{name} is {short_repr(getattr(self, name))}.", hint=f"it must be {needed}.")

    @property
    def prefix_length(self) -> int:
        """P, of the decoder; 0 without a prefix."""
        return 0 if self.prefix is None else self.prefix.length()

    def detokenizer(self, backbone: Backbone) -> Detokenizer:
        """The text of one of its sequences; an encoder-decoder's does not go on from the prompt."""
        context = () if backbone.kind == "encoder-decoder" else self.prompt[-_CONTEXT_TOKENS:]
        return Detokenizer(backbone.decode, self.sampling.stop, verbatim=self.verbatim, context=context)


@dataclass(frozen=True)
class Token:
    """One token of a text or of a prompt.

    Attributes:
        id: Its token id.
        logprob: Its log-probability under the model, before temperature; None: not requested, or there is none, as of
            a prompt's first token.
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
        engine_crashed: The engine has failed, with all requests; it computes nothing any more.
        refused: The request is at fault: its grammar became too complex. `error` is then for its sender.
        prompt_tokens: In the first output, if `prompt_logprobs` were requested: the prompt's tokens.
    """

    request_id: str
    index: int
    tokens: tuple[Token, ...]
    text: str
    finish_reason: FinishReason | None = None
    error: str = ""
    engine_crashed: bool = False
    refused: bool = False
    prompt_tokens: tuple[Token, ...] = ()


def join_outputs(outputs: Sequence[SequenceOutput]) -> SequenceOutput:
    """All outputs of one sequence, in order, as one."""
    last = outputs[-1]
    tokens = tuple(token for output in outputs for token in output.tokens)
    text = "".join(output.text for output in outputs)
    prompt_tokens = next((output.prompt_tokens for output in outputs if output.prompt_tokens), ())
    return replace(last, tokens=tokens, text=text, prompt_tokens=prompt_tokens)
