"""Encoders: windows, special tokens, and what an encoder does not do."""

import pytest
import torch

from prefixtune.backbone.load import load_backbone
from prefixtune.errors import BackboneError, RequestError
from prefixtune.inference.generate import generate, stream

P = 5


def states(backbone, ids, mask=None, prefixes=None):
    return backbone.forward(ids, mask, prefixes=prefixes).last_hidden_state


def test_a_local_window_does_not_hide_the_prefix(tiny_backbone, random_prefix, random_ids):
    """ModernBERT's local attention: four tokens on either side, and the whole prefix."""
    backbone = tiny_backbone("modernbert", num_hidden_layers=1, layer_types=["sliding_attention"], local_attention=8)
    ids, one, other = torch.tensor([random_ids(20)]), random_prefix(backbone, 3, 1), random_prefix(backbone, 3, 2)
    found = states(backbone, ids, prefixes=one)
    effect = (found - states(backbone, ids, prefixes=other)).detach().abs().amax(-1)[0]
    assert float(effect.min()) > 1e-2
    for place in (0, 10, 19):
        for gradient in torch.autograd.grad(found[0, place, 0], one.tensors(), retain_graph=True):
            assert torch.all(gradient.abs().amax(-1) > 0)

    # The text's own window holds.
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 90
    after = states(backbone, changed, prefixes=one)
    moved = (after - found).detach().abs().amax(-1)[0] > 0
    assert moved.nonzero().flatten().tolist() == list(range(6, 15))


def test_an_encoder_reads_a_text_within_its_special_tokens(encoder):
    ids = encoder.encode("ab")
    assert len(ids) == 2
    assert encoder.encode_sources(["ab", ""]) == [
        [encoder.tokenizer.bos_token_id, *ids, encoder.eos_id],
        [encoder.tokenizer.bos_token_id, encoder.eos_id],
    ]


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_folder_is_loaded_as_an_encoder(family, tmp_path, tiny_models, enclosing_tokenizer, random_ids, assert_same):
    model = tiny_models(family)
    model.save_pretrained(tmp_path)
    enclosing_tokenizer.save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path)
    assert backbone.kind == "encoder"
    assert backbone.encode_sources(["a"]) == [enclosing_tokenizer("a")["input_ids"]]
    ids = torch.tensor([random_ids(14)])
    assert_same(states(backbone, ids), model(input_ids=ids).last_hidden_state)


def test_the_width_is_that_of_the_layers(tiny_backbone):
    """The MLP is as wide as the model; ELECTRA's embeddings are narrower."""
    backbone = tiny_backbone("electra")
    assert backbone.hidden_size == backbone.model.config.hidden_size == 32


def test_an_encoder_writes_nothing(encoder, tiny_backbone, random_prefix):
    for prefix in (None, random_prefix(encoder, 3)):
        with pytest.raises(RequestError, match=r"is an encoder, which reads text and writes none") as error:
            generate(encoder, ["some text"], prefix)
        assert error.value.hint
        with pytest.raises(RequestError, match="is an encoder"):
            next(stream(encoder, "some text", prefix))
    with pytest.raises(BackboneError, match="the prefix has decoder"):
        encoder.forward(torch.tensor([[1, 2]]), prefixes=random_prefix(tiny_backbone("gpt2"), 3))
