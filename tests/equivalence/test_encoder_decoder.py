"""Encoder-decoders: the three sites against attention written by hand, packed rows, mixed batches, cached decoding.

Text positions are not shifted by a prefix, and a relative position bias is zero at its columns.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor
from torch.nn import functional as F

from prefixtune.attention.forward import gradient_checkpointing
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.batch import Batch
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.loss import batch_loss
from prefixtune.backbone.prefixes import load_prefix, make_header
from prefixtune.data import Example
from prefixtune.data.batching import collate, pad
from prefixtune.data.encoding import TokenizedExample, encode_examples
from prefixtune.errors import BackboneError, ConfigError, DataError, PrefixError, RequestError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate, generate_ids, stream
from prefixtune.prefix.encoder import PrefixEncoder
from prefixtune.prefix.geometry import LayerShape
from prefixtune.prefix.prefix import Prefix, save_prefix, unflatten
from prefixtune.prefix.text_format import TextFormat
from prefixtune.training.config import TrainConfig
from prefixtune.training.score import evaluation_loss
from prefixtune.training.starts.words import from_words
from prefixtune.training.train import train
from zoo import make_tokenizer

SITES = {"encoder": 4, "decoder": 3, "cross": 5}
"""Every site, each with a length of its own."""

NEW = 8


# --- attention written by hand ---------------------------------------------------------------------------------------


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    front: tuple[Tensor, Tensor] | None,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(q [P_key; K]^T) [P_val; V] of (H, T, D) heads, the prefix visible to all; returns (T, H * D)."""
    scores = query @ key.transpose(1, 2) * scale
    if bias is not None:
        scores = scores + bias
    if causal:
        steps = torch.arange(query.shape[1])
        scores = scores.masked_fill(steps[:, None] < steps[None, :], float("-inf"))
    if front is not None:
        scores = torch.cat([query @ front[0].transpose(1, 2) * scale, scores], dim=2)
        value = torch.cat([front[1], value], dim=1)
    return (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)


def heads(flat: Tensor, count: int) -> Tensor:
    """(T, H * D) -> (H, T, D)."""
    return flat.unflatten(1, (count, -1)).transpose(0, 1)


def fronts(prefix: Prefix, site: str, number: int) -> tuple[Tensor, Tensor] | None:
    return prefix.layers[site][number] if site in prefix.layers else None


def bart(model: Any, source: Tensor, target: Tensor, prefix: Prefix, firsts: tuple[int, int]) -> Tensor:
    """BART (Lewis et al. 2020): learned positions, counted from a row's begin, padding or not; norms after each block.

    Args:
        model: Whose weights are used.
        source: What the encoder reads, without padding.
        target: What the decoder reads, without padding.
        prefix: Of any sites.
        firsts: Where the text of source and target begins in its row.
    """
    w, config = model.state_dict(), model.config

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"model.{name}.weight"].T + w[f"model.{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"model.{name}.weight"] + w[f"model.{name}.bias"]

    def embed(ids: Tensor, part: str, first: int) -> Tensor:
        # The table's first two rows are never used.
        places = w[f"model.{part}.embed_positions.weight"][2 + first : 2 + first + len(ids)]
        return norm(w[f"model.{part}.embed_tokens.weight"][ids] + places, f"{part}.layernorm_embedding")

    def attend(x: Tensor, seen: Tensor, name: str, site: str, number: int) -> Tensor:
        count = config.encoder_attention_heads if site == "encoder" else config.decoder_attention_heads
        query, key, value = (
            heads(linear(y, f"{name}.{part}_proj"), count) for y, part in ((x, "q"), (seen, "k"), (seen, "v"))
        )
        scale, causal = query.shape[-1] ** -0.5, site == "decoder"
        out = attention(query, key, value, fronts(prefix, site, number), scale=scale, causal=causal)
        return norm(x + linear(out, f"{name}.out_proj"), f"{name}_layer_norm")

    def feed(x: Tensor, name: str) -> Tensor:
        return norm(x + linear(F.gelu(linear(x, f"{name}.fc1")), f"{name}.fc2"), f"{name}.final_layer_norm")

    x = embed(source, "encoder", firsts[0])
    for number in range(config.encoder_layers):
        name = f"encoder.layers.{number}"
        x = feed(attend(x, x, f"{name}.self_attn", "encoder", number), name)
    y = embed(target, "decoder", firsts[1])
    for number in range(config.decoder_layers):
        name = f"decoder.layers.{number}"
        y = attend(y, y, f"{name}.self_attn", "decoder", number)
        y = feed(attend(y, x, f"{name}.encoder_attn", "cross", number), name)
    return y @ w["lm_head.weight"].T + w["final_logits_bias"][0]


def t5(model: Any, source: Tensor, target: Tensor, prefix: Prefix, firsts: tuple[int, int]) -> Tensor:
    """T5 (Raffel et al. 2020): unscaled scores plus a bias by distance, shared by a stack's layers; norms before."""
    w, config = model.state_dict(), model.config

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def bias(part: str, length: int) -> Tensor:
        """(H, T, T), from the table of the stack's first layer."""
        places = [[bucket(key - query, part == "encoder") for key in range(length)] for query in range(length)]
        table = w[f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        return table[torch.tensor(places)].permute(2, 0, 1)

    def bucket(distance: int, both_ways: bool) -> int:
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

    def attend(x: Tensor, seen: Tensor | None, name: str, site: str, number: int, relative: Tensor | None) -> Tensor:
        kind = "EncDecAttention" if site == "cross" else "SelfAttention"
        z = norm(x, f"{name}.layer_norm")
        pairs = ((z, "q"), (z if seen is None else seen, "k"), (z if seen is None else seen, "v"))
        query, key, value = (heads(y @ w[f"{name}.{kind}.{part}.weight"].T, config.num_heads) for y, part in pairs)
        front = fronts(prefix, site, number)
        out = attention(query, key, value, front, bias=relative, causal=site == "decoder")
        return x + out @ w[f"{name}.{kind}.o.weight"].T

    def feed(x: Tensor, name: str) -> Tensor:
        hidden = F.relu(norm(x, f"{name}.layer_norm") @ w[f"{name}.DenseReluDense.wi.weight"].T)
        return x + hidden @ w[f"{name}.DenseReluDense.wo.weight"].T

    x, relative = w["encoder.embed_tokens.weight"][source], bias("encoder", len(source))
    for number in range(config.num_layers):
        name = f"encoder.block.{number}.layer"
        x = feed(attend(x, None, f"{name}.0", "encoder", number, relative), f"{name}.1")
    x = norm(x, "encoder.final_layer_norm")
    y, relative = w["decoder.embed_tokens.weight"][target], bias("decoder", len(target))
    for number in range(config.num_decoder_layers):
        name = f"decoder.block.{number}.layer"
        y = attend(y, None, f"{name}.0", "decoder", number, relative)
        y = feed(attend(y, x, f"{name}.1", "cross", number, None), f"{name}.2")
    return norm(y, "decoder.final_layer_norm") @ w["lm_head.weight"].T


@pytest.fixture(scope="module", params=["bart", "t5"])
def by_hand(request: pytest.FixtureRequest, tiny_backbone: Callable[..., Any]) -> tuple[Any, Callable[..., Tensor]]:
    """A backbone whose decoder is deeper than its encoder, and its forward written by hand."""
    return tiny_backbone(request.param), {"bart": bart, "t5": t5}[request.param]


def padded(rows: list[list[int]], side: str, pad_id: int) -> tuple[Tensor, Tensor, list[int]]:
    """Ids, mask, and where each row's text begins."""
    width = max(map(len, rows))
    firsts = [width - len(row) if side == "left" else 0 for row in rows]
    ids, mask = torch.full((len(rows), width), pad_id), torch.zeros(len(rows), width, dtype=torch.long)
    for number, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        ids[number, first : first + len(row)], mask[number, first : first + len(row)] = torch.tensor(row), 1
    return ids, mask, firsts


@pytest.mark.parametrize(
    ("sites", "sides"),
    [
        *((tuple(SITES), sides) for sides in itertools.product(("left", "right"), repeat=2)),
        *(((site,), ("left", "right")) for site in SITES),
    ],
)
def test_the_attached_prefix_is_the_papers_attention(
    sides: tuple[str, str],
    sites: tuple[str, ...],
    by_hand: tuple[Any, Callable[..., Tensor]],
    random_prefix: Any,
    random_ids: Any,
    assert_same: Any,
):
    backbone, model = by_hand
    prefix = random_prefix(backbone, {site: SITES[site] for site in sites})
    sources, targets = ([random_ids(n, n) for n in lengths] for lengths in ((9, 14, 1), (11, 2, 7)))
    ids, mask, firsts = padded(sources, sides[0], backbone.pad_id)
    decoder_ids, decoder_mask, decoder_firsts = padded(targets, sides[1], backbone.pad_id)
    logits = backbone.forward(
        ids, mask, decoder_input_ids=decoder_ids, decoder_attention_mask=decoder_mask, prefixes=prefix
    ).logits[decoder_mask.bool()]
    expected = torch.cat(
        [
            model(backbone.model, torch.tensor(source), torch.tensor(target), prefix, starts)
            for source, target, starts in zip(sources, targets, zip(firsts, decoder_firsts, strict=True), strict=True)
        ]
    )
    assert_same(logits, expected)

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weights).sum(), prefix.tensors())
    assert_same(torch.autograd.grad((logits * weights).sum(), prefix.tensors()), wanted)


def test_without_a_prefix_it_is_the_bare_model(
    encoder_decoder: Any, tiny_models: Any, random_ids: Any, assert_same: Any
):
    bare = tiny_models(encoder_decoder.name.removeprefix("tiny-"))
    bare.set_attn_implementation("eager")
    ids, target = torch.tensor([random_ids(9)]), torch.tensor([random_ids(6, 1)])
    with torch.no_grad():
        expected = bare(input_ids=ids, decoder_input_ids=target).logits
        assert_same(encoder_decoder.forward(ids, decoder_input_ids=target).logits, expected)
        assert_same(encoder_decoder.forward(ids, decoder_input_ids=target, prefixes=[None]).logits, expected)
        # The model stays an ordinary one for anybody who calls it directly.
        assert_same(encoder_decoder.model(input_ids=ids, decoder_input_ids=target).logits, expected)


# --- every slot counts -----------------------------------------------------------------------------------------------


def test_every_slot_of_every_site_and_layer_gets_a_gradient(encoder_decoder: Any, random_prefix: Any, random_ids: Any):
    assert tuple(encoder_decoder.geometry) == tuple(SITES)
    prefix = random_prefix(encoder_decoder, SITES)
    ids, target = torch.tensor([random_ids(9)]), torch.tensor([random_ids(6, 1)])
    logits = encoder_decoder.forward(ids, decoder_input_ids=target, prefixes=prefix).logits
    # A single token's logit: those of a loss summed with equal weights may cancel out.
    for gradient in torch.autograd.grad(logits[0, -1, 3], prefix.tensors()):
        assert torch.all(gradient.abs().amax(-1) > 0)


@torch.no_grad()
def test_every_slot_of_every_site_and_layer_changes_the_logits(
    encoder_decoder: Any, random_prefix: Any, random_ids: Any
):
    prefix = random_prefix(encoder_decoder, SITES).detach()
    changed: list[Prefix] = []
    for number, tensor in enumerate(prefix.tensors()):
        for slot in range(tensor.shape[1]):
            copy = prefix.detach()
            copy.tensors()[number][:, slot] *= -1
            changed.append(copy)
    count = len(changed)
    ids, target = (torch.tensor([random_ids(n, n)]).expand(count, -1) for n in (9, 6))
    logits = encoder_decoder.forward(ids, decoder_input_ids=target, prefixes=changed).logits
    whole = encoder_decoder.forward(ids[:1], decoder_input_ids=target[:1], prefixes=prefix).logits
    assert count == 2 * sum(SITES[site] * len(shapes) for site, shapes in encoder_decoder.geometry.items())
    assert float((logits - whole).abs().amax((1, 2)).min()) > 1e-3


# --- packed rows -----------------------------------------------------------------------------------------------------


@pytest.fixture
def examples(random_ids: Any) -> list[TokenizedExample]:
    """Sources shared by several targets, and of one token."""
    shapes = [(7, (3, 6, 1)), (1, (4,)), (12, (5, 2)), (3, (9,))]
    return [
        TokenizedExample(
            tuple(random_ids(prompt, seed=prompt)),
            tuple(tuple(random_ids(count, seed=100 * prompt + count)) for count in targets),
        )
        for prompt, targets in shapes
    ]


def losses_one_by_one(backbone: Any, prefix: Any, examples: list[TokenizedExample]) -> Tensor:
    """Each target's losses, each pair run by itself, without a mask."""
    losses = []
    for example in examples:
        for target in example.targets:
            read = torch.tensor([[backbone.decoder_start_id, *target[:-1]]])
            given = torch.tensor([example.prompt])
            logits = backbone.forward(given, decoder_input_ids=read, prefixes=prefix).logits[0]
            losses.append(F.cross_entropy(logits, torch.tensor(target), reduction="none"))
    return torch.cat(losses)


def batches(backbone: Any, examples: list[TokenizedExample]) -> Iterator[Batch]:
    """What training makes of the examples, and padded rows."""
    chosen = collate(backbone, examples)
    assert (chosen.packing is not None) == backbone.layout.packable == ("m2m" not in backbone.name)
    yield chosen
    yield pad(examples, pad_id=backbone.pad_id, decoder_start_id=backbone.decoder_start_id)


@pytest.mark.parametrize("lengths", [SITES, {"encoder": 3}, {"decoder": 3}, {"cross": 3}], ids="-".join)
def test_packed_and_padded_rows_are_one_pair_at_a_time(
    lengths: dict[str, int],
    encoder_decoder: Any,
    random_prefix: Any,
    examples: list[TokenizedExample],
    assert_same: Any,
):
    prefix = random_prefix(encoder_decoder, lengths)
    expected = losses_one_by_one(encoder_decoder, prefix, examples)
    weights = torch.rand(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weights).sum(), prefix.tensors())
    for batch in batches(encoder_decoder, examples):
        losses = batch_loss(encoder_decoder, prefix, batch)
        assert_same(losses, expected)
        assert batch.target_index.tolist() == [n for n, size in enumerate((3, 6, 1, 4, 5, 2, 9)) for _ in range(size)]
        assert_same(torch.autograd.grad((losses * weights).sum(), prefix.tensors()), wanted)


@torch.no_grad()
def test_packed_and_padded_rows_without_a_prefix(
    encoder_decoder: Any, examples: list[TokenizedExample], assert_same: Any
):
    expected = losses_one_by_one(encoder_decoder, None, examples)
    for batch in batches(encoder_decoder, examples):
        assert_same(batch_loss(encoder_decoder, None, batch), expected)
    for size in (2, 64):
        loss = evaluation_loss(encoder_decoder, None, examples, size)
        assert loss == pytest.approx(float(expected.mean()), rel=1e-5)


def test_a_source_is_read_once_for_all_of_its_targets(encoder_decoder: Any, examples: list[TokenizedExample]):
    positions = sum(len(example.prompt) for example in examples)
    chosen, rows = batches(encoder_decoder, examples)
    assert rows.input_ids.shape == (4, 12)
    assert rows.decoder_input_ids.shape == (7, 9)
    assert rows.source_rows.tolist() == [0, 0, 0, 1, 2, 2, 3]
    if encoder_decoder.layout.packable:
        assert chosen.input_ids.shape == (1, positions)
        assert chosen.decoder_input_ids.shape == (1, len(chosen.labels))


# --- mixed prefixes --------------------------------------------------------------------------------------------------


@pytest.fixture
def prefixes(encoder_decoder: Any, random_prefix: Any) -> list[Prefix | None]:
    """Of other lengths at each site, of some sites only, and none."""
    lengths = [SITES, {"encoder": 1, "decoder": 6, "cross": 2}, None, {"cross": 3}, {"decoder": 2, "encoder": 7}]
    return [
        None if given is None else random_prefix(encoder_decoder, given, seed=seed)
        for seed, given in enumerate(lengths)
    ]


def test_a_batch_of_mixed_prefixes_is_each_row_alone(
    encoder_decoder: Any, prefixes: list[Any], random_ids: Any, assert_same: Any
):
    sources, targets = ([random_ids(n, n) for n in lengths] for lengths in ((7, 2, 12, 5, 1), (4, 9, 1, 6, 3)))
    ids, mask, _ = padded(sources, "right", encoder_decoder.pad_id)
    read, read_mask, _ = padded(targets, "right", encoder_decoder.pad_id)
    logits = encoder_decoder.forward(
        ids, mask, decoder_input_ids=read, decoder_attention_mask=read_mask, prefixes=prefixes
    ).logits
    together = [row[real.bool()] for row, real in zip(logits, read_mask, strict=True)]
    alone = [
        encoder_decoder.forward(
            torch.tensor([source]), decoder_input_ids=torch.tensor([target]), prefixes=prefix
        ).logits[0]
        for source, target, prefix in zip(sources, targets, prefixes, strict=True)
    ]
    for one, other in zip(together, alone, strict=True):
        assert_same(one, other)

    leaves = [tensor for prefix in prefixes if prefix is not None for tensor in prefix.tensors()]
    wanted = torch.autograd.grad(sum(part.square().sum() for part in alone), leaves)
    assert_same(torch.autograd.grad(sum(part.square().sum() for part in together), leaves), wanted)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_mixed_prefixes_generate_as_each_alone(
    num_beams: int, encoder_decoder: Any, prefixes: list[Any], random_ids: Any
):
    prompts = [random_ids(n, n) for n in (7, 2, 12, 5, 1)]
    config = GenerateConfig(max_new_tokens=NEW, num_beams=num_beams)
    together = generate_ids(encoder_decoder, prompts, prefixes, config=config)
    for prompt, prefix, output in zip(prompts, prefixes, together, strict=True):
        assert generate_ids(encoder_decoder, [prompt], [prefix], config=config) == [output]
    if num_beams == 1:
        in_twos = config.replace(batch_size=2)
        assert generate_ids(encoder_decoder, prompts, prefixes, config=in_twos) == together


# --- cached decoding -------------------------------------------------------------------------------------------------


def cut(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


@torch.no_grad()
def greedy_by_recomputation(backbone: Any, prompt: list[int], prefix: Any, count: int = NEW) -> list[int]:
    """The likeliest token again and again, each time running source and target anew with the prefix injected."""
    ids = [backbone.decoder_start_id]
    for _ in range(count):
        logits = backbone.forward(torch.tensor([prompt]), decoder_input_ids=torch.tensor([ids]), prefixes=prefix).logits
        ids.append(int(logits[0, -1].argmax()))
    return cut(ids[1:], backbone.eos_id)


def beams_by_recomputation(
    backbone: Any, prompt: list[int], prefix: Any, patch: pytest.MonkeyPatch, **options: Any
) -> list[int]:
    """transformers' beam search over a forward that has no cache and takes the prefix by injection."""
    model, original, widths = backbone.model, backbone.model.forward, []

    def recompute(decoder_input_ids: Any, **_: Any) -> Any:
        widths.append(decoder_input_ids.shape[1])
        source = torch.tensor([prompt]).expand(len(decoder_input_ids), -1)
        with patch.context() as inner:
            inner.setattr(model, "forward", original)
            return backbone.forward(source, decoder_input_ids=decoder_input_ids, prefixes=prefix)

    with patch.context() as outer, torch.no_grad():
        outer.setattr(model, "forward", recompute)
        output = model.generate(
            input_ids=torch.tensor([prompt]),
            use_cache=False,
            do_sample=False,
            decoder_start_token_id=backbone.decoder_start_id,
            pad_token_id=backbone.pad_id,
            eos_token_id=backbone.eos_id,
            **options,
        )
    assert widths == list(range(1, len(widths) + 1)), "the oracle must have seen the whole target at every step"
    return cut(output[0, 1:].tolist(), backbone.eos_id)


def test_greedy_is_recomputation(encoder_decoder: Any, prefixes: list[Any], random_ids: Any):
    prompts = [random_ids(n, n) for n in (7, 2, 12, 5, 1)]
    outputs = generate_ids(encoder_decoder, prompts, prefixes, config=GenerateConfig(max_new_tokens=NEW))
    expected = [greedy_by_recomputation(encoder_decoder, *request) for request in zip(prompts, prefixes, strict=True)]
    assert outputs == expected


def make_end_likely(backbone: Any) -> None:
    """An end token that is now and then likely lets beams end at different lengths."""
    with torch.no_grad():
        head = backbone.model.get_output_embeddings().weight
        head[backbone.eos_id] += 0.5 * head.norm(dim=1).mean() * head.mean(0) / head.mean(0).norm()


@pytest.mark.parametrize("family", ["bart", "pegasus", "t5", "m2m_100"])
def test_beams_are_recomputation(
    family: str, tiny_backbone: Any, random_prefix: Any, random_ids: Any, monkeypatch: pytest.MonkeyPatch
):
    backbone = tiny_backbone(family)
    make_end_likely(backbone)
    prompts = [random_ids(n, n) for n in (7, 2, 12)]
    prefixes = [random_prefix(backbone, SITES, 1), random_prefix(backbone, {"encoder": 2, "cross": 1}, 2), None]
    for length_penalty in (1.0, -1.0):
        options = {"max_new_tokens": 8, "num_beams": 3, "length_penalty": length_penalty}
        outputs = generate_ids(backbone, prompts, prefixes, config=GenerateConfig(**options))
        assert outputs == [
            beams_by_recomputation(backbone, prompt, prefix, monkeypatch, **options)
            for prompt, prefix in zip(prompts, prefixes, strict=True)
        ]


def test_streamed_pieces_joined_are_the_whole(by_hand: Any, random_prefix: Any):
    backbone, _ = by_hand
    prefix, options = random_prefix(backbone, SITES), {"max_new_tokens": 30, "temperature": 1.0, "seed": 0}
    (whole,) = generate(backbone, ["some source"], prefix, **options)
    assert "".join(stream(backbone, "some source", prefix, **options)) == whole
    stop = (whole[3:5],)
    (stopped,) = generate(backbone, ["some source"], prefix, **options, stop=stop)
    assert stopped == whole[: whole.find(stop[0])].strip()


def test_what_a_tokenizer_adds_is_learned_and_not_shown(tiny_models: Any, enclosing_tokenizer: Any):
    """BART's tokenizer puts <s> and </s> around a target; the decoder reads its start token before both."""
    backbone = Backbone.from_model(tiny_models("bart"), enclosing_tokenizer, "tiny")
    begin, end = enclosing_tokenizer.bos_token_id, backbone.eos_id
    ids = tuple(backbone.encode("ab"))
    encoding = encode_examples(backbone, [Example("ab", ("ab",))], TextFormat("{source}", "{target}"), prefix_length=9)
    assert encoding.examples == (TokenizedExample((begin, *ids, end), ((begin, *ids, end),)),)
    assert collate(backbone, encoding.examples).decoder_input_ids.tolist() == [[backbone.decoder_start_id, begin, *ids]]
    assert backbone.decode([begin, *ids, end]) == "ab"


def test_where_none_is_configured_a_language_token_comes_first(tiny_models: Any, random_ids: Any):
    """mBART's tokenizer puts the language after the end of a text: the decoder begins with it, and learns to end."""
    tokenizer = make_tokenizer()
    language = tokenizer.convert_tokens_to_ids("@")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s> @", special_tokens=[("</s>", tokenizer.eos_token_id), ("@", language)]
    )
    backbone = Backbone.from_model(tiny_models("mbart", decoder_start_token_id=None), tokenizer, "tiny")
    assert backbone.decoder_start_id == language
    ids, end = tuple(backbone.encode("ab")), backbone.eos_id
    encoding = encode_examples(backbone, [Example("ab", ("ab",))], TextFormat("{source}", "{target}"), prefix_length=1)
    assert encoding.examples == (TokenizedExample((*ids, end, language), ((*ids, end),)),)
    prompt = random_ids(5)
    assert generate_ids(backbone, [prompt], [None], config=GenerateConfig(max_new_tokens=NEW)) == [
        greedy_by_recomputation(backbone, prompt, None)
    ]


def test_a_first_token_that_the_model_forces_comes_first(tmp_path: Path, tiny_models: Any, random_ids: Any):
    """Summarizing BARTs and translating mBARTs name it in their generation settings."""
    model, tokenizer = tiny_models("bart"), make_tokenizer()
    model.generation_config.forced_bos_token_id = 7
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompt = random_ids(5)
    (output,) = generate_ids(
        load_backbone(tmp_path), [prompt], [None], config=GenerateConfig(max_new_tokens=3, min_new_tokens=3)
    )
    assert output[0] == 7


@pytest.mark.parametrize("family", ["bart", "t5", "m2m_100"])
def test_a_folder_is_loaded_with_what_writes(
    family: str, tmp_path: Path, tiny_models: Any, tiny_tokenizer: Any, random_ids: Any, assert_same: Any
):
    model = tiny_models(family, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path)
    assert backbone.kind == "encoder-decoder"
    assert tuple(backbone.geometry) == tuple(SITES)
    given = {"input_ids": torch.tensor([random_ids(9)]), "decoder_input_ids": torch.tensor([random_ids(5)])}
    with torch.no_grad():
        assert_same(backbone.forward(**given).logits, model(**given).logits)


# --- real words ------------------------------------------------------------------------------------------------------


def hand_hooked(model: Any, ids: list[int]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """What the layers' key and value projections give for a text, read on both sides, by site."""
    if hasattr(model, "shared"):
        blocks, layers = model.encoder.block, model.decoder.block
        sites = {
            "encoder": [(b.layer[0].SelfAttention.k, b.layer[0].SelfAttention.v) for b in blocks],
            "decoder": [(b.layer[0].SelfAttention.k, b.layer[0].SelfAttention.v) for b in layers],
            "cross": [(b.layer[1].EncDecAttention.k, b.layer[1].EncDecAttention.v) for b in layers],
        }
    else:
        blocks, layers = model.model.encoder.layers, model.model.decoder.layers
        sites = {
            "encoder": [(b.self_attn.k_proj, b.self_attn.v_proj) for b in blocks],
            "decoder": [(b.self_attn.k_proj, b.self_attn.v_proj) for b in layers],
            "cross": [(b.encoder_attn.k_proj, b.encoder_attn.v_proj) for b in layers],
        }
    seen: dict[Any, Tensor] = {}
    for pairs in sites.values():
        for linear in (linear for pair in pairs for linear in pair):
            linear.register_forward_hook(lambda module, _, output: seen.__setitem__(module, output[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([ids]))
    return {site: [(seen[key], seen[value]) for key, value in pairs] for site, pairs in sites.items()}


@pytest.mark.parametrize("lengths", [6, {"encoder": 4, "decoder": 11, "cross": 7}, {"cross": 5}])
def test_words_give_the_keys_and_values_of_their_forward(
    lengths: int | dict[str, int], encoder_decoder: Any, tiny_models: Any, assert_same: Any
):
    text = "some wds"
    prefix = from_words(encoder_decoder, text, lengths)
    by_site = dict.fromkeys(SITES, lengths) if isinstance(lengths, int) else lengths
    assert {site: prefix.length(site) for site in prefix.sites} == by_site
    ids = encoder_decoder.encode(text) * 2
    for site, length in by_site.items():
        bare = tiny_models(encoder_decoder.name.removeprefix("tiny-"))
        expected = hand_hooked(bare, ids[:length])[site]
        for pair, flat, shape in zip(prefix.layers[site], expected, encoder_decoder.geometry[site], strict=True):
            assert_same(pair, [heads(part, shape.num_kv_heads) for part in flat])


# --- checkpointing, precision, the frozen model ----------------------------------------------------------------------


def test_checkpointing_changes_no_number(encoder_decoder: Any, random_prefix: Any, examples: list[TokenizedExample]):
    prefix = random_prefix(encoder_decoder, SITES)
    calls: list[int] = []
    watched = [next(m for m, place in encoder_decoder.layout.layer_of.items() if place == (site, 0)) for site in SITES]
    handles = [module.register_forward_pre_hook(lambda *_: calls.append(1)) for module in watched]

    def loss_and_gradients(batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = batch_loss(encoder_decoder, prefix, batch).sum()
        return loss, torch.autograd.grad(loss, prefix.tensors())

    try:
        for batch in batches(encoder_decoder, examples):
            calls.clear()
            loss, gradients = loss_and_gradients(batch)
            assert len(calls) == 3
            with gradient_checkpointing(encoder_decoder.model):
                again, recomputed = loss_and_gradients(batch)
            assert len(calls) == 9, "each layer must run again in the backward pass"
            assert torch.equal(again, loss)
            assert all(torch.equal(one, other) for one, other in zip(recomputed, gradients, strict=True))
            assert not any(module.training for module in encoder_decoder.model.modules())
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ["bart", "t5", "m2m_100"])
def test_bfloat16_is_float32_up_to_rounding(
    family: str,
    tiny_backbone: Any,
    random_prefix: Any,
    random_ids: Any,
    examples: list[TokenizedExample],
    assert_same: Any,
):
    backbone = tiny_backbone(family)
    prefix = random_prefix(backbone, SITES)
    exact = losses_one_by_one(backbone, prefix, examples)
    wanted = torch.autograd.grad(exact.mean(), prefix.tensors())
    backbone.model.to(torch.bfloat16)
    for batch in batches(backbone, examples):
        losses = batch_loss(backbone, prefix, batch)
        assert losses.dtype == torch.float32
        assert_same(losses, exact, tolerance=0.05)
        assert_same(torch.autograd.grad(losses.mean(), prefix.tensors()), wanted, tolerance=0.35)
    config = GenerateConfig(max_new_tokens=3, num_beams=2)
    assert len(generate_ids(backbone, [random_ids(4), random_ids(7)], [prefix, None], config=config)) == 2


def test_nothing_stays_behind_on_the_model(
    tiny_backbone: Any, random_prefix: Any, examples: list[TokenizedExample], random_ids: Any
):
    for family in ("bart", "t5", "m2m_100"):
        backbone = tiny_backbone(family)
        before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
        prefix = random_prefix(backbone, SITES)
        for batch in batches(backbone, examples):
            batch_loss(backbone, prefix, batch).sum().backward()
            with gradient_checkpointing(backbone.model):
                batch_loss(backbone, prefix, batch).sum().backward()
        for beams in (1, 3):
            generate_ids(backbone, [random_ids(5)], [prefix], config=GenerateConfig(max_new_tokens=4, num_beams=beams))
        from_words(backbone, "words", SITES)
        for name, tensor in backbone.model.state_dict().items():
            assert torch.equal(tensor, before[name]), f"{name} has moved"
        for module in backbone.model.modules():
            assert not module._forward_pre_hooks
            assert not module._forward_hooks
        assert all(parameter.grad is None for parameter in backbone.model.parameters())


def test_another_thread_may_use_the_model_meanwhile(
    by_hand: Any, random_prefix: Any, random_ids: Any, examples: list[TokenizedExample], assert_same: Any
):
    """While a packed row is trained on, the same model serves: each call keeps its own positions and prefix."""
    backbone, _ = by_hand
    given = {"input_ids": torch.tensor([random_ids(9)]), "decoder_input_ids": torch.tensor([random_ids(5)])}
    packed, other = random_prefix(backbone, SITES, 1), random_prefix(backbone, SITES, 2)
    batch = collate(backbone, examples)
    expected, losses = backbone.forward(**given, prefixes=other).logits, batch_loss(backbone, packed, batch)
    answers: list[Any] = []

    def serve() -> None:
        try:
            answers.append(backbone.forward(**given, prefixes=other).logits)
        except Exception as error:
            answers.append(error)

    def interrupt(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=serve)
            thread.start()
            thread.join()

    handle = next(iter(backbone.layout.layer_of)).register_forward_pre_hook(interrupt)
    try:
        again = batch_loss(backbone, packed, batch)
    finally:
        handle.remove()
    assert [type(answer) for answer in answers] == [Tensor]
    assert_same(answers[0], expected)
    assert_same(again, losses)


# --- the artifact ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [SITES, {"cross": 2, "encoder": 5}], ids="-".join)
def test_saved_is_loaded_bit_for_bit(
    lengths: dict[str, int], dtype: torch.dtype, tmp_path: Path, by_hand: Any, random_prefix: Any, random_ids: Any
):
    backbone, _ = by_hand
    prefix = Prefix(random_prefix(backbone, lengths).layers, make_header(backbone, task="records"))
    loaded = load_prefix(save_prefix(tmp_path / "p.safetensors", prefix, dtype=dtype), backbone)
    assert loaded.layers.keys() == lengths.keys()
    assert loaded.header["prefix_length"] == lengths
    for site, layers in prefix.to(dtype).layers.items():
        for one, other in zip(loaded.layers[site], layers, strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
    ids, target = torch.tensor([random_ids(7)]), torch.tensor([random_ids(4, 1)])
    one, other = (
        backbone.forward(ids, decoder_input_ids=target, prefixes=p).logits for p in (loaded, prefix.to(dtype))
    )
    assert torch.equal(one, other)


def test_the_artifact_says_that_positions_are_not_shifted(tmp_path: Path, tiny_backbone: Any, random_prefix: Any):
    """In an encoder-decoder the decoder's text does not start at position P."""
    backbone = tiny_backbone("bart")
    prefix = Prefix(random_prefix(backbone, SITES).layers, make_header(backbone))
    loaded = load_prefix(save_prefix(tmp_path / "p.safetensors", prefix), backbone)
    assert set(loaded.header["positions"].values()) == {"text positions are not shifted"}


BART_LARGE = {site: (LayerShape(16, 64, 64),) * 12 for site in SITES}


@pytest.mark.parametrize("length", [10, 200])
def test_a_prefix_for_bart_large_has_the_papers_size(length: int, tmp_path: Path):
    """Three sites of 2 * L * d_kv numbers a position, and three MLPs (m = 800, as for summarization) to train them."""
    per_site = length * 2 * 12 * 1024
    prefix = Prefix(
        {site: unflatten(torch.zeros(length, per_site // length), shapes) for site, shapes in BART_LARGE.items()}
    )
    assert prefix.geometry == BART_LARGE
    assert prefix.num_parameters == 3 * per_site == {10: 737_280, 200: 14_745_600}[length]
    size = save_prefix(tmp_path / "p.safetensors", prefix, dtype=torch.bfloat16).stat().st_size
    assert 2 * 3 * per_site < size < 2 * 3 * per_site + 20_000

    with torch.device("meta"):
        module = PrefixEncoder("mlp", BART_LARGE, length, embedding_size=1024, bottleneck_size=800)
    wide = 2 * 12 * 1024
    trained = sum(parameter.numel() for parameter in module.parameters())
    assert trained == 3 * (length * 1024 + (1024 + 1) * 800 + (800 + 1) * wide)


# --- what is refused, in one line with a hint ------------------------------------------------------------------------


def refused(kind: type[PrefixError], words: str) -> Any:
    """Expect an error of one line, with a next step."""

    def check(error: PrefixError) -> bool:
        return bool(error.hint) and "\n" not in str(error)

    return pytest.raises(kind, match=words, check=check)


EXAMPLES = [Example("source", ("target",))]


@pytest.mark.parametrize(
    ("name", "sites", "words"),
    [
        ("gpt2", "cross", "'tiny-gpt2' has no site cross"),
        ("gpt2", "decoder=3,encoder=2", "has no site encoder"),
        (
            "longt5-local",
            "encoder",
            r"no site encoder \(no site 'encoder': its layers attend through code of their own",
        ),
    ],
)
def test_a_site_that_the_model_lacks(name: str, sites: str, words: str, tmp_path: Path, tiny_backbone: Any):
    config = TrainConfig(sites=sites, output=str(tmp_path / "run"), max_steps=1)
    with refused(ConfigError, words):
        train(config, backbone=tiny_backbone(name), examples=EXAMPLES)
    assert not (tmp_path / "run").exists()


def test_a_model_without_an_encoder_site_has_the_others(tiny_backbone: Any, random_prefix: Any, random_ids: Any):
    backbone = tiny_backbone("longt5-local")
    assert tuple(backbone.geometry) == ("decoder", "cross")
    prefix, prompt = random_prefix(backbone, 4), random_ids(9)
    config = GenerateConfig(max_new_tokens=NEW)
    assert generate_ids(backbone, [prompt], [prefix], config=config) == [
        greedy_by_recomputation(backbone, prompt, prefix)
    ]


@pytest.mark.parametrize("name", ["longt5-local", "longt5-global", "pegasus_x", "bigbird_pegasus"])
def test_layers_that_attend_by_themselves_go_on_as_before_or_the_model_is_refused(
    name: str, tiny_backbone: Any, tiny_models: Any, random_ids: Any, assert_same: Any
):
    """Their masks must not change with the attention function of the other layers."""
    try:
        backbone = tiny_backbone(name)
    except BackboneError:
        return
    ids, mask, _ = padded([random_ids(9, 1), random_ids(5, 2)], "right", backbone.pad_id)
    given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.tensor([random_ids(6)] * 2)}
    with torch.no_grad():
        assert_same(backbone.forward(**given).logits, tiny_models(name)(**given).logits)


def test_a_model_that_reads_no_text_is_refused(tiny_backbone: Any):
    with refused(BackboneError, "hisper"):
        tiny_backbone("whisper")


@pytest.mark.parametrize("sites", ["decodr", "encoder,encoder=3", "encoder=0", "encoder=x", "encoder=", "encoder=3=4"])
def test_sites_that_mean_nothing(sites: str):
    with pytest.raises(ConfigError, match="sites"):
        TrainConfig(sites=sites)


def test_a_prefix_of_another_family(tiny_backbone: Any, random_prefix: Any, random_ids: Any):
    bart, t5, gpt2 = (tiny_backbone(name) for name in ("bart", "t5", "gpt2"))
    ids = torch.tensor([random_ids(5)])
    for mine, foreign in ((bart, t5), (t5, bart), (bart, gpt2), (gpt2, bart)):
        prefix = random_prefix(foreign, 3)
        read = None if mine is gpt2 else ids
        with refused(BackboneError, "the prefix has .*, but .* has "):
            mine.forward(ids, decoder_input_ids=read, prefixes=prefix)
        with refused(BackboneError, f"the prefix has .*, but '{mine.name}' has "):
            generate(mine, ["x"], prefix)


def test_what_the_decoder_reads_must_come_with_an_encoder_decoder_only(tiny_backbone: Any, random_ids: Any):
    ids = torch.tensor([random_ids(5)])
    with refused(ConfigError, "decoder_input_ids"):
        tiny_backbone("gpt2").forward(ids, decoder_input_ids=ids)
    with refused(ConfigError, "decoder_input_ids"):
        tiny_backbone("bart").forward(ids)
    with refused(ConfigError, "decoder_input_ids"):
        tiny_backbone("bert").forward(ids, decoder_input_ids=ids)


def test_what_is_longer_than_the_position_table(tiny_backbone: Any, tmp_path: Path):
    """A source is cut and counted, or refused; a target is refused; a request is refused before any work."""
    backbone, limit, plain = tiny_backbone("bart"), 160, TextFormat("{source}", "{target}")
    assert backbone.max_positions == limit
    long, fits = Example("s" * 170, ("t",)), Example("s" * limit, ("t" * (limit - 1),))
    # A prefix takes none of the positions, and source and target have all of them each.
    assert encode_examples(backbone, [fits], plain, prefix_length=50, on_too_long="error").num_truncated == 0
    encoding = encode_examples(backbone, [fits, long], plain, prefix_length=50)
    assert encoding.num_truncated == 1
    assert [len(example.prompt) for example in encoding.examples] == [limit, limit]
    with refused(DataError, "example 1 .* 170 tokens"):
        encode_examples(backbone, [long], plain, prefix_length=0, on_too_long="error")
    with refused(DataError, "example 1 .* 161 tokens"):
        encode_examples(backbone, [Example("s", ("t" * limit,))], plain, prefix_length=0)
    with refused(RequestError, r"text 1 needs 161 \(text\) and 5 \(new\) positions, but 'tiny-bart' has 160"):
        generate(backbone, ["s" * 161], max_new_tokens=5)
    with refused(RequestError, r"1 \(text\) and 161 \(new\)"):
        generate(backbone, ["s"], max_new_tokens=limit + 1)
    # The last token takes no position, and the start token one.
    assert generate(backbone, ["s" * limit], max_new_tokens=limit)

    result = train(
        TrainConfig(output=str(tmp_path / "run"), max_steps=1, sites="encoder=2", reparameterization="none"),
        backbone=backbone,
        examples=[fits, long],
    )
    assert result.events[0]["num_cut"] == 1


def test_a_cut_source_keeps_the_closing_token(tiny_models: Any, enclosing_tokenizer: Any):
    backbone = Backbone.from_model(tiny_models("t5"), enclosing_tokenizer, "tiny")
    assert backbone.max_positions is None
    plain = TextFormat("{source}", "{target}")
    (example,) = encode_examples(backbone, [Example("abcdef", ("x",))], plain, prefix_length=4, max_length=5).examples
    begin, end = enclosing_tokenizer.bos_token_id, backbone.eos_id
    assert example.prompt == (begin, *backbone.encode("abc"), end)
