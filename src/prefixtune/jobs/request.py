"""From what somebody asks for to a job that can be queued: every number settled, and what is wrong told at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prefixtune.distillation.config import SELF, DistillConfig
from prefixtune.errors import PrefixError
from prefixtune.jobs.job import Job, RefusedError
from prefixtune.prefix.geometry import spell_lengths
from prefixtune.training.config import TrainConfig, default_learning_rate
from prefixtune.training.presets import preset, without_conflicts

if TYPE_CHECKING:
    from prefixtune.jobs.files import StoredFile

_PATHS = frozenset({"train", "dev", "document", "questions", "output", "init_prefix"})
"""Fields that the worker fills in."""
_NAME = re.compile(r"(?!.*\.step-[0-9]+\Z)[A-Za-z0-9_-][A-Za-z0-9._-]{0,111}")
"""Of a result: so that `.step-N` can follow it, and not the name of a checkpoint."""
_OF_START = ("start", "prefix_length", "init_text", "init_examples")
"""Options that a prefix to go on from has itself."""
_QUICK_TARGETS, _FEWEST_EXAMPLES = range(8, 201), 4
_FEWEST_STEPS, _EPOCHS = 24, 5
_EVALUATIONS = 8
"""Of a run with a validation file, unless the request says otherwise."""
MOST_VALIDATED = 256
"""Targets of a validation file, or of those held out, that are used: the first ones."""
_MOST_QUESTIONS = 1000
"""Without an answer, which the model has to write."""
_CHARACTERS_OF_WINDOW = 2048
"""Of a text that is learned in windows; an estimate."""


def settle_job(
    asked: Job,
    files: Mapping[str, StoredFile],
    hyperparameters: Mapping[str, Any],
    *,
    max_steps: int,
    start_lengths: Mapping[str, int] | None = None,
) -> Job:
    """A job that can be queued.

    Args:
        asked: All that is asked for; what follows from the files is still empty.
        files: By the request's field: `training_file` has the examples or is the document; the best prefix is chosen by
            `validation_file`; `prefixtune.questions` are about the document, and without them the model makes some.
        hyperparameters: `n_epochs`, `batch_size` and `learning_rate_multiplier`, each a number or `auto`.
        max_steps: Most optimizer steps that the owner may ask for.
        start_lengths: Positions by site of the prefix to go on from; None: training begins anew.

    Raises:
        RefusedError: Something is wrong with the request.
    """
    options, training = asked.extension, files["training_file"]
    validation, questions = files.get("validation_file"), files.get("prefixtune.questions")
    numbers = {name: value for name, value in hyperparameters.items() if value != "auto"}
    is_document = training.purpose == "document"
    form = None if is_document else str(options.get("form") or (training.facts.form if training.facts else ""))
    for param, file in files.items():
        _check_file(param, file, "question" if file is questions else form)
    _check_options(asked, numbers, questions, start_lengths)
    values = _given_values(asked, form, start_lengths)
    if validation is not None:
        values["dev"] = "dev"
    targets = _num_targets(questions or training, form, options)
    values = {**_preset_values(training, form, targets, values, options.get("preset")), **values}
    usual_rate = default_learning_rate(values.get("reparameterization", TrainConfig.default("reparameterization")))
    batch_size = int(numbers.get("batch_size", values.get("batch_size", TrainConfig.default("batch_size"))))
    per_epoch = -(-targets // batch_size)
    usual = int(values.get("max_steps") or max(_FEWEST_STEPS, _EPOCHS * per_epoch))
    steps = min(int(DistillConfig.default("max_steps")) if is_document else usual, max_steps)
    steps = int(options.get("max_steps", numbers.get("n_epochs", 0) * per_epoch)) or steps
    if steps > max_steps:
        message = f"{steps:,} steps are asked for, but a job of this key may take {max_steps:,} (max_steps)."
        param = "prefixtune.max_steps" if "max_steps" in options else "hyperparameters.n_epochs"
        raise RefusedError(param, message, "too_many_steps")
    values |= {"batch_size": batch_size, "max_steps": steps, "seed": asked.seed}
    if "learning_rate_multiplier" in numbers:
        values["learning_rate"] = usual_rate * numbers["learning_rate_multiplier"]
    if validation is not None:
        values = {"eval_every": max(1, steps // _EVALUATIONS), **values}
    if validation is not None or values.get("hold_out"):
        values["dev_limit"] = MOST_VALIDATED
    config = _validate(values, is_document=is_document)
    settled: dict[str, Any] = {
        "name": _result_name(asked),
        "kind": "document" if is_document else "examples",
        "config": config.model_dump(mode="json", include=set(config.model_fields_set) - _PATHS),
        "training_file": training.id,
        "validation_file": validation.id if validation else "",
        "questions_file": questions.id if questions else "",
        # Whole, as OpenAI's are.
        "hyperparameters": {
            "n_epochs": max(1, round(steps / per_epoch)),
            "batch_size": batch_size,
            "learning_rate_multiplier": round((config.learning_rate or usual_rate) / usual_rate, 6),
        },
    }
    return asked.model_copy(update=settled)


# --- what can be wrong ------------------------------------------------------------------------------------------------


def _result_name(asked: Job) -> str:
    """What the result will be served as."""
    name = str(asked.extension.get("name") or f"{asked.suffix or 'ft'}-{asked.id[-8:]}")
    if not _NAME.fullmatch(name):
        message = f"{name[:128]!r} is no name: use at most 112 letters, digits, '.', '_' and '-', without '.step-N'."
        raise RefusedError("prefixtune.name" if "name" in asked.extension else "suffix", message, "invalid_name")
    return name


def _check_file(param: str, file: StoredFile, form: str | None) -> None:
    """Refuse a file that cannot be read in a form; None: as a document."""
    code, forms = f"invalid_{param.removeprefix('prefixtune.')}", file.facts.forms if file.facts else []
    if file.status != "processed":
        what = file.status_details.rstrip(".")
        raise RefusedError(param, f"{file.id} cannot be trained on: {what}. Upload a corrected file.", code)
    if form == "" and forms:
        raise RefusedError("prefixtune.form", f"'training_file' can be read as {forms}; say which by this option.")
    if form is not None and (form not in forms or file.purpose != "fine-tune"):
        raise RefusedError(param, f"{file.id} ({file.purpose}) holds {forms}, but must hold {form!r}.", code)


def _check_options(
    asked: Job, numbers: Mapping[str, Any], questions: StoredFile | None, start_lengths: Mapping[str, int] | None
) -> None:
    """Refuse options that mean nothing in this job, or do not go together."""
    options, facts = asked.extension, questions.facts if questions else None
    begun = [name for name in _OF_START if name in options and start_lengths is not None]
    unanswered = facts.rows - facts.targets if facts else 0
    for name, is_wrong, message in (
        *((name, True, f"training goes on from {asked.model!r}, which has its own {name}") for name in begun),
        # A command line would read a file.
        ("init_text", str(options.get("init_text")).startswith("@"), "init_text must not begin with '@'"),
        ("max_steps", "n_epochs" in numbers and "max_steps" in options, "both n_epochs and max_steps are given"),
        ("questions", unanswered > _MOST_QUESTIONS, f"at most {_MOST_QUESTIONS:,} questions may have no answer"),
    ):
        if is_wrong:
            raise RefusedError(f"prefixtune.{name}", f"{message}.")


# --- the configuration ------------------------------------------------------------------------------------------------


def _num_targets(file: StoredFile, form: str | None, options: Mapping[str, Any]) -> int:
    """What an epoch goes through."""
    assert file.facts is not None
    if file.purpose == "document":
        return int(options.get("num_questions", DistillConfig.default("num_questions")))
    # Texts are learned in windows.
    windows = file.facts.characters // _CHARACTERS_OF_WINDOW if form == "text" else 0
    return max((file.facts.targets if form else 0) or file.facts.rows, windows)


def _given_values(asked: Job, form: str | None, start_lengths: Mapping[str, int] | None) -> dict[str, Any]:
    """What the request says, as the configuration calls it."""
    no_config = ("name", "document", "questions") if form is None else ("name", "preset")
    names = {"start": "initialization"}
    given = {names.get(name, name): value for name, value in asked.extension.items() if name not in no_config}
    if form is not None:
        given["form"] = form
    if start_lengths is not None:
        length, sites = max(start_lengths.values()), spell_lengths(start_lengths)
        given |= {"initialization": "prefix", "init_prefix": "start", "prefix_length": length, "sites": sites}
    for integration in asked.integrations:
        settings = integration.get(integration["type"]) or {}
        given |= {"report_to": [integration["type"]], "run_name": settings.get("name") or asked.id}
        given["project"] = settings.get("project") or ""
    return given


def _preset_values(
    training: StoredFile, form: str | None, targets: int, given: Mapping[str, Any], chosen: str | None
) -> dict[str, Any]:
    """Those of `quick`, where it is asked for, or there are as few examples as it is for."""
    facts = training.facts
    if form is None or facts is None or (chosen or ("quick" if targets in _QUICK_TARGETS else "none")) == "none":
        return {}
    if facts.task not in ("classification", "tagging") and form != "text" and facts.examples >= _FEWEST_EXAMPLES:
        return without_conflicts(preset("quick", "records"), given)
    if chosen is None:
        return {}
    message = f"the preset 'quick' is for at least {_FEWEST_EXAMPLES} examples whose targets are texts."
    raise RefusedError("prefixtune.preset", message)


def _validate(values: Mapping[str, Any], *, is_document: bool) -> TrainConfig:
    """The configuration that the worker will have, with other paths; refuses values that do not go together."""
    try:
        if is_document:
            return DistillConfig(**values, output="run", document="document", questions=SELF)
        return TrainConfig(**values, output="run", train="train")
    except PrefixError as error:
        raise RefusedError("prefixtune", error.message.replace("initialization", "start")) from None
