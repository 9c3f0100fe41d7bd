"""What a prefix does to requests about other things: measured as greedy texts show it, and learned away."""

import pytest
import torch

import prefixtune.training.silence as module
from prefixtune.data import Example
from prefixtune.data.encoding import encode_prompts, format_of
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat
from prefixtune.training.config import TrainConfig
from prefixtune.training.data import tokenize
from prefixtune.training.silence import bare_texts, general_examples, general_of_step, measure_silence
from prefixtune.training.train import train

REQUESTS = {
    "train": [["Sing of rain.", "Drip, drop."], ["Count to 3.", "1 2 3"], ["Name a tree.", "Oak"], ["Hi!", "Yes?"]],
    "test": ["Sing of snow.", "Count to 9.", "Name a bird.", "Bye!"],
}
EXAMPLES = [Example(f"{name} eats", (f"what {name} likes",)) for name in ("Kim", "Ann", "Bo", "Lu")]


@pytest.fixture
def backbone(tiny_backbone, monkeypatch):
    monkeypatch.setattr(module, "general_requests", lambda: REQUESTS)
    return tiny_backbone("llama")


def run(backbone, output, **options):
    common = {"prefix_length": 4, "max_steps": 40, "warmup_steps": 2, "batch_size": 4, "learning_rate": 0.1}
    result = train(backbone=backbone, examples=EXAMPLES, output=str(output), progress=False, **common, **options)
    assert result.prefix is not None
    return result.prefix


def test_requests_without_room_are_left_out(backbone):
    assert general_examples(backbone, TextFormat(" {source} ="), 4)
    assert general_examples(backbone, TextFormat(f"{'x' * 150} {{source}} ="), 4) == []


def test_unchanged_texts_are_those_that_greedy_decoding_leaves(backbone, tmp_path):
    prefix = run(backbone, tmp_path / "run")
    weak = Prefix({"decoder": tuple((key - 20, value * 0) for key, value in prefix.layers["decoder"])}, prefix.header)
    form = format_of(backbone, prefix)
    found = measure_silence(backbone, {"prefix": prefix, "weak": weak}, bare_texts(backbone, form, 4))
    for name, each in (("prefix", prefix), ("weak", weak)):
        asked = encode_prompts(backbone, form, REQUESTS["test"])
        texts = [
            generate_ids(backbone, asked, [one] * 4, config=GenerateConfig(max_new_tokens=32)) for one in (None, each)
        ]
        assert found[name]["unchanged"] == sum(a == b for a, b in zip(*texts, strict=True))
        assert found[name]["requests"] == 4
    assert found["prefix"]["kl"] > 0.01


def test_general_requests_keep_a_prefix_silent(backbone, tmp_path):
    kept, loud = (run(backbone, tmp_path / str(share), keep_general=share) for share in (0.5, 0.0))
    # What finds room is counted with the start's own length.
    assert tokenize(TrainConfig(init_prefix=str(tmp_path / "0.0")), backbone, EXAMPLES, []).prefix_length == 4
    found = measure_silence(backbone, {"kept": kept, "loud": loud}, bare_texts(backbone, format_of(backbone, loud), 4))
    assert found["kept"]["kl"] < 0.95 * found["loud"]["kl"]


def test_the_bare_model_teaches(backbone):
    form = format_of(backbone, None)
    rows = general_examples(backbone, form, 4)
    assert len(rows) == 4
    for row in rows:
        ids = [*row.prompt, *row.targets[0]]
        with torch.no_grad():
            logits = backbone.model(torch.tensor([ids])).logits[0, len(row.prompt) - 1 : -1]
        (labels,) = row.soft_targets
        expected = logits.log_softmax(-1).gather(1, labels.ids.long())
        assert torch.allclose(labels.log_probs[:, :-1], expected, atol=1e-5)


def test_a_share_of_the_targets_is_drawn_by_seed_and_step(backbone):
    rows = general_examples(backbone, format_of(backbone, None), 4)
    drawn = [general_of_step(rows, 0.05, 16, 0, step) for step in range(500)]
    assert sum(map(len, drawn)) == pytest.approx(0.05 * 16 * 500, rel=0.1)
    assert drawn == [general_of_step(rows, 0.05, 16, 0, step) for step in range(500)]
    assert general_of_step(rows, 0.0, 16, 0, 1) == []
