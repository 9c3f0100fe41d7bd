"""What holds of every kind of model alike: of decoders, of encoder-decoders with three sites, and of encoders."""

import threading

import pytest
import torch
from torch import Tensor

from oracles import outputs_of, outputs_together
from prefixtune.attention.forward import gradient_checkpointing
from prefixtune.backbone.loss import batch_loss
from prefixtune.backbone.prefixes import load_prefix, make_header
from prefixtune.data.batching import collate, pad
from prefixtune.errors import BackboneError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from prefixtune.prefix.prefix import Prefix, save_prefix
from prefixtune.training.starts.words import from_words

DECODERS = ("gpt2", "llama", "opt", "gpt_neox", "qwen3", "mistral")
ENCODER_DECODERS = ("bart", "mbart", "pegasus", "t5", "t5_gated", "m2m_100")
ENCODERS = ("bert", "roberta", "distilbert", "electra", "modernbert")
ALL = (*DECODERS, *ENCODER_DECODERS, *ENCODERS)
SOME = ("gpt2", "llama", "mistral", "bart", "pegasus", "t5", "m2m_100", "bert", "roberta", "modernbert")
SITES = {"encoder": 4, "decoder": 3, "cross": 5}
"""Every site, each with a length of its own."""
SITES_OF = {"decoder": ["decoder"], "encoder": ["encoder"], "encoder-decoder": list(SITES)}


@pytest.fixture
def prefix_at(random_prefix):
    """A factory: `prefix_at(backbone, lengths)` makes a prefix at those of the sites that the backbone has."""

    def make(backbone, lengths, seed=0):
        there = {site: lengths[site] for site in backbone.geometry if site in lengths}
        return random_prefix(backbone, there, seed) if there else None

    return make


def inputs_of(backbone, ids):
    """What a model is called with."""
    row = torch.tensor([ids])
    return {"input_ids": row} | ({"decoder_input_ids": row.flip(1)} if backbone.kind == "encoder-decoder" else {})


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_without_a_prefix_it_is_the_bare_model(name, made, tiny_models, random_ids, assert_same):
    backbone, bare = made(name), tiny_models(name)
    bare.set_attn_implementation("eager")
    given = inputs_of(backbone, random_ids(14))
    expected = bare(**given)[0]
    assert_same(backbone.forward(**given)[0], expected)
    assert_same(backbone.forward(**given, prefixes=[None])[0], expected)
    # The model stays an ordinary one for anybody who calls it directly.
    assert_same(backbone.model(**given)[0], expected)


@pytest.mark.parametrize("name", ["whisper", "funnel"])
def test_a_model_that_reads_no_text_or_shortens_its_rows_is_refused(name, tiny_backbone):
    with pytest.raises(BackboneError, match=name[1:]) as error:
        tiny_backbone(name)
    assert error.value.hint


@pytest.mark.parametrize("name", ALL)
def test_every_slot_of_every_site_and_layer_gets_a_gradient(name, made, prefix_at, random_ids):
    backbone = made(name)
    assert list(backbone.geometry) == SITES_OF[backbone.kind]
    prefix = prefix_at(backbone, SITES)
    # Longer than the windows of Mistral and ModernBERT.
    outputs = outputs_of(backbone, random_ids(9), random_ids(6, 1), prefix)
    # A single number: those of a loss summed with equal weights may cancel out.
    for gradient in torch.autograd.grad(outputs[-1, 3], prefix.tensors()):
        assert torch.all(gradient.abs().amax(-1) > 0)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_every_slot_of_every_site_and_layer_changes_every_token(name, made, prefix_at, random_ids):
    backbone = made(name)
    prefix = prefix_at(backbone, SITES).detach()
    changed = []
    for number, tensor in enumerate(prefix.tensors()):
        for slot in range(tensor.shape[1]):
            copy = prefix.detach()
            copy.tensors()[number][:, slot] *= -1
            changed.append(copy)
    assert len(changed) == 2 * sum(SITES[site] * len(shapes) for site, shapes in backbone.geometry.items())
    text = random_ids(9), random_ids(6, 1)
    whole = outputs_of(backbone, *text, prefix)
    for outputs in outputs_together(backbone, *([part] * len(changed) for part in text), changed):
        assert float((outputs - whole).abs().amax(-1).min()) > 1e-4


@pytest.mark.parametrize(
    ("name", "side"),
    [*((name, "right") for name in ALL), *((name, "left") for name in (*DECODERS, "roberta", "modernbert"))],
)
def test_a_padded_batch_of_mixed_prefixes_is_each_row_alone(name, side, made, prefix_at, random_ids, assert_same):
    """RoBERTa counts real tokens only; rotary positions tell distances, but to a prefix's keys they are absolute."""
    backbone = made(name)
    lengths = (SITES, {"encoder": 1, "decoder": 6, "cross": 2}, {}, {"cross": 3}, {"decoder": 2, "encoder": 7})
    prefixes = [prefix_at(backbone, one, seed) for seed, one in enumerate(lengths)]
    prefixes[3] = prefixes[3] or prefixes[0]
    prompts, written = ([random_ids(n, n) for n in counts] for counts in ((7, 2, 12, 5, 1), (4, 9, 1, 6, 3)))
    together = outputs_together(backbone, prompts, written, prefixes, side=side)
    alone = [outputs_of(backbone, *row) for row in zip(prompts, written, prefixes, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert_same(one, other)

    leaves = [tensor for prefix in (*prefixes[:2], prefixes[4]) for tensor in prefix.tensors()]
    weights = [torch.randn(part.shape, generator=torch.Generator().manual_seed(1)) for part in alone]
    sums = [sum((w * p).sum() for w, p in zip(weights, parts, strict=True)) for parts in (together, alone)]
    assert_same(torch.autograd.grad(sums[0], leaves), torch.autograd.grad(sums[1], leaves))


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_what_is_in_the_padding_does_not_matter(name, made, prefix_at, random_ids):
    backbone = made(name)
    prefix, side = prefix_at(backbone, SITES), "left" if backbone.kind == "decoder" else "right"
    texts = [random_ids(3, 1), random_ids(8, 2)], [random_ids(2, 3), random_ids(4, 4)]
    one, other = (outputs_together(backbone, *texts, prefix, side=side, padding=id) for id in (backbone.pad_id, 7))
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


KEYS, VALUES = ("k", "k_proj", "key", "k_lin"), ("v", "v_proj", "value", "v_lin")


@torch.no_grad()
def projections_of(model, given):
    """What the layers' key and value projections give for a text, by site."""
    seen = {}
    for name, module in model.named_modules():
        *path, last = name.split(".")
        if last in (*KEYS, *VALUES):
            stack = "decoder" if "decoder" in path else "encoder"
            site = "cross" if {*path} & {"encoder_attn", "EncDecAttention"} else stack
            into = seen.setdefault(site, ([], []))[last in VALUES]
            module.register_forward_hook(lambda _, __, output, into=into: into.append(output[0]))
    model(**given)
    return seen


@pytest.mark.parametrize("lengths", [6, {"encoder": 4, "decoder": 11, "cross": 7}, {"cross": 5, "encoder": 3}])
@pytest.mark.parametrize("name", [*ENCODER_DECODERS, "bert", "roberta", "distilbert", "electra"])
def test_words_give_the_keys_and_values_of_their_forward(name, lengths, made, tiny_models, assert_same):
    backbone, text = made(name), "some wds"
    by_site = dict.fromkeys(SITES, lengths) if isinstance(lengths, int) else lengths
    by_site = {site: by_site[site] for site in backbone.geometry if site in by_site}
    prefix = from_words(backbone, text, by_site)
    assert {site: prefix.length(site) for site in prefix.sites} == by_site
    for site, length in by_site.items():
        read = torch.tensor([(backbone.encode(text) * 2)[:length]])
        given = {"input_ids": read} | ({"decoder_input_ids": read} if backbone.kind == "encoder-decoder" else {})
        pairs = zip(*projections_of(tiny_models(name), given)[site], strict=True)
        for layer, pair, shape in zip(prefix.layers[site], pairs, backbone.geometry[site], strict=True):
            assert_same(layer, [flat.unflatten(1, (shape.num_kv_heads, -1)).transpose(0, 1) for flat in pair])


# --- training, storing, and all other uses ----------------------------------------------------------------------------


def losses_of(backbone, prefix, batch):
    """The losses of a batch; an encoder's states."""
    if batch is None:
        return outputs_of(backbone, range(14), (), prefix)
    return batch_loss(backbone, prefix, batch)


def batches_of(backbone, examples):
    """What training makes of the examples, and padded rows."""
    if backbone.kind == "encoder":
        return [None]
    start = backbone.decoder_start_id if backbone.kind == "encoder-decoder" else None
    return [collate(backbone, examples), pad(examples, pad_id=backbone.pad_id, decoder_start_id=start)]


@pytest.mark.parametrize("name", ALL)
def test_checkpointing_changes_no_number(name, made, prefix_at, examples):
    backbone = made(name)
    prefix, calls = prefix_at(backbone, SITES), list[int]()
    # Found once, by calls of its own.
    assert backbone.kind == "encoder" or backbone.head._rest is not None
    firsts = [module for module, (_, layer) in backbone.layout.layer_of.items() if layer == 0]
    handles = [module.register_forward_pre_hook(lambda *_: calls.append(1)) for module in firsts]

    def numbers(batch):
        losses = losses_of(backbone, prefix, batch)
        # A LayerNorm's states have the same sum whatever the prefix.
        weights = torch.randn(losses.shape, generator=torch.Generator().manual_seed(1))
        return [losses, *torch.autograd.grad((losses * weights).sum(), prefix.tensors())]

    try:
        for batch in batches_of(backbone, examples):
            calls.clear()
            expected = numbers(batch)
            assert len(calls) == len(firsts) == len(backbone.geometry)
            with gradient_checkpointing(backbone.model):
                recomputed = numbers(batch)
            assert len(calls) == 3 * len(firsts), "each layer must run again in the backward pass"
            after = numbers(batch)
            assert len(calls) == 4 * len(firsts), "checkpointing must end with its block"
            for one, again, other in zip(expected, recomputed, after, strict=True):
                assert torch.equal(one, again)
                assert torch.equal(one, other)
            assert not any(module.training for module in backbone.model.modules())
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "lengths"), [*((name, SITES) for name in ALL), ("bart", {"cross": 2, "encoder": 5})])
def test_saved_is_loaded_bit_for_bit(name, lengths, dtype, made, prefix_at, random_ids, tmp_path):
    backbone = made(name)
    layers = prefix_at(backbone, lengths).detach().layers
    prefix = Prefix(layers, make_header(backbone, task="toy", license="CC0: as you like, é"))
    path = save_prefix(tmp_path / "deep" / "p.safetensors", prefix, dtype=dtype)
    loaded = load_prefix(path, backbone)
    assert loaded.equal(prefix.to(dtype))
    assert loaded.lengths == {site: lengths[site] for site in backbone.geometry if site in lengths}
    assert loaded.header.items() >= prefix.header.items()
    text = random_ids(7), random_ids(4, 1)
    assert torch.equal(*(outputs_of(backbone, *text, one) for one in (loaded, prefix.to(dtype))))
    assert [entry.name for entry in path.parent.iterdir()] == ["p.safetensors"]


@pytest.mark.parametrize("name", SOME)
@torch.no_grad()
def test_train_mode_does_not_turn_dropout_on(name, tiny_models, tiny_backbone, prefix_at, random_ids):
    """These models' rates are 0.1 to 0.3."""
    backbone, bare = tiny_backbone(name), tiny_models(name).train()
    given, prefix = inputs_of(backbone, random_ids(9)), prefix_at(backbone, SITES)
    assert not torch.equal(bare(**given)[0], bare(**given)[0]), "the model must have dropout"
    expected = backbone.forward(**given, prefixes=prefix)[0]
    backbone.model.train()
    for _ in range(2):
        assert torch.equal(backbone.forward(**given, prefixes=prefix)[0], expected)


@pytest.mark.parametrize("name", SOME)
def test_nothing_stays_behind_on_the_model(name, tiny_backbone, tiny_models, prefix_at, random_ids, examples):
    backbone, before = tiny_backbone(name), tiny_models(name).state_dict()
    prefix = prefix_at(backbone, SITES)
    for batch in batches_of(backbone, examples):
        losses_of(backbone, prefix, batch).sum().backward()
        with gradient_checkpointing(backbone.model):
            losses_of(backbone, prefix, batch).sum().backward()
    if backbone.kind != "encoder":
        for beams in (1, 3):
            generate_ids(backbone, [random_ids(5)], [prefix], config=GenerateConfig(max_new_tokens=4, num_beams=beams))
    from_words(backbone, "words", 4)
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.model.state_dict().items())
    for module in backbone.model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


@pytest.mark.parametrize("name", ["llama", "bart", "t5"])
def test_another_thread_may_use_the_model_meanwhile(name, made, prefix_at, random_ids, examples, assert_same):
    """While a packed row is trained on, the same model serves: each call keeps its own positions and prefix."""
    backbone = made(name)
    given, batch = inputs_of(backbone, random_ids(9)), collate(backbone, examples)
    packed, other = prefix_at(backbone, SITES, 1), prefix_at(backbone, SITES, 2)
    expected, losses = backbone.forward(**given, prefixes=other).logits, batch_loss(backbone, packed, batch)
    answers = []

    def serve():
        try:
            answers.append(backbone.forward(**given, prefixes=other).logits)
        except Exception as error:
            answers.append(error)

    def interrupt(*_):
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
