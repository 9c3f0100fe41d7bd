"""Encoders: the prefix against attention written by hand, padded against unpadded rows, mixed batches, windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prefixtune.attention.forward import gradient_checkpointing
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import load_prefix, make_header
from prefixtune.errors import BackboneError, RequestError
from prefixtune.inference.generate import generate, stream
from prefixtune.prefix.prefix import Prefix, save_prefix
from prefixtune.training.starts.words import from_words

P = 5


def bert(model: Any, ids: Tensor, prefix: Prefix, first: int) -> Tensor:
    """BERT (Devlin et al. 2019) for a text without padding that begins at a place of its row; every token sees all."""
    w, config = model.state_dict(), model.config

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return scaled * w[f"{name}.LayerNorm.weight"] + w[f"{name}.LayerNorm.bias"]

    places = w["embeddings.position_embeddings.weight"][first : first + len(ids)]
    words = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0]
    x = norm(words + places, "embeddings")
    for number, (front_key, front_value) in enumerate(prefix.layers["encoder"]):
        name = f"encoder.layer.{number}"
        query, key, value = (
            linear(x, f"{name}.attention.self.{part}").unflatten(1, (config.num_attention_heads, -1)).transpose(0, 1)
            for part in ("query", "key", "value")
        )
        key, value = torch.cat([front_key, key], dim=1), torch.cat([front_value, value], dim=1)
        weights = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1)
        seen = (weights @ value).transpose(0, 1).flatten(1)
        x = norm(x + linear(seen, f"{name}.attention.output.dense"), f"{name}.attention.output")
        hidden = F.gelu(linear(x, f"{name}.intermediate.dense"))
        x = norm(x + linear(hidden, f"{name}.output.dense"), f"{name}.output")
    return x


def padded(rows: list[list[int]], side: str, pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad_id), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        span = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, span], mask[number, span] = torch.tensor(row), 1
    return ids, mask


def states(backbone: Any, ids: Tensor, mask: Tensor | None = None, prefixes: Any = None) -> Tensor:
    return backbone.forward(ids, mask, prefixes=prefixes).last_hidden_state


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_attached_prefix_is_the_papers_attention(
    side: str, tiny_backbone: Any, random_prefix: Any, random_ids: Any, assert_same: Any
):
    backbone = tiny_backbone("bert")
    prefix, texts = random_prefix(backbone, P), [random_ids(count, count) for count in (9, 12, 1)]
    ids, mask = padded(texts, side, backbone.pad_id)
    found = states(backbone, ids, mask, prefix)[mask.bool()]
    firsts = [12 - len(text) if side == "left" else 0 for text in texts]
    expected = torch.cat(
        [bert(backbone.model, torch.tensor(t), prefix, first) for t, first in zip(texts, firsts, strict=True)]
    )
    assert_same(found, expected)

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weights).sum(), prefix.tensors())
    assert_same(torch.autograd.grad((found * weights).sum(), prefix.tensors()), wanted)


@torch.no_grad()
def test_without_a_prefix_it_is_the_bare_model(encoder: Any, tiny_models: Any, random_ids: Any, assert_same: Any):
    bare = tiny_models(encoder.name.removeprefix("tiny-"))
    bare.set_attn_implementation("eager")
    ids = torch.tensor([random_ids(14)])
    expected = bare(input_ids=ids).last_hidden_state
    assert_same(states(encoder, ids), expected)
    assert_same(states(encoder, ids, prefixes=[None]), expected)
    assert_same(encoder.model(input_ids=ids).last_hidden_state, expected)


def test_every_slot_of_every_layer_gets_a_gradient(encoder: Any, random_prefix: Any, random_ids: Any):
    assert tuple(encoder.geometry) == ("encoder",)
    prefix = random_prefix(encoder, P)
    # Longer than ModernBERT's window.
    found = states(encoder, torch.tensor([random_ids(14)]), prefixes=prefix)
    for place in (0, -1):
        gradients = torch.autograd.grad(found[0, place, 3], prefix.tensors(), retain_graph=True)
        assert len(gradients) == 6
        assert all(torch.all(gradient.abs().amax(-1) > 0) for gradient in gradients)


@torch.no_grad()
def test_every_slot_of_every_layer_changes_every_token(encoder: Any, random_prefix: Any, random_ids: Any):
    prefix = random_prefix(encoder, P).detach()
    changed: list[Prefix] = []
    for number, tensor in enumerate(prefix.tensors()):
        for slot in range(tensor.shape[1]):
            copy = prefix.detach()
            copy.tensors()[number][:, slot] *= -1
            changed.append(copy)
    ids = torch.tensor([random_ids(14)])
    found = states(encoder, ids.expand(len(changed), -1), prefixes=changed)
    assert float((found - states(encoder, ids, prefixes=prefix)).abs().amax(-1).min()) > 1e-4


def check_mixed_batch(backbone: Any, side: str, random_prefix: Any, random_ids: Any, assert_same: Any) -> None:
    """Rows of unequal lengths with prefixes of unequal lengths, and each by itself: the same states and gradients."""
    prefixes = [random_prefix(backbone, 6, seed=1), random_prefix(backbone, 2, seed=2), None]
    prefixes.append(prefixes[1])
    texts = [random_ids(count, seed=count) for count in (9, 5, 14, 1)]
    ids, mask = padded(texts, side, backbone.pad_id)
    together = [row[real.bool()] for row, real in zip(states(backbone, ids, mask, prefixes), mask, strict=True)]
    alone = [
        states(backbone, torch.tensor([text]), prefixes=prefix)[0] for text, prefix in zip(texts, prefixes, strict=True)
    ]
    for one, other in zip(together, alone, strict=True):
        assert_same(one, other)

    leaves = prefixes[0].tensors() + prefixes[1].tensors()
    weights = [torch.randn(part.shape, generator=torch.Generator().manual_seed(1)) for part in alone]
    sums = [sum((w * p).sum() for w, p in zip(weights, parts, strict=True)) for parts in (together, alone)]
    assert_same(torch.autograd.grad(sums[0], leaves), torch.autograd.grad(sums[1], leaves))


def test_a_padded_batch_of_mixed_prefixes_is_each_row_alone(
    encoder: Any, random_prefix: Any, random_ids: Any, assert_same: Any
):
    check_mixed_batch(encoder, "right", random_prefix, random_ids, assert_same)


@pytest.mark.parametrize("family", ["roberta", "modernbert"])
def test_padding_in_front_moves_no_position(
    family: str, tiny_backbone: Any, random_prefix: Any, random_ids: Any, assert_same: Any
):
    """RoBERTa counts real tokens only; rotary positions tell distances, but to a prefix's keys they are absolute."""
    check_mixed_batch(tiny_backbone(family), "left", random_prefix, random_ids, assert_same)


def test_what_is_in_the_padding_does_not_matter(encoder: Any, random_prefix: Any, random_ids: Any):
    prefix = random_prefix(encoder, P)
    ids, mask = padded([random_ids(3, 1), random_ids(8, 2)], "right", encoder.pad_id)
    other = ids.clone()
    other[0, 3:] = torch.tensor(random_ids(5, 3))
    with torch.no_grad():
        one, two = (states(encoder, given, mask, prefix) for given in (ids, other))
    assert torch.equal(one[mask.bool()], two[mask.bool()])


def test_a_local_window_does_not_hide_the_prefix(tiny_backbone: Any, random_prefix: Any, random_ids: Any):
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


def test_words_give_the_keys_and_values_of_their_forward(tiny_backbone: Any, tiny_models: Any, assert_same: Any):
    for family in ("bert", "roberta", "electra", "distilbert"):
        backbone, bare = tiny_backbone(family), tiny_models(family)
        seen: list[Tensor] = []
        if family == "distilbert":
            linears = [part for b in bare.transformer.layer for part in (b.attention.k_lin, b.attention.v_lin)]
        else:
            layers = bare.encoder.layer
            linears = [part for b in layers for part in (b.attention.self.key, b.attention.self.value)]
        for linear in linears:
            linear.register_forward_hook(lambda _, __, output, into=seen: into.append(output[0]))
        prefix = from_words(backbone, "some wds", 11)
        with torch.no_grad():
            bare(input_ids=torch.tensor([(backbone.encode("some wds") * 2)[:11]]))
        assert_same(prefix.tensors(), [flat.unflatten(1, (4, -1)).transpose(0, 1) for flat in seen])


def test_checkpointing_changes_no_number(encoder: Any, random_prefix: Any, random_ids: Any):
    prefix, ids = random_prefix(encoder, P), torch.tensor([random_ids(14)])

    def state_and_gradients() -> tuple[Tensor, tuple[Tensor, ...]]:
        state = states(encoder, ids, prefixes=prefix)[0, -1, 3]
        return state, torch.autograd.grad(state, prefix.tensors())

    state, gradients = state_and_gradients()
    calls: list[int] = []
    handle = next(iter(encoder.layout.layer_of)).register_forward_pre_hook(lambda *_: calls.append(1))
    with gradient_checkpointing(encoder.model):
        again, recomputed = state_and_gradients()
    handle.remove()
    assert len(calls) == 2, "the layer must run twice: forward, and again in the backward pass"
    assert torch.equal(again, state)
    assert all(torch.equal(one, other) for one, other in zip(recomputed, gradients, strict=True))


def test_the_model_is_left_as_it_was(
    tmp_path: Path, tiny_backbone: Any, tiny_models: Any, random_prefix: Any, random_ids: Any
):
    for family in ("bert", "roberta", "modernbert"):
        backbone = tiny_backbone(family)
        before = tiny_models(family).state_dict()
        prefix = Prefix(random_prefix(backbone, P).layers, make_header(backbone))
        ids = torch.tensor([random_ids(14)])
        states(backbone, ids, prefixes=prefix).sum().backward()
        loaded = load_prefix(save_prefix(tmp_path / f"{family}.safetensors", prefix), backbone)
        assert loaded.equal(prefix)
        assert set(loaded.header["positions"].values()) == {"text positions are not shifted"}
        expected = states(backbone, ids, prefixes=prefix)
        # These models' dropout rates are 0.1.
        backbone.model.train()
        assert torch.equal(states(backbone, ids, prefixes=loaded), expected)
        assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.model.state_dict().items())


def test_an_encoder_reads_a_text_within_its_special_tokens(encoder: Any):
    ids = encoder.encode("ab")
    assert len(ids) == 2
    assert encoder.encode_sources(["ab", ""]) == [
        [encoder.tokenizer.bos_token_id, *ids, encoder.eos_id],
        [encoder.tokenizer.bos_token_id, encoder.eos_id],
    ]


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_folder_is_loaded_as_an_encoder(
    family: str, tmp_path: Path, tiny_models: Any, enclosing_tokenizer: Any, random_ids: Any, assert_same: Any
):
    model = tiny_models(family)
    model.save_pretrained(tmp_path)
    enclosing_tokenizer.save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path)
    assert backbone.kind == "encoder"
    assert backbone.encode_sources(["a"]) == [enclosing_tokenizer("a")["input_ids"]]
    ids = torch.tensor([random_ids(14)])
    assert_same(states(backbone, ids), model(input_ids=ids).last_hidden_state)


def test_an_encoder_without_fixed_rows_is_refused(tiny_backbone: Any):
    """Funnel shortens its rows from block to block."""
    with pytest.raises(BackboneError, match="unnel") as error:
        tiny_backbone("funnel")
    assert error.value.hint


def test_the_width_is_that_of_the_layers(tiny_backbone: Any):
    """The MLP is as wide as the model; ELECTRA's embeddings are narrower."""
    backbone = tiny_backbone("electra")
    assert backbone.hidden_size == backbone.model.config.hidden_size == 32


def test_an_encoder_writes_nothing(encoder: Any, tiny_backbone: Any, random_prefix: Any):
    for prefix in (None, random_prefix(encoder, 3)):
        with pytest.raises(RequestError, match=r"is an encoder, which reads text and writes none") as error:
            generate(encoder, ["some text"], prefix)
        assert error.value.hint
        with pytest.raises(RequestError, match="is an encoder"):
            next(stream(encoder, "some text", prefix))
    with pytest.raises(BackboneError, match="the prefix has decoder"):
        encoder.forward(torch.tensor([[1, 2]]), prefixes=random_prefix(tiny_backbone("gpt2"), 3))
