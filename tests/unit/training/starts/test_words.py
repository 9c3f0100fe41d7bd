"""Starts of a prefix: from words, exactly what the model would have cached for them; from another prefix."""

import pytest
import torch

from prefixtune import load_prefix, save_prefix
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.training.config import TrainConfig
from prefixtune.training.starts.build import build_encoder, resolve_site_lengths
from prefixtune.training.starts.words import from_words


def test_a_prefix_of_words_acts_like_the_words(backbone, assert_same):
    words, text = backbone.encode("Say it: "), backbone.encode("name : Ann")
    prefix = from_words(backbone, "Say it: ", len(words))
    logits = backbone.forward(torch.tensor([text]), prefixes=prefix).logits[0]
    whole = backbone.forward(torch.tensor([[*words, *text]])).logits[0, len(words) :]
    assert_same(logits, whole)


def test_words_are_cut_and_cycled(tiny_backbone):
    backbone = tiny_backbone("llama")
    assert from_words(backbone, "abcdef", 4).equal(from_words(backbone, "abcd", 4))
    assert from_words(backbone, "abc", 7).equal(from_words(backbone, "abcabca", 7))
    assert not from_words(backbone, "abcd", 4).equal(from_words(backbone, "abce", 4))


@pytest.mark.parametrize("name", ["bert", "bart", "gpt2"])
def test_more_words_than_a_model_reads_are_refused_before_the_data_is_tokenized(name, tiny_backbone):
    backbone = tiny_backbone(name)
    assert from_words(backbone, "abc", 160).prefix_length == 160
    config = TrainConfig(prefix_length=161)
    with pytest.raises(ConfigError, match="161"):
        resolve_site_lengths(config, backbone)
    assert set(resolve_site_lengths(config.replace(initialization="random"), backbone).values()) == {161}


def test_another_prefix_is_checked(tiny_backbone, save_random_prefix, tmp_path):
    backbone, path = tiny_backbone("llama"), tmp_path / "other.safetensors"
    other = load_prefix(save_random_prefix(path, backbone)).to(torch.bfloat16)
    save_prefix(path, other, dtype=torch.bfloat16)
    config = TrainConfig(init_prefix=str(path), prefix_length=4)
    assert build_encoder(config, backbone)[1].prefix.equal(other.to(torch.float32))
    for length in (3, 6):
        with pytest.raises(ConfigError, match=f"decoder=4.*decoder={length}"):
            build_encoder(config.replace(prefix_length=length), backbone)
    with pytest.raises(BackboneError, match=r"2 KV heads x 8.*2 KV heads x 16"):
        build_encoder(config, tiny_backbone("qwen3"))
