"""Forms of data, recognized by their columns: one test for each, and what is refused with file and row."""

import json
from typing import get_args

import pytest

from data_files import write
from prefixtune.data import as_examples, read_task
from prefixtune.data.examples import Example, Message
from prefixtune.data.files import iter_file
from prefixtune.data.forms import FORMS, describe_data, make_example
from prefixtune.data.registry import TASKS, read_data
from prefixtune.errors import ConfigError, DataError, PrefixError
from prefixtune.training.config import FormName, TrainConfig

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello. "}
HI = (Message("user", "Hi"),)
TURNS = [USER, ASSISTANT, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "So long."}]
SYSTEM = {"role": "system", "content": "Be brief."}
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello. "}


def jsonl(path, *rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


BRIEF = (Message("system", "Be brief."), *HI)
PARTS = {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}
# As OpenAI's clients and others write them: empty keys, and marks that say what is done anyway.
MARKED = {
    **ASSISTANT,
    **dict.fromkeys(("refusal", "audio", "function_call", "tool_calls", "reasoning_content", "loss")),
    "annotations": [],
    "images": [],
    "thinking": "",
    "weight": 1,
    "train": True,
}
FLIGHTS = '[{"from": "Rome", "to": "Oslo"}]'
SQUAD = {"question": "Who?", "context": "Ann sang.", "answers": {"text": ["Ann", "She"], "answer_start": [0, 0]}}
CASES = [
    (
        "messages",
        {"id": 1, "messages": [{**SYSTEM, "role": "developer"}, *TURNS], "tools": []},
        "Bye",
        ("So long.",),
        (*BRIEF, Message("assistant", "Hello. "), Message("user", "Bye")),
    ),
    ("messages", {"messages": [PARTS, ASSISTANT]}, "Hi", ("Hello. ",), HI),
    ("messages", {"messages": [{**USER, "train": False, "weight": 0}, MARKED]}, "Hi", ("Hello. ",), HI),
    # As a cell of a table holds it.
    ("messages", {"messages": json.dumps([USER, ASSISTANT])}, "Hi", ("Hello. ",), HI),
    (
        "conversations",
        {"conversations": [{"from": "system", "value": "Be brief."}, HUMAN, GPT]},
        "Hi",
        ("Hello. ",),
        BRIEF,
    ),
    ("prompt", {"prompt": " Hi", "completion": " Hello. "}, "Hi", ("Hello.",), HI),
    ("prompt", {"prompt": "Hi", "completion": ["A", "B"]}, "Hi", ("A", "B"), HI),
    ("prompt", {"prompt": [USER], "completion": [ASSISTANT]}, "Hi", ("Hello. ",), HI),
    ("prompt", {"prompt": "Hi", "response": [ASSISTANT]}, "Hi", ("Hello. ",), HI),
    ("prompt", {"prompt": "Hi", "completion": "Hello.", "system": "Be brief."}, "Hi", ("Hello.",), BRIEF),
    ("prompt", {"system": "Be brief.", "prompt": [USER], "completion": [ASSISTANT]}, "Hi", ("Hello. ",), BRIEF),
    ("prompt", {"prompt": json.dumps([HUMAN]), "completion": json.dumps([ASSISTANT])}, "Hi", ("Hello. ",), HI),
    # Texts about lists.
    ("prompt", {"prompt": FLIGHTS, "completion": "x"}, FLIGHTS, ("x",), (Message("user", FLIGHTS),)),
    ("prompt", {"prompt": "Hi", "completion": '[{"role": "CEO"}]'}, "Hi", ('[{"role": "CEO"}]',), HI),
    (
        "instruction",
        {"instruction": "Add", "input": "1, 2", "output": "3"},
        "Add\n\n1, 2",
        ("3",),
        (Message("user", "Add\n\n1, 2"),),
    ),
    ("instruction", {"instruction": "Hi", "input": "", "output": "Hello.", "text": "Below is"}, "Hi", ("Hello.",), HI),
    (
        "instruction",
        {"instruction": "Hi", "context": None, "response": "Hello.", "category": "x"},
        "Hi",
        ("Hello.",),
        HI,
    ),
    ("question", {"question": "Why?", "answer": "So.", "context": None, "id": 3}, "Why?", ("So.",), ()),
    ("question", {"question": "Why?", "answers": ["So.", "Because."]}, "Why?", ("So.", "Because."), ()),
    # As the hub has SQuAD, and as its own files write answers.
    ("question", SQUAD, "Who?\n\nAnn sang.", ("Ann", "She"), ()),
    ("question", {"question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}]}, "Who?", ("Ann",), ()),
    ("source", {"source": "1+1", "target": "2"}, "1+1", ("2",), ()),
    ("source", {"source": "1+1", "targets": ["2", "two"]}, "1+1", ("2", "two"), ()),
    ("document", {"document": "It\nrained.", "summary": "Rain."}, "It rained.", ("Rain.",), ()),
    ("document", {"article": "It rained.", "highlights": ["Rain.", "Wet."]}, "It rained.", ("Rain.", "Wet."), ()),
    ("label", {"text": "Fine.", "label": 1}, "Fine.", ("1",), ()),
    ("tags", {"tokens": ["Grey", "Wolf"], "tags": ["B-X", "I-X"]}, "Grey Wolf", ("B-X I-X",), ()),
    ("text", {"text": "  def f():\n", "url": "x"}, "", ("  def f():\n",), ()),
]


@pytest.mark.parametrize(("form", "row", "source", "targets", "messages"), CASES)
def test_a_form_is_recognized_by_its_columns(form, row, source, targets, messages, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", row)
    read = read_data("records", path)
    assert (read.task, read.form, read.columns) == (FORMS[form].task, FORMS[form], tuple(row))
    expected = Example(source, targets, messages=messages)
    assert read_task("records", path, needs_targets=True) == [expected]
    assert read_task("records", path, form=form) == [expected]
    assert as_examples([row]) == [expected]
    assert [make_example(record, FORMS[form]) for record in iter_file(path)] == [expected]
    if form != "tags":
        assert set(read_task("records", path)[0].fields) == set(row)


def test_every_form_has_a_case_and_a_task():
    assert {form for form, *_ in CASES} == set(FORMS) == set(get_args(FormName))
    assert all(form.task in TASKS for form in FORMS.values())


def test_equal_sources_of_one_turn_are_merged_and_conversations_and_texts_are_not(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl",
        {"messages": [USER, ASSISTANT]},
        {"messages": TURNS},
        {"messages": [USER, {"role": "assistant", "content": "Yes?"}]},
        {"messages": TURNS},
        {"messages": [SYSTEM, USER, ASSISTANT]},
    )
    read = read_task("records", path)
    assert [example.targets for example in read] == [("Hello. ", "Yes?"), ("So long.",), ("So long.",), ("Hello. ",)]
    line = describe_data(FORMS["messages"], read, path, ["messages", "id"])
    assert all(part in line for part in (str(path), "chats", "examples 4", "targets 7", "not used: id"))
    texts = read_task("records", jsonl(tmp_path / "b.jsonl", {"text": "x"}, {"text": "x"}))
    assert texts == [Example("", ("x",))] * 2


def test_two_readings_are_refused_with_the_choices_and_one_can_be_named(tmp_path):
    row = {"messages": [USER, ASSISTANT], "prompt": "Hi", "completion": "No."}
    path = jsonl(tmp_path / "a.jsonl", row)
    with pytest.raises(ConfigError) as raised:
        read_task("records", path)
    assert all(f"--form {name}" in raised.value.hint for name in ("messages", "prompt"))
    assert read_task("records", path, form="prompt")[0].targets == ("No.",)
    assert as_examples([row], form="messages")[0].targets == ("Hello. ",)


@pytest.mark.parametrize("row", [{"prompt": "x", "chosen": "y", "rejected": "z"}, {}])
def test_no_form_says_what_there_is(row, tmp_path):
    with pytest.raises(DataError) as raised:
        read_task("records", jsonl(tmp_path / "a.jsonl", row), needs_targets=True)
    assert raised.value.message.startswith(f"{tmp_path / 'a.jsonl'}, line 1 has the columns {next(iter(row), 'none')}")
    assert len(str(raised.value)) < 700


def test_a_named_form_must_fit_and_suit_the_task(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "x", "completion": "y"})
    with pytest.raises(DataError, match=r"line 1 has the columns prompt, completion"):
        read_task("records", path, form="text")
    for task, options in (
        ("records", {"form": "chats"}),
        ("e2e", {"form": "prompt"}),
        ("records", {"source": "prompt", "form": "prompt"}),
    ):
        with pytest.raises(ConfigError, match="form"):
            read_task(task, path, **options)
    assert read_task("classification", jsonl(tmp_path / "b.jsonl", {"text": "x", "label": "y"}), form="label")


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
NESTED = []
for _ in range(500):
    NESTED = [NESTED]


CHAT = {"messages": [USER, ASSISTANT]}


@pytest.mark.parametrize(
    ("good", "bad", "named"),
    [
        *(
            (CHAT, {"messages": messages}, named)
            for named, messages in (
                ("", [USER]),
                ("tool_calls", [USER, {"role": "assistant", "tool_calls": [{"id": 1}]}]),
                ("image_url", [{"role": "user", "content": [IMAGE]}, ASSISTANT]),
                ("weight", [USER, {**ASSISTANT, "weight": 0}]),
                ("reasoning_content", [USER, {**ASSISTANT, "reasoning_content": "Hm."}]),
                ("", [NESTED]),
            )
        ),
        (CHAT, {**CHAT, "tools": [{"name": "x"}]}, "tools"),
        (CHAT, {"prompt": "x", "completion": "y"}, "messages"),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}, "completion"),
        ({"conversations": [HUMAN, GPT]}, {"conversations": [{"from": "human"}]}, "conversations"),
        ({"question": "a", "answers": {"text": ["b"]}}, {"question": "a", "answers": {"text": []}}, "answers"),
        ({"text": "x", "label": "a"}, {"text": "x", "label": 0.5}, "0.5"),
    ],
)
def test_a_wrong_row_far_down_is_named_in_one_line(good, bad, named, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *[good] * 70, bad)
    with pytest.raises(DataError) as raised:
        read_task("records", path, needs_targets=True)
    message = raised.value.message
    assert message.startswith(f"{path}, line 71")
    assert named in message
    assert "\n" not in message
    assert len(str(raised.value)) < 600
    with pytest.raises(PrefixError, match="example 2"):
        as_examples([good, bad], needs_targets=True)


def test_examples_that_are_made_are_not_merged():
    assert as_examples([Example("a", ("b",)), Example("a", ("c",))], "{question}")[1].targets == ("c",)


def test_without_targets_there_is_something_to_answer(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"messages": [USER]}, {"messages": [*TURNS, USER]})
    assert [(len(example.messages), example.targets) for example in read_task("records", path)] == [(1, ()), (5, ())]
    assert read_task("records", jsonl(tmp_path / "b.jsonl", {"prompt": "Hi"})) == [Example("Hi", messages=HI)]
    none = {"question": "q?", "context": "c", "answers": {"text": [], "answer_start": []}}
    assert read_task("records", jsonl(tmp_path / "c.jsonl", none))[0].targets == ()
    with pytest.raises(DataError, match="line 1 has the columns prompt"):
        read_task("records", jsonl(tmp_path / "b.jsonl", {"prompt": "Hi"}), needs_targets=True)


def test_an_empty_column_gives_way_to_a_filled_one_of_the_same_meaning():
    (example,) = as_examples([{"instruction": "Sum up.", "input": "", "context": "Owls hunt.", "output": "Owls."}])
    assert example.source == "Sum up.\n\nOwls hunt."
    row = {"instruction": "Sum up.", "input": None, "output": None, "context": "Owls hunt.", "response": "Owls."}
    merged, both = as_examples([row, {**row, "input": "At night."}], needs_targets=True)
    assert (merged.source, merged.targets) == ("Sum up.\n\nOwls hunt.", ("Owls.",))
    assert both.source == "Sum up.\n\nAt night.\n\nOwls hunt."


def test_where_a_chat_is_from_is_no_field_of_an_example():
    chats = [{"messages": [USER, ASSISTANT], "source": "forum"}, {"messages": [USER, ASSISTANT]}]
    assert [example.targets for example in as_examples(chats, needs_targets=True)] == [("Hello. ",)] * 2
    assert as_examples([{"prompt": [USER], "completion": ""}])[0].targets == ()
    (pair,) = as_examples([{"prompt": "1+1", "completion": "2", "source": "forum"}])
    assert (pair.source, pair.targets) == ("1+1", ("2",))
    assert as_examples([{"messages": [USER], "source": "forum"}])[0].source == "Hi"
    assert as_examples([{"source": "1+1"}])[0].source == "1+1"
    (asked,) = as_examples([{"messages": [USER], "targets": ["Hello.", "Hi."]}])
    assert (asked.source, asked.targets) == ("Hi", ("Hello.", "Hi."))


def test_a_file_has_the_preferred_form_if_it_fits_and_else_its_own(tmp_path):
    train = jsonl(tmp_path / "qa.jsonl", {"question": "Who?", "answer": "Mira"})
    both = jsonl(tmp_path / "both.jsonl", {"messages": [USER, ASSISTANT], "prompt": "Hi", "completion": "No."})
    config = TrainConfig(train=str(both), dev=str(both), form="prompt")
    forms = [read_data("records", path, prefer=config.form).form for path in (both, train)]
    assert forms == [FORMS["prompt"], FORMS["question"]]
