"""Attention to the prefix against transformers' own eager attention over a cache that holds the prefix."""

import pytest
import torch

from oracles import behind_cache, cache_of
from prefixtune.attention import record
from prefixtune.attention.injection import observe_attention
from prefixtune.attention.record import PrefixMass
from prefixtune.data.batching import pack, pad
from prefixtune.data.encoding import TokenizedExample

WITHOUT_WINDOW = ("gpt2", "llama", "opt", "gpt_neox", "qwen3")
P = 4


def examples_of(random_ids):
    return [
        TokenizedExample(tuple(random_ids(6, 1)), (tuple(random_ids(5, 2)), tuple(random_ids(3, 3)))),
        TokenizedExample(tuple(random_ids(2, 4)), (tuple(random_ids(4, 5)),)),
    ]


def weights_of(model, ids, prefix):
    """transformers' attention at the prefix by layer, (Hq, T, P)."""
    mask = torch.ones(1, P + len(ids), dtype=torch.long)
    options = {"attention_mask": mask, "output_attentions": True}
    out = behind_cache(model, cache_of(prefix), torch.tensor([ids]), P, **options)
    return [weights[0, :, :, :P] for weights in out.attentions]


@torch.no_grad()
@pytest.mark.parametrize("make_batch", [pack, lambda examples: pad(examples, pad_id=0)], ids=["packed", "padded"])
@pytest.mark.parametrize("name", WITHOUT_WINDOW)
def test_mass_is_transformers_own(
    name, make_batch, tiny_backbone, tiny_models, random_prefix, random_ids, assert_same, monkeypatch
):
    backbone, oracle = tiny_backbone(name), tiny_models(name).requires_grad_(False)
    oracle.set_attn_implementation("eager")
    prefix = random_prefix(backbone, P).detach()
    examples = examples_of(random_ids)
    expected = []
    for example in examples:
        for target in example.targets:
            whole = weights_of(oracle, [*example.prompt, *target], prefix)
            first = len(example.prompt) - 1
            expected.append([weights[:, first : first + len(target)] for weights in whole])
    by_layer = [torch.cat(parts, dim=1).mean(1) for parts in zip(*expected, strict=True)]
    monkeypatch.setattr(record, "_MOST_WEIGHTS", 100)  # so that queries come in several parts
    batch = make_batch(examples)
    counted = torch.zeros(batch.input_ids.numel(), dtype=torch.bool)
    counted[batch.label_positions] = True
    mass = PrefixMass({"decoder": counted.view_as(batch.input_ids)})
    before = backbone.forward(**batch.inputs(backbone.device), prefixes=prefix).logits
    with observe_attention(mass.add):
        watched = backbone.forward(**batch.inputs(backbone.device), prefixes=prefix).logits
    assert torch.equal(before, watched)
    found = mass.mean()["decoder"]
    assert_same(found, by_layer)
    shifted = PrefixMass({"decoder": counted.roll(1).view_as(batch.input_ids)})
    with observe_attention(shifted.add):
        backbone.forward(**batch.inputs(backbone.device), prefixes=prefix)
    assert not torch.allclose(torch.stack(shifted.mean()["decoder"]), torch.stack(found))


@torch.no_grad()
def test_mass_at_an_encoder_is_the_first_layer_by_hand(tiny_backbone, random_prefix, random_ids, assert_same):
    backbone = tiny_backbone("bert")
    prefix = random_prefix(backbone, P).detach()
    ids, real = torch.tensor([random_ids(6, 1), random_ids(6, 2)]), torch.ones(2, 6, dtype=torch.long)
    real[1, 4:] = 0
    mass = PrefixMass({"encoder": real.bool()})
    with observe_attention(mass.add):
        backbone.forward(ids, real, prefixes=prefix)
    layer = backbone.model.base_model.encoder.layer[0].attention.self
    x = backbone.model.base_model.embeddings(ids)
    query, key = (
        part(x).view(2, 6, -1, layer.attention_head_size).transpose(1, 2) for part in (layer.query, layer.key)
    )
    (prefix_key, _), *_ = prefix.layers["encoder"]
    scores = query @ torch.cat([prefix_key.expand(2, -1, -1, -1), key], 2).transpose(2, 3) * query.shape[-1] ** -0.5
    scores[1, :, :, P + 4 :] = float("-inf")
    weights = scores.softmax(-1)[..., :P]
    expected = torch.cat([weights[0], weights[1][:, :4]], dim=1).mean(1)
    assert_same(mass.mean()["encoder"][0], expected)


@torch.no_grad()
def test_nothing_is_seen_without_a_prefix(tiny_backbone, random_prefix, random_ids):
    backbone = tiny_backbone("llama")
    batch = pack(examples_of(random_ids)[:1])
    mass = PrefixMass({"decoder": torch.ones_like(batch.input_ids, dtype=torch.bool)})
    with observe_attention(mass.add):
        backbone.forward(**batch.inputs(backbone.device))
    assert mass.mean() == {}
