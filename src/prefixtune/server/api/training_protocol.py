"""The body of a request for a fine-tuning job: OpenAI's fields, and the object `prefixtune` with this project's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prefixtune.distillation.config import QuestionKind
from prefixtune.server.api.protocol import Body, Boolean, Integer, NonEmpty, Number
from prefixtune.server.api.validation import Check, Fault, whole
from prefixtune.server.limits import Limits
from prefixtune.training.config import FormName

__all__ = ["FineTuningRequest", "TrainingOptions"]


_FILE_ID = Annotated[str, Field(min_length=1, max_length=128), Check("the id of an uploaded file")]
_LABEL = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_. -]{0,63}$")]
_LABEL_CHECK = Check("a text of 1 to 64 letters, digits, spaces, '.', '_' and '-', not starting with a dot")


class _Part(BaseModel):
    """An object within the body: null is the same as no field, and whole numbers may be written as floats."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _tidy(cls, part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        known = cls.model_fields
        kept = {name: value for name, value in part.items() if value is not None or name not in known}
        return dict(zip(kept, whole(list(kept.values())), strict=True))

    def given(self) -> dict[str, Any]:
        """The fields that the body has."""
        return self.model_dump(exclude_unset=True, exclude_none=True)


class TrainingHyperparameters(_Part):
    """OpenAI's hyperparameters; `auto` chooses by the data."""

    n_epochs: (
        Annotated[
            Literal["auto"] | Annotated[Integer, Field(ge=1, le=1000)],
            Check('"auto" or a whole number between 1 and 1000'),
        ]
        | None
    ) = Field(None, description="Passes over the training targets.")
    batch_size: (
        Annotated[
            Literal["auto"] | Annotated[Integer, Field(ge=1, le=256)],
            Check('"auto" or a whole number between 1 and 256'),
        ]
        | None
    ) = Field(None, description="Targets per step.")
    learning_rate_multiplier: (
        Annotated[
            Literal["auto"] | Annotated[Number, Field(gt=0, le=100)],
            Check('"auto" or a number above 0 and at most 100'),
        ]
        | None
    ) = Field(None, description="Times the usual learning rate.")


class SupervisedMethod(_Part):
    """Training on examples."""

    hyperparameters: TrainingHyperparameters | None = None


class TrainingMethod(_Part):
    """How to train."""

    type: Annotated[
        Literal["supervised"],
        Check("only 'supervised' is; preferences (dpo) and rewards (reinforcement) are not learned", "not_supported"),
    ]
    supervised: SupervisedMethod | None = None
    dpo: Annotated[None, Check("preferences are not learned", "not_supported")] = None
    reinforcement: Annotated[None, Check("rewards are not learned", "not_supported")] = None


class TrackerSettings(_Part):
    """Where a tracker shows the run."""

    project: Annotated[_LABEL, _LABEL_CHECK] | None = Field(None, description="By default prefixtune.")
    name: Annotated[_LABEL, _LABEL_CHECK] | None = Field(None, description="Of the run; by default the job's id.")
    entity: Annotated[None, Check("it is that of the worker's own account", "not_supported")] = None
    tags: Annotated[list[Any], Field(max_length=0), Check("runs have no tags", "not_supported")] | None = None


class TrainingIntegration(_Part):
    """A tracker that the worker reports to."""

    type: Literal["wandb", "trackio", "tensorboard", "mlflow"]
    wandb: TrackerSettings | None = None
    trackio: TrackerSettings | None = None
    tensorboard: TrackerSettings | None = None
    mlflow: TrackerSettings | None = None


class TrainingOptions(_Part):
    """What OpenAI's fields do not say; `prefixtune train --help` and `prefixtune distill --help` say more on each."""

    name: Annotated[str, Field(min_length=1, max_length=128), Check("a name of 1 to 128 characters")] | None = Field(
        None, description="What the result is served as; by default the suffix and the end of the job's id."
    )
    preset: Literal["quick", "none"] | None = Field(
        None, description="By default quick for 8 to 200 examples whose targets are texts, else none."
    )
    prefix_length: Integer | None = Field(
        None, ge=0, le=2048, description="Positions of the prefix; 0: as many as the start has."
    )
    start: Literal["words", "text", "examples", "random"] | None = Field(None, description="What training starts from.")
    init_text: Annotated[str, Field(max_length=16_384), Check("a text of at most 16384 characters")] | None = Field(
        None, description="Words or a text to start from."
    )
    init_examples: Integer | None = Field(None, ge=0, le=64, description="Solved examples to start from.")
    compaction: Literal["cut", "stride", "match"] | None = None
    reparameterization: Literal["none", "mlp", "scaled"] | None = None
    prefix_dropout: Number | None = Field(None, ge=0, lt=1)
    nested: Boolean | None = None
    max_steps: Integer | None = Field(None, ge=1, le=1_000_000, description="Optimizer steps, instead of n_epochs.")
    warmup_steps: Integer | None = Field(None, ge=0, le=1_000_000)
    weight_decay: Number | None = Field(None, ge=0, le=10)
    eval_every: Integer | None = Field(
        None, ge=0, le=1_000_000, description="Steps between evaluations, of which a job has at most 100."
    )
    patience: Integer | None = Field(None, ge=0, le=1_000_000)
    hold_out: Number | None = Field(None, ge=0, lt=1, description="Share of the examples to choose the best prefix by.")
    max_length: Integer | None = Field(None, ge=0, le=1_000_000)
    on_too_long: Literal["cut", "error"] | None = None
    save_dtype: Literal["float32", "bfloat16"] | None = None
    license: Annotated[str, Field(max_length=500), Check("a text of at most 500 characters")] | None = None

    form: FormName | None = Field(None, description="How the file is read, where its columns fit several forms.")
    system: Annotated[str, Field(max_length=16_384), Check("a text of at most 16384 characters")] | None = Field(
        None, description="System message of conversations that have none."
    )
    chat_template: Literal["model", "none"] | None = None
    classifier: Literal["auto", "head", "words"] | None = None
    label_words: Annotated[str, Field(max_length=4096), Check("a text of at most 4096 characters")] | None = None

    document: _FILE_ID | None = Field(
        None, description="A document to remember; the training file then holds questions about it, or is the document."
    )
    questions: Annotated[str, Field(min_length=1, max_length=128), Check("the id of a file, or self")] | None = Field(
        None, description="About a document, a file; or self, the default: the model makes them."
    )
    num_questions: Integer | None = Field(None, ge=5, le=1000, description="That the model makes.")
    kinds: (
        Annotated[
            list[QuestionKind],
            Field(min_length=1, max_length=5),
            Check("a list of kinds: fact, paraphrase, list, summary, continuation"),
        ]
        | None
    ) = Field(None, description="Of the questions that the model makes.")
    answer_length: Integer | None = Field(None, ge=1, le=256, description="Most tokens of an answer that it writes.")
    chunk_length: Integer | None = Field(None, ge=0, le=1_000_000)
    ask: Literal["auto", "plain", "chat"] | None = None


class FineTuningRequest(Body):
    """A body of `POST /v1/fine_tuning/jobs`."""

    model: Annotated[NonEmpty, Check("the bare backbone's name, or that of a prefix")] = Field(
        description="The bare backbone's name; or that of a prefix, which training goes on from."
    )
    training_file: _FILE_ID = Field(description="An uploaded file with examples; or a document to remember.")
    validation_file: _FILE_ID | None = Field(
        None, description="Examples to choose the best prefix by: the first 256 targets, fewer of long ones."
    )
    suffix: (
        Annotated[
            str,
            Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$"),
            Check("1 to 64 letters, digits, '.', '_' and '-', not starting with a dot"),
        ]
        | None
    ) = Field(None, description="Begins the name of the result.")
    seed: Integer | None = Field(None, ge=0, le=2**31 - 1)
    method: TrainingMethod | None = None
    hyperparameters: TrainingHyperparameters | None = Field(None, description="The older place of them.")
    integrations: (
        Annotated[
            list[TrainingIntegration],
            Field(max_length=4),
            Check("a list of at most 4 trackers, each with its type", deep=True),
        ]
        | None
    ) = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=16),
            Check("an object of at most 16 texts: names of at most 64 characters, values of at most 512"),
        ]
        | None
    ) = Field(None, description="Returned as it is; jobs can be listed by it.")
    prefixtune: TrainingOptions | None = Field(None, description="Options that OpenAI's interface does not have.")

    @property
    def given_hyperparameters(self) -> dict[str, Any]:
        """The hyperparameters, wherever they are."""
        chosen = self._of_method or self.hyperparameters
        return chosen.given() if chosen is not None else {}

    @property
    def _of_method(self) -> TrainingHyperparameters | None:
        supervised = self.method.supervised if self.method is not None else None
        return supervised.hyperparameters if supervised is not None else None

    @property
    def options(self) -> dict[str, Any]:
        """The given fields of `prefixtune`."""
        return self.prefixtune.given() if self.prefixtune is not None else {}

    def _conflicts(self, limits: Limits) -> Iterator[Fault]:
        old, new = self.hyperparameters, self._of_method
        if old is not None and new is not None and old.given() != new.given():
            yield Fault("'hyperparameters' and method.supervised.hyperparameters differ.", "hyperparameters")
        for index, integration in enumerate(self.integrations or ()):
            others = integration.given().keys() - {"type", integration.type}
            if others:
                name = sorted(others)[0]
                message = f"integrations[{index}].{name} is given, but the type is {integration.type!r}."
                yield Fault(message, f"integrations[{index}].{name}")
