"""The bodies of OpenAI's requests for texts: `/v1/completions` and `/v1/chat/completions`.

Of OpenAI's fields, those that do not concern the output are ignored; those that would change it and are not supported
are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WrapValidator,
    field_validator,
    model_validator,
)

from prefixtune.server.api.protocol import (
    Boolean,
    GenerationRequest,
    Integer,
    NonEmpty,
    Number,
    Texts,
    TokenIds,
    TokenNumber,
    allow_null,
    ignored,
    parse,
)
from prefixtune.server.api.validation import Check, Fault, in_slices
from prefixtune.server.limits import Limits

__all__ = ["ChatRequest", "CompletionRequest", "Message", "OpenAIRequest", "parse_chat"]


_NO_TOOLS = "no function is called; ask for its arguments with response_format and a JSON schema"


def _unsupported(why: str, *neutral: Any) -> Any:
    """A field that would change the output: why it is refused, and the values that change nothing."""
    return Field(None, description=f"Not supported: {why}.", json_schema_extra={"enum": [*neutral, None]})


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra=allow_null)

    include_usage: Boolean | None = Field(None, description="End the stream with its usage.")
    include_obfuscation: Any = Field(None, description="Ignored.")


class TextFormatOption(BaseModel):
    """Any text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["text"]


class JsonObjectFormat(BaseModel):
    """A JSON object."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["json_object"]


class NamedSchema(BaseModel):
    """A JSON schema with a name, which is not read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    json_schema: dict[str, Any] = Field(alias="schema", description="At most 65,536 characters and 64 levels.")
    description: Any = None
    strict: Any = Field(None, description="Ignored: texts always follow the schema.")


class JsonSchemaFormat(BaseModel):
    """JSON that follows a schema."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = TextFormatOption | JsonObjectFormat | JsonSchemaFormat


class OpenAIRequest(GenerationRequest):
    """What OpenAI's two requests share."""

    model: Annotated[NonEmpty, Check("the name of a model; /v1/models lists them")] = Field(
        description="A name that /v1/models lists; or those of several prefixes with + between them, which are joined "
        "in this order."
    )
    prefixes: (
        Annotated[
            list[NonEmpty],
            Field(min_length=1, fail_fast=True),
            Check("a list of names of prefixes, at least one"),
        ]
        | None
    ) = Field(
        None,
        description="Names of prefixes to join, at most {joined}; instead of `model`, which may be left out or be the "
        "bare backbone's name.",
    )
    n: Integer = Field(1, ge=1, description="Texts for each prompt; at most {texts} for all prompts together.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    logit_bias: (
        Annotated[
            dict[TokenNumber, Annotated[Number, Field(ge=-100, le=100)]],
            Field(max_length=1024),
            Check("an object of at most 1024 token ids, each with a number between -100 and 100"),
        ]
        | None
    ) = Field(None, description="Added to the scores of tokens, by token id.", examples=[{"11": -100}])
    response_format: (
        Annotated[
            Annotated[ResponseFormat, Discriminator("type")],
            Check(
                'one of {"type": "text"}, {"type": "json_object"} and {"type": "json_schema", "json_schema": '
                '{"name": "...", "schema": {...}}}'
            ),
        ]
        | None
    ) = Field(None, description="What a text must be: any text, a JSON object, or JSON that follows a schema.")

    user: Any = ignored()
    metadata: Any = ignored()
    store: Any = ignored()
    service_tier: Any = ignored()
    safety_identifier: Any = ignored()
    prompt_cache_key: Any = ignored()
    prompt_cache_retention: Any = ignored()
    parallel_tool_calls: Any = ignored()

    tools: Any = _unsupported(_NO_TOOLS, [])
    tool_choice: Any = _unsupported(_NO_TOOLS, "none", "auto")
    functions: Any = _unsupported(_NO_TOOLS, [])
    function_call: Any = _unsupported(_NO_TOOLS, "none", "auto")
    best_of: Any = _unsupported("use n with logprobs, and choose", 1)
    echo: Any = _unsupported("only /v1/completions repeats the prompt", False)
    suffix: Any = _unsupported("text is generated after the prompt only", "")
    audio: Any = _unsupported("only text is generated")
    modalities: Any = _unsupported("only text is generated", ["text"])
    prediction: Any = _unsupported("there are no predicted outputs")
    web_search_options: Any = _unsupported("there is no search")
    reasoning_effort: Any = _unsupported("there is no separate reasoning", "none")
    verbosity: Any = _unsupported("the length of outputs is set by max_tokens", "medium")

    @field_validator("*")
    @classmethod
    def _drop_unread(cls, value: Any, info: Any) -> Any:
        """Fields of any type are not read; if they are not supported, only values that change nothing are allowed."""
        field = cls.model_fields[str(info.field_name)]
        if field.annotation is not Any:
            return value
        if isinstance(field.json_schema_extra, dict):
            neutral: Any = field.json_schema_extra["enum"]
            # False is not 0 here, but 0.0 is.
            if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral):
                why = str(field.description).removeprefix("Not supported: ").removesuffix(".")
                raise Check(why, "not_supported").error()
        return None

    @model_validator(mode="before")
    @classmethod
    def _name_joined(cls, body: dict[str, Any]) -> dict[str, Any]:
        """Without a model, the prefixes name it."""
        prefixes = body.get("prefixes")
        if body.get("model") is not None or not isinstance(prefixes, list):
            return body
        return {**body, "model": "+".join(str(name) for name in prefixes) or "prefixes"}

    @property
    def bias(self) -> dict[int, float]:
        """What is added to the scores of tokens, by token id."""
        return {int(token): bias for token, bias in (self.logit_bias or {}).items()}

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """The JSON schema that texts follow; None: they follow none."""
        match self.response_format:
            case JsonSchemaFormat(json_schema=named):
                return named.json_schema
            case JsonObjectFormat():
                return {"type": "object"}
        return None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _conflicts(self, limits: Limits) -> Iterator[Fault]:
        yield from super()._conflicts(limits)
        if self.prefixes is not None and len(self.prefixes) > limits.max_joined:
            message = f"'prefixes' has {len(self.prefixes)} names, but this server joins at most {limits.max_joined}."
            yield Fault(message, "prefixes", "too_many_prefixes")
        if self.json_schema is not None and self.min_tokens:
            yield Fault("min_tokens cannot go with response_format, which says when a text ends.", "min_tokens")
        if self.stream_options and not self.stream:
            yield Fault("'stream_options' needs stream to be true.", "stream_options")


def _kind_of_prompt(prompt: Any) -> str:
    """Which of the types of a prompt is meant: by its first item."""
    if not isinstance(prompt, list):
        return "text"
    first = prompt[0] if prompt else None
    return "texts" if isinstance(first, str) else "lists" if isinstance(first, list) else "ids"


class CompletionRequest(OpenAIRequest):
    """A body of `/v1/completions`."""

    prompt: Annotated[
        Annotated[NonEmpty, Tag("text")]
        | Annotated[Texts, Tag("texts")]
        | Annotated[TokenIds, Tag("ids")]
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), Tag("lists")],
        Discriminator(_kind_of_prompt),
        Check("a text, a list of texts, a list of token ids, or a list of such lists, none of them empty"),
    ] = Field(
        description="With a prefix, a text is a source in the prefix's text format; token ids are used as they are.",
    )
    max_tokens: Integer | None = Field(
        None,
        ge=0,
        description="Most new tokens; by default those of the prefix's task or {length}, as far as they fit. 0: "
        "none; with echo, the prompt's log-probabilities.",
    )
    logprobs: Integer | None = Field(
        None, ge=0, le=20, description="How many of the likeliest tokens to return; with echo, also of the prompt."
    )
    echo: Boolean = Field(
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
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to return; None: no logprobs at all."""
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the prompt's tokens."""
        return self.logprobs if self.echo else None

    def _conflicts(self, limits: Limits) -> Iterator[Fault]:
        yield from super()._conflicts(limits)
        count = len(self.prompts)
        if count * self.n > limits.max_texts:
            yield Fault(f"{count} prompts times n = {self.n} are more than {limits.max_texts} texts.", "n")


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


def _parts(content: Any) -> Any:
    """The content of a message, a text or parts, as parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


_ONLY_TEXT_PARTS = Check('only text parts are allowed, as in {"type": "text", "text": "..."}', "not_supported")


class Message(BaseModel):
    """A message of a chat; other fields may be present only if they are empty."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[
        str, Annotated[Annotated[list[Any], Field(max_length=0)] | None, Check("only text is allowed", "not_supported")]
    ]

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Annotated[TextPart, _ONLY_TEXT_PARTS]],
        Field(fail_fast=True),
        BeforeValidator(_parts, json_schema_input_type=str | list[TextPart]),
        Check("a text, or a list of text parts", deep=True),
    ]
    name: Any = None
    refusal: Any = None

    @property
    def text(self) -> str:
        """The content."""
        return "".join(part.text for part in self.content)


_MAX_MESSAGES = 2048
_MESSAGES = Check(f"a list of at least one message and at most {_MAX_MESSAGES:,}", deep=True)


def _few(messages: Any) -> Any:
    """Refuse very many messages before any is checked."""
    if isinstance(messages, list) and len(messages) > _MAX_MESSAGES:
        raise _MESSAGES.error()
    return messages


class ChatRequest(OpenAIRequest):
    """A body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], WrapValidator(in_slices), BeforeValidator(_few), _MESSAGES] = Field(
        min_length=1,
        max_length=_MAX_MESSAGES,
        description="With a prefix, the last one must be the user's; it is the source, or all are read by a prefix "
        "that was trained with a chat template.",
    )
    max_completion_tokens: Integer | None = Field(
        None, ge=1, description="The newer name of max_tokens; used if both are present."
    )
    logprobs: Boolean = Field(False, description="Return the tokens and their logprobs.")
    top_logprobs: Integer | None = Field(None, ge=0, le=20, description="Only with logprobs.")

    @property
    def length(self) -> int | None:
        """Most new tokens, if the body says so."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def length_field(self) -> str:
        """The field that says so."""
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to return; None: no logprobs at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages for a chat template, which knows the older name of a role only."""
        roles = {"developer": "system"}
        return [{"role": roles.get(message.role, message.role), "content": message.text} for message in self.messages]

    def _conflicts(self, limits: Limits) -> Iterator[Fault]:
        yield from super()._conflicts(limits)
        if self.top_logprobs is not None and not self.logprobs:
            yield Fault("top_logprobs needs logprobs to be true.", "top_logprobs")


def parse_chat(body: Mapping[str, Any], limits: Limits) -> tuple[ChatRequest, list[dict[str, str]]]:
    """A body of `/v1/chat/completions`, and its conversation.

    The request has no messages any more: it may wait, and they take forty times the memory of their text.

    Raises:
        ApiError: As `parse`.
    """
    request = parse(ChatRequest, body, limits)
    return request.model_copy(update={"messages": []}), request.conversation
