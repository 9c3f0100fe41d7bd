"""The texts of tokens beside their log-probabilities."""

from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefixtune.attention.layout import Layout
from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.request import SequenceOutput, Token
from prefixtune.server.api.choices import ChatChoices, CompletionChoices

WORDS = ["<unk>", "</s>", "▁Hello", "▁world", "world", "!", "▁", "a", "▁a"]


@pytest.fixture
def sentencepiece():
    """A tokenizer as LLaMA 2's and T5's: its decoder leaves out the space that a text begins with."""
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in WORDS], unk_id=0))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def output(*words, prompt=()):
    def tokens(some):
        return tuple(Token(WORDS.index(word), -1.0, ((WORDS.index("world"), -2.0),)) for word in some)

    text = "".join(words).replace("▁", " ")
    return SequenceOutput("r", 0, tokens(words), text, "stop", prompt_tokens=tokens(prompt))


def test_tokens_keep_the_space_that_they_begin_with(sentencepiece):
    backbone = Backbone(None, sentencepiece, "words", Layout({}, {}, "decoder"), "")
    choice = CompletionChoices(backbone).whole(0, output("▁Hello", "▁world", "!"), " Hello world!")
    assert choice["logprobs"]["tokens"] == [" Hello", " world", "!"]
    assert choice["logprobs"]["text_offset"] == [0, 6, 12]
    assert choice["logprobs"]["top_logprobs"][1] == {" world": -1.0, "world": -2.0}
    content = ChatChoices(backbone).whole(0, output("▁Hello", "▁world"), "")["logprobs"]["content"]
    assert [token["token"] for token in content] == [" Hello", " world"]
    assert bytes(content[1]["bytes"]) == b" world"


def test_a_text_begins_without_it(sentencepiece):
    backbone = Backbone(None, sentencepiece, "words", Layout({}, {}, "decoder"), "")
    echoed = CompletionChoices(backbone, prompts=["Hello world"])
    logprobs = echoed.whole(0, output("!", prompt=("▁Hello", "▁world")), "!")["logprobs"]
    assert logprobs["tokens"] == ["Hello", " world", "!"]
    assert logprobs["text_offset"] == [0, 5, 11]
    # An encoder-decoder's text follows nothing; its pieces follow each other.
    backbone = Backbone(None, sentencepiece, "words", Layout({}, {}, "encoder-decoder"), "")
    choices = CompletionChoices(backbone)
    (first,), (second,) = (choices.pieces(0, output(word), word) for word in ("▁Hello", "▁world"))
    assert (first["logprobs"]["tokens"], second["logprobs"]["tokens"]) == (["Hello"], [" world"])
    assert (first["logprobs"]["text_offset"], second["logprobs"]["text_offset"]) == ([0], [5])


@pytest.fixture
def bytewise():
    """A backbone whose every token is a byte, or a special one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    return Backbone(None, fast, "bytes", Layout({}, {}, "decoder"), "")


def generated(backbone, text, prompt=""):
    """Of a text, in which special tokens may be by name, and of a prompt."""
    tokens, read = (tuple(Token(id, -1.0) for id in backbone.encode(words)) for words in (text, prompt))
    return SequenceOutput("r", 0, tokens, backbone.decode(backbone.encode(text)), "stop", prompt_tokens=read)


def test_offsets_count_characters_and_no_special_tokens(bytewise):
    output = generated(bytewise, "é</s>中 ok<s>")
    logprobs = CompletionChoices(bytewise).whole(0, output, output.text)["logprobs"]
    assert "".join(logprobs["tokens"][-4:]) == " ok<s>"
    assert logprobs["text_offset"] == [0, 0, 1, 1, 1, 1, 2, 3, 4, 5]
    choices = CompletionChoices(bytewise)
    parts = [replace(output, tokens=(one,), text="", finish_reason=None) for one in output.tokens]
    streamed = [choices.pieces(0, part, "é中 ok")[0]["logprobs"]["text_offset"] for part in parts]
    assert [offset for (offset,) in streamed] == logprobs["text_offset"]


def test_offsets_of_an_echoed_prompt(bytewise):
    output = generated(bytewise, "é", prompt="<s>aé")
    for prompt, offsets in (("aé", [0, 0, 1, 1, 2, 2]), ("<s>aé", [0, 3, 4, 4, 5, 5])):
        choice = CompletionChoices(bytewise, prompts=[prompt]).whole(0, output, "é")
        assert choice["logprobs"]["text_offset"] == offsets


def test_part_of_a_character_has_no_bytes(bytewise):
    content = ChatChoices(bytewise).whole(0, generated(bytewise, " é"), "")["logprobs"]["content"]
    assert [(token["token"], token["bytes"]) for token in content] == [(" ", [32]), ("\ufffd", None), ("\ufffd", None)]
