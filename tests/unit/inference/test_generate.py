"""Where an output ends, in each way of generating; the model's own settings; the words around a target."""

import sys

import pytest
import torch

from patching import replace_everywhere
from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import TorchEngine
from prefixtune.engine.request import Request, SamplingParams, SequenceOutput, Token
from prefixtune.errors import BackboneError, ConfigError, RequestError
from prefixtune.inference.beams import search
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate, generate_ids, stream, write
from prefixtune.inference.prompts import Prompt, prepare_prompts
from prefixtune.prefix.prefix import Prefix


def test_all_ways_end_there(tiny_backbone, random_ids):
    backbone, config = tiny_backbone("llama"), GenerateConfig(max_new_tokens=12)
    prompts = [random_ids(count, seed=count) for count in (4, 6, 5)]
    free = generate_ids(backbone, prompts, [None] * 3, config=config)
    ends = [(free[0][len(free[0]) // 2],), (), (free[2][-1], free[2][len(free[2]) // 3])]
    expected = [
        row[: next((index for index, token in enumerate(row) if token in own), len(row))]
        for row, own in zip(free, ends, strict=True)
    ]
    assert [len(row) for row in expected] != [len(row) for row in free]
    # In one call, each text has its own.
    assert generate_ids(backbone, prompts, [None] * 3, config=config, ends=ends) == expected
    for prompt, own, ids in zip(prompts, ends, expected, strict=True):
        pieces = [output.text for _, output in write(backbone, [Prompt(prompt, None, 12, own)], config)]
        assert "".join(pieces) == backbone.decode(ids).strip()
        engine = TorchEngine(backbone, EngineConfig(num_slots=2))
        request = Request(tuple(prompt), sampling=SamplingParams(max_new_tokens=12, end_ids=own))
        ((output,),) = engine.run([request])
        assert [token.id for token in output.tokens] == ids


def test_a_special_token_may_be_a_stop_string(tiny_backbone):
    backbone = tiny_backbone("llama")
    bos = backbone.tokenizer.bos_token_id
    config = GenerateConfig(stop=["b", "<s>", "<x>"])
    assert [one.ends for one in prepare_prompts(backbone, ["x"], [None], config)] == [(bos,)]
    assert [one.ends for one in prepare_prompts(backbone, ["x"], [None], GenerateConfig())] == [()]


def test_a_conversation_without_a_template_anywhere(tiny_backbone):
    backbone, one = tiny_backbone("llama"), [{"role": "user", "content": "Hi"}]
    assert generate(backbone, [one], max_new_tokens=4) == generate(backbone, ["Hi"], max_new_tokens=4)
    chat = [*one, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Go on"}]
    with pytest.raises(RequestError, match="no chat template and reads one text"):
        generate(backbone, [chat])


def test_the_models_own_generation_settings_do_not_leak(tiny_models, tiny_tokenizer, tiny_backbone):
    model = tiny_models("llama")
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.no_repeat_ngram_size = 2
    poisoned = Backbone.from_model(model, tiny_tokenizer, "poisoned")
    plain = tiny_backbone("llama")
    texts = ["some text", "more"]
    assert generate(poisoned, texts, max_new_tokens=12) == generate(plain, texts, max_new_tokens=12)


def test_a_tiny_temperature_takes_the_likeliest_tokens(tiny_backbone):
    backbone = tiny_backbone("llama")
    greedy = generate(backbone, ["some text"], max_new_tokens=8)
    assert generate(backbone, ["some text"], max_new_tokens=8, temperature=1e-39, seed=1) == greedy


def test_words_around_the_target_are_taken_off(tiny_backbone, random_prefix, monkeypatch):
    backbone = tiny_backbone("llama")
    header = {"text_format": {"prompt": "{source}{separator}", "target": "Answer: {target} ."}}
    prefix = Prefix(random_prefix(backbone, 3).layers, header).detach()
    text = "Answer: yes ."
    written = SequenceOutput("0", 0, tuple(map(Token, backbone.encode(text))), text, "stop")
    replace_everywhere(monkeypatch, write, lambda *_, **__: iter([(0, written)]))
    assert generate(backbone, ["x"], prefix) == ["yes"]
    assert "".join(stream(backbone, "x", prefix)) == "yes"


@pytest.mark.parametrize(
    ("device", "batch_size", "texts", "num_slots"),
    [("cpu", 0, 500, 16), ("cuda", 0, 500, 128), ("cuda", 0, 7, 7), ("cpu", 40, 500, 40), ("cuda", 40, 500, 40)],
)
def test_a_gpu_computes_more_texts_at_once(device, batch_size, texts, num_slots, tiny_backbone, monkeypatch):
    asked = []

    def engine(backbone, **options):
        asked.append(options)
        raise BackboneError("none", hint="none")

    monkeypatch.setattr(sys.modules["prefixtune.inference.generate"], "TorchEngine", engine)
    replace_everywhere(monkeypatch, search, lambda *_: iter(()))
    backbone = tiny_backbone("llama")
    monkeypatch.setattr(Backbone, "device", torch.device(device))
    config = GenerateConfig(batch_size=batch_size)
    assert not list(write(backbone, [Prompt([1, 2], None, 3)] * texts, config))
    assert [(one["num_slots"], one["prefill_tokens"] > 0) for one in asked] == [(num_slots, device == "cpu")]
    with pytest.raises(ConfigError):
        GenerateConfig(batch_size=-1)
