"""Decoding options: what is refused, and what the model's own settings may not change."""

from patching import replace_everywhere
from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.request import SequenceOutput, Token
from prefixtune.inference.generate import generate, stream, write
from prefixtune.prefix.prefix import Prefix


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
