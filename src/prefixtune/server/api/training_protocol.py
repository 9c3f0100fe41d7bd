"""The body of a request for a fine-tuning job: OpenAI's fields, and the object `prefixtune` with this project's own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from prefixtune.server.api.protocol import Body, Part, Text
from prefixtune.server.responses import bad_request
from prefixtune.training.config import FormName

_FileId = Annotated[str, Field(min_length=1, max_length=128)]
_Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_. -]{0,63}$")]
_LongText = Annotated[str, Field(max_length=16_384)]
_Count = Annotated[int, Field(ge=0, le=1_000_000)]


class _Options(Part):
    """An object within the body."""

    def given(self) -> dict[str, Any]:
        """The fields that the body has."""
        return self.model_dump(exclude_unset=True, exclude_none=True)


class TrainingHyperparameters(_Options):
    """OpenAI's hyperparameters; `auto` chooses by the data."""

    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="Passes over the training targets."
    )
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] | None = Field(
        None, description="Targets per step."
    )
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(gt=0, le=100)] | None = Field(
        None, description="Times the usual learning rate."
    )


class SupervisedMethod(_Options):
    """Training on examples."""

    hyperparameters: TrainingHyperparameters | None = None


class TrainingMethod(_Options):
    """How to train; preferences (dpo) and rewards (reinforcement) are not learned."""

    type: Literal["supervised"]
    supervised: SupervisedMethod | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_kind(cls, method: Any) -> Any:
        if isinstance(method, dict) and (
            method.get("type") in ("dpo", "reinforcement") or method.get("dpo") or method.get("reinforcement")
        ):
            raise bad_request("only the method 'supervised' is supported.", "method.type", "unsupported_field")
        return method


class TrackerSettings(_Options):
    """Where a tracker shows the run."""

    project: _Label | None = Field(None, description="By default prefixtune.")
    name: _Label | None = Field(None, description="Of the run; by default the job's id.")


class TrainingIntegration(_Options):
    """A tracker that the worker reports to."""

    type: Literal["wandb", "trackio", "tensorboard", "mlflow"]
    wandb: TrackerSettings | None = None
    trackio: TrackerSettings | None = None
    tensorboard: TrackerSettings | None = None
    mlflow: TrackerSettings | None = None

    @model_validator(mode="after")
    def _check_settings(self) -> TrainingIntegration:
        if others := self.given().keys() - {"type", self.type}:
            raise ValueError(f"{min(others)} is given, but the type is {self.type!r}")
        return self


class TrainingOptions(_Options):
    """What OpenAI's fields do not say; `prefixtune train --help` and `prefixtune distill --help` say more on each."""

    name: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        None, description="What the result is served as; by default the suffix and the end of the job's id."
    )
    preset: Literal["quick", "none"] | None = Field(
        None, description="By default quick for 8 to 200 examples whose targets are texts, else none."
    )
    prefix_length: int | None = Field(
        None, ge=0, le=2048, description="Positions of the prefix; 0: as many as the start has."
    )
    start: Literal["words", "text", "examples", "random"] | None = Field(None, description="What training starts from.")
    init_text: _LongText | None = Field(None, description="Words or a text to start from.")
    init_examples: int | None = Field(None, ge=0, le=64, description="Solved examples to start from.")
    max_steps: int | None = Field(None, ge=1, le=1_000_000, description="Optimizer steps, instead of n_epochs.")
    eval_every: int | None = Field(None, ge=0, le=1_000_000, description="Steps between evaluations.")
    patience: _Count | None = None
    hold_out: float | None = Field(None, ge=0, lt=1, description="Share of the examples to choose the best prefix by.")
    max_length: _Count | None = None

    form: FormName | None = Field(None, description="How the file is read, where its columns fit several forms.")
    system: _LongText | None = Field(None, description="System message of conversations that have none.")
    chat_template: Literal["model", "none"] | None = None

    document: _FileId | None = Field(None, description="The training file again, which is a document to remember.")
    questions: _FileId | None = Field(
        None, description="About a document, a file; or self, the default: the model makes them."
    )
    num_questions: int | None = Field(None, ge=5, le=1000, description="That the model makes.")
    answer_length: int | None = Field(None, ge=1, le=256, description="Most tokens of an answer that it writes.")


class FineTuningRequest(Body):
    """A body of `POST /v1/fine_tuning/jobs`."""

    model: Text = Field(description="The bare backbone's name; or that of a prefix, which training goes on from.")
    training_file: _FileId = Field(description="An uploaded file with examples; or a document to remember.")
    validation_file: _FileId | None = Field(
        None, description="Examples to choose the best prefix by: the first 256 targets."
    )
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")] | None = Field(
        None, description="Begins the name of the result."
    )
    seed: int | None = Field(None, ge=0, le=2**31 - 1)
    method: TrainingMethod | None = None
    hyperparameters: TrainingHyperparameters | None = Field(None, description="The older place of them.")
    integrations: Annotated[list[TrainingIntegration], Field(max_length=1)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = Field(None, description="Returned as it is; jobs can be listed by it.")
    prefixtune: TrainingOptions | None = Field(None, description="Options that OpenAI's interface does not have.")

    @property
    def given_hyperparameters(self) -> dict[str, Any]:
        """The hyperparameters, wherever they are."""
        supervised = self.method.supervised if self.method is not None else None
        chosen = (supervised.hyperparameters if supervised is not None else None) or self.hyperparameters
        return chosen.given() if chosen is not None else {}

    @property
    def options(self) -> dict[str, Any]:
        """The given fields of `prefixtune`."""
        return self.prefixtune.given() if self.prefixtune is not None else {}
