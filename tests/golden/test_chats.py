"""Conversations by the chat templates of eight families: token ids, and where the labels are, as they were."""

import hashlib
import json
from pathlib import Path

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.chat import chat_format
from prefixtune.data.encoding import encode_examples, encode_pairs, encode_prompts
from prefixtune.data.examples import Example, Message
from prefixtune.errors import DataError, RequestError
from prefixtune.prefix.text_format import TextFormat
from zoo import make_model

FOLDER = Path(__file__).parent
TEMPLATES = sorted(path.stem for path in (FOLDER / "templates").glob("*.jinja"))
NUM_CONVERSATIONS = 60
LIMIT = 120
"""Positions where conversations are cut: about a third of them are longer."""

_SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"),
    *("<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|User|>", "<|Assistant|>"),
)
_MERGES = (
    *("t h", "th e", "i n", "in g", "e r", "o u", "a n", "an d", "Ġ t", "Ġ a", "Ġ the", "Ġt he", "Ġ s", "Ċ Ċ"),
    *("Ġ Ġ", ". Ċ", "l l", "Ġ in", "Ġ and", "o n", "r e", "a t", "ĠĠ ĠĠ", "s t", "u s", "us er", "> Ċ", "] Ġ", "Ġ ["),
)

_OPENINGS = ("What is", "Tell me about", "Who found", "Why does one need", "How do I cook", "Please draw", "List")
_THINGS = (
    "the moon",
    "a cat",
    "Crème brûlée",
    "東京タワー",
    "שלום עולם",
    "🙂 faces",
    "e\u0301tudes",
    "x = {y}",
    "O(n²)",
)
_ANSWERS = (
    "It is round and the light of the sun shines on it.",
    "  Yes.  ",
    "First line.\n\nSecond line:\n\n    indented\n",
    "\nA list:\n- one\n- two\n",
    "An answer that quotes <|im_end|> and [INST] and </s> in the middle.",
    "<think>\nThe user is asking. Let me see.\n</think>\n\nThe answer.",
    "<think>short</think>No.",
    "ありがとう、そして さようなら。",
    "1",
    "\t`code` {{ not.a.template }} {% if %}",
)
_SYSTEMS = ("Be short.", " Answer in two lines,\nplease. ", "Du bist ein Freund.", "{{ system }}")


def make_tokenizer():
    """Bytes, some merges across the borders that templates write, and the families' special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for merge in _MERGES:
        first, second = merge.split(" ")
        if first in vocabulary and second in vocabulary and first + second not in vocabulary:
            merges.append((first, second))
            vocabulary[first + second] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=list(_SPECIAL),
        clean_up_tokenization_spaces=False,
    )


def make_backbone():
    """A tiny model with many positions; only its tokenizer counts."""
    tokenizer = make_tokenizer()
    model = make_model("llama", tokenizer, max_position_embeddings=4096)
    return Backbone.from_model(model, tokenizer, "tiny-llama")


def conversations():
    """From one turn to six, with and without a system message, several last answers, and texts of all kinds."""
    for number in range(NUM_CONVERSATIONS):
        num_turns = (1, 2, 3, 1, 6, 2, 4)[number % 7]
        messages = [Message("system", _SYSTEMS[number // 3 % 4])] if number % 3 == 1 else []
        for turn in range(num_turns):
            step = number * 5 + turn * 3
            question = f"{_OPENINGS[step % 7]} {_THINGS[(step + number) % 9]}?"
            if number % 11 == 5:
                question = f"\n {question} \n\n"
            if number % 13 == 4 and turn == num_turns - 1:
                question += " And then some more of it, over and over," * 12
            if number % 10 == 9:
                question = "?a\u00e9"[turn % 3]
            messages += [Message("user", question), Message("assistant", _ANSWERS[(number * 7 + turn * 3) % 10])]
        targets = [messages.pop().content]
        if number % 8 == 3:
            targets += [_ANSWERS[number % 10] + " Or so.", "Another answer."]
        yield Example(messages[-1].content, tuple(targets), messages=tuple(messages))


def spelled(ids):
    """How many ids, and a hash of them."""
    numbers = json.dumps(list(ids))
    return f"{len(ids)} {hashlib.sha256(numbers.encode()).hexdigest()[:10]}"


def described(example):
    """The ids of a tokenized example, and the turns that are labels."""
    turns = " ".join(f"{first}-{stop}" for first, stop in example.turns)
    return " | ".join([spelled(example.prompt), *map(spelled, example.targets)]) + (f" [{turns}]" if turns else "")


def encoded(backbone, example, form, **options):
    """What becomes of one conversation; the class of the error where the template refuses it."""
    try:
        dataset = encode_examples(backbone, [example], form, prefix_length=4, **options)
    except DataError:
        return "DataError"
    counts = f"{dataset.num_targets}t {dataset.num_truncated}c {dataset.num_dropped_turns}d {dataset.num_unpacked}u"
    return "; ".join([counts, *map(described, dataset.examples)])


def of_template(backbone, name):
    """All of a template: what it writes first in full, then each conversation, in each way."""
    template = (FOLDER / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    form = chat_format(backbone, template)
    # Stored forms are read by themselves; the model's own template is rendered by transformers.
    backbone.tokenizer.chat_template = template
    backbone.tokenizer_cache.clear()
    own = chat_format(backbone, "model")
    assert (own.end, own.target) == (form.end, form.target)
    results = {f"{name} form": [form.end, form.target]}
    for number, example in enumerate(conversations()):
        packed = encoded(backbone, example, form)
        assert encoded(backbone, example, own) == packed
        results[f"{name} {number:02}"] = packed
        if number % 3 == 0 or number % 13 == 4:
            results[f"{name} {number:02} cut"] = encoded(backbone, example, form, max_length=LIMIT)
        if number % 5 == 0:
            separate = encoded(backbone, example, form, turns="separate")
            last = encoded(backbone, example, form, turns="last")
            results[f"{name} {number:02} separate"], results[f"{name} {number:02} last"] = separate, last
        if number % 6 == 0:
            try:
                ((prompt, target),) = encode_pairs(backbone, form, [example])
                assert encode_prompts(backbone, form, [example.messages])[0] == list(prompt)
                results[f"{name} {number:02} pair"] = f"{spelled(prompt)} | {spelled(target)}"
            except RequestError:
                results[f"{name} {number:02} pair"] = "RequestError"
    first = next(conversations())
    (whole,) = encode_examples(backbone, [first], form, prefix_length=4).examples
    results[f"{name} 00 ids"] = " ".join(map(str, (*whole.prompt, -1, *whole.targets[0])))
    return results


def of_texts(backbone):
    """Sources and targets without a template, and texts that are learned as they are."""
    pairs = [Example(f"{one.source} {number}", one.targets) for number, one in enumerate(conversations())]
    texts = [Example("", (" ".join(_ANSWERS) * 9,)), Example("", ("short",))]
    results = {}
    for name, form, options in (
        ("default", TextFormat(), {}),
        ("around", TextFormat("Q: {source}\nA:", " {target}"), {}),
        ("cut", TextFormat("Q: {source}\nA:", " {target}"), {"max_length": 90}),
    ):
        dataset = encode_examples(backbone, pairs[:20], form, prefix_length=4, **options)
        results[f"texts {name}"] = [str(dataset.num_truncated), *map(described, dataset.examples)]
        windows = encode_examples(backbone, texts, form, prefix_length=4, **options)
        results[f"windows {name}"] = [" ".join(map(str, windows.origins)), *map(described, windows.examples)]
    return results


def compute():
    """All results: texts, each of lengths, hashes of ids, and spans."""
    backbone = make_backbone()
    results = of_texts(backbone)
    for name in TEMPLATES:
        results |= of_template(backbone, name)
    return results


def test_chats():
    stored = json.loads((FOLDER / "chats.json").read_text(encoding="utf-8"))
    computed = compute()
    assert computed.keys() == stored.keys()
    assert {name: value for name, value in computed.items() if value != stored[name]} == {}
