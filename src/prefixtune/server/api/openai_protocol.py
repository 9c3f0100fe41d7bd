"""The bodies of OpenAI's requests for texts: `/v1/completions` and `/v1/chat/completions`.

Of OpenAI's fields, those that do not concern the output are ignored; those that would change it and are not supported
are refused by name, unless their value changes nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prefixtune.engine.request import SamplingParams
from prefixtune.server.api.protocol import GenerationRequest, Ids, Part, Text, Texts
from prefixtune.server.responses import bad_request
from prefixtune.server.settings import ServeConfig

_IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "parallel_tool_calls"),
}
_UNSUPPORTED = {
    *("tools", "tool_choice", "functions", "function_call", "best_of", "echo", "suffix", "audio", "modalities"),
    *("prediction", "web_search_options", "reasoning_effort", "verbosity"),
}
_NEUTRAL: tuple[Any, ...] = (None, False, 1, "", [], "none", "auto", "medium", ["text"])
"""Values of such a field that change nothing."""
_MAX_MESSAGES = 2048


class StreamOptions(Part):
    """Options of a stream."""

    include_usage: bool = Field(False, description="End the stream with its usage.")
    include_obfuscation: Any = Field(None, description="Ignored.")


class PlainFormat(Part):
    """Any text, or a JSON object."""

    type: Literal["text", "json_object"]


class NamedSchema(Part):
    """A JSON schema with a name, which is not read."""

    name: str
    json_schema: dict[str, Any] = Field(alias="schema", description="At most 65,536 characters and 64 levels.")
    description: Any = None
    strict: Any = Field(None, description="Ignored: texts always follow the schema.")


class JsonSchemaFormat(Part):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


_Share = Annotated[float, Field(ge=-100, le=100)]
_Biases = Annotated[dict[Annotated[int, Field(ge=0, lt=10**9)], _Share], Field(max_length=1024)]
_Format = Annotated[PlainFormat | JsonSchemaFormat, Field(discriminator="type")]


class OpenAIRequest(GenerationRequest):
    """What OpenAI's two requests share."""

    model: str = Field("", description="A name that /v1/models lists; or names of prefixes to join, with + between.")
    prefixes: Texts | None = Field(None, description="Names of prefixes to join, instead of `model`.")
    n: int = Field(1, ge=1, description="Texts for each prompt.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    logit_bias: _Biases | None = Field(
        None, description="Added to the scores of tokens, by token id.", examples=[{"11": -100}]
    )
    response_format: _Format | None = Field(
        None, description="What a text must be: any text, a JSON object, or JSON that follows a schema."
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_unread(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        left = {name: value for name, value in body.items() if name not in _IGNORED}
        for name in sorted(_UNSUPPORTED & left.keys() - cls.model_fields.keys()):
            if (value := left.pop(name)) is True or value not in _NEUTRAL:
                raise bad_request(f"{name} is not supported.", name, "unsupported_field")
        return left

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """The JSON schema that texts follow; None: they follow none."""
        if isinstance(self.response_format, JsonSchemaFormat):
            return self.response_format.json_schema.json_schema
        is_any = self.response_format is None or self.response_format.type == "text"
        return None if is_any else {"type": "object"}

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def num_prompts(self) -> int:
        """How many prompts there are."""
        return 1

    def sampling(self, config: ServeConfig, **more: Any) -> SamplingParams:
        """As `GenerationRequest.sampling`."""
        return super().sampling(config, logit_bias=self.logit_bias or {}, **more)

    def check(self, config: ServeConfig) -> None:
        """As `Body.check`."""
        super().check(config)
        if not self.model and not self.prefixes:
            raise bad_request("the name of a model is needed; /v1/models lists them.", "model")
        if self.n * self.num_prompts > config.max_texts:
            raise bad_request(f"{self.num_prompts} prompts times n are more than {config.max_texts} texts.", "n")
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
        if isinstance(self.prompt, str):
            return (self.prompt,)
        if isinstance(self.prompt[0], int):
            return (tuple(self.prompt),)
        return tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in self.prompt)

    @property
    def num_prompts(self) -> int:
        """How many prompts there are."""
        return len(self.prompts)

    def sampling(self, config: ServeConfig, **more: Any) -> SamplingParams:
        """As `GenerationRequest.sampling`."""
        prompt_logprobs = self.logprobs if self.echo else None
        return super().sampling(config, logprobs=self.logprobs, prompt_logprobs=prompt_logprobs, **more)


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

    def sampling(self, config: ServeConfig, **more: Any) -> SamplingParams:
        """As `GenerationRequest.sampling`."""
        return super().sampling(config, logprobs=(self.top_logprobs or 0) if self.logprobs else None, **more)

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages for a chat template, which knows the older name of a role only."""
        roles = {"developer": "system"}
        return [{"role": roles.get(message.role, message.role), "content": message.text} for message in self.messages]

    def check(self, config: ServeConfig) -> None:
        """As `Body.check`."""
        super().check(config)
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true.", "top_logprobs")
