"""What responses about files and jobs contain, as models, as in `schemas`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from prefixtune.jobs.file_facts import FileFacts

__all__ = [
    "DeletedFile",
    "File",
    "FilePreview",
    "Files",
    "FineTuningCheckpoints",
    "FineTuningEvent",
    "FineTuningEvents",
    "FineTuningJob",
    "FineTuningJobs",
]


class File(BaseModel):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: None
    filename: str
    purpose: Literal["fine-tune", "document", "fine-tune-results"]
    status: Annotated[Literal["processed", "error"], Field(description="error: it cannot be trained on.")]
    status_details: Annotated[str | None, Field(description="What is wrong with it, and in which row.")]
    prefixtune: Annotated[FileFacts | None, Field(description="What it holds; None: it is wrong, or a result.")]


class Files(BaseModel):
    object: Literal["list"]
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class PreviewMessage(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str
    trained: bool


class PreviewExample(BaseModel):
    source: str = ""
    targets: list[str] = []
    messages: Annotated[list[PreviewMessage], Field(description="Of a chat, instead of the others.")] = []


class PreviewPart(BaseModel):
    text: str
    trained: Annotated[bool, Field(description="The model learns to write it.")]


class PreviewLengths(BaseModel):
    unit: Literal["tokens"]
    counts: Annotated[list[int], Field(description="Examples, by their lengths.")]
    edges: Annotated[list[int], Field(description="Where the bins begin, and where the last one ends.")]
    median: int
    longest: int


class PreviewLimit(BaseModel):
    positions: int
    cut: Annotated[int, Field(description="Sampled examples that would lose something.")]
    refused: Annotated[int, Field(description="Sampled examples whose target alone does not fit.")]


class Estimate(BaseModel):
    seconds: Annotated[float, Field(description="Of all steps, where nothing else trains; within a factor of two.")]
    steps: Annotated[int, Field(description="Of a job without options.")]


class FilePreview(BaseModel):
    id: str
    object: Literal["file.preview"]
    examples: Annotated[list[PreviewExample], Field(description="Some, evenly spaced; long texts are shortened.")]
    sampled: Annotated[int, Field(description="Examples that were tokenized.")]
    parts: Annotated[list[PreviewPart], Field(description="The first example, as the model reads it.")]
    lengths: PreviewLengths | None
    limits: list[PreviewLimit]
    cuts: Annotated[str, Field(description="A sentence on what fits.")]
    positions_per_step: Annotated[float | None, Field(description="Of an optimizer step, without padding.")]
    steps_per_epoch: int | None
    estimate: Annotated[Estimate | None, Field(description="None: it is not known.")]


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"]
    deleted: bool


class FineTuningError(BaseModel):
    code: str
    message: str
    param: str | None


class FineTuningNumbers(BaseModel):
    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float


class FineTuningSupervised(BaseModel):
    hyperparameters: FineTuningNumbers


class FineTuningMethod(BaseModel):
    type: Literal["supervised"]
    supervised: FineTuningSupervised


class FineTuningProgress(BaseModel):
    step: int
    total_steps: Annotated[int, Field(description="0: not known yet.")]
    loss: Annotated[float | None, Field(description="Of the last step, in nats per token.")]
    seconds_left: float | None
    updated: Annotated[int, Field(description="When this was measured, in seconds since 1970.")]
    trained_tokens: int


class FineTuningExtension(BaseModel):
    name: Annotated[str, Field(description="What the result is served as once the job has succeeded.")]
    kind: Literal["examples", "document"]
    options: Annotated[dict[str, Any], Field(description="As asked for.")]
    position: Annotated[int | None, Field(description="Jobs that come before this one; None: it does not wait.")]
    progress: FineTuningProgress | None
    best_loss: Annotated[float | None, Field(description="On the validation file, in nats per token.")]


class FineTuningJob(BaseModel):
    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    status: Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
    model: str
    fine_tuned_model: Annotated[str | None, Field(description="The name to use, once the job has succeeded.")]
    error: FineTuningError | None
    training_file: str
    validation_file: str | None
    result_files: Annotated[list[str], Field(description="Of the figures of all steps, as CSV.")]
    trained_tokens: int | None
    estimated_finish: int | None
    hyperparameters: FineTuningNumbers
    method: FineTuningMethod
    seed: int
    integrations: list[dict[str, Any]]
    metadata: dict[str, str]
    organization_id: Annotated[str, Field(description="The name of the key that asked.")]
    user_provided_suffix: str | None
    prefixtune: FineTuningExtension


class Page(BaseModel):
    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FineTuningListExtension(BaseModel):
    backbone: Annotated[str, Field(description="The bare model, which jobs of any key may train.")]


class FineTuningJobs(Page):
    data: list[FineTuningJob]
    prefixtune: FineTuningListExtension


class FineTuningEvent(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class FineTuningEvents(Page):
    data: list[FineTuningEvent]


class FineTuningCheckpoint(BaseModel):
    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: Annotated[dict[str, float], Field(description="`step`, `train_loss` and `valid_loss`.")]


class FineTuningCheckpoints(Page):
    data: list[FineTuningCheckpoint]
