"""The artifact of a run can be stored: known before the first step."""

import pytest

import prefixtune as pt
from prefixtune.backbone.prefixes import PrefixValidator
from prefixtune.errors import CheckpointError
from prefixtune.inference.classify import classify


def test_what_is_too_long_to_be_stored_is_refused_before_the_first_step(backbone, tmp_path, monkeypatch):
    """The state has room for the configuration; the artifact's header has the labels, too."""
    monkeypatch.setattr("prefixtune.prefix.header.HEADER_BYTES", 30_000)
    examples = [pt.Example(f"n : {n}", (f"label {n} " + "a" * 90,), {"label": f"{n}"}) for n in range(300)]
    config = pt.TrainConfig(
        task="classification", classifier="words", prefix_length=2, init_text="ab", output=str(tmp_path / "run")
    )
    events = []
    with pytest.raises(CheckpointError, match=r"the header cannot be stored: it takes .* bytes"):
        pt.train(config, backbone=backbone, examples=examples, on_event=events.append)
    assert events == []


def test_a_head_reads_what_a_model_projects_its_last_hidden_states_to(tiny_backbone, tmp_path):
    """As OPT-350M does."""
    narrow = tiny_backbone("opt", word_embed_proj_dim=16, do_layer_norm_before=False)
    assert (narrow.hidden_size, narrow.head_size) == (32, 16)
    examples = [pt.Example(f"n : {n}", (("odd", "even")[n % 2],)) for n in range(4)]
    config = pt.TrainConfig(
        task="classification", classifier="head", prefix_length=2, init_text="ab", max_steps=1, output=str(tmp_path)
    )
    prefix = pt.train(config, backbone=narrow, examples=examples).prefix
    file, served = tmp_path / "prefix.safetensors", PrefixValidator(narrow, 10**6)
    served.read_header(file)
    sources = [example.source for example in examples]
    assert classify(narrow, sources, served.load(file, "mine")) == classify(narrow, sources, prefix)
