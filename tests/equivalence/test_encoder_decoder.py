"""Encoder-decoders: where texts begin and end, windows, lengths, and what is refused."""

import pytest
import torch
from tokenizers import processors

from oracles import greedy_by_recomputation, pad_rows
from prefixtune.backbone.backbone import Backbone
from prefixtune.data import Example
from prefixtune.data.batching import collate
from prefixtune.data.encoding import TokenizedExample, encode_examples
from prefixtune.errors import BackboneError, ConfigError, DataError, RequestError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate, generate_ids
from prefixtune.prefix.text_format import TextFormat
from prefixtune.training.config import TrainConfig
from zoo import make_tokenizer

NEW = 8
GREEDY = GenerateConfig(max_new_tokens=NEW)


# --- where texts begin and end, and windows --------------------------------------------------------------------------


def test_what_a_tokenizer_adds_is_learned_and_not_shown(tiny_models, enclosing_tokenizer):
    """BART's tokenizer puts <s> and </s> around a target; the decoder reads its start token before both."""
    backbone = Backbone.from_model(tiny_models("bart"), enclosing_tokenizer, "tiny")
    begin, end = enclosing_tokenizer.bos_token_id, backbone.eos_id
    ids = tuple(backbone.encode("ab"))
    encoding = encode_examples(backbone, [Example("ab", ("ab",))], TextFormat("{source}", "{target}"), prefix_length=9)
    assert encoding.examples == (TokenizedExample((begin, *ids, end), ((begin, *ids, end),)),)
    assert collate(backbone, encoding.examples).decoder_input_ids.tolist() == [[backbone.decoder_start_id, begin, *ids]]
    assert backbone.decode([begin, *ids, end]) == "ab"


def test_where_none_is_configured_a_language_token_comes_first(tiny_models, random_ids):
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
    (found,) = generate_ids(backbone, [prompt], [None], config=GREEDY)
    assert found == greedy_by_recomputation(backbone, prompt, None, NEW)


def test_a_window_does_not_hide_the_prefix(tiny_backbone, random_prefix, random_ids):
    """T5Gemma has windows in encoder and decoder."""
    part = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "layer_types": ["sliding_attention"],
        "sliding_window": 4,
    }
    backbone = tiny_backbone("t5gemma", encoder=part, decoder=part)
    ids, read = torch.tensor([random_ids(20, 1)]), torch.tensor([random_ids(20, 2)])
    for site in ("encoder", "decoder"):
        prefix = random_prefix(backbone, {site: 3})
        hidden = []
        layer = getattr(backbone.model.model, site).layers[0].self_attn
        handle = layer.register_forward_hook(lambda _, __, output, into=hidden: into.append(output[0][0]))
        logits = backbone.forward(ids, decoder_input_ids=read, prefixes=prefix).logits
        backbone.forward(ids, decoder_input_ids=read)
        handle.remove()
        # The prefix reaches every position of the site's own attention, those beyond the window too.
        assert float((hidden[0] - hidden[1]).detach().abs().amax(-1).min()) > 1e-3
        for gradient in torch.autograd.grad(logits[0, -1, 0], prefix.tensors()):
            assert torch.all(gradient.abs().amax(-1) > 0)

    # The text's own window holds: with one layer, a token beyond it sees nothing of the target's start.
    prefix = random_prefix(backbone, 3)
    changed = read.clone()
    changed[0, :3] = torch.tensor(random_ids(3, seed=9))
    with torch.no_grad():
        one, two = (
            backbone.forward(ids, decoder_input_ids=given, prefixes=prefix).logits[0] for given in (read, changed)
        )
    assert torch.equal(one[6:], two[6:])
    assert not torch.allclose(one[3], two[3])

    # And while decoding with the cache.
    prompt = random_ids(20, 1)
    (found,) = generate_ids(backbone, [prompt], [prefix], config=GREEDY)
    assert found == greedy_by_recomputation(backbone, prompt, prefix, NEW)


# --- other layers, and what is refused -------------------------------------------------------------------------------


def test_a_model_without_an_encoder_site_has_the_others(tiny_backbone, random_prefix, random_ids):
    backbone = tiny_backbone("longt5-local")
    assert tuple(backbone.geometry) == ("decoder", "cross")
    prefix, prompt = random_prefix(backbone, 4), random_ids(9)
    (found,) = generate_ids(backbone, [prompt], [prefix], config=GREEDY)
    assert found == greedy_by_recomputation(backbone, prompt, prefix, NEW)


@pytest.mark.parametrize("name", ["longt5-local", "longt5-global", "pegasus_x", "bigbird_pegasus"])
def test_layers_that_attend_by_themselves_go_on_as_before_or_the_model_is_refused(
    name, tiny_backbone, tiny_models, random_ids, assert_same
):
    """Their masks must not change with the attention function of the other layers."""
    try:
        backbone = tiny_backbone(name)
    except BackboneError:
        return
    ids, mask, _ = pad_rows([random_ids(9, 1), random_ids(5, 2)], "right", backbone.pad_id)
    given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.tensor([random_ids(6)] * 2)}
    with torch.no_grad():
        assert_same(backbone.forward(**given).logits, tiny_models(name)(**given).logits)


@pytest.mark.parametrize("sites", ["decodr", "encoder,encoder=3", "encoder=0", "encoder=x", "encoder=", "encoder=3=4"])
def test_sites_that_mean_nothing(sites):
    with pytest.raises(ConfigError, match="sites"):
        TrainConfig(sites=sites)


def test_what_the_decoder_reads_must_come_with_an_encoder_decoder_only(tiny_backbone, random_ids):
    ids = torch.tensor([random_ids(5)])
    for name, more in (("gpt2", {"decoder_input_ids": ids}), ("bart", {}), ("bert", {"decoder_input_ids": ids})):
        with pytest.raises(ConfigError, match="decoder_input_ids"):
            tiny_backbone(name).forward(ids, **more)


def test_what_is_longer_than_the_position_table(tiny_backbone):
    """A source is cut and counted, or refused; a target is refused; a request is refused before any work."""
    backbone, limit, plain = tiny_backbone("bart"), 160, TextFormat("{source}", "{target}")
    assert backbone.max_positions == limit
    long, fits = Example("s" * 170, ("t",)), Example("s" * limit, ("t" * (limit - 1),))
    # A prefix takes none of the positions, and source and target have all of them each.
    assert encode_examples(backbone, [fits], plain, prefix_length=50, on_too_long="error").num_truncated == 0
    encoding = encode_examples(backbone, [fits, long], plain, prefix_length=50)
    assert encoding.num_truncated == 1
    assert [len(example.prompt) for example in encoding.examples] == [limit, limit]
    with pytest.raises(DataError):
        encode_examples(backbone, [long], plain, prefix_length=0, on_too_long="error")
    with pytest.raises(DataError):
        encode_examples(backbone, [Example("s", ("t" * limit,))], plain, prefix_length=0)
    with pytest.raises(RequestError):
        generate(backbone, ["s" * 161], max_new_tokens=5)
    with pytest.raises(RequestError):
        generate(backbone, ["s"], max_new_tokens=limit + 1)
    # The last token takes no position, and the start token one.
    assert generate(backbone, ["s" * limit], max_new_tokens=limit)


def test_a_cut_source_keeps_the_closing_token(tiny_models, enclosing_tokenizer):
    backbone = Backbone.from_model(tiny_models("t5"), enclosing_tokenizer, "tiny")
    assert backbone.max_positions is None
    plain = TextFormat("{source}", "{target}")
    (example,) = encode_examples(backbone, [Example("abcdef", ("x",))], plain, prefix_length=4, max_length=5).examples
    begin, end = enclosing_tokenizer.bos_token_id, backbone.eos_id
    assert example.prompt == (begin, *backbone.encode("abc"), end)
