"""The bodies of requests, as models: the types, ranges, defaults and descriptions of their fields.

An unknown field is refused, with the nearest known one. Of OpenAI's fields, those that do not concern the output are
ignored; those that would change it and are not supported are refused by name. Null is the same as no field.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    Tag,
    ValidationError,
    WrapValidator,
    create_model,
    field_validator,
    model_validator,
)

from prefixtune.engine.request import SamplingParams
from prefixtune.server.api.validation import (
    Check,
    Fault,
    faults_of,
    in_slices,
    refuse,
    supported_fields,
    unknown_fields,
    whole,
    whole_ids,
)
from prefixtune.server.limits import Limits

__all__ = [
    "Body",
    "ChatRequest",
    "ClassifyRequest",
    "CompletionRequest",
    "GenerationRequest",
    "Message",
    "OpenAIRequest",
    "TaskRequest",
    "parse",
    "parse_task",
    "with_limits",
]


def _allow_null(schema: dict[str, Any]) -> None:
    """In the schema of a model: fields may be null, except those that are required."""
    for name, field in schema["properties"].items():
        if name in schema.get("required", ()):
            continue
        if field.get("default", ...) is None:
            del field["default"]
        options = [option for option in field.pop("anyOf", ()) if option != {"type": "null"}]
        for option in options:
            if "patternProperties" in option:
                option["additionalProperties"] = False
        if len(options) == 1 and "type" in options[0]:
            field |= options.pop()
        if options:
            field["anyOf"] = [*options, {"type": "null"}]
        elif "type" in field:
            field["type"] = [field["type"], "null"]


Integer = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
Boolean = Annotated[bool, Strict()]
NonEmpty = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[NonEmpty], Field(min_length=1, fail_fast=True)]
TokenIds = Annotated[list[Integer], Field(min_length=1, fail_fast=True), BeforeValidator(whole_ids)]
TokenNumber = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
StopString = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    """What all bodies share: null is the same as no field, and whole numbers may be written as floats."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra=_allow_null)

    @model_validator(mode="before")
    @classmethod
    def _tidy(cls, body: dict[str, Any]) -> dict[str, Any]:
        known = cls.model_fields
        return {name: value for name, value in body.items() if value is not None or name not in known}

    @field_validator("*", mode="before")
    @classmethod
    def _write_whole(cls, value: Any, info: Any) -> Any:
        return whole([value])[0] if cls.model_fields[info.field_name].annotation in (int, Integer | None) else value

    def _conflicts(self, limits: Limits) -> Iterator[Fault]:
        """Fields that do not go together."""
        yield from ()


class GenerationRequest(Body):
    """What all requests for texts share."""

    max_tokens: Integer | None = Field(
        None,
        ge=1,
        description="Most new tokens; by default those of the prefix's task or {length}, as far as they fit.",
    )
    min_tokens: Integer = Field(0, ge=0, description="Fewest new tokens; at most max_tokens.")
    temperature: Number = Field(1.0, ge=0, le=2, description="0: the likeliest token each time.")
    top_p: Number = Field(1.0, gt=0, le=1)
    top_k: Integer = Field(0, ge=0, le=1_000_000, description="0: all tokens.")
    min_p: Number = Field(
        0.0, ge=0, le=1, description="No token less likely than this share of the likeliest one's probability."
    )
    # Scores divided by much less would overflow.
    repetition_penalty: Number = Field(1.0, ge=0.01, le=10, description="Of tokens in the prompt and in the text.")
    presence_penalty: Number = Field(0.0, ge=-2, le=2, description="Of tokens that were generated.")
    frequency_penalty: Number = Field(0.0, ge=-2, le=2, description="Of tokens, as often as they were generated.")
    seed: Integer | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: (
        Annotated[
            StopString | Annotated[list[StopString], Field(max_length=16)],
            Check("a text or a list of at most 16 texts, of 1 to 256 characters each"),
        ]
        | None
    ) = Field(None, description="Strings that end a text; they are not part of it.", examples=[["\n\n"]])
    stream: Boolean = Field(False, description="Send pieces as they are generated.")

    @property
    def length(self) -> int | None:
        """Most new tokens, if the body says so."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to return; None: no logprobs at all."""
        return None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the prompt's tokens."""
        return None

    @property
    def bias(self) -> dict[int, float]:
        """What is added to the scores of tokens, by token id."""
        return {}

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """The JSON schema that texts follow; None: they follow none."""
        return None

    def sampling(self, limits: Limits) -> SamplingParams:
        """How tokens are chosen; the number of new tokens counts only if there is a `length`."""
        return SamplingParams(
            max_new_tokens=limits.max_tokens if self.length is None else self.length,
            min_new_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.bias,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            logprobs=self.num_logprobs,
            prompt_logprobs=self.num_prompt_logprobs,
        )

    def _conflicts(self, limits: Limits) -> Iterator[Fault]:
        if self.length is not None and self.min_tokens > self.length:
            message = f"min_tokens is {self.min_tokens}, which is more than max_tokens ({self.length})."
            yield Fault(message, "min_tokens")


_NO_TOOLS = "no function is called; ask for its arguments with response_format and a JSON schema"


def _ignored() -> Any:
    """A field that concerns the service and not the output; clients may send it."""
    return Field(None, description="Ignored.")


def _unsupported(why: str, *neutral: Any) -> Any:
    """A field that would change the output: why it is refused, and the values that change nothing."""
    return Field(None, description=f"Not supported: {why}.", json_schema_extra={"enum": [*neutral, None]})


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra=_allow_null)

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

    user: Any = _ignored()
    metadata: Any = _ignored()
    store: Any = _ignored()
    service_tier: Any = _ignored()
    safety_identifier: Any = _ignored()
    prompt_cache_key: Any = _ignored()
    prompt_cache_retention: Any = _ignored()
    parallel_tool_calls: Any = _ignored()

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


class ChatRequest(OpenAIRequest):
    """A body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], WrapValidator(in_slices), Check("a list of at least one message", deep=True)] = (
        Field(
            min_length=1,
            description="With a prefix, the last one must be the user's; it is the source, or all are read by a prefix "
            "that was trained with a chat template.",
        )
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


class TaskRequest(GenerationRequest):
    """A body of `/v1/tasks/{name}`: options, and beside them the task's own fields, which GET lists."""

    model_config = ConfigDict(extra="allow")

    max_tokens: Integer | None = Field(None, ge=1, description="Most new tokens; by default the task's own.")
    # Greedy unless the request says otherwise, as in the task's evaluation.
    temperature: Number = Field(0.0, ge=0, le=2, description="0: the likeliest token each time.")
    source: Annotated[str, Check("a text")] | None = Field(
        None, description="A text that is already linearized; instead of the task's own fields."
    )
    fields: Annotated[dict[str, Any], Check("an object")] | None = Field(
        None,
        description="The task's own fields, if one has the name of an option; else they may be beside the options.",
    )
    format_of: Annotated[str, Check("the name of a prefix")] | None = Field(
        None, description="With the bare backbone: the prefix whose text format and fields are used."
    )

    @property
    def record(self) -> Mapping[str, Any]:
        """The task's own fields; empty if there is a `source`."""
        return self.model_extra or {} if self.fields is None else self.fields


class ClassifyRequest(Body):
    """A body of `/classify`."""

    model: Annotated[NonEmpty, Check("the name of a model; /v1/models lists them")] = Field(
        description="A prefix that classifies or tags; or the bare backbone, with labels."
    )
    input: Annotated[
        NonEmpty
        | Annotated[
            list[NonEmpty | Annotated[list[NonEmpty], Field(min_length=1, fail_fast=True)]],
            Field(min_length=1, fail_fast=True),
        ],
        Check("a text or a list of texts; for a prefix that tags, each may be a list of words; none of them empty"),
    ] = Field(
        description="One or several texts, at most {texts}. For a prefix that tags, a text is split at white space.",
        examples=["a fine film"],
    )
    labels: (
        Annotated[
            list[NonEmpty],
            Field(min_length=2, max_length=1000, fail_fast=True),
            Check("a list of 2 to 1000 labels"),
        ]
        | None
    ) = Field(None, description="With the bare backbone: the labels to choose from, by their own words.")
    user: Any = _ignored()
    priority: Any = _ignored()

    @property
    def texts(self) -> list[str | list[str]]:
        """The texts, as a list."""
        return [self.input] if isinstance(self.input, str) else list(self.input)

    def _conflicts(self, limits: Limits) -> Iterator[Fault]:
        if len(self.texts) > limits.max_texts:
            yield Fault(f"'input' has {len(self.texts)} texts; at most {limits.max_texts} are allowed.", "input")


R = TypeVar("R", bound=Body)


@functools.cache
def with_limits(model: type[R], limits: Limits) -> type[R]:
    """A model with the limits of a server at its fields."""
    tokens, texts = Field(le=limits.max_tokens), Field(le=limits.max_texts)
    rules = {"max_tokens": tokens, "max_completion_tokens": tokens, "min_tokens": tokens, "n": texts}
    fields: dict[str, Any] = {
        name: (Annotated[field.annotation, rules[name]], field)
        for name, field in model.model_fields.items()
        if name in rules
    }
    return create_model(model.__name__, __base__=model, __doc__=model.__doc__, **fields)


def parse(model: type[R], body: Mapping[str, Any], limits: Limits) -> R:
    """A body as a request.

    Raises:
        ApiError: Fields are wrong, unknown or not supported; the message lists all of them.
    """
    known = model.model_fields
    # pydantic would collect very many unknown fields slowly.
    request, faults = _validate(model, {name: value for name, value in body.items() if name in known}, limits)
    faults += unknown_fields([name for name in body if name not in known], supported_fields(model))
    if faults or request is None:
        raise refuse(faults)
    return request


def parse_task(body: Mapping[str, Any], limits: Limits, columns: Sequence[str]) -> TaskRequest:
    """A body of `/v1/tasks/{prefix}`: the task's own fields, beside the options of decoding.

    Args:
        body: The object.
        limits: What a request may ask for.
        columns: The task's own fields. One with the name of an option must be inside `fields`.

    Raises:
        ApiError: Fields are wrong or unknown; the message lists all of them.
    """
    request, faults = _validate(TaskRequest, body, limits)
    faults += _faults_of_record(body, columns)
    if faults or request is None:
        raise refuse(faults)
    return request


def _validate(model: type[R], body: Mapping[str, Any], limits: Limits) -> tuple[R | None, list[Fault]]:
    limited = with_limits(model, limits)
    try:
        request = limited.model_validate(body)
    except ValidationError as error:
        return None, faults_of(error, limited)
    return request, list(request._conflicts(limits))


def _faults_of_record(body: Mapping[str, Any], columns: Sequence[str]) -> Iterator[Fault]:
    """What is wrong with the names of a task's own fields."""
    options = TaskRequest.model_fields
    inner, source = body.get("fields"), body.get("source")
    outside = [name for name in body if name not in options]
    if inner is not None and outside:
        message = f"{outside[0]!r} is outside 'fields', but all of the task's fields must be inside."
        yield Fault(message, outside[0])
    known = [*columns, *(options if inner is None else ())]
    own = outside if inner is None else list(inner) if isinstance(inner, dict) else []
    yield from unknown_fields([name for name in own if name not in columns], known)
    if source is None and not own and inner in (None, {}):
        hint = f"Give {', '.join(map(repr, columns))}, or 'source'." if columns else "Give 'source'."
        yield Fault(f"the request has none of the task's fields. {hint}", columns[0] if columns else "source")
    if source is not None and any(name in columns for name in own):
        yield Fault("give either 'source' or the task's fields, not both.", "source")
