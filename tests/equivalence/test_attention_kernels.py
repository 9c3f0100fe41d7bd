"""Fused and spelled-out attention give the same logits and gradients, with prefixes in front."""

import pytest
import torch

from oracles import outputs_together
from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import BackboneError, ConfigError

MODELS = ("gpt2", "llama", "mistral", "gemma2", "bart", "t5", "bert")
LENGTHS = (3, None, 5)


@pytest.fixture
def with_kernel(tiny_models, tiny_tokenizer):
    def make(name, attention):
        return Backbone.from_model(tiny_models(name), tiny_tokenizer, name, attention=attention)

    return make


@pytest.mark.parametrize("name", MODELS)
def test_kernels_agree(name, with_kernel, random_prefix, random_ids, assert_same):
    usual, other = with_kernel(name, "sdpa"), with_kernel(name, "eager")
    prefixes = [None if length is None else random_prefix(usual, length, seed=n) for n, length in enumerate(LENGTHS)]
    tensors = [tensor for prefix in prefixes if prefix is not None for tensor in prefix.tensors()]
    texts = [random_ids(n, seed) for seed, n in enumerate((9, 6, 7))], [random_ids(n, n) for n in (3, 5, 1)]
    expected = torch.cat(outputs_together(usual, *texts, prefixes))
    gradients = torch.autograd.grad(expected.square().sum(), tensors)
    learning = torch.cat(outputs_together(other, *texts, prefixes))
    assert_same(learning, expected)
    assert_same(torch.autograd.grad(learning.square().sum(), tensors), gradients, tolerance=1e-4)
    with torch.no_grad():
        assert_same(torch.cat(outputs_together(other, *texts, prefixes)), expected)


def test_an_unknown_kernel_is_refused(with_kernel):
    with pytest.raises(ConfigError, match="flash_attention_2") as error:
        with_kernel("llama", "flash_attention_2")
    assert "sdpa" in error.value.hint


def test_a_static_cache_without_a_mask_is_refused(with_kernel, random_ids):
    backbone = with_kernel("llama", "sdpa")
    with pytest.raises(BackboneError):
        backbone.model.generate(torch.tensor([random_ids(7, 1)]), cache_implementation="static", max_new_tokens=3)
