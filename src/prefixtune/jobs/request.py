"""From what somebody asks for to a job that can be queued: every number settled, and what is wrong told at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prefixtune.distillation.config import SELF, DistillConfig
from prefixtune.errors import PrefixError, RequestError
from prefixtune.jobs.job import Job, check_result_name
from prefixtune.prefix.geometry import spell_lengths
from prefixtune.training.config import TrainConfig, default_learning_rate
from prefixtune.training.presets import preset, without_conflicts

if TYPE_CHECKING:
    from prefixtune.jobs.files import StoredFile

AUTO = "auto"
Hyperparameters = Mapping[str, int | float | Literal["auto"]]

_PLACEHOLDERS = frozenset({"train", "dev", "document", "questions", "output", "init_prefix"})
"""Paths, which the worker fills in."""
_QUICK_TARGETS, _FEWEST_EXAMPLES = range(8, 201), 4
_FEWEST_STEPS, _EPOCHS = 24, 5
_EVALUATIONS = 8
"""Of a run with a validation file, unless the request says otherwise."""
MOST_VALIDATED, _FEWEST_VALIDATED, _VALIDATED_CHARACTERS = 256, 16, 60_000
"""Targets of a validation file, or of those held out, that are used: the first ones, fewer of long ones, as other jobs
wait while they are computed; and the characters that they have together, about."""
_MOST_QUESTIONS = 1000
"""Without an answer, which the model has to write."""
_CHARACTERS_OF_WINDOW = 2048
"""Of a text that is learned in windows; an estimate."""


class JobRefusedError(RequestError):
    """A request for a job is wrong.

    Attributes:
        param: The field at fault.
        code: For programs; None: there is none.
    """

    def __init__(self, param: str, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


@dataclass(frozen=True)
class JobRequest:
    """What somebody asks for: each value has the right type, and is in its own bounds.

    Attributes:
        model: The backbone's name, or that of the prefix to go on from.
        training_file: The examples, the document, or questions about the document that the options name.
        validation_file: To choose the best prefix by.
        document: The file that the option `document` names.
        questions: The file that the option `questions` names.
        hyperparameters: `n_epochs`, `batch_size` and `learning_rate_multiplier`, each a number or `auto`.
        options: The given fields of the request's object `prefixtune`.
        integrations: Trackers, as given.
        start_lengths: Positions by site of the prefix to go on from; None: training begins anew.
        backbone: Which workers may train it; see `Job`.
        fingerprint: Of the server's weights.
        seed: Of the start and the order of the data.
        suffix: For the result's name.
        metadata: Of the owner.
    """

    model: str
    training_file: StoredFile
    validation_file: StoredFile | None = None
    document: StoredFile | None = None
    questions: StoredFile | None = None
    hyperparameters: Hyperparameters = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    integrations: Sequence[Mapping[str, Any]] = ()
    start_lengths: Mapping[str, int] | None = None
    backbone: str = ""
    fingerprint: str = ""
    seed: int = 0
    suffix: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> StoredFile | None:
        """The document that it distills; None: it trains on examples."""
        return self.document or (self.training_file if self.training_file.purpose == "document" else None)

    @property
    def asked(self) -> StoredFile | None:
        """The questions about the document; None: there is none, or the model makes them."""
        found = self.questions or self.training_file
        return None if self.text is None or found.id == self.text.id else found

    @property
    def form(self) -> str:
        """How the training file's rows are read; empty: it is not said, and several forms fit."""
        facts = self.training_file.facts
        return str(self.options.get("form") or (facts.form if facts is not None else ""))


def make_job(request: JobRequest, *, job_id: str, owner: str, created: int, max_steps: int) -> Job:
    """A job that can be queued.

    Args:
        request: What is asked for.
        job_id: The job's id.
        owner: Who asks.
        created: When, in seconds since 1970.
        max_steps: Most optimizer steps that the owner may ask for.

    Raises:
        JobRefusedError: Something is wrong with the request.
    """
    name = str(request.options.get("name") or f"{request.suffix or 'ft'}-{job_id[-8:]}")
    _check_files(request)
    _check_options(request)
    try:
        check_result_name(name)
    except RequestError as error:
        param = "prefixtune.name" if request.options.get("name") else "suffix"
        raise JobRefusedError(param, error.message, "invalid_name") from None
    targets = _num_targets(request)
    values = _config_values(request, targets, max_steps) | _tracking(request, job_id)
    config = _validate(request, values)
    return Job(
        id=job_id,
        owner=owner,
        created=created,
        model=request.model,
        name=name,
        backbone=request.backbone,
        fingerprint=request.fingerprint,
        kind="examples" if request.text is None else "document",
        config=config.model_dump(mode="json", include=set(config.model_fields_set) - _PLACEHOLDERS),
        training_file=(request.text or request.training_file).id,
        validation_file=request.validation_file.id if request.validation_file else "",
        questions_file=request.asked.id if request.asked else "",
        targets=targets,
        seed=request.seed,
        hyperparameters=dict(request.hyperparameters),
        extension=dict(request.options),
        integrations=[dict(one) for one in request.integrations],
        suffix=request.suffix,
        metadata=dict(request.metadata),
    )


def resolved_hyperparameters(job: Job) -> dict[str, int | float]:
    """The hyperparameters of a job as numbers."""
    kind = DistillConfig if job.kind == "document" else TrainConfig
    batch_size = int(job.config.get("batch_size", kind.default("batch_size")))
    steps = int(job.config.get("max_steps", kind.default("max_steps")))
    epochs = float(job.config.get("epochs", kind.default("epochs")))
    if steps and job.targets:
        epochs = steps / -(-job.targets // batch_size)
    usual = _usual_rate(job.config)
    rate = float(job.config.get("learning_rate", 0.0)) or usual
    # Whole, as OpenAI's are.
    return {
        "n_epochs": max(1, round(epochs)),
        "batch_size": batch_size,
        "learning_rate_multiplier": round(rate / usual, 6),
    }


# --- what can be wrong ------------------------------------------------------------------------------------------------


def _check_files(request: JobRequest) -> None:
    """Refuse files that cannot be read as what they are for."""
    training, validation, text, asked = request.training_file, request.validation_file, request.text, request.asked
    if text is not None and training.id == text.id:
        _check_file("training_file", training, "document")
    else:
        form = "question" if asked is not None and training.id == asked.id else request.options.get("form")
        _check_file("training_file", training, "fine-tune", form)
    for param, file, purpose, form in (
        ("prefixtune.document", request.document, "document", None),
        ("prefixtune.questions", request.questions, "fine-tune", "question"),
        ("validation_file", validation, "fine-tune", None),
    ):
        if file is not None:
            _check_file(param, file, purpose, form)
    if text is not None and request.questions and training.id not in (text.id, request.questions.id):
        message = "'training_file' and prefixtune.questions both name questions; give one of them."
        raise JobRefusedError("training_file", message)
    facts = training.facts
    if text is None and facts is not None and facts.form and not facts.targets:
        message = f"{training.id} has nothing to train on: no row has a target, such as an answer."
        raise JobRefusedError("training_file", message, "invalid_training_file")
    unanswered = asked.facts.rows - asked.facts.targets if asked is not None and asked.facts is not None else 0
    if unanswered > _MOST_QUESTIONS:
        message = f"{unanswered:,} questions have no answer, but the model answers at most {_MOST_QUESTIONS:,}."
        param = "prefixtune.questions" if asked is request.questions else "training_file"
        raise JobRefusedError(param, message, "too_many_questions")
    if validation is not None and text is not None:
        raise JobRefusedError("validation_file", "a document has no validation file; leave it out.")
    forms = [request.form] if request.form else _forms(training)
    if validation is not None and not set(forms) & set(_forms(validation)):
        message = f"'validation_file' holds {_forms(validation)}, but 'training_file' holds {forms}."
        raise JobRefusedError("validation_file", message, "invalid_validation_file")


def _check_file(param: str, file: StoredFile, purpose: str, form: str | None = None) -> None:
    code = f"invalid_{param}" if "." not in param else "invalid_file"
    if file.status != "processed":
        details = file.status_details.rstrip(".")
        raise JobRefusedError(param, f"{file.id} cannot be trained on: {details}. Upload a corrected file.", code)
    if file.purpose != purpose:
        message = f"the purpose of {file.id} is {file.purpose!r}, but must be {purpose!r} here."
        raise JobRefusedError(param, message, code)
    if form and form not in _forms(file):
        where = "prefixtune.form" if param == "training_file" and form != "question" else param
        raise JobRefusedError(where, f"{file.id} holds {_forms(file)}, which are not read as {form!r}.", code)


def _forms(file: StoredFile) -> list[str]:
    return list(file.facts.forms) if file.facts is not None else []


def _check_options(request: JobRequest) -> None:
    """Refuse options that mean nothing in this job, or do not go together."""
    for name in request.options:
        if request.start_lengths is not None and name in ("start", "prefix_length", "init_text", "init_examples"):
            message = f"prefixtune.{name} is given, but training goes on from the prefix {request.model!r}."
            raise JobRefusedError(f"prefixtune.{name}", message)
    if str(request.options.get("init_text", "")).startswith("@"):
        message = "prefixtune.init_text must be a text that does not begin with '@'."
        raise JobRefusedError("prefixtune.init_text", message)
    if request.hyperparameters.get("n_epochs", AUTO) != AUTO and "max_steps" in request.options:
        message = "n_epochs and prefixtune.max_steps are both given; give one of them."
        raise JobRefusedError("prefixtune.max_steps", message)
    if request.text is None and not request.form:
        message = f"'training_file' can be read as {_forms(request.training_file)}; say which in prefixtune.form."
        raise JobRefusedError("prefixtune.form", message)
    projects = {(settings.get("project"), settings.get("name")) for settings in _trackers(request).values()}
    if len(projects) > 1:
        message = "the integrations have different projects or names, but a job has one of each."
        raise JobRefusedError("integrations", message)


# --- numbers ----------------------------------------------------------------------------------------------------------


def _num_targets(request: JobRequest) -> int:
    """What an epoch goes through."""
    if request.text is not None:
        if request.asked is not None and request.asked.facts is not None:
            return request.asked.facts.rows
        return int(request.options.get("num_questions", DistillConfig.default("num_questions")))
    facts = request.training_file.facts
    assert facts is not None
    # Texts are learned in windows.
    windows = facts.characters // _CHARACTERS_OF_WINDOW if request.form == "text" else 0
    return max(facts.targets or facts.rows, windows)


def _config_values(request: JobRequest, targets: int, max_steps: int) -> dict[str, Any]:
    """The values of the configuration: the request's, those of a preset beneath, and what `auto` stands for."""
    options, asked = request.options, request.hyperparameters
    no_config = ("name", "preset") if request.text is None else ("name", "document", "questions")
    given = {name: value for name, value in options.items() if name not in no_config}
    if "start" in given:
        given["initialization"] = given.pop("start")
    if request.start_lengths is not None:
        lengths = request.start_lengths
        given |= {"initialization": "prefix", "prefix_length": max(lengths.values()), "sites": spell_lengths(lengths)}
    if request.text is None:
        given["form"] = request.form
        given |= {"dev": "dev"} if request.validation_file is not None else {}
    numbers = {name: value for name, value in asked.items() if not isinstance(value, str)}
    given |= {"batch_size": int(numbers["batch_size"])} if "batch_size" in numbers else {}
    values = {**_preset_values(request, targets, given), **given, "seed": request.seed}
    batch_size = int(values.get("batch_size", TrainConfig.default("batch_size")))
    values["max_steps"] = _steps(request, values, targets, batch_size, max_steps)
    if request.validation_file is not None and "eval_every" not in values:
        values["eval_every"] = max(1, values["max_steps"] // _EVALUATIONS)
    if request.validation_file is not None or values.get("hold_out"):
        values["dev_limit"] = _num_validated(request)
    if "learning_rate_multiplier" in numbers:
        values["learning_rate"] = _usual_rate(values) * numbers["learning_rate_multiplier"]
    return values


def _usual_rate(values: Mapping[str, Any]) -> float:
    """The learning rate that a multiplier of 1 stands for."""
    return default_learning_rate(str(values.get("reparameterization", TrainConfig.default("reparameterization"))))


def _num_validated(request: JobRequest) -> int:
    """Targets that an evaluation computes, at most."""
    facts = (request.validation_file or request.training_file).facts
    assert facts is not None
    length = facts.characters // max(facts.targets, facts.rows, 1)
    return min(max(_VALIDATED_CHARACTERS // max(length, 1), _FEWEST_VALIDATED), MOST_VALIDATED)


def _preset_values(request: JobRequest, targets: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `quick`, for as few examples as it is for; refuses it where it is asked for and not for such data."""
    facts, chosen = request.training_file.facts, request.options.get("preset")
    if (
        request.text is not None
        or facts is None
        or chosen == "none"
        or (chosen is None and targets not in _QUICK_TARGETS)
    ):
        return {}
    if facts.task in ("classification", "tagging") or request.form == "text" or facts.examples < _FEWEST_EXAMPLES:
        if chosen is None:
            return {}
        what = f"at least {_FEWEST_EXAMPLES} examples whose targets are texts"
        message = f"prefixtune.preset is 'quick', which is for {what}; leave it out."
        raise JobRefusedError("prefixtune.preset", message)
    return without_conflicts(preset("quick", "records"), given)


def _steps(request: JobRequest, values: Mapping[str, Any], targets: int, batch_size: int, max_steps: int) -> int:
    """Optimizer steps; more than are allowed are refused."""
    per_epoch = -(-targets // batch_size)
    epochs, wanted = request.hyperparameters.get("n_epochs", AUTO), request.options.get("max_steps")
    if epochs == AUTO and not wanted:
        if request.text is not None:
            return min(int(DistillConfig.default("max_steps")), max_steps)
        return min(int(values.get("max_steps") or max(_FEWEST_STEPS, _EPOCHS * per_epoch)), max_steps)
    param, steps = "prefixtune.max_steps", int(wanted or 0)
    if epochs != AUTO:
        param, steps = "hyperparameters.n_epochs", int(epochs) * per_epoch
    if steps > max_steps:
        message = (
            f"{steps:,} steps are asked for, over {targets:,} targets in batches of {batch_size}, but a job of this "
            f"key may take {max_steps:,} (max_steps); ask for fewer steps."
        )
        raise JobRefusedError(param, message, "too_many_steps")
    return steps


def _trackers(request: JobRequest) -> dict[str, Mapping[str, Any]]:
    return {str(one["type"]): one.get(str(one["type"])) or {} for one in request.integrations}


def _tracking(request: JobRequest, job_id: str) -> dict[str, Any]:
    trackers = _trackers(request)
    if not trackers:
        return {}
    settings = next(iter(trackers.values()))
    project = {"project": settings["project"]} if settings.get("project") else {}
    return {"report_to": list(trackers), "run_name": settings.get("name") or job_id, **project}


# --- the configuration ------------------------------------------------------------------------------------------------


def _validate(request: JobRequest, values: Mapping[str, Any]) -> TrainConfig:
    """The configuration that the worker will have, with other paths; refuses values that do not go together."""
    paths: dict[str, Any] = {"output": "run", "init_prefix": "start" if request.start_lengths is not None else ""}
    try:
        config: TrainConfig
        if request.text is not None:
            config = DistillConfig(**values, **paths, document="document", questions=SELF)
        else:
            config = TrainConfig(**values, **paths, train="train")
    except PrefixError as error:
        message = re.sub(r"\binitialization\b", "start", error.message)
        # The option that it is about: the first that it names.
        named = {name: found.start() for name in request.options if (found := re.search(rf"\b{name}\b", message))}
        param = f"prefixtune.{min(named, key=named.__getitem__)}" if named else "prefixtune"
        raise JobRefusedError(param, message) from None
    if config.patience and not (config.dev or config.hold_out):
        message = "prefixtune.patience needs a validation file, or prefixtune.hold_out."
        raise JobRefusedError("prefixtune.patience", message)
    return config
