"""The injected route against attention written by hand: K = [P_key; K] and V = [P_val; V] at every site.

A decoder's text begins at position P. In encoders and encoder-decoders a prefix shifts no position, and a bias by
distance is zero at its columns.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from oracles import outputs_together, pad_rows

SITES = {"encoder": 4, "decoder": 3, "cross": 5}


class Weights:
    """A model's weights by the names of their modules, and what is computed with them."""

    def __init__(self, model):
        self.state = {name: weight.float().cpu() for name, weight in model.state_dict().items()}
        self.config = model.config

    def __getitem__(self, name):
        return self.state[f"{name}.weight"]

    def linear(self, x, name):
        return x @ self[name].T + self.state.get(f"{name}.bias", 0)

    def norm(self, x, name, epsilon=1e-5):
        """Layer normalization."""
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
        return scaled * self[name] + self.state[f"{name}.bias"]

    def scale(self, x, name):
        """Root mean square normalization."""
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self[name]


def attention(query, key, value, front, *, scale=1.0, bias=None, causal=False):
    """softmax(q [P_key; K]^T) [P_val; V] of (H, T, D) heads, the prefix visible to all; returns (T, H * D)."""
    if front is not None:
        key, value = torch.cat([front[0], key], dim=1), torch.cat([front[1], value], dim=1)
    length, group = key.shape[1] - (0 if front is None else front[0].shape[1]), query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, dim=0), value.repeat_interleave(group, dim=0)
    scores = query @ key.transpose(1, 2) * scale
    before, own = scores.split([key.shape[1] - length, length], dim=2)
    if bias is not None:
        own = own + bias
    if causal:
        steps = torch.arange(length)
        own = own.masked_fill(steps[:, None] < steps[None, :], float("-inf"))
    return (torch.cat([before, own], dim=2).softmax(-1) @ value).transpose(0, 1).flatten(1)


def heads(flat, size):
    """(T, H * D) -> (H, T, D)."""
    return flat.unflatten(1, (-1, size)).transpose(0, 1)


def front_of(prefix, site, number):
    return prefix.layers[site][number] if site in prefix.layers else None


def llama(w, text, read, prefix, firsts):
    """LLaMA (Touvron et al. 2023): rotary positions, grouped queries, norms before."""

    def rotate(x):
        """Rotary embedding of (H, T, D), positions from P on."""
        half, start = x.shape[-1] // 2, prefix.prefix_length
        angle = torch.arange(start, start + x.shape[1])[:, None] * 10000.0 ** -(torch.arange(half) / half)
        first, second = x[..., :half], x[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    x = w["model.embed_tokens"][text]
    for number, front in enumerate(prefix.layers["decoder"]):
        name = f"model.layers.{number}"
        y = w.scale(x, f"{name}.input_layernorm")
        query, key, value = (heads(w.linear(y, f"{name}.self_attn.{part}_proj"), front[0].shape[2]) for part in "qkv")
        seen = attention(rotate(query), rotate(key), value, front, scale=query.shape[-1] ** -0.5, causal=True)
        x = x + w.linear(seen, f"{name}.self_attn.o_proj")
        y = w.scale(x, f"{name}.post_attention_layernorm")
        gated = F.silu(w.linear(y, f"{name}.mlp.gate_proj")) * w.linear(y, f"{name}.mlp.up_proj")
        x = x + w.linear(gated, f"{name}.mlp.down_proj")
    return w.scale(x, "model.norm") @ w["lm_head"].T


def gpt2(w, text, read, prefix, firsts):
    """GPT-2 (Radford et al. 2019): learned positions from P on, one matrix for queries, keys and values."""

    def linear(x, name):
        return x @ w[name] + w.state[f"{name}.bias"]

    start = prefix.prefix_length
    x = w["transformer.wte"][text] + w["transformer.wpe"][start : start + len(text)]
    for number, front in enumerate(prefix.layers["decoder"]):
        name = f"transformer.h.{number}"
        fused = linear(w.norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn")
        query, key, value = (heads(part, front[0].shape[2]) for part in fused.chunk(3, dim=-1))
        seen = attention(query, key, value, front, scale=query.shape[-1] ** -0.5, causal=True)
        x = x + linear(seen, f"{name}.attn.c_proj")
        y = F.gelu(linear(w.norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc"), approximate="tanh")
        x = x + linear(y, f"{name}.mlp.c_proj")
    return w.norm(x, "transformer.ln_f") @ w["lm_head"].T


def bert(w, text, read, prefix, firsts):
    """BERT (Devlin et al. 2019): positions counted from the row's begin, padding or not; every token sees all."""
    places = w["embeddings.position_embeddings"][firsts[0] : firsts[0] + len(text)]
    words = w["embeddings.word_embeddings"][text] + w["embeddings.token_type_embeddings"][0]
    x = w.norm(words + places, "embeddings.LayerNorm", 1e-12)
    for number, front in enumerate(prefix.layers["encoder"]):
        name = f"encoder.layer.{number}"
        query, key, value = (
            heads(w.linear(x, f"{name}.attention.self.{part}"), front[0].shape[2]) for part in ("query", "key", "value")
        )
        seen = attention(query, key, value, front, scale=query.shape[-1] ** -0.5)
        mixed = x + w.linear(seen, f"{name}.attention.output.dense")
        x = w.norm(mixed, f"{name}.attention.output.LayerNorm", 1e-12)
        hidden = F.gelu(w.linear(x, f"{name}.intermediate.dense"))
        x = w.norm(x + w.linear(hidden, f"{name}.output.dense"), f"{name}.output.LayerNorm", 1e-12)
    return x


def bart(w, text, read, prefix, firsts):
    """BART (Lewis et al. 2020): positions counted from a row's begin, padding or not; norms after each block."""
    config = w.config

    def embed(ids, part, first):
        # The table's first two rows are never used.
        places = w[f"model.{part}.embed_positions"][2 + first : 2 + first + len(ids)]
        return w.norm(w[f"model.{part}.embed_tokens"][ids] + places, f"model.{part}.layernorm_embedding")

    def attend(x, seen, name, site, number):
        count = config.encoder_attention_heads if site == "encoder" else config.decoder_attention_heads
        size = config.d_model // count
        query, key, value = (
            heads(w.linear(y, f"{name}.{part}_proj"), size) for y, part in ((x, "q"), (seen, "k"), (seen, "v"))
        )
        front = front_of(prefix, site, number)
        out = attention(query, key, value, front, scale=size**-0.5, causal=site == "decoder")
        return w.norm(x + w.linear(out, f"{name}.out_proj"), f"{name}_layer_norm")

    def feed(x, name):
        hidden = F.gelu(w.linear(x, f"{name}.fc1"))
        return w.norm(x + w.linear(hidden, f"{name}.fc2"), f"{name}.final_layer_norm")

    x = embed(text, "encoder", firsts[0])
    for number in range(config.encoder_layers):
        name = f"model.encoder.layers.{number}"
        x = feed(attend(x, x, f"{name}.self_attn", "encoder", number), name)
    y = embed(read, "decoder", firsts[1])
    for number in range(config.decoder_layers):
        name = f"model.decoder.layers.{number}"
        y = attend(y, y, f"{name}.self_attn", "decoder", number)
        y = feed(attend(y, x, f"{name}.encoder_attn", "cross", number), name)
    return y @ w["lm_head"].T + w.state["final_logits_bias"][0]


def t5(w, text, read, prefix, firsts):
    """T5 (Raffel et al. 2020): unscaled scores plus a bias by distance, shared by a stack's layers; norms before."""
    config = w.config

    def bias(part, length):
        """(H, T, T), from the table of the stack's first layer."""
        places = [[bucket(key - query, part == "encoder") for key in range(length)] for query in range(length)]
        table = w[f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias"]
        return table[torch.tensor(places)].permute(2, 0, 1)

    def bucket(distance, both_ways):
        """Half of a direction's buckets are exact distances, the others grow with the logarithm."""
        count, base = config.relative_attention_num_buckets, 0
        if both_ways:
            count //= 2
            base = count if distance > 0 else 0
        distance, exact = abs(distance) if both_ways else max(-distance, 0), count // 2
        if distance < exact:
            return base + distance
        ratio = math.log(distance / exact) / math.log(config.relative_attention_max_distance / exact)
        return base + min(exact + int(ratio * (count - exact)), count - 1)

    def attend(x, seen, name, site, number, relative):
        kind = "EncDecAttention" if site == "cross" else "SelfAttention"
        z = w.scale(x, f"{name}.layer_norm")
        pairs = ((z, "q"), (z if seen is None else seen, "k"), (z if seen is None else seen, "v"))
        query, key, value = (heads(w.linear(y, f"{name}.{kind}.{part}"), config.d_kv) for y, part in pairs)
        out = attention(query, key, value, front_of(prefix, site, number), bias=relative, causal=site == "decoder")
        return x + w.linear(out, f"{name}.{kind}.o")

    def feed(x, name):
        hidden = F.relu(w.linear(w.scale(x, f"{name}.layer_norm"), f"{name}.DenseReluDense.wi"))
        return x + w.linear(hidden, f"{name}.DenseReluDense.wo")

    x, relative = w["encoder.embed_tokens"][text], bias("encoder", len(text))
    for number in range(config.num_layers):
        name = f"encoder.block.{number}.layer"
        x = feed(attend(x, None, f"{name}.0", "encoder", number, relative), f"{name}.1")
    x = w.scale(x, "encoder.final_layer_norm")
    y, relative = w["decoder.embed_tokens"][read], bias("decoder", len(read))
    for number in range(config.num_decoder_layers):
        name = f"decoder.block.{number}.layer"
        y = attend(y, None, f"{name}.0", "decoder", number, relative)
        y = feed(attend(y, x, f"{name}.1", "cross", number, None), f"{name}.2")
    return w.scale(y, "decoder.final_layer_norm") @ w["lm_head"].T


BY_HAND = {"llama": llama, "gpt2": gpt2, "bert": bert, "bart": bart, "t5": t5}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        *((name, 5) for name in ("llama", "gpt2", "bert")),
        *((name, one) for name in ("bart", "t5") for one in (SITES, *({site: 4} for site in SITES))),
    ],
)
def test_the_attached_prefix_is_the_papers_attention(name, lengths, side, made, random_prefix, random_ids, assert_same):
    backbone = made(name)
    prefix = random_prefix(backbone, lengths)
    texts, written = ([random_ids(n, n) for n in counts] for counts in ((9, 14, 1), (11, 2, 7)))
    found = torch.cat(outputs_together(backbone, texts, written, prefix, side=side))
    if backbone.kind == "encoder-decoder":
        read = [[backbone.decoder_start_id, *one] for one in written]
    else:
        texts, read = [[*one, *other] for one, other in zip(texts, written, strict=True)], written
    firsts = zip(*(pad_rows(rows, side, 0)[2] for rows in (texts, read)), strict=True)
    rows = zip(texts, read, firsts, strict=True)
    weights = Weights(backbone.model)
    expected = torch.cat(
        [BY_HAND[name](weights, torch.tensor(text), torch.tensor(ids), prefix, first) for text, ids, first in rows]
    )
    assert_same(found, expected)

    factors = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * factors).sum(), prefix.tensors())
    assert_same(torch.autograd.grad((found * factors).sum(), prefix.tensors()), wanted)
