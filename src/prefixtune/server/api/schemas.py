"""What responses contain, as models: for the OpenAPI document. Tests compare them with real responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from prefixtune.server.models.store import StoreStats
from prefixtune.server.models.task_schema import TaskField

__all__ = [
    "Chat",
    "ChatChunk",
    "Classification",
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
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetails


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: Annotated[str, Field(description="As `id`.")]
    parent: Annotated[str | None, Field(description="The backbone; None: it is the backbone.")]
    max_model_len: Annotated[int, Field(description="Most tokens of prompt and text together.")]
    kind: Literal["backbone", "prefix", "joined"]
    description: str
    task: str | None
    job: str = Field("", description="The job that made it, for its owner; empty: no job.")
    license: str = ""
    prefix_length: dict[str, Any] = Field({}, description="Positions, by site.")


class Deleted(BaseModel):
    id: str
    object: Literal["model"]
    deleted: bool


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Logprobs(BaseModel):
    tokens: list[str]
    token_logprobs: Annotated[list[float | None], Field(description="None: of a prompt's first token (echo).")]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class Head(BaseModel):
    id: str
    created: int
    model: str


class CompletionPiece(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


class CompletionChoice(CompletionPiece):
    finish_reason: FinishReason


class Completion(Head):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Head):
    object: Literal["text_completion"]
    choices: list[CompletionPiece]
    usage: Usage | None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class Delta(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChatPiece(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class Chat(Head):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(Head):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatPiece]
    usage: Usage | None = None


class Label(BaseModel):
    label: str
    probs: Annotated[list[float], Field(description="Of every label, in the order of the prefix's labels.")]
    num_classes: int


class TokenLabel(Label):
    token: str


class TextLabel(BaseModel):
    index: int
    label: Annotated[str | None, Field(description="None: the prefix tags.")]
    probs: list[float] | None
    num_classes: int
    tokens: Annotated[list[TokenLabel] | None, Field(description="Of a prefix that tags.")] = None


class Classification(Head):
    object: Literal["list"]
    data: list[TextLabel]
    usage: Usage


class Task(BaseModel):
    id: str
    task: str | None
    fields: list[TaskField]
    max_tokens: int | None = Field(description="The task's own.")


class TaskOutput(Head):
    object: Literal["task.output"]
    source: str
    output: str
    finish_reason: FinishReason
    usage: Usage


class TaskOutputChunk(Head):
    object: Literal["task.output.chunk"]
    delta: str


class RunningText(BaseModel):
    slot: int
    model: str | None
    prompt_tokens: int
    new_tokens: int


class CacheUse(BaseModel):
    prefixes: int
    bytes: int
    hits: int
    misses: int


class Status(BaseModel):
    draining: bool
    seconds: float
    slots: int
    running: list[RunningText]
    waiting: int
    steps: int
    tokens: int
    cache: CacheUse


class Health(BaseModel):
    status: str
    folder: str


class Prefixes(BaseModel):
    prefixes: list[str]
    refused: Reasons
    cache: StoreStats


class PrefixHeader(BaseModel):
    name: str
    header: dict[str, Any]


class Uploaded(BaseModel):
    name: str
    bytes: int
    replaced: bool


class Reloaded(BaseModel):
    added: list[str]
    removed: list[str]
    refused: Reasons
