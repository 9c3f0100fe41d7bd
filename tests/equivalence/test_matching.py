"""Attention Matching against brute force: keys, biases and values from the model's own projections, head by head."""

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import prefixtune.training.starts.compaction as module
from prefixtune.attention.record import prefix_from_tokens
from prefixtune.data.encoding import TokenizedExample
from prefixtune.training.starts.compaction import match

TEXT = "The Gannet goes to Ashby at 8:00. The Osprey goes to Dunmore."
ASKED = [("Where does the Gannet go?", " Ashby"), ("When?", " 8:00"), ("Where does the Osprey go?", " Dunmore")]
P = 9


@pytest.fixture
def backbone(tiny_backbone):
    return tiny_backbone("llama", num_hidden_layers=1, max_position_embeddings=256)


def questions(backbone):
    return [TokenizedExample(tuple(backbone.encode(q)), (tuple(backbone.encode(a)),)) for q, a in ASKED]


def projections(backbone, ids):
    """Scaled queries, keys and values of the first layer, by head, turned as the model turns them."""
    model, row = backbone.model.model, torch.tensor([ids])
    attention = model.layers[0].self_attn
    with torch.no_grad():
        hidden = model.layers[0].input_layernorm(model.embed_tokens(row))
        cosines = model.rotary_emb(hidden, torch.arange(len(ids))[None])
        shape = 1, len(ids), -1, attention.head_dim
        made = [getattr(attention, f"{name}_proj")(hidden).view(shape).transpose(1, 2) for name in "qkv"]
        query, key = apply_rotary_pos_emb(*made[:2], *cosines)
    query, key, value = (one[0].double().numpy() for one in (query * attention.scaling, key, made[2]))
    return query, key, value


def readings(backbone, ids, asked):
    """What is read behind the text, and what each of its queries weighs."""
    for one in asked:
        weight = np.ones(len(one.prompt) + len(one.targets[0]) - 1)
        weight[len(one.prompt) - 1 :] = 4
        yield [*one.prompt, *one.targets[0][:-1]], weight
    total = sum(len(one.prompt) + len(one.targets[0]) for one in asked)
    yield ids, np.full(len(ids), 0.05 * total / len(ids) if asked else 1.0)


def softmax(scores):
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def bounded(left, right):
    """The factors within e^-3 and e^3 of least squares: one after the other, until none changes."""
    factors = np.ones(left.shape[1])
    for _ in range(5000):
        for index, column in enumerate(left.T):
            step = column @ (right - left @ factors) / (column @ column)
            factors[index] = np.clip(factors[index] + step, np.exp(-3), np.exp(3))
    return factors


@pytest.mark.parametrize("asks", [True, False])
def test_keys_biases_and_values_are_those_of_brute_force(asks, backbone, monkeypatch):
    # The queries of a model of random weights are not alike.
    monkeypatch.setattr(module, "_SPREAD", torch.inf)
    ids, asked = backbone.encode(TEXT), questions(backbone) if asks else []
    whole = prefix_from_tokens(backbone.model, backbone.layout, torch.tensor([ids]))
    made, facts = match(backbone, whole, ids, {"decoder": P}, asked)
    keys, values = (side.double().numpy() for side in made.layers["decoder"][0])
    heads, tokens = len(keys), len(ids)
    assert facts == ({"questions": 3, "bias": {"heads": heads, "of": heads, "positions": 33}} if asks else {})
    for head in range(heads):
        weights, on_text, behind, wanted, queries = [], [], [], [], []
        for row, weight in readings(backbone, ids, asked):
            query, key, value = projections(backbone, ids + row)
            for own in np.split(query, heads)[head]:
                scores = own[tokens:] @ key[head].T
                scores[:, tokens:][np.triu_indices(len(row), 1)] = -np.inf
                wanted.append(softmax(scores) @ value[head])
                on_text.append(scores[:, :tokens])
                behind.append(np.exp(scores[:, tokens:]) @ np.c_[value[head, tokens:], np.ones(len(row))])
                queries.append(own[tokens:])
                weights.append(weight)
        query, weight = np.concatenate(queries), np.concatenate(weights)
        scores, target = np.concatenate(on_text), np.concatenate(wanted)
        own, mass = np.split(np.concatenate(behind), [-1], axis=1)
        drawn = weight @ softmax(scores) ** 2
        drawn[0] = np.inf
        kept = np.sort(np.argsort(-drawn)[:P])
        text_key, text_value = key[head, kept], value[head, kept]
        root = np.sqrt(weight)[:, None]
        # Biases: the same sum of squares as an exact solver's, along the direction of least variance.
        mean = weight @ query / weight.sum()
        spread = (query - mean).T * weight @ (query - mean) / weight.sum()
        spread += 0.01 * np.trace(spread) / len(spread) * np.eye(len(spread))
        direction = np.linalg.solve(spread, mean)
        direction /= direction @ mean
        bias = (keys[head] - text_key) @ direction / (direction @ direction)
        assert np.allclose(keys[head], text_key + np.outer(bias, direction), atol=1e-4)
        if asks:
            shares = root * np.exp(scores[:, kept]) / np.exp(scores).sum(-1, keepdims=True)
            best = ((shares @ bounded(shares, root[:, 0]) - root[:, 0]) ** 2).sum()
            assert ((shares @ np.exp(bias) - root[:, 0]) ** 2).sum() == pytest.approx(best, rel=0.01)
            assert np.abs(bias).max() > 0.1
        # Values: ridge regression, as least squares with more rows.
        shares = np.exp(query @ keys[head].T)
        total = shares.sum(-1, keepdims=True) + mass
        shares /= total
        size = np.sqrt(1e-3 * (root * shares).__pow__(2).sum(0).mean())
        left = np.r_[root * shares, size * np.eye(P)]
        right = np.r_[root * (target - own / total - shares @ text_value), np.zeros((P, text_value.shape[1]))]
        change = np.linalg.lstsq(left, right, rcond=None)[0]
        assert np.allclose(values[head], text_value + change, atol=2e-3 * np.abs(text_value + change).max())


def test_heads_whose_queries_differ_get_no_bias(backbone):
    ids = backbone.encode(TEXT)
    whole = prefix_from_tokens(backbone.model, backbone.layout, torch.tensor([ids]))
    made, facts = match(backbone, whole, ids, {"decoder": P}, questions(backbone))
    assert facts["bias"]["heads"] == 0
    (key, _), (text, _) = made.layers["decoder"][0], whole.layers["decoder"][0]
    assert float((key[:, :, None] - text[:, None]).abs().amax(-1).amin(-1).max()) < 1e-6
