"""A conversation computed once against its turns one by one, and its token ids against `apply_chat_template`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefixtune.backbone.batch import SoftLabels
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import collate, pack, pad
from prefixtune.data.chat import chat_format, encode_chat, encode_conversation, end_ids
from prefixtune.data.encoding import encode_examples
from prefixtune.data.examples import Example, Message, chat_example
from prefixtune.data.tokenized import TokenizedExample, epoch_batches

CHATML = (Path(__file__).parents[1] / "golden" / "templates" / "chatml.jinja").read_text(encoding="utf-8")
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token ~ '[INST] ' ~ content.strip() ~ ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' ~ content | trim ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"
)
# As Qwen3 and DeepSeek-R1 do: only the last answer keeps its thinking.
THINKING = (
    "{% for message in messages %}{% set content = message.content %}"
    "{% if message.role == 'assistant' and not loop.last %}{% set content = content.split('</think>')[-1].lstrip() %}"
    "{% endif %}{{ '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = (
    "{% for message in messages %}{% if message.role == 'user' %}### User: {{ message.content }}\n{% else %}"
    "### Assistant: {{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:{% endif %}"
)
CHAT = [
    Message("system", "Answer like a pirate."),
    Message("user", "Who are you?"),
    Message("assistant", "Arr, a parrot."),
    Message("user", "And where?"),
    Message("assistant", "<think>\nsea or land?\n</think>\n\nOn the sea, matey! "),
    Message("user", "Since when? é 水"),
]
ANSWER = "Since the last moon."


# --- packed = one by one ----------------------------------------------------------------------------------------------


@pytest.fixture
def conversation(random_ids):
    """Three turns with other tokens between them."""
    ids = tuple(random_ids(23, seed=5))
    return TokenizedExample(tuple(random_ids(6, seed=6)), (ids,), turns=((0, 4), (9, 14), (20, 23)))


def turn_by_turn(example):
    (target,) = example.targets
    return [
        replace(example, prompt=(*example.prompt, *target[:first]), targets=(target[first:stop],), turns=())
        for first, stop in example.turns
    ]


@pytest.mark.parametrize("reduction", ["sentence", "token"])
@pytest.mark.parametrize("hidden", [(), (1, 3)])
def test_packed_is_one_by_one(reduction, hidden, backbone, random_prefix, random_ids, conversation, assert_same):
    plain = TokenizedExample(tuple(random_ids(5)), (tuple(random_ids(3, seed=2)), tuple(random_ids(6, seed=3))))
    prefix = random_prefix(backbone, 5)
    tensors = prefix.tensors()
    for tensor in tensors:
        tensor.requires_grad_(True)

    def loss_and_gradients(examples):
        batch = collate(backbone, examples)
        assert batch.num_targets == 5
        total = batch.num_targets if reduction == "sentence" else len(batch.labels)
        loss = batch_loss(backbone, prefix, batch).sum() / total
        return loss, list(torch.autograd.grad(loss, tensors))

    whole = [replace(conversation, hidden=hidden), replace(plain, hidden=hidden)]
    loss, gradients = loss_and_gradients(whole)
    alone, alone_gradients = loss_and_gradients([*turn_by_turn(whole[0]), whole[1]])
    assert_same(loss, alone)
    for gradient, other in zip(gradients, alone_gradients, strict=True):
        assert gradient.abs().sum() > 0
        assert_same(gradient, other)


def test_padded_rows_and_soft_labels(tiny_backbone, random_prefix, conversation, assert_same):
    backbone = tiny_backbone("llama")
    prefix, labels = random_prefix(backbone, 4), sum(stop - first for first, stop in conversation.turns)
    size = int(backbone.model.get_output_embeddings().weight.shape[0])
    teacher = SoftLabels.from_logits(torch.randn(labels, size, generator=torch.Generator().manual_seed(1)), k=7)
    soft = replace(conversation, soft_targets=(teacher,))
    counts = [stop - first for first, stop in conversation.turns]
    alone = [
        replace(turn, soft_targets=(part,))
        for turn, part in zip(turn_by_turn(conversation), teacher.split(counts), strict=True)
    ]
    for whole, turns in ((conversation, turn_by_turn(conversation)), (soft, alone)):
        expected = batch_loss(backbone, prefix, pad(turns, pad_id=backbone.pad_id))
        assert_same(batch_loss(backbone, prefix, pack([whole])), expected)
        assert_same(batch_loss(backbone, prefix, pad([whole], pad_id=backbone.pad_id)), expected)
    assert pad([whole], pad_id=0).target_index.tolist() == pack([whole]).target_index.tolist()


def test_batches_count_turns_and_keep_conversations_whole(conversation):
    single = TokenizedExample((1, 2), ((3,),))
    examples = [conversation, single, single, conversation, single]
    batches = list(epoch_batches(examples, batch_size=4, targets_per_source=4, seed=None))
    assert [[example.num_targets for example in batch] for batch in batches] == [[3, 1], [1, 3], [1]]
    assert [example for batch in batches for example in batch] == examples


# --- token ids = apply_chat_template ----------------------------------------------------------------------------------


def by_transformers(tokenizer, messages, template, *, opens):
    return tokenizer.apply_chat_template(
        [message._asdict() for message in messages],
        chat_template=template,
        add_generation_prompt=opens,
        tokenize=True,
        return_dict=False,
    )


@pytest.mark.parametrize("template", ["model", CHATML, LLAMA_2, THINKING, NO_END], ids=lambda text: text[:20])
def test_ids_are_those_of_transformers(template, default_backbone):
    form = chat_format(default_backbone, template)
    own = None if template == "model" else template
    tokenizer = default_backbone.tokenizer
    messages = CHAT if template != NO_END else CHAT[1:]
    for stop in range(2 if messages is CHAT else 1, len(messages) + 1, 2):
        before = messages[:stop]
        expected = by_transformers(tokenizer, before, own, opens=True)
        assert encode_chat(default_backbone, [message._asdict() for message in before], form) == expected
    found = encode_conversation(default_backbone, form, messages, [ANSWER])
    # A turn is what transformers writes after the opening of the answer, up to where generation stops.
    ends = {default_backbone.eos_id, *end_ids(default_backbone, form)}
    asked = [index for index, message in enumerate(messages) if message.role == "user"]
    for turn, index in zip(found.turns, asked, strict=True):
        assert list(turn.prompt) == by_transformers(tokenizer, messages[: index + 1], own, opens=True)
        answered = [*messages, Message("assistant", ANSWER)][: index + 2]
        whole = by_transformers(tokenizer, answered, own, opens=False)
        ours = [*turn.prompt, *turn.labels]
        assert turn.labels[-1] in ends
        if template == NO_END:
            assert ours[:-1] == whole[: len(ours) - 1]
        else:
            assert ours == whole[: len(ours)]
            assert not tokenizer.decode(whole[len(ours) :]).strip()
    assert found.is_packed == (template not in (THINKING, NO_END))


def long_conversation(num_answers):
    pairs = [
        (
            Message("user", f"What is {number}?"),
            Message("assistant", f"<think>\nhm {number}\n</think>\n\nIt is é{number}. "),
        )
        for number in range(num_answers)
    ]
    return [message for pair in pairs for message in pair] + [Message("user", "And now?")]


@pytest.mark.parametrize("template", ["model", CHATML, LLAMA_2, THINKING], ids=lambda text: text[:20])
def test_the_work_for_a_conversation_grows_with_its_length(template, default_backbone, monkeypatch):
    form, messages = chat_format(default_backbone, template), long_conversation(40)
    encode, encoded = type(default_backbone).encode, [0]

    def counted(backbone, text):
        encoded[0] += len(text)
        return encode(backbone, text)

    monkeypatch.setattr(type(default_backbone), "encode", counted)
    found = encode_conversation(default_backbone, form, messages, [ANSWER])
    # Turns that stand alone are read as often as they are trained on.
    rows = found.turns[-1:] if found.is_packed else found.turns
    assert encoded[0] < 8 * sum(len(default_backbone.tokenizer.decode([*one.prompt, *one.labels])) for one in rows)
    own = None if template == "model" else template
    for turn, stop in zip(found.turns, range(1, len(messages) + 1, 2), strict=True):
        assert list(turn.prompt) == by_transformers(default_backbone.tokenizer, messages[:stop], own, opens=True)


def test_what_follows_a_turn_that_is_too_long_is_dropped(default_backbone):
    form, messages = chat_format(default_backbone, "model"), long_conversation(12)
    whole = encode_conversation(default_backbone, form, messages, [ANSWER])
    limit = whole.turns[4].length
    example = chat_example([*messages, Message("assistant", ANSWER)])
    dataset = encode_examples(default_backbone, [example], form, prefix_length=0, max_length=limit)
    assert (dataset.num_dropped_turns, len(dataset.examples[0].turns)) == (13 - 5, 5)


def test_turns_that_are_rewritten_are_examples_of_their_own(default_backbone):
    form = chat_format(default_backbone, THINKING)
    messages = tuple(CHAT)
    examples = [Example("plain", ("target",)), Example(CHAT[-1].content, (ANSWER, "Ages."), messages=messages)]
    dataset = encode_examples(default_backbone, examples, form, prefix_length=10)
    assert (dataset.num_targets, dataset.num_unpacked, dataset.origins) == (5, 1, (0, 1, 1, 1))
    assert [len(example.targets) for example in dataset.examples] == [1, 1, 1, 2]
    thinking = default_backbone.tokenizer.decode(dataset.examples[2].targets[0])
    assert "<think>" in thinking
    assert "<think>" not in default_backbone.tokenizer.decode(dataset.examples[3].prompt)


def test_tokens_that_join_at_a_border(default_backbone):
    """Generation begins after the tokens of what was asked, so an answer is learned from there."""
    form, tokenizer = chat_format(default_backbone, "model"), default_backbone.tokenizer
    messages = [Message("user", "Hi"), Message("assistant", "  Hello."), Message("user", "Again")]
    found = encode_conversation(default_backbone, form, messages, ["  Hello again."])
    assert not found.is_packed
    whole = by_transformers(tokenizer, messages[:2], None, opens=False)
    for turn, count in zip(found.turns, (1, 3), strict=True):
        assert list(turn.prompt) == by_transformers(tokenizer, messages[:count], None, opens=True)
    assert [tokenizer.decode(turn.labels) for turn in found.turns] == ["  Hello.<|im_end|>", "  Hello again.<|im_end|>"]
    # The line break before the answer and its first spaces are one token there.
    assert whole[: len(found.turns[0].prompt)] != list(found.turns[0].prompt)
