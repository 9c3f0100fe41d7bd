"""The whole tour on a tiny random model: train, store, load, generate, mix, evaluate."""

import torch

import prefixtune as pt
from prefixtune.inference.config import GenerateConfig

EXAMPLES = [pt.Example(f"n : {letter}", (f"{letter}{letter} it is.",)) for letter in "abcdefgh"]


def test_the_whole_tour(tiny_backbone, tmp_path):
    backbone = tiny_backbone("llama")
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    config = pt.TrainConfig(
        prefix_length=6, init_text="tell", max_steps=60, batch_size=8, learning_rate=0.05, output=str(tmp_path / "run")
    )
    result = pt.train(config, backbone=backbone, examples=EXAMPLES, dev_examples=EXAMPLES)

    # It learned, through the prefix alone.
    steps = [event for event in result.events if event["event"] == "step"]
    assert len(steps) == 60
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.model.state_dict().items())

    # What is stored is the prefix alone: 3 layers x 2 KV heads x 6 positions x (8 + 8).
    assert result.prefix.num_parameters == 3 * 2 * 6 * 16
    prefix = pt.load_prefix(result.path, backbone)
    assert prefix.equal(result.prefix)
    assert prefix.header["backbone"]["fingerprint"] == backbone.fingerprint

    # It generates, alone and mixed with other prefixes in one batch.
    texts = [example.source for example in EXAMPLES[:3]]
    short = pt.Prefix({"decoder": prefix[:2].layers["decoder"]}, prefix.header)
    mixed = pt.generate(backbone, texts, [prefix, None, short], max_new_tokens=8)
    alone = [
        pt.generate(backbone, [t], p, max_new_tokens=8)[0] for t, p in zip(texts, [prefix, None, short], strict=True)
    ]
    assert mixed == alone
    bare = pt.generate(backbone, texts, max_new_tokens=8)
    assert pt.generate(backbone, texts, prefix, max_new_tokens=8) != bare

    # And it is measured, on the outputs that it generates.
    outcome = pt.evaluate(backbone, EXAMPLES[:3], prefix, config=GenerateConfig(max_new_tokens=8))
    assert list(outcome.outputs) == pt.generate(backbone, texts, prefix, max_new_tokens=8)
    assert 0 <= outcome.scores["bleu"].score <= 100
