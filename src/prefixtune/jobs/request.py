"""From what somebody asks for to what a worker trains by: every number settled by the data and the limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prefixtune.distillation.config import SELF, DistillConfig
from prefixtune.errors import PrefixError
from prefixtune.jobs.job import Job, RefusedError
from prefixtune.training.config import TrainConfig, default_learning_rate
from prefixtune.training.presets import preset, without_conflicts

if TYPE_CHECKING:
    from prefixtune.jobs.files import StoredFile

_PATHS = frozenset({"train", "dev", "document", "questions", "output", "init_prefix"})
"""Fields that the worker fills in."""
_QUICK_TARGETS, _FEWEST_EXAMPLES = range(8, 201), 4
_FEWEST_STEPS, _EPOCHS = 24, 5
_EVALUATIONS = 8
"""Of a run with a validation file, unless the request says otherwise."""
MOST_VALIDATED = 256
"""Targets of a validation file, or of those held out, that are used: the first ones."""
_CHARACTERS_OF_WINDOW = 2048
"""Of a text that is learned in windows; an estimate."""


def settle_job(asked: Job, files: Mapping[str, StoredFile], given: Mapping[str, Any], max_steps: int) -> Job:
    """A job that can be queued.

    Args:
        asked: All that is asked for, the hyperparameters (`n_epochs`, `batch_size` and `learning_rate_multiplier`) each
            as a number or `auto`; what a worker trains by is still empty.
        files: By the request's field: `training_file` has the examples or is the document; the best prefix is chosen by
            `validation_file`; `prefixtune.questions` are about the document, and without them the model makes some.
        given: What the request says, as the configuration calls it; of examples, their form is in it.
        max_steps: Most optimizer steps that the owner may ask for.

    Raises:
        RefusedError: Too many steps are asked for, or values do not go together.
    """
    options, training, is_document = asked.extension, files["training_file"], asked.kind == "document"
    has_validation = "validation_file" in files
    numbers = {name: value for name, value in asked.hyperparameters.items() if value != "auto"}
    values = {**given, "dev": "dev"} if has_validation else dict(given)
    targets = _num_targets(files.get("prefixtune.questions", training), values)
    if not is_document:
        values = {**_preset_values(training, targets, values, options.get("preset")), **values}
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
    if has_validation:
        values = {"eval_every": max(1, steps // _EVALUATIONS), **values}
    if has_validation or values.get("hold_out"):
        values["dev_limit"] = MOST_VALIDATED
    config = _validate(values, is_document=is_document)
    settled = config.model_dump(mode="json", include=set(config.model_fields_set) - _PATHS)
    # Epochs are whole, as OpenAI's are.
    told: dict[str, float] = {"n_epochs": max(1, round(steps / per_epoch)), "batch_size": batch_size}
    told["learning_rate_multiplier"] = round((config.learning_rate or usual_rate) / usual_rate, 6)
    return asked.model_copy(update={"config": settled, "hyperparameters": told})


def _num_targets(file: StoredFile, values: Mapping[str, Any]) -> int:
    """What an epoch goes through."""
    assert file.facts is not None
    if file.purpose == "document":
        return int(values.get("num_questions", DistillConfig.default("num_questions")))
    # Texts are learned in windows.
    windows = file.facts.characters // _CHARACTERS_OF_WINDOW if values.get("form") == "text" else 0
    # Of questions all count, as the model answers the others.
    return max((file.facts.targets if "form" in values else 0) or file.facts.rows, windows)


def _preset_values(training: StoredFile, targets: int, given: Mapping[str, Any], chosen: str | None) -> dict[str, Any]:
    """Those of `quick`, where it is asked for, or there are as few examples as it is for."""
    facts = training.facts
    if facts is None or (chosen or ("quick" if targets in _QUICK_TARGETS else "none")) == "none":
        return {}
    has_texts = given["form"] != "text" and facts.task not in ("classification", "tagging")
    if has_texts and facts.examples >= _FEWEST_EXAMPLES:
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
