"""From a request to what a worker trains by: what `auto` stands for, and what is refused."""

import pytest

from prefixtune.distillation.config import DistillConfig
from prefixtune.jobs.files import FileFacts, StoredFile
from prefixtune.jobs.job import Job, RefusedError
from prefixtune.jobs.request import MOST_VALIDATED, settle_job
from prefixtune.training.config import TrainConfig


def stored(number=1, form="prompt", targets=50, **more):
    """An uploaded file of so many rows."""
    forms, task = more.pop("forms", [form]), more.pop("task", "records")
    facts = {"form": form, "forms": forms, "task": task, "characters": more.pop("characters", 100)}
    counts = {"rows": targets, "examples": targets, "targets": more.pop("counted", targets)}
    file = {"purpose": "fine-tune", "facts": FileFacts(**facts, **counts), **more}
    return StoredFile(
        id=f"file-{number:024x}", owner="ann", bytes=1, created_ns=1, filename="a.jsonl", ending=".jsonl", **file
    )


DOCUMENT = stored(9, "document", 0, purpose="document", task="document")
QUESTIONS = stored(8, "question", 40)


def made(training_file=None, *, max_steps=5000, hyperparameters=None, options=None, seed=0, **files):
    named = {"prefixtune.questions" if name == "questions" else name: file for name, file in files.items()}
    data, options = training_file or stored(), options or {}
    asked = Job(
        id="ftjob-" + "ab" * 12, owner="ann", created=1, model="tiny", extension=options, seed=seed,
        hyperparameters=hyperparameters or {},
        kind="document" if data.purpose == "document" else "examples",
    )  # fmt: skip
    given = options if asked.kind == "document" else {"form": data.facts.form, **options}
    given = {name: value for name, value in given.items() if name != "preset"}
    return settle_job(asked, {"training_file": data, **named}, given, max_steps)


def refused(**fields):
    with pytest.raises(RefusedError) as caught:
        made(**fields)
    return caught.value


@pytest.mark.parametrize(
    ("file", "steps", "epochs", "is_quick"),
    [
        (stored(targets=50), 24, 6, True),
        (stored(targets=7), 24, 24, False),
        (stored(targets=1000), 315, 5, False),
        (stored(targets=1_000_000), 5000, 1, False),
        (stored(form="text", targets=10), 24, 24, False),
        # A long text is learned in windows.
        (stored(form="text", targets=1, characters=2048 * 320), 100, 5, False),
    ],
)
def test_auto_chooses_by_the_data(file, steps, epochs, is_quick):
    job = made(training_file=file)
    assert job.config["max_steps"] == steps
    assert job.hyperparameters == {"n_epochs": epochs, "batch_size": 16, "learning_rate_multiplier": 1.0}
    assert (job.config.get("initialization") == "examples") == is_quick
    assert job.config["form"] == file.facts.form if file.facts else ""


def test_numbers_are_used_as_they_are():
    numbers = {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 0.5}
    job = made(hyperparameters=numbers, options={"reparameterization": "none"}, seed=5)
    config = TrainConfig(train="x", output="y", **job.config)
    assert (config.max_steps, config.batch_size, config.learning_rate, config.seed) == (21, 8, 2.5e-3, 5)
    assert job.hyperparameters == numbers


def test_the_same_values_come_back_from_the_database():
    for options in ({}, {"initialization": "examples", "prefix_length": 10, "init_examples": 3}, {"preset": "none"}):
        job = made(options=options)
        again = Job.model_validate_json(job.model_dump_json())
        config = TrainConfig(train="x", output="y", **again.config)
        assert {name: config.to_dict()[name] for name in again.config} == again.config
        assert not {"train", "dev", "output", "init_prefix"} & again.config.keys()


def test_a_validation_file_is_evaluated_on_while_it_trains():
    job = made(training_file=stored(targets=1000), validation_file=stored(2))
    assert (job.config["eval_every"], job.config["dev_limit"]) == (39, MOST_VALIDATED)


def test_a_document_is_distilled():
    job = made(training_file=DOCUMENT, options={"prefix_length": 8, "num_questions": 32})
    config = DistillConfig(document="x", questions="self", output="y", **job.config)
    assert (config.max_steps, config.prefix_length, config.num_questions) == (150, 8, 32)
    # Questions without an answer train, too.
    for questions in (QUESTIONS, stored(8, "question", 40, counted=3)):
        both = made(training_file=DOCUMENT, questions=questions, hyperparameters={"n_epochs": 4})
        assert both.config["max_steps"] == 12


WRONG = [
    ({"training_file": DOCUMENT, "validation_file": stored(2)}, "prefixtune", None),
    ({"options": {"max_steps": 5001}}, "prefixtune.max_steps", "too_many_steps"),
    ({"hyperparameters": {"n_epochs": 900, "batch_size": 1}}, "hyperparameters.n_epochs", "too_many_steps"),
    ({"options": {"preset": "quick"}, "training_file": stored(targets=3)}, "prefixtune.preset", None),
]  # fmt: skip


def test_what_is_wrong_is_named():
    for fields, param, code in WRONG:
        error = refused(**fields)
        assert (error.param, error.code) == (param, code)
