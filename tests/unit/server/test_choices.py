"""The texts of tokens beside their log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from prefixtune.attention.layout import Layout
from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.request import SequenceOutput, Token
from prefixtune.server.api.choices import ChatChoices, CompletionChoices

WORDS = ["<unk>", "</s>", "▁Hello", "▁world", "world", "!", "▁", "a", "▁a"]


@pytest.fixture
def sentencepiece() -> Any:
    """A tokenizer as LLaMA 2's and T5's: its decoder leaves out the space that a text begins with."""
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in WORDS], unk_id=0))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def output(*words: str, prompt: tuple[str, ...] = ()) -> SequenceOutput:
    def tokens(some: tuple[str, ...]) -> tuple[Token, ...]:
        return tuple(Token(WORDS.index(word), -1.0, ((WORDS.index("world"), -2.0),)) for word in some)

    text = "".join(words).replace("▁", " ")
    return SequenceOutput("r", 0, tokens(words), text, "stop", prompt_tokens=tokens(prompt))


def test_tokens_keep_the_space_that_they_begin_with(sentencepiece: Any) -> None:
    backbone = Backbone(None, sentencepiece, "words", Layout({}, {}, "decoder"), "")
    choice = CompletionChoices(backbone).whole(0, output("▁Hello", "▁world", "!"), " Hello world!")
    assert choice["logprobs"]["tokens"] == [" Hello", " world", "!"]
    assert choice["logprobs"]["text_offset"] == [0, 6, 12]
    assert choice["logprobs"]["top_logprobs"][1] == {" world": -1.0, "world": -2.0}
    content = ChatChoices(backbone).whole(0, output("▁Hello", "▁world"), "")["logprobs"]["content"]
    assert [token["token"] for token in content] == [" Hello", " world"]
    assert bytes(content[1]["bytes"]) == b" world"


def test_a_text_begins_without_it(sentencepiece: Any) -> None:
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
