"""A start from a text: before training it equals the text in view; compacted, it keeps what attention gave."""

import pytest
import torch

from prefixtune.attention.record import prefix_from_tokens
from prefixtune.errors import ConfigError
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.config import TrainConfig
from prefixtune.training.starts.build import build_encoder
from zoo import ZOO

TEXT = "The Gannet goes to Ashby at 8:00. The Osprey goes to Dunmore."
BEHIND = "Where does it go? "

# In the others a window hides the text's first tokens from those behind it, but never a prefix; or they are refused.
WITHOUT_A_WINDOW = (
    *("gpt2", "gptj", "gpt_neox", "gpt_bigcode", "opt", "llama", "mixtral", "qwen2", "qwen2_moe", "qwen3"),
    *("phi", "phi3", "gemma", "olmo2", "cohere", "glm", "glm4", "deepseek_v2", "deepseek_v3", "minicpm3", "smollm3"),
    *("granite", "stablelm", "helium", "hunyuan_v1_dense", "nemotron", "persimmon", "codegen", "biogpt", "ctrl"),
)


def start_of(backbone, length=0, text=TEXT, **options):
    """The prefix of a run from a text before its first step, and what its header says of it."""
    config = TrainConfig(initialization="text", init_text=text, prefix_length=length, **options)
    encoder, start = build_encoder(config, backbone)
    return encoder.bake(), start.description


def logits_behind(backbone, prefix, text):
    """Logits at a text's tokens, in front of which a prefix stands."""
    with torch.no_grad():
        return backbone.forward(torch.tensor([backbone.encode(text)]), prefixes=prefix).logits[0]


@pytest.mark.parametrize("name", WITHOUT_A_WINDOW)
def test_a_whole_text_equals_the_text_in_view(name, tiny_backbone, assert_same):
    assert ZOO[name].kind == "decoder"
    backbone = tiny_backbone(name)
    prefix, description = start_of(backbone)
    tokens = len(backbone.encode(TEXT))
    assert prefix.prefix_length == description["tokens"] == tokens
    assert_same(logits_behind(backbone, prefix, BEHIND), logits_behind(backbone, None, TEXT + BEHIND)[tokens:])


@pytest.mark.parametrize("how", ["cut", "stride", "match"])
def test_as_many_positions_as_tokens_are_the_text_itself(how, tiny_backbone):
    backbone = tiny_backbone("llama")
    whole, _ = start_of(backbone)
    assert start_of(backbone, len(backbone.encode(TEXT)), compaction=how)[0].equal(whole)


def test_a_cut_text_is_its_beginning(backbone):
    prefix, description = start_of(backbone, 9, compaction="cut")
    assert prefix.equal(start_of(backbone, text=TEXT[:9])[0])
    assert description["compaction"] == "cut"


def test_a_stride_keeps_the_distances_to_the_text_behind(tiny_backbone, assert_same):
    # With one layer, what is kept of a position does not depend on the others, so hiding those gives the same function.
    backbone = tiny_backbone("llama", num_hidden_layers=1)
    tokens, length = len(backbone.encode(TEXT)), 7
    prefix, description = start_of(backbone, length, compaction="stride")
    assert description["turned_back"] == tokens - length
    kept = torch.linspace(0, tokens - 1, length).round().long()
    ids = torch.tensor([[*backbone.encode(TEXT), *backbone.encode(BEHIND)]])
    mask = torch.zeros_like(ids)
    mask[0, kept] = mask[0, tokens:] = 1
    with torch.no_grad():
        hidden = backbone.model(
            input_ids=ids, attention_mask=mask, position_ids=torch.arange(ids.shape[1])[None], use_cache=False
        )
    assert_same(logits_behind(backbone, prefix, BEHIND), hidden.logits[0, tokens:])


def attention_outputs(backbone, prefix):
    """What the first layer's heads give for the text read again behind a prefix, before they are mixed."""
    given = []
    module = backbone.model.model.layers[0].self_attn.o_proj
    handle = module.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0][0]))
    with torch.no_grad():
        backbone.forward(torch.tensor([backbone.encode(TEXT)]), prefixes=prefix)
    handle.remove()
    return given[0]


def error_of(backbone, prefix, whole):
    """The squared error of the attention's output on the reference queries."""
    return float((attention_outputs(backbone, prefix) - attention_outputs(backbone, whole)).square().sum())


@pytest.mark.parametrize("name", ["llama", "qwen3", "smollm3"])
def test_matched_values_are_those_of_least_squares(name, tiny_backbone):
    backbone = tiny_backbone(name, num_hidden_layers=1) if name != "smollm3" else tiny_backbone(name)
    whole, _ = start_of(backbone)
    stride, _ = start_of(backbone, 12, compaction="stride")
    matched, _ = start_of(backbone, 12, compaction="match")
    error = error_of(backbone, matched, whole)
    assert error < 0.5 * error_of(backbone, stride, whole)
    # No other values do better, but for what holds them to the text's own.
    (key, value), *others = matched.layers["decoder"]
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-2, 1e-1, 1.0):
        moved = value + scale * value.std() * torch.randn(value.shape, generator=generator)
        assert error_of(backbone, Prefix({"decoder": ((key, moved), *others)}), whole) > error
    # Keys are those of the text.
    shared = (key[:, :, None] - _turned(backbone, whole, 12)[:, None]).abs().amax(-1).amin(-1)
    assert float(shared.max()) < 1e-4


def _turned(backbone, whole, length):
    """The first layer's keys of the whole text, moved back so that the text behind starts at P."""
    return backbone.rotation.turn(whole, length - whole.prefix_length).layers["decoder"][0][0]


def test_a_longer_match_is_nearer(tiny_backbone):
    backbone = tiny_backbone("llama", num_hidden_layers=1)
    whole, _ = start_of(backbone)
    tokens = whole.prefix_length
    errors = [error_of(backbone, start_of(backbone, p, compaction="match")[0], whole) for p in (4, 16, tokens - 1)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
def test_windows_soft_caps_and_sinks_are_matched_too(name, tiny_backbone):
    backbone = tiny_backbone(name)
    whole, _ = start_of(backbone)
    errors = {
        how: float(
            (
                logits_behind(backbone, start_of(backbone, 16, compaction=how)[0], TEXT)
                - logits_behind(backbone, whole, TEXT)
            )
            .square()
            .mean()
        )
        for how in ("stride", "match")
    }
    assert errors["match"] < errors["stride"]


def test_absolute_positions_stay(tiny_backbone):
    backbone = tiny_backbone("gpt2")
    prefix, description = start_of(backbone, 5, compaction="stride")
    whole, _ = start_of(backbone)
    kept = torch.linspace(0, whole.prefix_length - 1, 5).round().long()
    assert description["turned_back"] == 0
    pairs = zip(prefix.layers["decoder"], whole.layers["decoder"], strict=True)
    assert all(torch.equal(key, whole_key[:, kept]) for (key, _), (whole_key, _) in pairs)


@pytest.mark.parametrize("how", ["cut", "stride", "match"])
def test_encoder_decoders_start_at_all_sites(how, encoder_decoder):
    prefix, _ = start_of(encoder_decoder, sites="encoder=6,cross=8,decoder=7", compaction=how)
    assert {site: prefix.length(site) for site in prefix.sites} == {"encoder": 6, "cross": 8, "decoder": 7}
    whole, _ = start_of(encoder_decoder)
    ids = torch.tensor([encoder_decoder.encode(TEXT)])
    assert whole.equal(prefix_from_tokens(encoder_decoder.model, encoder_decoder.layout, ids))


@pytest.mark.parametrize("how", ["cut", "stride", "match"])
def test_encoders_start_from_a_text(how, encoder):
    prefix, description = start_of(encoder, 6, compaction=how)
    assert prefix.length("encoder") == 6
    assert description["compaction"] == how


def test_attention_that_cannot_be_observed_is_not_matched(tiny_backbone):
    backbone = tiny_backbone("deberta-v2")
    with pytest.raises(ConfigError, match="compaction 'match' needs to observe attention") as error:
        start_of(backbone, 6)
    assert "--compaction stride" in error.value.hint
    assert start_of(backbone, 6, compaction="stride")[0].length("encoder") == 6
