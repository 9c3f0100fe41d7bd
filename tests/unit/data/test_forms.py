"""Forms of data, recognized by their columns: one test for each, and what is refused with file and row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, get_args

import pytest

from data_files import write
from prefixtune.data import as_examples, read_task
from prefixtune.data.examples import Example, Message
from prefixtune.data.files import iter_file
from prefixtune.data.forms import FORMS, describe_data, detect_form, file_form, iter_form
from prefixtune.data.registry import TASKS, resolve_task
from prefixtune.errors import ConfigError, DataError, PrefixError
from prefixtune.training.config import FormName, TrainConfig
from prefixtune.training.forms import describe_run_data, settle_form

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello. "}
HI = (Message("user", "Hi"),)
TURNS = [USER, ASSISTANT, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "So long."}]
SYSTEM = {"role": "system", "content": "Be brief."}
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello. "}

Row = dict[str, Any]


def jsonl(path: Path, *rows: Row) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


CASES: list[tuple[str, Row, str, tuple[str, ...], tuple[Message, ...]]] = [
    ("messages", {"messages": [USER, ASSISTANT]}, "Hi", ("Hello. ",), HI),
    (
        "messages",
        {"id": 1, "messages": [{**SYSTEM, "role": "developer"}, *TURNS], "tools": []},
        "Bye",
        ("So long.",),
        (Message("system", "Be brief."), *HI, Message("assistant", "Hello. "), Message("user", "Bye")),
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                ASSISTANT,
            ]
        },
        "Hi",
        ("Hello. ",),
        HI,
    ),
    # As Parquet and `datasets` give it, and as a cell of a table holds it.
    (
        "messages",
        {"messages": [{**USER, "tool_calls": None, "name": None}, {**ASSISTANT, "tool_calls": None}]},
        "Hi",
        ("Hello. ",),
        HI,
    ),
    # As OpenAI's clients and others write them: empty keys, and marks that say what is done anyway.
    (
        "messages",
        {
            "messages": [
                {**USER, "train": False, "weight": 0},
                {
                    **ASSISTANT,
                    **dict.fromkeys(("refusal", "audio", "function_call", "tool_calls", "reasoning_content")),
                    "annotations": [],
                    "images": [],
                    "thinking": "",
                    "weight": 1,
                    "train": True,
                    "loss": None,
                },
            ]
        },
        "Hi",
        ("Hello. ",),
        HI,
    ),
    ("messages", {"messages": json.dumps([USER, ASSISTANT])}, "Hi", ("Hello. ",), HI),
    ("conversations", {"conversations": [HUMAN, GPT]}, "Hi", ("Hello. ",), HI),
    (
        "conversations",
        {"conversations": [{"from": "system", "value": "Be brief."}, HUMAN, GPT], "id": "x"},
        "Hi",
        ("Hello. ",),
        (Message("system", "Be brief."), *HI),
    ),
    ("prompt", {"prompt": " Hi", "completion": " Hello. "}, "Hi", ("Hello.",), HI),
    ("prompt", {"prompt": "Hi", "completion": ["A", "B"]}, "Hi", ("A", "B"), HI),
    ("prompt", {"prompt": [USER], "completion": [ASSISTANT]}, "Hi", ("Hello. ",), HI),
    ("prompt", {"prompt": "Hi", "response": [ASSISTANT]}, "Hi", ("Hello. ",), HI),
    (
        "prompt",
        {"prompt": "Hi", "completion": "Hello.", "system": "Be brief."},
        "Hi",
        ("Hello.",),
        (Message("system", "Be brief."), *HI),
    ),
    (
        "instruction",
        {"instruction": "Add", "input": "1, 2", "output": "3"},
        "Add\n\n1, 2",
        ("3",),
        (Message("user", "Add\n\n1, 2"),),
    ),
    ("instruction", {"instruction": "Hi", "input": "", "output": "Hello.", "text": "Below is"}, "Hi", ("Hello.",), HI),
    ("instruction", {"instruction": "Hi", "input": None, "output": "Hello."}, "Hi", ("Hello.",), HI),
    ("instruction", {"instruction": "Hi", "output": "Hello."}, "Hi", ("Hello.",), HI),
    ("instruction", {"instruction": "Hi", "context": "", "response": "Hello.", "category": "x"}, "Hi", ("Hello.",), HI),
    ("question", {"question": "Why?", "answer": "So.", "id": 3}, "Why?", ("So.",), ()),
    ("question", {"question": "Why?", "answers": ["So.", "Because."]}, "Why?", ("So.", "Because."), ()),
    # SQuAD's, as the hub has it, and as its own files write answers.
    (
        "question",
        {"question": "Who?", "context": "Ann sang.", "answers": {"text": ["Ann", "She"], "answer_start": [0, 0]}},
        "Who?\n\nAnn sang.",
        ("Ann", "She"),
        (),
    ),
    ("question", {"question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}]}, "Who?", ("Ann",), ()),
    ("question", {"question": "Who?", "context": None, "answer": "Ann"}, "Who?", ("Ann",), ()),
    ("source", {"source": "1+1", "target": "2"}, "1+1", ("2",), ()),
    ("source", {"source": "1+1", "targets": ["2", "two"]}, "1+1", ("2", "two"), ()),
    ("document", {"document": "It\nrained.", "summary": "Rain."}, "It rained.", ("Rain.",), ()),
    ("document", {"article": "It rained.", "highlights": ["Rain.", "Wet."]}, "It rained.", ("Rain.", "Wet."), ()),
    ("label", {"text": "Fine.", "label": 1}, "Fine.", ("1",), ()),
    ("tags", {"tokens": ["Grey", "Wolf"], "tags": ["B-X", "I-X"]}, "Grey Wolf", ("B-X I-X",), ()),
    ("text", {"text": "  def f():\n", "url": "x"}, "", ("  def f():\n",), ()),
]


@pytest.mark.parametrize(("form", "row", "source", "targets", "messages"), CASES)
def test_a_form_is_recognized_by_its_columns(
    form: str, row: Row, source: str, targets: tuple[str, ...], messages: tuple[Message, ...], tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "a.jsonl", row)
    assert file_form(path)[0].name == form
    task, found, columns = resolve_task("records", path)
    assert (task, found, columns) == (FORMS[form].task, FORMS[form], tuple(row))
    expected = Example(source, targets, messages=messages)
    assert read_task("records", path, needs_targets=True) == [expected]
    assert read_task("records", path, form=form) == [expected]
    assert as_examples([row]) == [expected]
    assert list(iter_form(iter_file(path), FORMS[form])) == [expected]
    if form != "tags":
        assert set(read_task("records", path)[0].fields) == set(row)


def test_every_form_has_a_case_and_a_task() -> None:
    assert {form for form, *_ in CASES} == set(FORMS) == set(get_args(FormName))
    assert all(form.task in TASKS for form in FORMS.values())


def test_equal_sources_of_one_turn_are_merged_and_conversations_and_texts_are_not(tmp_path: Path) -> None:
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
    assert line == f"{path}: read as chats: 4 conversations, 7 answers; not used: id"
    texts = read_task("records", jsonl(tmp_path / "b.jsonl", {"text": "x"}, {"text": "x"}))
    assert texts == [Example("", ("x",))] * 2
    assert describe_data(FORMS["text"], texts, "-", ["text"]) == "stdin: read as texts: 2 texts"


def test_unknown_keys_of_messages_are_named_with_the_columns_that_are_not_used(tmp_path: Path) -> None:
    named = [{**USER, "name": "Ann", "refusal": None}, {**ASSISTANT, "id": 3, "weight": 1}]
    for name, row in {
        "messages": {"id": 1, "messages": named},
        "prompt": {"id": 1, "prompt": named[:1], "completion": named[1:]},
    }.items():
        path = jsonl(tmp_path / "a.jsonl", row)
        _, form, columns = resolve_task("records", path)
        assert form is not None
        within = ["messages.name", "messages.id"] if name == "messages" else ["prompt.name", "completion.id"]
        for first in (columns, row):
            line = describe_data(form, read_task("records", path), path, first)
            assert line.endswith(f"; not used: id, {', '.join(within)}")
    # A text about a list has no keys.
    assert FORMS["prompt"].columns_of({"prompt": FLIGHTS, "completion": "x"}) == ("prompt", "completion")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '[{"prompt": "Hi", "completion": "Hello."}]'),
        ("a.csv", "prompt,completion\nHi,Hello.\n"),
        ("a.csv", "prompt;completion\nHi;Hello.\n"),
        ("a.tsv", "prompt\tcompletion\nHi\tHello.\n"),
        ("a.jsonl.gz", '{"prompt": "Hi", "completion": "Hello."}\n'),
    ],
)
def test_a_form_in_every_kind_of_file(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert read_task("records", path) == [Example("Hi", ("Hello.",), messages=HI)]


def test_a_form_in_a_folder(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        jsonl(tmp_path / f"{split}.jsonl", {"prompt": split, "completion": "x"})
    assert read_task("records", tmp_path, split="dev")[0].source == "dev"
    assert resolve_task("records", tmp_path, split="train")[0] == "records"


def test_two_readings_are_refused_with_the_choices_and_one_can_be_named(tmp_path: Path) -> None:
    row = {"messages": [USER, ASSISTANT], "prompt": "Hi", "completion": "No."}
    path = jsonl(tmp_path / "a.jsonl", row)
    with pytest.raises(ConfigError) as raised:
        read_task("records", path)
    assert raised.value.message == (
        f"{path}, line 1 can be read as chats (messages), or as prompts and completions (prompt + completion)."
    )
    assert raised.value.hint == "choose one: --form messages or --form prompt."
    assert read_task("records", path, form="prompt")[0].targets == ("No.",)
    assert read_task("records", path, prefer="messages")[0].targets == ("Hello. ",)
    assert as_examples([row], form="prompt")[0].targets == ("No.",)
    # An export of several files fills the columns that a row does not have.
    assert detect_form({**row, "messages": None}, "x").name == "prompt"


@pytest.mark.parametrize(
    ("row", "message", "hint"),
    [
        ({"Prompt": "x", "Completion": "y"}, "has the columns Prompt, Completion", "did you mean 'prompt'"),
        ({"a": "x", "b": "y"}, "forms that are recognized: messages; conversations; prompt + completion", "--source"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "has the columns", "--source prompt --target chosen"),
        ({"input_ids": [1, 2]}, "has the columns input_ids", "give the texts"),
        ({}, "has the columns none", ""),
        ({f"c{number}": 1 for number in range(500)}, "... (500 in all)", ""),
    ],
)
def test_no_form_says_what_there_is(row: Row, message: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        read_task("records", jsonl(tmp_path / "a.jsonl", row))
    assert raised.value.message.startswith(f"{tmp_path / 'a.jsonl'}, line 1 has the columns")
    assert message in raised.value.message
    assert hint in raised.value.hint
    assert len(str(raised.value)) < 700


def test_a_named_form_must_fit_and_suit_the_task(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "x", "completion": "y"})
    with pytest.raises(DataError, match=r"line 1 has the columns prompt, completion, but the form 'text' needs text"):
        read_task("records", path, form="text")
    with pytest.raises(ConfigError, match="there is no form 'chats'"):
        read_task("records", path, form="chats")
    with pytest.raises(ConfigError, match="form is 'prompt', but the task 'e2e' has its own"):
        read_task("e2e", path, form="prompt")
    with pytest.raises(ConfigError, match="form is 'prompt', but source names the columns: 'prompt'"):
        read_task("records", path, source="prompt", form="prompt")
    assert read_task("classification", jsonl(tmp_path / "b.jsonl", {"text": "x", "label": "y"}), form="label")


def chat(*messages: Any) -> Row:
    return {"messages": list(messages)}


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
NESTED: Any = []
for _ in range(500):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (chat(USER), "the conversation ends with the user's turn, so there is no answer to learn"),
        (chat(*TURNS, USER), "the conversation ends with the user's turn"),
        (chat(SYSTEM), "the conversation ends with the system's message, but must end with the user's"),
        (chat(ASSISTANT), "the conversation has no message"),
        (chat(USER, USER, ASSISTANT), "message 2 of the conversation is the user's, but must be the assistant's"),
        (chat(ASSISTANT, USER, ASSISTANT), "message 1 of the conversation is the assistant's, but must be the user's"),
        (chat(USER, SYSTEM, ASSISTANT), "message 2 of the conversation is the system's"),
        (chat(USER, ASSISTANT, SYSTEM, USER, ASSISTANT), "message 3 of the conversation is the system's"),
        (chat(USER, {**ASSISTANT, "content": " \n"}), "message 2 of 'messages' is empty"),
        (chat(USER, {**ASSISTANT, "content": []}), "message 2 of 'messages' is empty"),
        (chat(USER, {"role": "assistant"}), "message 2 of 'messages' has no 'content'; its keys are: role"),
        (chat({"role": "tool", "content": "x"}), "message 1 of 'messages' has the role 'tool'"),
        (
            chat(USER, {"role": "assistant", "tool_calls": [{"id": 1}]}),
            "message 2 of 'messages' calls a tool (tool_calls)",
        ),
        (
            chat({"role": "user", "content": [IMAGE]}, ASSISTANT),
            "message 1 of 'messages' holds a part of type 'image_url'",
        ),
        (chat({"role": "usr", "content": "x"}), "message 1 of 'messages' has the role 'usr'"),
        (chat({"role": 3, "content": "x"}), "message 1 of 'messages' has the role 3 (of type int)"),
        (chat({"role": "user", "content": 3}), "message 1 of 'messages' has 3 (of type int) as content"),
        (chat(USER, {**ASSISTANT, "weight": 0}), "message 2 of 'messages' has the weight 0"),
        (chat(USER, {**ASSISTANT, "weight": 0.5}), "message 2 of 'messages' has the weight 0.5"),
        (chat(USER, {**ASSISTANT, "train": False}), "message 2 of 'messages' has the train False"),
        (chat(USER, {**ASSISTANT, "loss": False}), "message 2 of 'messages' has the loss False"),
        (chat(USER, {**ASSISTANT, "reasoning_content": "Hm."}), "has a thought beside its text (reasoning_content)"),
        (chat(USER, {**ASSISTANT, "thinking": "Hm."}), "has a thought beside its text (thinking)"),
        (chat({**USER, "images": ["a.png"]}, ASSISTANT), "message 1 of 'messages' holds more than text (images)"),
        (chat(USER, {**ASSISTANT, "audio": {"id": "a"}}), "message 2 of 'messages' holds more than text (audio)"),
        (chat("Hi"), "message 1 of 'messages' is of type str, 'Hi', not an object"),
        (chat(NESTED), "message 1 of 'messages' is of type list, not an object"),
        (chat({"role": "user", "content": NESTED}), "message 1 of 'messages' holds of type list; only text is read"),
        (chat(), "'messages' is an empty list"),
        ({"messages": None}, "'messages' is nothing (null)"),
        ({"messages": {"role": "user"}}, "'messages' is of type dict"),
        ({"messages": "Hi"}, "'messages' is of type str, 'Hi'"),
        ({"messages": "[" * 9000}, "'messages' is not JSON"),
        ({"messages": [USER, ASSISTANT], "tools": [{"name": "x"}]}, "'tools' is not empty"),
        ({"prompt": "x", "completion": "y"}, "has the form of prompts and completions (prompt + completion), but"),
        ({"message": [USER, ASSISTANT]}, "there is no column 'messages'; there are: message"),
    ],
)
def test_a_wrong_row_of_chats_is_named_in_one_line(row: Row, message: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *[{"messages": [USER, ASSISTANT]}] * 3, row)
    with pytest.raises(DataError) as raised:
        read_task("records", path, needs_targets=True)
    assert raised.value.message.startswith(f"{path}, line 4")
    assert message in raised.value.message
    assert raised.value.hint
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ({"prompt": "a", "completion": "b"}, {"prompt": "a"}, "there is no column 'completion' or 'response'"),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}, "column 'completion' holds nothing"),
        (
            {"prompt": "a", "completion": "b"},
            {"prompt": ["a"], "completion": "b"},
            "message 1 of 'prompt' is of type str",
        ),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": []}, "'completion' is an empty list"),
        ({"prompt": "a", "completion": "b"}, {"prompt": " ", "completion": "b"}, "'prompt' gives an empty text"),
        (
            {"instruction": "a", "output": "b"},
            {"instruction": "a", "input": {}, "output": "b"},
            "'input' holds an object",
        ),
        ({"conversations": [HUMAN, GPT]}, {"conversations": [GPT]}, "the conversation has no message"),
        (
            {"conversations": [HUMAN, GPT]},
            {"conversations": [{"from": "human"}]},
            "message 1 of 'conversations' has no 'value'",
        ),
        (
            {"question": "a", "answers": {"text": ["b"], "answer_start": [0]}},
            {"question": "a", "answers": {"text": [], "answer_start": []}},
            "'answers' is an empty list",
        ),
        ({"question": "a", "answer": "b"}, {"question": "a", "answer": {"begin": 3}}, "'answer' holds an object"),
        ({"text": "x"}, {"text": ""}, "'text' gives an empty text"),
        ({"text": "x"}, {"text": ["x"]}, "column 'text' holds a list"),
        ({"text": "x", "label": "a"}, {"text": "x", "label": 0.5}, "label 0.5 is not a whole number"),
        ({"text": "x", "label": "a"}, {"text": "x"}, "has the form of texts (text), but"),
        ({"source": "x", "target": "a"}, {"source": "x"}, "there is no column 'target' or 'targets'"),
    ],
)
def test_a_wrong_row_far_down_is_named(good: Row, bad: Row, message: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *[good] * 7_000, bad)
    with pytest.raises(DataError) as raised:
        read_task("records", path, needs_targets=True)
    assert raised.value.message.startswith(f"{path}, line 7001")
    assert message in raised.value.message
    if "source" not in bad:  # otherwise a dict has an example's fields
        with pytest.raises(PrefixError, match="example 2"):
            as_examples([good, bad], needs_targets=True)


def test_without_targets_there_is_something_to_answer(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", chat(USER), chat(*TURNS, USER))
    assert [(len(example.messages), example.targets) for example in read_task("records", path)] == [(1, ()), (5, ())]
    assert read_task("records", jsonl(tmp_path / "b.jsonl", {"prompt": "Hi"})) == [Example("Hi", messages=HI)]
    with pytest.raises(DataError, match="forms that are recognized"):
        read_task("records", jsonl(tmp_path / "b.jsonl", {"prompt": "Hi"}), needs_targets=True)


FLIGHTS = '[{"from": "Rome", "to": "Oslo"}]'


@pytest.mark.parametrize(
    ("row", "messages", "targets"),
    [
        (
            {"system": "Answer in French.", "prompt": [USER], "completion": [ASSISTANT]},
            (Message("system", "Answer in French."), *HI),
            ("Hello. ",),
        ),
        (
            {"system": " ", "prompt": "Hi", "completion": [ASSISTANT]},
            HI,
            ("Hello. ",),
        ),
        # As a cell of a table holds them.
        ({"prompt": json.dumps([USER]), "completion": json.dumps([ASSISTANT])}, HI, ("Hello. ",)),
        ({"prompt": json.dumps([HUMAN]), "completion": "Hello."}, HI, ("Hello.",)),
        # A text about a list.
        ({"prompt": '[{"a": 1}]', "completion": "x"}, (Message("user", '[{"a": 1}]'),), ("x",)),
        ({"prompt": "[{", "completion": "x"}, (Message("user", "[{"),), ("x",)),
        ({"prompt": "Who?", "completion": '[{"role": "CEO"}]'}, (Message("user", "Who?"),), ('[{"role": "CEO"}]',)),
        ({"prompt": FLIGHTS, "completion": "x"}, (Message("user", FLIGHTS),), ("x",)),
    ],
)
def test_messages_and_a_system_message_as_prompt(row: Row, messages: tuple[Message, ...], targets: tuple[str, ...]):
    (example,) = as_examples([row], needs_targets=True)
    assert example.messages == messages
    assert example.targets == targets


def test_two_system_messages_are_refused() -> None:
    with pytest.raises(DataError, match="message 2 of the conversation is the system's"):
        as_examples([{"system": "Be kind.", "prompt": [SYSTEM, USER], "completion": [ASSISTANT]}])


def test_an_empty_column_gives_way_to_a_filled_one_of_the_same_meaning() -> None:
    (example,) = as_examples([{"instruction": "Sum up.", "input": "", "context": "Owls hunt.", "output": "Owls."}])
    assert example.source == "Sum up.\n\nOwls hunt."
    (merged,) = as_examples(
        [{"instruction": "Sum up.", "input": None, "output": None, "context": "Owls hunt.", "response": "Owls."}],
        needs_targets=True,
    )
    assert (merged.source, merged.targets) == ("Sum up.\n\nOwls hunt.", ("Owls.",))


def test_where_a_chat_is_from_is_no_field_of_an_example() -> None:
    chats = [{"messages": [USER, ASSISTANT], "source": "forum"}, {"messages": [USER, ASSISTANT]}]
    assert [example.targets for example in as_examples(chats, needs_targets=True)] == [("Hello. ",)] * 2
    (pair,) = as_examples([{"prompt": "1+1", "completion": "2", "source": "forum"}])
    assert (pair.source, pair.targets) == ("1+1", ("2",))
    # An example without a target keeps its fields.
    assert as_examples([{"messages": [USER], "source": "Hi"}])[0].source == "Hi"
    assert as_examples([{"source": "1+1"}])[0].source == "1+1"


def test_a_development_file_is_described_by_its_own_form(tmp_path: Path) -> None:
    train, dev = tmp_path / "qa.jsonl", tmp_path / "dev.csv"
    train.write_text('{"question": "Who?", "answer": "Mira"}\n', encoding="utf-8")
    dev.write_text("prompt,completion\nHow high?,3 m\n", encoding="utf-8")
    config = settle_form(TrainConfig(train=str(train), dev=str(dev)))
    lines = describe_run_data(config, read_task("records", train), read_task("records", dev))
    assert lines == [
        f"{train}: read as questions and answers: 1 question, 1 answer",
        f"{dev}: read as prompts and completions: 1 prompt, 1 completion",
    ]
