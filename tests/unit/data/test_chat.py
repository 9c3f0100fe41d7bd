"""Conversations that are too long or cannot be written, and where an answer ends."""

from dataclasses import replace

import pytest

from chat_templates import TEMPLATE
from prefixtune.data.chat import chat_format, encode_chat, end_ids, literal_format
from prefixtune.data.encoding import encode_examples, encode_pairs, encode_prompts
from prefixtune.data.examples import Example, Message, chat_example
from prefixtune.data.truncation import truncate_prompt
from prefixtune.errors import DataError, PrefixWarning, RequestError
from prefixtune.prefix.text_format import TextFormat

USER, ASSISTANT = Message("user", "What is it?"), Message("assistant", "A cat.")


@pytest.fixture
def form(llama):
    return chat_format(llama, TEMPLATE)


def test_where_an_answer_ends(llama, form):
    assert form.end == "<pad>"
    assert end_ids(llama, form) == (llama.tokenizer.pad_token_id,)
    assert end_ids(llama, TextFormat()) == ()
    (tokenized,) = encode_examples(llama, [Example("Q", ("A",))], form, prefix_length=0).examples
    assert llama.tokenizer.decode(tokenized.prompt) == "<s>u:Q<pad>\n<s>a:"
    assert llama.tokenizer.decode(tokenized.targets[0]) == "A<pad>"
    no_end = chat_format(llama, "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert no_end.end == "</s>"
    (tokenized,) = encode_examples(llama, [Example("Q", ("A\n",))], no_end, prefix_length=0).examples
    assert llama.tokenizer.decode(tokenized.targets[0]) == "A</s>"


def test_an_answer_that_quotes_the_end_token(llama, form):
    (tokenized,) = encode_examples(llama, [Example("Q", ("A<pad>B",))], form, prefix_length=0).examples
    assert llama.tokenizer.decode(tokenized.targets[0]) == "A<pad>B<pad>"


def test_a_default_system_message(llama):
    form = chat_format(llama, TEMPLATE, system="Be short.")
    assert llama.tokenizer.decode(encode_prompts(llama, form, ["Q"])[0]) == "<s>s:Be short.<pad>\n<s>u:Q<pad>\n<s>a:"
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "Q"}]
    assert "Be short." not in llama.tokenizer.decode(encode_chat(llama, own, form))


def test_a_long_user_message_is_cut_inside_the_template(llama, form):
    chat = chat_example([Message("system", "Sys"), Message("user", "long " * 20), ASSISTANT, USER, ASSISTANT])
    cut = encode_examples(llama, [chat], form, prefix_length=0, max_length=50)
    (kept,) = cut.examples
    assert (cut.num_targets, cut.num_dropped_turns, cut.num_truncated) == (1, 1, 1)
    assert len(kept.prompt) + len(kept.targets[0]) == 50
    text = llama.tokenizer.decode(kept.prompt)
    assert text.startswith("<s>s:Sys<pad>\n<s>u:long long")
    assert text.endswith("<pad>\n<s>a:")
    with pytest.raises(DataError):
        encode_examples(llama, [chat], form, prefix_length=0, max_length=23)
    # In use, the last message is cut as well, and those before it stay.
    form = replace(form, max_length=60, longest_target=7, on_too_long="cut")
    messages = [*chat.messages[:1], USER, ASSISTANT, Message("user", "long " * 20)]
    whole = encode_prompts(llama, form, [messages])[0]
    ids = truncate_prompt(llama, form, whole, prefix_length=0, new_tokens=7, source=messages)
    assert len(ids) == 53
    assert llama.tokenizer.decode(ids).startswith("<s>s:Sys<pad>\n<s>u:What is it?<pad>\n<s>a:A cat.<pad>\n<s>u:l")
    assert llama.tokenizer.decode(ids).endswith("<pad>\n<s>a:")


def test_without_a_template(llama):
    single = chat_example([USER, ASSISTANT])
    (plain,) = encode_examples(
        llama, [Example(USER.content, (ASSISTANT.content,))], TextFormat(), prefix_length=0
    ).examples
    assert encode_examples(llama, [single], TextFormat(), prefix_length=0).examples[0] == plain
    for messages in ([USER, ASSISTANT, USER], [Message("system", "S"), USER]):
        with pytest.raises(DataError, match="example 2"):
            encode_examples(llama, [single, chat_example([*messages, ASSISTANT])], TextFormat(), prefix_length=0)
        with pytest.raises(RequestError):
            encode_prompts(llama, TextFormat(), [messages])
    with pytest.raises(RequestError):
        chat_format(llama, "model")


def test_solved_examples_and_last_turns(llama, form):
    chat = chat_example([USER, ASSISTANT, USER, Message("assistant", "A dog.")])
    ((prompt, target),) = encode_pairs(llama, form, [chat])
    (last,) = encode_examples(llama, [chat], form, prefix_length=0, turns="last").examples
    assert (last.prompt, last.targets, last.turns) == (prompt, (target,), ())
    apart = encode_examples(llama, [chat], form, prefix_length=0, turns="separate")
    assert [len(example.prompt) for example in apart.examples][1] == len(prompt)
    assert (apart.num_targets, apart.num_unpacked, apart.origins) == (2, 1, (0, 0))


def test_a_format_for_programs_without_templates(llama):
    form = chat_format(llama, TEMPLATE, system="Be short.")
    plain = literal_format(llama, form)
    assert not plain.is_chat
    assert plain.prompt == "<s>s:Be short.<pad>\n<s>u:{source}<pad>\n<s>a:"
    assert encode_prompts(llama, plain, ["What?"]) == encode_prompts(llama, form, ["What?"])
    assert literal_format(llama, TextFormat()) == TextFormat()
    with pytest.raises(RequestError):
        literal_format(llama, chat_format(llama, "{% for m in messages %}{source}{{ m.content }}{% endfor %}"))


def test_a_changed_template_is_noticed(default_backbone):
    form = chat_format(default_backbone, "model")
    assert encode_prompts(default_backbone, form, ["Hi"])
    with pytest.warns(PrefixWarning):
        encode_prompts(default_backbone, replace(form, template_hash="0" * 16), ["Hi"])


@pytest.mark.parametrize(
    "template",
    ["{% for m in messages if m.role == 'human' %}{{ m.content }}{% endfor %}BOT: ", "{{ messages[0].content }} BOT: "],
)
def test_a_template_that_leaves_a_message_out_is_refused(llama, template):
    with pytest.raises(RequestError):
        chat_format(llama, template)


# --- far too long ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenized(monkeypatch, llama):
    """The characters of every text that the tokenizer reads."""
    read = []
    kind = type(llama.tokenizer)
    call = kind.__call__

    def counted(self, text, *args, **kwargs):
        texts = [text] if isinstance(text, str) else text
        read.extend(map(len, texts))
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", counted)
    return read


def test_no_more_of_a_text_is_tokenized_than_could_fit(llama, form, tokenized):
    far, positions = "word " * 200_000, 100
    plain = TextFormat("Q: {source}\nA:", "{target}", max_length=positions, on_too_long="cut")
    around = {"prefix_length": 0, "new_tokens": 10, "positions": positions}
    for one in (plain, replace(form, max_length=positions, on_too_long="cut")):
        (ids,) = encode_prompts(llama, one, [far], positions=positions)
        kept = truncate_prompt(llama, one, ids, source=far, **around)
        # As of a text that is long, but not far too long.
        (whole,) = encode_prompts(llama, one, [far[:600]])
        assert kept == truncate_prompt(llama, one, whole, source=far[:600], **around)
        (example,) = encode_examples(llama, [Example(far, ("A",))], one, prefix_length=0, max_length=positions).examples
        assert len(example.prompt) + len(example.targets[0]) == positions
        for source, target in ((far, "A"), ("Q", far)):
            policy = "error" if target == "A" else "cut"
            options = {"prefix_length": 0, "max_length": positions, "on_too_long": policy}
            with pytest.raises(DataError):
                encode_examples(llama, [Example(source, (target,))], one, **options)
    many = [USER, ASSISTANT] * 50_000
    assert len(encode_chat(llama, [message._asdict() for message in [*many, USER]], form, positions=positions)) > 100
    assert encode_examples(llama, [chat_example(many)], form, prefix_length=0, max_length=positions).num_targets == 3
    assert max(tokenized) < 40 * positions


def test_what_a_template_writes_is_bounded(llama, tokenized, monkeypatch):
    loops = "{% for i in range(900) %}{% for j in range(900) %}{{ none }}{% endfor %}{% endfor %}"
    form = chat_format(llama, TEMPLATE)
    monkeypatch.setattr(llama.tokenizer, "chat_template", loops + TEMPLATE)
    own = replace(form, chat_template="model", template_hash="")
    with pytest.raises(RequestError):
        encode_prompts(llama, own, ["Q"])
    with pytest.raises(DataError):
        encode_examples(llama, [chat_example([USER, ASSISTANT])], own, prefix_length=0)
    with pytest.raises(RequestError):
        chat_format(llama, "model")
    assert max(tokenized) < 1000
