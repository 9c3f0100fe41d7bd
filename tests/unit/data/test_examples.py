"""Examples and the messages of a conversation."""

import pytest

from prefixtune.data.examples import Example, Message, chat_example, check_messages
from prefixtune.errors import DataError

SYSTEM = {"role": "system", "content": "Be short."}
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello."}


def test_a_conversation_as_dicts_pairs_or_messages():
    wanted = (Message("system", "Be short."), Message("user", "Hi"))
    assert check_messages([SYSTEM, USER]) == wanted
    assert check_messages([("system", "Be short."), ["user", "Hi"]]) == wanted
    assert check_messages(wanted) == wanted
    assert Example("Hi", ("Hello.",), messages=wanted).messages == wanted


def test_the_last_answer_is_the_target():
    example = chat_example([SYSTEM, USER, ASSISTANT, USER, ASSISTANT])
    assert (example.source, example.targets) == ("Hi", ("Hello.",))
    assert [message.role for message in example.messages] == ["system", "user", "assistant", "user"]
    assert chat_example([USER]).targets == ()


@pytest.mark.parametrize(
    "messages", ["Hi", [], [USER, ASSISTANT], [ASSISTANT, USER], [{"role": "usr", "content": "Hi"}]]
)
def test_what_is_no_conversation(messages):
    with pytest.raises(DataError, match="the conversation"):
        check_messages(messages)


def test_groups_are_texts():
    groups = {"n": 3}
    with pytest.raises(DataError, match="'a'"):
        Example("a", ("b",), groups=groups)
