"""What responses contain, as models: for the OpenAPI document. Tests compare them with real responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from prefixtune.server.models.store import StoreStats
from prefixtune.server.models.task_schema import FieldKind

__all__ = [
    "Chat",
    "ChatChunk",
    "Completion",
    "CompletionChunk",
    "Error",
    "Health",
    "Model",
    "Models",
    "PrefixHeader",
    "Prefixes",
    "Reloaded",
    "Status",
    "Task",
    "TaskOutput",
    "TaskOutputChunk",
    "Uploaded",
]


FinishReason = Literal["stop", "length"]
Reasons = Annotated[dict[str, str], Field(description="Why each file is not served.")]


class ErrorDetails(BaseModel):
    """What is wrong, for people (`message`) and for programs; `param` is the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """An error, in OpenAI's shape."""

    error: ErrorDetails


class Model(BaseModel):
    """The bare backbone, or a prefix."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Literal["backbone", "prefix"]
    description: str
    task: str | None
    license: str = ""
    prefix_length: dict[str, Any] = Field({}, description="Positions, by site.")


class Models(BaseModel):
    """The models that the key may use."""

    object: Literal["list"]
    data: list[Model]


class Usage(BaseModel):
    """Tokens read and generated; the prefix is not counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Logprobs(BaseModel):
    """The tokens of a text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TopLogprob(BaseModel):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of a message."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of a message."""

    content: list[TokenLogprob]
    refusal: None


class Head(BaseModel):
    """What all outputs begin with."""

    id: str
    created: int
    model: str


class CompletionPiece(BaseModel):
    """A piece of a text."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


class CompletionChoice(CompletionPiece):
    """A text."""

    finish_reason: FinishReason


class Completion(Head):
    """Texts after prompts."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Head):
    """An event of a completion."""

    object: Literal["text_completion"]
    choices: list[CompletionPiece]
    usage: Usage | None = None


class AssistantMessage(BaseModel):
    """The answer of a chat."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """An answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class Delta(BaseModel):
    """What an event adds to a message."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChatPiece(BaseModel):
    """A piece of an answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class Chat(Head):
    """Answers of a chat."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(Head):
    """An event of a chat."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatPiece]
    usage: Usage | None = None


class TaskField(BaseModel):
    """A field of a task, and how a page asks for it."""

    name: str
    kind: FieldKind
    example: Any
    parts: list[str]


class Task(BaseModel):
    """The fields of a prefix's task."""

    id: str
    task: str | None
    fields: list[TaskField]
    max_tokens: int | None = Field(description="The task's own.")


class TaskOutput(Head):
    """The output of a task; in a stream, the last event."""

    object: Literal["task.output"]
    source: str
    output: str
    finish_reason: FinishReason
    usage: Usage


class TaskOutputChunk(Head):
    """An event of a task."""

    object: Literal["task.output.chunk"]
    delta: str


class RunningText(BaseModel):
    """A text that is being generated."""

    slot: int
    model: str | None
    prompt_tokens: int
    new_tokens: int


class CacheUse(BaseModel):
    """The loaded prefixes."""

    prefixes: int
    bytes: int
    hits: int
    misses: int


class Status(BaseModel):
    """What runs now."""

    draining: bool
    seconds: float
    slots: int
    running: list[RunningText]
    waiting: int
    steps: int
    tokens: int
    cache: CacheUse


class Health(BaseModel):
    """How the server is, in a few words."""

    status: str
    folder: str


class Prefixes(BaseModel):
    """The folder of prefixes."""

    prefixes: list[str]
    refused: Reasons
    cache: StoreStats


class PrefixHeader(BaseModel):
    """The header of a prefix's file."""

    name: str
    header: dict[str, Any]


class Uploaded(BaseModel):
    """An uploaded prefix."""

    name: str
    bytes: int
    replaced: bool


class Reloaded(BaseModel):
    """What a reload changed."""

    added: list[str]
    removed: list[str]
    refused: Reasons
