"""The bodies of requests that OpenAI does not have: `/v1/tasks/{name}` and `/classify`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import (
    ConfigDict,
    Field,
)

from prefixtune.errors import short_repr
from prefixtune.inference.classify import first_duplicate
from prefixtune.server.api.protocol import (
    Body,
    GenerationRequest,
    Integer,
    NonEmpty,
    Number,
    ignored,
    validate,
)
from prefixtune.server.api.validation import Check, Fault, refuse, unknown_fields
from prefixtune.server.limits import Limits

__all__ = ["ClassifyRequest", "TaskRequest", "parse_task"]


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
    ) = Field(None, description="With the bare backbone: the labels to choose from, each once, by their own words.")
    user: Any = ignored()
    priority: Any = ignored()

    @property
    def texts(self) -> list[str | list[str]]:
        """The texts, as a list."""
        return [self.input] if isinstance(self.input, str) else list(self.input)

    def _conflicts(self, limits: Limits) -> Iterator[Fault]:
        if len(self.texts) > limits.max_texts:
            yield Fault(f"'input' has {len(self.texts)} texts; at most {limits.max_texts} are allowed.", "input")
        if label := first_duplicate(self.labels or ()):
            yield Fault(f"'labels' has {short_repr(label)} more than once; give every label once.", "labels")


def parse_task(body: Mapping[str, Any], limits: Limits, columns: Sequence[str]) -> TaskRequest:
    """A body of `/v1/tasks/{prefix}`: the task's own fields, beside the options of decoding.

    Args:
        body: The object.
        limits: What a request may ask for.
        columns: The task's own fields. One with the name of an option must be inside `fields`.

    Raises:
        ApiError: Fields are wrong or unknown; the message lists all of them.
    """
    request, faults = validate(TaskRequest, body, limits)
    faults += _faults_of_record(body, columns)
    if faults or request is None:
        raise refuse(faults)
    return request


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
