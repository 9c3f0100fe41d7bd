"""What a distillation reads, and what it refuses before a model loads."""

import pytest

from prefixtune.data.examples import Example
from prefixtune.distillation import inputs
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.inputs import read_jobs
from prefixtune.errors import ConfigError, DataError


@pytest.fixture
def of_prompt(tmp_path):
    """Of a run on a prompt, without its inputs."""
    (tmp_path / "prompt.txt").write_text("Answer in small letters.")
    return {"prompt": str(tmp_path / "prompt.txt"), "output": str(tmp_path / "run")}


@pytest.fixture
def documents(tmp_path):
    """A function: `documents({"owl.txt": b"text"}, questions)` reads the jobs of a folder with these files."""

    def read(files, questions="self", **options):
        (tmp_path / "docs").mkdir()
        for name, content in files.items():
            (tmp_path / "docs" / name).write_bytes(content)
        given = {"document": str(tmp_path / "docs"), "questions": questions, "output": str(tmp_path / "run")}
        return read_jobs(DistillConfig(**given, **options), resume=False)

    return read


def test_a_folder_has_its_text_files_in_order(documents):
    jobs = documents({"b.md": b"two", "a.txt": b" one\n", "notes.pdf": b"none"})
    assert [(job.name, job.text, job.output.name) for job in jobs] == [("a", "one", "a"), ("b", "two", "b")]


@pytest.mark.parametrize(
    "files",
    [{}, {"a.txt": b"x", "a.md": b"y"}, {"a.txt": b"  \n"}, {"a.txt": b"\xff\xfe\xfa"}],
    ids=["empty folder", "one name twice", "empty", "no UTF-8"],
)
def test_wrong_documents(documents, files):
    with pytest.raises(DataError):
        documents(files)


@pytest.mark.parametrize("named", [{}, {"source": "asked", "target": "said"}])
def test_questions_of_each_document(documents, tmp_path, named):
    asked = tmp_path / "questions"
    asked.mkdir()
    (asked / "owl.csv").write_text(f"{','.join(named.values()) or 'question,answer'}\nWho?,Mira\n")
    (job,) = documents({"owl.txt": b"The owl."}, str(asked), **named)
    assert (job.answered, [question.answer for question in job.questions]) == (True, ["Mira"])


@pytest.mark.parametrize("questions", ["questions", "questions/owl.csv"], ids=["one is missing", "one for two"])
def test_questions_that_are_not_of_each_document(documents, tmp_path, questions):
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "owl.csv").write_text("question,answer\nWho?,Mira\n")
    with pytest.raises(DataError):
        documents({"owl.txt": b"The owl.", "fox.txt": b"The fox."}, str(tmp_path / questions))


NO_TEXT, NO_ANSWER = [{"question": ["Who?"]}], [{"question": "Who?", "answers": [["Mira"]]}]
NO_TEST = [{"question": "Who?", "answer": "Mira"}, {"question": "Where?"}]


@pytest.mark.parametrize("rows", [NO_TEXT, NO_ANSWER, NO_TEST])
def test_wrong_questions(documents, write_rows, rows):
    asked, test = write_rows("questions/owl.jsonl", rows[:1]), write_rows("test/owl.jsonl", rows)
    with pytest.raises(DataError):
        documents({"owl.txt": b"The owl."}, asked, test=test)


def test_questions_of_a_hub_set_are_of_their_splits(tmp_path, monkeypatch):
    (tmp_path / "owl.txt").write_text("The owl.")
    asked = []

    def read(task, path, *, split, **_):
        asked.append((str(path), split))
        return [Example("Where?", ("Ashby",), {"question": "Where?"})]

    monkeypatch.setattr(inputs, "read_task", read)
    both = {"questions": "hub:a/b", "test": "hub:a/b", "output": str(tmp_path / "run")}
    for template in ({}, {"source": "question", "target": "answer"}):
        read_jobs(DistillConfig(document=str(tmp_path / "owl.txt"), **both, **template), resume=False)
    assert asked == [("hub:a/b", "train"), ("hub:a/b", "test")] * 2


def test_each_of_several_answers_is_learned(documents, write_rows):
    rows = [
        {"question": "Where?", "answers": ["Ashby", "In Ashby"]},
        {"question": "How many?", "answers": 24},
        {"question": "Who?", "answer": ["Mira"]},
        {"question": "Why?", "answer": None, "answers": ["Rain."], "context": "It rains."},
    ]
    (job,) = documents({"owl.txt": b"The owl."}, write_rows("questions/owl.jsonl", rows))
    found = [(one.question, one.answer) for one in job.questions]
    wanted = [("Where?", "Ashby"), ("Where?", "In Ashby"), ("How many?", "24"), ("Who?", "Mira"), ("Why?", "Rain.")]
    assert found == wanted


@pytest.mark.parametrize("names", [("question", "answer"), ("source", "target")])
def test_of_a_folder_the_training_set_is_learned_and_the_test_set_held_out(of_prompt, write_rows, tmp_path, names):
    data = str(tmp_path / "data")
    write_rows("data/train.jsonl", [dict(zip(names, ("a train?", "b"), strict=True))])
    with pytest.raises(DataError):
        read_jobs(DistillConfig(data=data, test=data, **of_prompt), resume=False)
    write_rows("data/test.jsonl", [dict(zip(names, ("a test?", "b"), strict=True))])
    (job,) = read_jobs(DistillConfig(data=data, test=data, **of_prompt), resume=False)
    assert [question.question for question in job.questions] == ["a train?"]
    assert [question.question for question in job.test] == ["a test?"]


@pytest.mark.parametrize(
    ("options", "name"),
    [({"kinds": ("paraphrase", "list")}, "kinds"), ({"data": "d.jsonl"}, "data"), ({"init_text": "a"}, "init_text")],
)
def test_what_a_document_does_not_use_is_refused(options, name):
    with pytest.raises(ConfigError, match=name):
        DistillConfig(**{"document": "doc.txt", "questions": "self", **options})


def test_a_start_from_examples_is_no_choice_and_a_prefix_is_one(of_prompt):
    with pytest.raises(ConfigError, match="initialization"):
        DistillConfig(data="inputs.jsonl", **of_prompt, initialization="examples")
    started = DistillConfig(data="inputs.jsonl", **of_prompt, init_prefix="p")
    assert (started.initialization, started.prefix_length) == ("prefix", 0)
