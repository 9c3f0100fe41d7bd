"""The bodies of requests for texts: OpenAI's, and what those of `/v1/tasks` and `/classify` share with them.

An unknown field is refused. Null is the same as no field. Of OpenAI's fields, those that do not concern the output are
ignored; those that would change it and are not supported are refused by name, unless their value changes nothing.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prefixtune.engine.request import SamplingParams
from prefixtune.server.responses import bad_request
from prefixtune.server.settings import ServeConfig

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True)]
Ids = Annotated[list[int], Field(min_length=1, fail_fast=True)]
_StopString = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00]*$")]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Biases = Annotated[dict[Annotated[int, Field(ge=0)], _Bias], Field(max_length=1024)]
_LIMITED = ("max_tokens", "max_completion_tokens", "min_tokens")
_AS_THEY_ARE = ("temperature", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
_SMALLEST_TOP_P = 1e-9
"""What a `top_p` of 0 means: the likeliest token alone reaches it."""
_IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "parallel_tool_calls"),
}
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tools", "functions"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("audio", "prediction", "web_search_options"), ()),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "reasoning_effort": ("none", "medium"),
    "verbosity": ("medium",),
}
"""Values of such a field that, besides null, change nothing."""
_MAX_MESSAGES, _MOST_FIELDS = 2048, 1000
"""Of a chat; of a body, as pydantic would collect a fault for each field that is unknown."""


class Part(BaseModel):
    """An object within a body: null is the same as no field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None or name not in cls.model_fields}


class Body(Part):
    """What all bodies share: they can be written as JSON again."""

    @model_validator(mode="before")
    @classmethod
    def _check_text(cls, body: Any) -> Any:
        if isinstance(body, dict) and len(body) > _MOST_FIELDS:
            raise bad_request("the body has very many fields.", code="unknown_field")
        try:
            # What is no JSON at all is refused by its type.
            json.dumps(body, ensure_ascii=False, allow_nan=False, default=repr).encode("utf-8")
        except (ValueError, RecursionError):
            # JSON may have half a surrogate pair, which no tokenizer takes, and Python reads NaN and 1e999.
            raise ValueError("the body has invalid text, numbers that are not finite, or too deep lists") from None
        return body


class GenerationRequest(Body):
    """What all requests for texts share."""

    max_tokens: int | None = Field(None, ge=1, description="Most new tokens; by default the task's or the server's.")
    min_tokens: int = Field(0, ge=0, description="Fewest new tokens; at most max_tokens.")
    temperature: float = Field(1.0, ge=0, le=2, description="0: the likeliest token each time.")
    top_p: float = Field(1.0, ge=0, le=1, description="0: the likeliest token each time.")
    top_k: int = Field(0, ge=-1, le=1_000_000, description="0 or -1: all tokens.")
    min_p: float = Field(
        0.0, ge=0, le=1, description="No token less likely than this share of the likeliest one's probability."
    )
    # Scores divided by much less would overflow.
    repetition_penalty: float = Field(1.0, ge=0.01, le=10, description="Of tokens in the prompt and in the text.")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Of tokens that were generated.")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="Of tokens, as often as they were generated.")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: _StopString | Annotated[list[_StopString], Field(max_length=16)] | None = Field(
        None, description="Strings that end a text; they are not part of it.", examples=[["\n\n"]]
    )
    stream: bool = Field(False, description="Send pieces as they are generated.")

    @property
    def length(self) -> int | None:
        """Most new tokens, if the body says so."""
        return self.max_tokens

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """The JSON schema that texts follow; None: they follow none."""
        return None

    def sampling(self, length: int, **more: Any) -> SamplingParams:
        """How tokens are chosen, of which there are at most `length`."""
        return SamplingParams(
            max_new_tokens=length,
            min_new_tokens=self.min_tokens,
            top_p=self.top_p or _SMALLEST_TOP_P,
            top_k=max(0, self.top_k),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            **{name: getattr(self, name) for name in _AS_THEY_ARE},
            **more,
        )

    def check(self, config: ServeConfig) -> None:
        """Refuse fields that do not go together, or ask for more than the server gives.

        Raises:
            ApiError: 400.
        """
        for name in _LIMITED:
            value = getattr(self, name, None)
            if value is not None and value > config.max_tokens:
                raise bad_request(f"{name} is {value}, but {config.max_tokens} are the most.", name)
        if self.length is not None and self.min_tokens > self.length:
            message = f"min_tokens is {self.min_tokens}, but at most {self.length} are asked for."
            raise bad_request(message, "min_tokens")


class StreamOptions(Part):
    """Options of a stream."""

    include_usage: bool = Field(False, description="End the stream with its usage.")
    include_obfuscation: Any = Field(None, description="Ignored.")


class NamedSchema(Part):
    """A JSON schema with a name, which is not read."""

    name: str
    json_schema: dict[str, Any] = Field(alias="schema", description="At most 65,536 characters and 64 levels.")
    description: Any = None
    strict: Any = Field(None, description="Ignored: texts always follow the schema.")


class ResponseFormat(Part):
    """Any text, a JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class OpenAIRequest(GenerationRequest):
    """What OpenAI's two requests share."""

    model: str = Field("", description="A name of /v1/models; names to join, with + between; or route: and a pattern.")
    prefixes: Texts | None = Field(None, description="Names of prefixes to join, instead of `model`.")
    n: int = Field(1, ge=1, description="Texts for each prompt.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    logit_bias: _Biases | None = Field(
        None, description="Added to the scores of tokens, by token id.", examples=[{"11": -100}]
    )
    response_format: ResponseFormat | None = Field(
        None, description="What a text must be: any text, a JSON object, or JSON that follows a schema."
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_unread(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        left = {name: value for name, value in body.items() if name not in _IGNORED}
        for name in sorted(_UNSUPPORTED.keys() & left.keys() - cls.model_fields.keys()):
            value = left.pop(name)
            if value is not None and not any(value == one and type(value) is type(one) for one in _UNSUPPORTED[name]):
                raise bad_request(f"{name} is not supported.", name, "unsupported_field")
        return left

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """The JSON schema that texts follow; None: they follow none."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        return wanted.json_schema.json_schema if wanted.json_schema else {"type": "object"}

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def prompts(self) -> tuple[Any, ...]:
        """Texts, tuples of token ids, or a conversation."""
        raise NotImplementedError

    def sampling(self, length: int, **more: Any) -> SamplingParams:
        """As `GenerationRequest.sampling`."""
        return super().sampling(length, logit_bias=self.logit_bias or {}, **more)

    def check(self, config: ServeConfig) -> None:
        """As `GenerationRequest.check`."""
        super().check(config)
        if not self.model and not self.prefixes:
            raise bad_request("the name of a model is needed; /v1/models lists them.", "model")
        if self.n * len(self.prompts) > config.max_texts:
            raise bad_request(f"{len(self.prompts)} prompts times n are more than {config.max_texts} texts.", "n")
        wanted = self.response_format
        if wanted is not None and (wanted.type == "json_schema") != (wanted.json_schema is not None):
            raise bad_request("the type json_schema needs a schema, and no other has one.", "response_format")
        if self.json_schema is not None and self.min_tokens:
            raise bad_request("min_tokens cannot go with response_format, which says when a text ends.", "min_tokens")
        if self.stream_options and not self.stream:
            raise bad_request("stream_options needs stream to be true.", "stream_options")


class CompletionRequest(OpenAIRequest):
    """A body of `/v1/completions`."""

    prompt: Text | Texts | Ids | Annotated[list[Ids], Field(min_length=1, fail_fast=True)] = Field(
        description="With a prefix, a text is a source in the prefix's text format; token ids are used as they are.",
    )
    max_tokens: int | None = Field(
        None, ge=0, description="Most new tokens; by default the task's or the server's. 0: none, for an echo alone."
    )
    logprobs: int | None = Field(
        None, ge=0, le=20, description="How many of the likeliest tokens to return; with echo, also of the prompt."
    )
    echo: bool = Field(
        False, description="Begin with the prompt, as the model reads it; the text is then returned as it is generated."
    )

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """Texts or token ids."""
        prompts: Any = [self.prompt] if isinstance(self.prompt, str) or isinstance(self.prompt[0], int) else self.prompt
        return tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in prompts)

    def sampling(self, length: int, **more: Any) -> SamplingParams:
        """As `GenerationRequest.sampling`."""
        prompt_logprobs = self.logprobs if self.echo else None
        return super().sampling(length, logprobs=self.logprobs, prompt_logprobs=prompt_logprobs, **more)


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat; other fields may be present only if they are empty."""

    model_config = ConfigDict(frozen=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: Any = None
    refusal: Any = None

    @model_validator(mode="before")
    @classmethod
    def _check_only_text(cls, message: Any) -> Any:
        if isinstance(message, dict):
            content = message.get("content")
            parts = content if isinstance(content, list) else []
            if any(isinstance(part, dict) and part.get("type", "text") != "text" for part in parts):
                raise bad_request("only text parts are supported.", "messages", "unsupported_field")
            if any(value not in (None, []) for name, value in message.items() if name not in cls.model_fields):
                raise bad_request("of a message only its text is supported.", "messages", "unsupported_field")
        return message

    @property
    def text(self) -> str:
        """The content."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(OpenAIRequest):
    """A body of `/v1/chat/completions`."""

    messages: list[Message] = Field(
        min_length=1,
        max_length=_MAX_MESSAGES,
        fail_fast=True,
        description="With a prefix, the last one, the user's, is its source; or all are, by its chat template.",
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, description="The newer name of max_tokens; used if both are present."
    )
    logprobs: bool = Field(False, description="Return the tokens and their logprobs.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Only with logprobs.")

    @property
    def length(self) -> int | None:
        """Most new tokens, if the body says so."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def prompts(self) -> tuple[list[dict[str, str]]]:
        """The messages for a chat template, which knows the older name of a role only."""
        roles = {"developer": "system"}
        return ([{"role": roles.get(one.role, one.role), "content": one.text} for one in self.messages],)

    def sampling(self, length: int, **more: Any) -> SamplingParams:
        """As `GenerationRequest.sampling`."""
        return super().sampling(length, logprobs=(self.top_logprobs or 0) if self.logprobs else None, **more)

    def check(self, config: ServeConfig) -> None:
        """As `GenerationRequest.check`."""
        super().check(config)
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true.", "top_logprobs")
