"""From what somebody asks for to a job that can be queued: every number settled, every mistake found before that."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from prefixtune.distillation.config import SELF, DistillConfig
from prefixtune.errors import PrefixError, RequestError
from prefixtune.jobs.job import Job, check_result_name
from prefixtune.prefix.geometry import spell_lengths
from prefixtune.training.config import TrainConfig, default_learning_rate
from prefixtune.training.presets import preset, without_conflicts

if TYPE_CHECKING:
    from prefixtune.jobs.stored_file import StoredFile

__all__ = [
    "AUTO",
    "DOCUMENT_OPTIONS",
    "EXAMPLE_OPTIONS",
    "MOST_VALIDATED",
    "Hyperparameters",
    "JobRefusedError",
    "JobRequest",
    "make_job",
    "resolved_hyperparameters",
    "served_name",
]


AUTO = "auto"
Hyperparameters = Mapping[str, int | float | Literal["auto"]]

_SHARED_OPTIONS = (
    *("name", "prefix_length", "start", "init_text", "compaction", "reparameterization", "prefix_dropout", "nested"),
    *("max_steps", "eval_every", "warmup_steps", "weight_decay", "save_dtype", "license"),
)
EXAMPLE_OPTIONS = (
    *(*_SHARED_OPTIONS, "preset", "form", "system", "chat_template", "max_length", "on_too_long", "init_examples"),
    *("hold_out", "patience", "classifier", "label_words"),
)
"""Fields of the request's object `prefixtune` for a job that trains on examples."""
DOCUMENT_OPTIONS = (
    *(*_SHARED_OPTIONS, "document", "questions", "num_questions", "kinds", "answer_length", "chunk_length", "ask"),
)
"""Those for a job that distills a document."""

_CONFIG_NAMES = {"start": "initialization"}
"""Options that a configuration calls something else."""
_NOT_CONFIG = ("name", "preset", "document", "questions")
_PLACEHOLDERS = frozenset({"train", "dev", "document", "questions", "output", "init_prefix"})
"""Paths, which the worker fills in."""
_QUICK_TARGETS, _FEWEST_EXAMPLES = range(8, 201), 4
_FEWEST_STEPS, _EPOCHS = 24, 5
_EVALUATIONS, _MOST_EVALUATIONS = 8, 100
"""Of a run: with a validation file, unless the request says otherwise; and at most."""
MOST_VALIDATED, _FEWEST_VALIDATED, _VALIDATED_CHARACTERS = 256, 16, 60_000
"""Targets of a validation file, or of those held out, that are used: the first ones, fewer of long ones, as other jobs
wait while they are computed; and the characters that they have together, about."""
_MOST_VALIDATED_TEXT = 240_000
"""Characters of texts that are learned in windows: none of them is cut."""
_MOST_QUESTIONS = 1000
"""Without an answer, which the model has to write."""
_CHARACTERS_OF_WINDOW = 2048
"""Of a text that is learned in windows; an estimate."""


class Fault(NamedTuple):
    """One thing that is wrong with a request.

    Attributes:
        param: The field of the request.
        message: A sentence.
        code: For programs.
    """

    param: str
    message: str
    code: str | None = None


class JobRefusedError(RequestError):
    """A request for a job is wrong.

    Attributes:
        param: The first field at fault.
        code: For programs; None: there is none.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__(" ".join(fault.message for fault in faults))
        self.param, self.code = faults[0].param, faults[0].code


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
    def is_document(self) -> bool:
        """Whether it distills a document."""
        return self.document is not None or self.training_file.purpose == "document"


def served_name(job_id: str, options: Mapping[str, Any], suffix: str) -> str:
    """The name that a job's result will have."""
    return str(options.get("name") or f"{suffix or 'ft'}-{job_id[-8:]}")


def make_job(request: JobRequest, *, job_id: str, owner: str, created: int, max_steps: int) -> Job:
    """A job that can be queued.

    Args:
        request: What is asked for.
        job_id: The job's id.
        owner: Who asks.
        created: When, in seconds since 1970.
        max_steps: Most optimizer steps that the owner may ask for.

    Raises:
        JobRefusedError: Something is wrong with the request; all faults are listed.
    """
    name = served_name(job_id, request.options, request.suffix)
    faults = [*_file_faults(request), *_option_faults(request), *_name_faults(request, name)]
    if faults:
        raise JobRefusedError(faults)
    document = request.document or (request.training_file if request.is_document else None)
    questions = request.questions or (request.training_file if request.document else None)
    if document is not None and questions is not None and questions.id == document.id:
        questions = None
    targets = _num_targets(request, questions)
    values = _config_values(request, targets, max_steps) | _tracking(request, job_id)
    config = _validate(request, values, has_questions=questions is not None)
    stored = config.model_dump(mode="json", include=set(config.model_fields_set) - _PLACEHOLDERS)
    return Job(
        id=job_id,
        owner=owner,
        created=created,
        model=request.model,
        name=name,
        backbone=request.backbone,
        fingerprint=request.fingerprint,
        kind="examples" if document is None else "document",
        config=stored,
        training_file=(document or request.training_file).id,
        validation_file=request.validation_file.id if request.validation_file else "",
        questions_file=questions.id if questions else "",
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


def _file_faults(request: JobRequest) -> Iterator[Fault]:
    """Files that cannot be read as what they are for."""
    training, validation = request.training_file, request.validation_file
    if request.document is not None:
        yield from _unfit("prefixtune.document", request.document, "document")
        if request.training_file.id != request.document.id:
            yield from _unfit("training_file", training, "fine-tune", form="question")
            if request.questions is not None:
                message = "'training_file' and prefixtune.questions both name questions; give the document or questions"
                yield Fault("training_file", f"{message} as the training file.")
    elif training.purpose == "document":
        yield from _unfit("training_file", training, "document")
    else:
        yield from _unfit("training_file", training, "fine-tune", form=request.options.get("form"))
        yield from _without_targets(training)
    if request.questions is not None:
        yield from _unfit("prefixtune.questions", request.questions, "fine-tune", form="question")
    questions = request.questions or (training if request.document is not None else None)
    if questions is not None and (facts := questions.facts) is not None:
        unanswered = facts.rows - facts.targets
        if unanswered > 0 and facts.rows > _MOST_QUESTIONS:
            message = (
                f"{questions.id} has {facts.rows:,} questions, {unanswered:,} of them without an answer, but the model "
                f"answers at most {_MOST_QUESTIONS:,}; leave some out, or give answers."
            )
            yield Fault("prefixtune.questions" if request.questions else "training_file", message, "too_many_questions")
    if validation is None:
        return
    if request.is_document:
        yield Fault("validation_file", "a document has no validation file; leave 'validation_file' out.")
        return
    yield from _unfit("validation_file", validation, "fine-tune")
    forms = _forms(training, request.options.get("form"))
    if validation.facts is not None and forms and not set(forms) & set(validation.facts.forms):
        message = (
            f"'validation_file' holds {_named(validation.facts.forms)}, but 'training_file' holds {_named(forms)}; "
            "both must have the same form."
        )
        yield Fault("validation_file", message, "invalid_validation_file")


def _unfit(param: str, file: StoredFile, purpose: str, form: str | None = None) -> Iterator[Fault]:
    code = f"invalid_{param}" if "." not in param else "invalid_file"
    if file.status != "processed":
        details = file.status_details.rstrip(".")
        yield Fault(param, f"{file.id} cannot be trained on: {details}. Upload a corrected file.", code)
    elif file.purpose != purpose:
        message = f"the purpose of {file.id} is {file.purpose!r}, but must be {purpose!r} here."
        yield Fault(param, message, code)
    elif form and file.facts is not None and form not in file.facts.forms:
        where = "prefixtune.form" if param == "training_file" and form != "question" else param
        yield Fault(where, f"{file.id} holds {_named(file.facts.forms)}, which are not read as {form!r}.", code)


def _without_targets(file: StoredFile) -> Iterator[Fault]:
    facts = file.facts
    if file.status == "processed" and facts is not None and facts.form and not facts.targets:
        message = f"{file.id} has nothing to train on: no row has a target, such as an answer."
        yield Fault("training_file", message, "invalid_training_file")


def _forms(file: StoredFile, form: str | None) -> list[str]:
    if form:
        return [form]
    return list(file.facts.forms) if file.facts is not None else []


def _named(forms: Sequence[str]) -> str:
    return " or ".join(repr(form) for form in forms) or "nothing"


def _option_faults(request: JobRequest) -> Iterator[Fault]:
    """Options that mean nothing in this job, or do not go together."""
    allowed = DOCUMENT_OPTIONS if request.is_document else EXAMPLE_OPTIONS
    other = "a document" if not request.is_document else "examples"
    for name in request.options:
        if name not in allowed:
            yield Fault(f"prefixtune.{name}", f"prefixtune.{name} is for jobs that train on {other}.")
    if request.start_lengths is not None:
        for name in ("start", "prefix_length", "init_text", "init_examples"):
            if name in request.options:
                message = f"prefixtune.{name} is given, but training goes on from the prefix {request.model!r}."
                yield Fault(f"prefixtune.{name}", message)
    if str(request.options.get("init_text", "")).startswith("@"):
        yield Fault("prefixtune.init_text", "prefixtune.init_text must be a text that does not begin with '@'.")
    epochs = request.hyperparameters.get("n_epochs", AUTO)
    if epochs != AUTO and "max_steps" in request.options:
        yield Fault("prefixtune.max_steps", "n_epochs and prefixtune.max_steps are both given; give one of them.")
    facts = request.training_file.facts
    if not request.is_document and facts is not None and not facts.form and "form" not in request.options:
        message = f"'training_file' can be read as {_named(facts.forms)}; say which in prefixtune.form."
        yield Fault("prefixtune.form", message)
    projects = {(settings.get("project"), settings.get("name")) for settings in _trackers(request).values()}
    if len(projects) > 1:
        yield Fault("integrations", "the integrations have different projects or names, but a job has one of each.")


def _name_faults(request: JobRequest, name: str) -> Iterator[Fault]:
    try:
        check_result_name(name)
    except RequestError as error:
        param = "prefixtune.name" if request.options.get("name") else "suffix"
        yield Fault(param, f"{error.message} {error.hint[:1].upper()}{error.hint[1:]}", "invalid_name")


# --- numbers ----------------------------------------------------------------------------------------------------------


def _num_targets(request: JobRequest, questions: StoredFile | None) -> int:
    """What an epoch goes through."""
    if request.is_document:
        if questions is not None and questions.facts is not None:
            return questions.facts.rows
        return int(request.options.get("num_questions", DistillConfig.default("num_questions")))
    facts = request.training_file.facts
    assert facts is not None
    # Texts are learned in windows.
    windows = facts.characters // _CHARACTERS_OF_WINDOW if _form(request) == "text" else 0
    return max(facts.targets or facts.rows, windows)


def _form(request: JobRequest) -> str:
    facts = request.training_file.facts
    return str(request.options.get("form") or (facts.form if facts is not None else ""))


def _config_values(request: JobRequest, targets: int, max_steps: int) -> dict[str, Any]:
    """The values of the configuration: the request's, those of a preset beneath, and what `auto` stands for."""
    options, asked = request.options, request.hyperparameters
    given = {_CONFIG_NAMES.get(name, name): value for name, value in options.items() if name not in _NOT_CONFIG}
    if request.start_lengths is not None:
        given |= _continued(request.start_lengths)
    if not request.is_document:
        given |= {"form": _form(request)} if _form(request) else {}
        given |= {"dev": "dev"} if request.validation_file is not None else {}
    numbers = {name: value for name, value in asked.items() if not isinstance(value, str)}
    given |= {"batch_size": int(numbers["batch_size"])} if "batch_size" in numbers else {}
    values = {**_preset_values(request, targets, given), **given, "seed": request.seed}
    batch_size = int(values.get("batch_size", TrainConfig.default("batch_size")))
    values["max_steps"] = _steps(request, values, targets, batch_size, max_steps)
    if request.validation_file is not None and "eval_every" not in values:
        values["eval_every"] = max(1, values["max_steps"] // _EVALUATIONS)
    if every := int(values.get("eval_every", TrainConfig.default("eval_every"))):
        values["eval_every"] = _bounded_every(every, values["max_steps"], is_asked_for="eval_every" in options)
    if request.validation_file is not None or values.get("hold_out"):
        values["dev_limit"] = _num_validated(request)
    if "learning_rate_multiplier" in numbers:
        values["learning_rate"] = _usual_rate(values) * numbers["learning_rate_multiplier"]
    return values


def _usual_rate(values: Mapping[str, Any]) -> float:
    """The learning rate that a multiplier of 1 stands for."""
    return default_learning_rate(str(values.get("reparameterization", TrainConfig.default("reparameterization"))))


def _num_validated(request: JobRequest) -> int:
    """Targets that an evaluation computes, at most.

    Raises:
        JobRefusedError: They are texts, which are not cut, and too long.
    """
    facts = (request.validation_file or request.training_file).facts
    assert facts is not None
    length = facts.characters // max(facts.targets, facts.rows, 1)
    count = min(max(_VALIDATED_CHARACTERS // max(length, 1), _FEWEST_VALIDATED), MOST_VALIDATED)
    characters = length * min(count, facts.rows)
    if _form(request) == "text" and characters > _MOST_VALIDATED_TEXT:
        param = "validation_file" if request.validation_file is not None else "prefixtune.hold_out"
        message = (
            f"{characters:,} characters of text would be evaluated each time, but {_MOST_VALIDATED_TEXT:,} may be; "
            "give a shorter validation file."
        )
        raise JobRefusedError([Fault(param, message, "too_much_to_validate")])
    return count


def _continued(lengths: Mapping[str, int]) -> dict[str, Any]:
    """A start from a prefix of these lengths."""
    return {"initialization": "prefix", "prefix_length": max(lengths.values()), "sites": spell_lengths(lengths)}


def _preset_values(request: JobRequest, targets: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `quick`, for as few examples as it is for.

    Raises:
        JobRefusedError: It is asked for, and is not for such data.
    """
    facts, chosen = request.training_file.facts, request.options.get("preset")
    if request.is_document or facts is None or chosen == "none" or (chosen is None and targets not in _QUICK_TARGETS):
        return {}
    if facts.task in ("classification", "tagging") or _form(request) == "text" or facts.examples < _FEWEST_EXAMPLES:
        if chosen is None:
            return {}
        what = f"at least {_FEWEST_EXAMPLES} examples whose targets are texts"
        message = f"prefixtune.preset is 'quick', which is for {what}; leave it out."
        raise JobRefusedError([Fault("prefixtune.preset", message)])
    return without_conflicts(preset("quick", "records"), given)


def _steps(request: JobRequest, values: Mapping[str, Any], targets: int, batch_size: int, max_steps: int) -> int:
    """Optimizer steps.

    Raises:
        JobRefusedError: They are more than allowed.
    """
    per_epoch = -(-targets // batch_size)
    epochs = request.hyperparameters.get("n_epochs", AUTO)
    if epochs != AUTO:
        steps = int(epochs) * per_epoch
        why = f"n_epochs {epochs} over {targets:,} targets in batches of {batch_size} takes {steps:,} steps"
        return _bounded(steps, max_steps, "hyperparameters.n_epochs", why)
    if wanted := request.options.get("max_steps"):
        return _bounded(wanted, max_steps, "prefixtune.max_steps", f"prefixtune.max_steps is {wanted:,}")
    if request.is_document:
        return min(int(DistillConfig.default("max_steps")), max_steps)
    return min(int(values.get("max_steps") or max(_FEWEST_STEPS, _EPOCHS * per_epoch)), max_steps)


def _bounded(steps: int, max_steps: int, param: str, why: str) -> int:
    if steps > max_steps:
        message = f"{why}, but a job of this key may take {max_steps:,} (max_steps); ask for fewer steps."
        raise JobRefusedError([Fault(param, message, "too_many_steps")])
    return steps


def _bounded_every(every: int, steps: int, *, is_asked_for: bool) -> int:
    """Steps between evaluations, so that these take no more time than the steps.

    Raises:
        JobRefusedError: More evaluations are asked for.
    """
    fewest = -(-steps // _MOST_EVALUATIONS)
    if is_asked_for and every < fewest:
        message = (
            f"prefixtune.eval_every is {every}, which makes {-(-steps // every):,} evaluations in {steps:,} steps, but "
            f"a job has at most {_MOST_EVALUATIONS}; give {fewest} or more."
        )
        raise JobRefusedError([Fault("prefixtune.eval_every", message, "too_many_evaluations")])
    return max(every, fewest)


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


def _validate(request: JobRequest, values: Mapping[str, Any], *, has_questions: bool) -> TrainConfig:
    """The configuration that the worker will have, with other paths.

    Raises:
        JobRefusedError: Values do not go together.
    """
    paths = {"output": "run", "init_prefix": "start" if request.start_lengths is not None else ""}
    kind: type[TrainConfig] = TrainConfig
    if request.is_document:
        kind, files = DistillConfig, {"document": "document", "questions": "questions" if has_questions else SELF}
    else:
        files = {"train": "train"}
    try:
        config = kind(**{**values, **paths, **files})
    except PrefixError as error:
        message = _in_words_of_the_request(error.message)
        raise JobRefusedError([Fault(_param(message, request.options), message)]) from None
    if config.patience and not (config.dev or config.hold_out):
        message = "prefixtune.patience needs a validation file, or prefixtune.hold_out."
        raise JobRefusedError([Fault("prefixtune.patience", message)])
    return config


def _in_words_of_the_request(message: str) -> str:
    for option, name in _CONFIG_NAMES.items():
        message = re.sub(rf"\b{name}\b", option, message)
    return message


def _param(message: str, options: Mapping[str, Any]) -> str:
    """The option that a message is about: the first that it names."""
    found = {name: match.start() for name in options if (match := re.search(rf"\b{name}\b", message))}
    return f"prefixtune.{min(found, key=found.__getitem__)}" if found else "prefixtune"
