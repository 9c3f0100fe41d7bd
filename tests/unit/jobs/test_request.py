"""From a request to a job: what `auto` stands for, and everything that is wrong, in the words of the request."""

from __future__ import annotations

from typing import Any

import pytest

from prefixtune.distillation.config import DistillConfig
from prefixtune.jobs.file_check import FileFacts
from prefixtune.jobs.files import StoredFile
from prefixtune.jobs.job import Job
from prefixtune.jobs.request import MOST_VALIDATED, JobRefusedError, JobRequest, make_job, resolved_hyperparameters
from prefixtune.training.config import TrainConfig


def stored(number: int = 1, form: str = "prompt", targets: int = 50, **more: Any) -> StoredFile:
    """An uploaded file of so many rows."""
    forms, task = more.pop("forms", [form]), more.pop("task", "records")
    facts: dict[str, Any] = {"form": form, "forms": forms, "task": task, "characters": more.pop("characters", 100)}
    counts = {"rows": targets, "examples": targets, "targets": more.pop("counted", targets)}
    file: dict[str, Any] = {"purpose": "fine-tune", "facts": FileFacts(**facts, **counts), **more}
    return StoredFile(
        id=f"file-{number:024x}", owner="ann", bytes=1, created_ns=1, filename="a.jsonl", ending=".jsonl", **file
    )


DOCUMENT = stored(9, "document", 0, purpose="document", task="document")
QUESTIONS = stored(8, "question", 40)


def made(max_steps: int = 5000, **fields: Any) -> Job:
    request = JobRequest(**{"model": "tiny", "training_file": stored(), **fields})
    return make_job(request, job_id="ftjob-" + "ab" * 12, owner="ann", created=1, max_steps=max_steps)


def refused(**fields: Any) -> JobRefusedError:
    with pytest.raises(JobRefusedError) as caught:
        made(**fields)
    return caught.value


@pytest.mark.parametrize(
    ("file", "steps", "epochs", "is_quick"),
    [
        (stored(targets=50), 24, 6, True),
        (stored(targets=7), 24, 24, False),
        (stored(targets=1000), 315, 5, False),
        (stored(targets=1_000_000), 5000, 1, False),
        (stored(form="label", task="classification"), 24, 6, False),
        (stored(form="text", targets=10), 24, 24, False),
        # A long text is learned in windows.
        (stored(form="text", targets=1, characters=2048 * 320), 100, 5, False),
    ],
)
def test_auto_chooses_by_the_data(file: StoredFile, steps: int, epochs: int, is_quick: bool) -> None:
    job = made(training_file=file)
    assert job.config["max_steps"] == steps
    assert resolved_hyperparameters(job) == {"n_epochs": epochs, "batch_size": 16, "learning_rate_multiplier": 1.0}
    assert (job.config.get("initialization") == "examples") == is_quick
    assert job.config["form"] == file.facts.form if file.facts else ""


def test_numbers_are_used_as_they_are() -> None:
    numbers = {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 0.5}
    job = made(hyperparameters=numbers, options={"reparameterization": "none"}, seed=5)
    config = TrainConfig(train="x", output="y", **job.config)
    assert (config.max_steps, config.batch_size, config.learning_rate, config.seed) == (21, 8, 2.5e-3, 5)
    assert resolved_hyperparameters(job) == numbers
    assert job.hyperparameters == numbers


def test_the_same_values_come_back_from_the_database() -> None:
    for options in ({}, {"start": "examples", "prefix_length": 10, "init_examples": 3}, {"preset": "none"}):
        job = made(options=options)
        again = Job.model_validate_json(job.model_dump_json())
        config = TrainConfig(train="x", output="y", **again.config)
        assert {name: config.to_dict()[name] for name in again.config} == again.config
        assert not {"train", "dev", "output", "init_prefix"} & again.config.keys()


def test_a_validation_file_is_evaluated_on_while_it_trains() -> None:
    job = made(training_file=stored(targets=1000), validation_file=stored(2))
    assert job.config["eval_every"] == 39
    assert job.validation_file == stored(2).id


def test_evaluations_take_a_bounded_part_of_the_time() -> None:
    large, validation = stored(targets=100_000), stored(2, targets=10_000)
    assert made(training_file=large, validation_file=validation).config["dev_limit"] == MOST_VALIDATED
    assert made(training_file=large, options={"hold_out": 0.5}).config["dev_limit"] == MOST_VALIDATED
    assert "dev_limit" not in made(training_file=large).config
    for characters, limit in ((600, 100), (1_000_000, 16)):
        long = stored(2, targets=10_000, characters=10_000 * characters)
        assert made(training_file=large, validation_file=long).config["dev_limit"] == limit


def test_the_model_answers_a_bounded_number_of_questions() -> None:
    some = stored(7, "question", 1001, counted=0)
    for fields, param in (
        ({"training_file": DOCUMENT, "questions": some}, "prefixtune.questions"),
        ({"training_file": some, "document": DOCUMENT}, "training_file"),
    ):
        error = refused(**fields)
        assert (error.param, error.code) == (param, "too_many_questions")
    # Nothing has to be written for these.
    made(training_file=DOCUMENT, questions=stored(7, "question", 5000))


def test_a_document_is_distilled() -> None:
    job = made(training_file=DOCUMENT, options={"prefix_length": 8, "num_questions": 32})
    config = DistillConfig(document="x", questions="self", output="y", **job.config)
    assert (config.max_steps, config.prefix_length, config.num_questions) == (150, 8, 32)
    assert (job.kind, job.training_file, job.questions_file) == ("document", DOCUMENT.id, "")
    for fields in (
        {"training_file": DOCUMENT, "questions": QUESTIONS},
        {"training_file": QUESTIONS, "document": DOCUMENT},
    ):
        both = made(**fields, hyperparameters={"n_epochs": 4})
        assert (both.training_file, both.questions_file) == (DOCUMENT.id, QUESTIONS.id)
        assert both.config["max_steps"] == 12


def test_training_goes_on_from_a_prefix_of_any_sites() -> None:
    job = made(model="mine", start_lengths={"encoder": 20, "cross": 5})
    config = TrainConfig(train="x", output="y", init_prefix="z", **job.config)
    assert (config.initialization, config.site_lengths) == ("prefix", {"encoder": 20, "cross": 5})
    assert refused(model="mine", start_lengths={"decoder": 5}, options={"start": "words"}).param == "prefixtune.start"


def test_the_name_is_that_of_the_request_or_made_up() -> None:
    assert made(options={"name": "exact"}).name == "exact"
    assert made(suffix="cats").name == "cats-abababab"
    assert made().name == "ft-abababab"
    assert refused(options={"name": "x.step-4"}).param == "prefixtune.name"


def test_trackers_share_a_project() -> None:
    wandb = {"type": "wandb", "wandb": {"project": "p"}}
    config = made(integrations=[wandb, {"type": "mlflow", "mlflow": {"project": "p"}}]).config
    assert (config["report_to"], config["project"]) == (["wandb", "mlflow"], "p")
    assert config["run_name"].startswith("ftjob-")
    assert refused(integrations=[wandb, {"type": "mlflow"}]).param == "integrations"


WRONG: list[tuple[dict[str, Any], str, str | None]] = [
    ({"training_file": stored(status="error", status_details="row 7: no answer.")}, "training_file",
     "invalid_training_file"),
    ({"training_file": stored(purpose="fine-tune-results")}, "training_file", "invalid_training_file"),
    ({"training_file": stored(counted=0)}, "training_file", "invalid_training_file"),
    ({"training_file": stored(form="", forms=["prompt", "text"])}, "prefixtune.form", None),
    ({"options": {"form": "label"}}, "prefixtune.form", "invalid_training_file"),
    ({"validation_file": stored(2, "label")}, "validation_file", "invalid_validation_file"),
    ({"training_file": DOCUMENT, "validation_file": stored(2)}, "validation_file", None),
    ({"training_file": stored(), "document": DOCUMENT}, "training_file", "invalid_training_file"),
    ({"training_file": QUESTIONS, "document": DOCUMENT, "questions": stored(7, "question")}, "training_file", None),
    ({"training_file": DOCUMENT, "questions": stored(2)}, "prefixtune.questions", "invalid_file"),
    ({"training_file": DOCUMENT, "options": {"hold_out": 0.1}}, "prefixtune.hold_out", None),
    ({"options": {"num_questions": 9}}, "prefixtune.num_questions", None),
    ({"options": {"max_steps": 5001}}, "prefixtune.max_steps", "too_many_steps"),
    ({"options": {"max_steps": 5}, "hyperparameters": {"n_epochs": 2}}, "prefixtune.max_steps", None),
    ({"hyperparameters": {"n_epochs": 900, "batch_size": 1}}, "hyperparameters.n_epochs", "too_many_steps"),
    ({"options": {"patience": 2, "preset": "none"}}, "prefixtune.patience", None),
    ({"options": {"init_text": "@/etc/passwd"}}, "prefixtune.init_text", None),
    ({"options": {"start": "words", "prefix_length": 0}}, "prefixtune.prefix_length", None),
    ({"options": {"preset": "quick"}, "training_file": stored(targets=3)}, "prefixtune.preset", None),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "code"), WRONG)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str, code: str | None) -> None:
    error = refused(**fields)
    assert (error.param, error.code) == (param, code)


def test_patience_may_go_by_what_the_preset_holds_out() -> None:
    assert made(options={"patience": 5}).config["patience"] == 5
