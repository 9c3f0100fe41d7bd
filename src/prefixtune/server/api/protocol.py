"""The bodies of requests, as models: the types, ranges, defaults and descriptions of their fields.

An unknown field is refused, with the nearest known one. Null is the same as no field. Here is what all bodies
share, and what requests for texts share.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from prefixtune.engine.request import SamplingParams
from prefixtune.server.api.validation import (
    Check,
    Fault,
    faults_of,
    refuse,
    supported_fields,
    unknown_fields,
    whole,
    whole_ids,
)
from prefixtune.server.limits import Limits

__all__ = [
    "Body",
    "Boolean",
    "GenerationRequest",
    "Integer",
    "NonEmpty",
    "Number",
    "StopString",
    "Texts",
    "TokenIds",
    "TokenNumber",
    "allow_null",
    "ignored",
    "parse",
    "validate",
    "with_limits",
]


def allow_null(schema: dict[str, Any]) -> None:
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
_SMALLEST_TOP_P = 1e-9
"""What a `top_p` of 0 means: the likeliest token alone reaches it."""


class Body(BaseModel):
    """What all bodies share: null is the same as no field, and whole numbers may be written as floats."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra=allow_null)

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
    top_p: Number = Field(1.0, ge=0, le=1, description="0: the likeliest token each time.")
    top_k: Integer = Field(0, ge=-1, le=1_000_000, description="0 or -1: all tokens.")
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
    def length_field(self) -> str:
        """The field that says so."""
        return "max_tokens"

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
            top_p=self.top_p or _SMALLEST_TOP_P,
            top_k=max(0, self.top_k),
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
            message = f"min_tokens is {self.min_tokens}, which is more than {self.length_field} ({self.length})."
            yield Fault(message, "min_tokens")


def ignored() -> Any:
    """A field that concerns the service and not the output; clients may send it."""
    return Field(None, description="Ignored.")


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
    request, faults = validate(model, {name: value for name, value in body.items() if name in known}, limits)
    faults += unknown_fields([name for name in body if name not in known], supported_fields(model))
    if faults or request is None:
        raise refuse(faults)
    return request


def validate(model: type[R], body: Mapping[str, Any], limits: Limits) -> tuple[R | None, list[Fault]]:
    """A body as a request, if it can be one, and all that is wrong with it."""
    limited = with_limits(model, limits)
    try:
        request = limited.model_validate(body)
    except ValidationError as error:
        return None, faults_of(error, limited)
    return request, list(request._conflicts(limits))
