"""Marian models whose decoder has SSRU cells: the cell by hand, cached decoding, folders, and where a prefix stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.ssru import SSRU, has_ssru, make_with_ssru, save_with_ssru
from prefixtune.errors import BackboneError
from prefixtune.inference.generate import generate
from prefixtune.training.config import TrainConfig
from prefixtune.training.train import train


def tiny(tokenizer: Any, seed: int = 0) -> Any:
    from transformers import MarianConfig

    config = MarianConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        forced_eos_token_id=None,
        dropout=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make_with_ssru(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def folder(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ssru") / "model"
    path.mkdir()
    save_with_ssru(tiny(tiny_tokenizer), path)
    tiny_tokenizer.save_pretrained(path)
    return path


def test_the_cell_computes_its_recurrence() -> None:
    torch.manual_seed(0)
    cell, x = SSRU(5, 0), torch.randn(2, 7, 5)
    outputs, _ = cell(x)
    for row in range(2):
        state = torch.zeros(5, dtype=torch.float64)
        for step in range(7):
            at = x[row, step].double()
            forget = 1 / (1 + torch.exp(-(cell.forget.weight.double() @ at + cell.forget.bias.double())))
            state = forget * state + (1 - forget) * (cell.input.weight.double() @ at)
            assert torch.allclose(outputs[row, step].double(), state.clamp(min=0), atol=1e-6)


def test_a_folder_loads_as_the_model_that_it_was_saved_from(folder: Path, tiny_tokenizer: Any) -> None:
    backbone, model = load_backbone(folder), tiny(tiny_tokenizer)
    assert has_ssru(backbone.model.config)
    ids, decoded = torch.tensor([[5, 9, 11]]), torch.tensor([[model.config.pad_token_id, 4, 8]])
    with torch.no_grad():
        first, second = (
            one(input_ids=ids, decoder_input_ids=decoded, use_cache=False).logits for one in (model, backbone.model)
        )
    assert torch.allclose(first, second, atol=1e-6)
    # Where attention is, and nowhere else.
    assert {site: len(layers) for site, layers in backbone.geometry.items()} == {"encoder": 2, "cross": 2}
    assert load_backbone(folder, dtype="bfloat16").dtype is torch.bfloat16


@pytest.mark.parametrize("beams", [1, 3])
def test_decoding_with_the_cache_is_decoding_without_it(folder: Path, beams: int) -> None:
    model = load_backbone(folder).model
    ids, mask = torch.tensor([[5, 9, 11, 30], [7, 8, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    shared: dict[str, Any] = {"max_new_tokens": 12, "num_beams": beams, "do_sample": False, "min_new_tokens": 12}
    cached, whole = (
        model.generate(input_ids=ids, attention_mask=mask, use_cache=use_cache, **shared) for use_cache in (True, False)
    )
    assert torch.equal(cached, whole)


@pytest.mark.parametrize("sites", ["", "encoder", "cross"])
def test_a_prefix_trains_at_each_site_and_is_used(folder: Path, sites: str, tmp_path: Path) -> None:
    config = TrainConfig(
        backbone=str(folder), task="toy", train="train", sites=sites, prefix_length=3, max_steps=3, batch_size=4,
        warmup_steps=0, eval_every=0, limit=8, dtype="float32", initialization="random", output=str(tmp_path),
    )  # fmt: skip
    backbone = load_backbone(folder)
    result = train(config, backbone=backbone, progress=False)
    assert result.prefix is not None
    assert set(result.prefix.sites) == ({sites} if sites else {"encoder", "cross"})
    assert len(generate(backbone, ["train : Fox"] * 2, [result.prefix, None], max_new_tokens=8)) == 2


def test_weights_that_are_missing_are_named(folder: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.decoder.layers.0.self_attn.forget.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(BackboneError, match=r"exactly the weights.*layers\.0\.self_attn\.forget\.bias"):
        load_backbone(tmp_path)


def test_a_model_in_memory_is_the_same_backbone(folder: Path, tiny_tokenizer: Any) -> None:
    there, here = load_backbone(folder), Backbone.from_model(tiny(tiny_tokenizer), tiny_tokenizer, "tiny")
    assert there.fingerprint == here.fingerprint
