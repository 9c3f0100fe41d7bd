"""The engine with encoder-decoders: what a source, a bias by distance and a forced token ask of it."""

import pytest
import torch

from engine_runs import alone, ids
from patching import replace_everywhere
from prefixtune.attention.forward import run_encoder
from prefixtune.attention.record import relative_bias
from prefixtune.backbone.backbone import Backbone
from prefixtune.data.batching import collate
from prefixtune.data.encoding import TokenizedExample
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import TorchEngine
from prefixtune.engine.request import Request, SamplingParams
from prefixtune.errors import BackboneError, ContextLengthError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from zoo import make_model

NEW = 10


def test_a_long_text_goes_beyond_the_farthest_distance_of_a_bias(made, requests):
    backbone = made("t5")
    farthest = backbone.model.config.relative_attention_max_distance
    new = farthest + 20
    for request in requests(backbone, max_new_tokens=new, min_new_tokens=new)[:1]:
        (output,) = TorchEngine(backbone).run([request])[0]
        assert len(output.tokens) == new
        assert ids(output) == alone(backbone, request, min_new_tokens=new)


def test_the_bias_at_each_distance_is_the_models_own(made):
    backbone = made("t5")
    with torch.no_grad():
        found = relative_bias(backbone.model, backbone.layout, 40)
        own = backbone.model.get_decoder().block[0].layer[0].SelfAttention.compute_bias(40, 40)
    assert sorted(found) == [0, 1, 2]
    for distance in (0, 1, 17, 39):
        for bias in found.values():
            # All that are farther than it goes are alike.
            assert torch.equal(bias[:, min(distance, bias.shape[1] - 1)], own[0, :, 39, 39 - distance])


@pytest.mark.parametrize(("name", "num_slots"), [("bart", 28), ("t5", 2)])
def test_the_encoder_reads_a_request_of_many_texts_once(name, num_slots, made, requests, monkeypatch):
    backbone = made(name)
    # With two slots, texts of a request get theirs one after the other, as the first one is short.
    short = Request((5, 6), sampling=SamplingParams(max_new_tokens=2))
    asked = [short, *requests(backbone, n=3, temperature=1.0, seed=5, min_new_tokens=NEW)]
    lonely = [[ids(output) for output in TorchEngine(backbone).run([request])[0]] for request in asked]
    read = []
    encode = run_encoder

    def watch(model, layout, input_ids, prefix):
        read.append(input_ids.shape[1])
        return encode(model, layout, input_ids, prefix)

    replace_everywhere(monkeypatch, run_encoder, watch)
    found = TorchEngine(backbone, EngineConfig(num_slots=num_slots)).run(asked)
    assert [[ids(output) for output in texts] for texts in found] == lonely
    assert sorted(read) == sorted(len(request.prompt) for request in asked)


def test_a_forced_first_token_comes_first(tiny_backbone, requests):
    backbone = tiny_backbone("mbart")
    backbone.model.generation_config.forced_bos_token_id = 7
    for request in requests(backbone)[:3]:
        (output,) = TorchEngine(backbone).run([request])[0]
        assert ids(output)[0] == 7
        assert ids(output) == alone(backbone, request)


def test_bfloat16_runs(tiny_models, tiny_tokenizer, requests):
    backbone = Backbone.from_model(tiny_models("t5").to(torch.bfloat16), tiny_tokenizer, "tiny-bf16")
    for texts in TorchEngine(backbone).run(requests(backbone)):
        assert texts[0].finish_reason in ("stop", "length")


def test_too_long_a_source_or_text_is_refused(made, random_ids, random_prefix):
    backbone = made("bart", max_position_embeddings=40)
    limit = backbone.max_positions
    engine = TorchEngine(backbone)
    with pytest.raises(ContextLengthError):
        engine.add(Request(tuple(random_ids(limit + 1)), None, SamplingParams(max_new_tokens=5)))
    with pytest.raises(ContextLengthError):
        engine.add(Request((1,), None, SamplingParams(max_new_tokens=limit + 1)))
    # A prefix takes none of the positions.
    prefix = random_prefix(backbone, {"encoder": 4, "decoder": 9, "cross": 5}).detach()
    request = Request(tuple(random_ids(limit)), prefix, SamplingParams(max_new_tokens=limit, min_new_tokens=limit))
    found = ids(engine.run([request])[0][0])
    assert (len(found), found) == (limit, alone(backbone, request, min_new_tokens=limit))


def test_a_source_that_cannot_be_read_fails_its_step_alone(made, requests, monkeypatch):
    backbone = made("bart")
    asked = requests(backbone)
    expected = [alone(backbone, request) for request in asked]
    encode = run_encoder

    def watch(model, layout, input_ids, prefix):
        if input_ids.shape[1] == 30:
            raise MemoryError("no room")
        return encode(model, layout, input_ids, prefix)

    replace_everywhere(monkeypatch, run_encoder, watch)
    found = [texts[0] for texts in TorchEngine(backbone, EngineConfig(num_slots=3)).run(asked)]
    failed = [output for output in found if output.finish_reason == "error"]
    assert found[1] in failed
    assert len(failed) <= 3
    assert all("MemoryError" in output.error for output in failed)
    pairs = zip(found, expected, strict=True)
    assert all(ids(output) == row for output, row in pairs if output not in failed)


def test_what_cannot_write_side_by_side_is_refused(tiny_backbone):
    with pytest.raises(BackboneError, match="is an encoder"):
        TorchEngine(tiny_backbone("bert"))
    # Its decoder works positions out from the row.
    with pytest.raises(BackboneError, match="several texts in one row"):
        TorchEngine(tiny_backbone("m2m_100"))
    # Its experts take so many tokens of a row, and what is beyond passes them by.
    with pytest.raises(BackboneError):
        TorchEngine(tiny_backbone("switch_transformers"))


def test_texts_do_not_compete_for_experts(tiny_tokenizer, random_ids):
    """Switch Transformers' experts take so many tokens of a row, and what is beyond passes them by."""
    model = make_model("switch_transformers", tiny_tokenizer, expert_capacity=12, num_experts=2)
    backbone = Backbone.from_model(model, tiny_tokenizer, "tiny-switch")
    prompts, config = [random_ids(10, seed) for seed in range(12)], GenerateConfig(max_new_tokens=NEW)
    found = generate_ids(backbone, prompts, [None] * 12, config=config)
    assert found == [generate_ids(backbone, [prompt], [None], config=config)[0] for prompt in prompts]
    batch = collate(backbone, [TokenizedExample(tuple(prompt), ((3, 4),)) for prompt in prompts])
    assert (batch.packing, len(batch.input_ids)) == (None, len(prompts))
