"""A backbone whose matrices are laid out beforehand against the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prepack import PrepackedLinear, prepack
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import Engine
from prefixtune.engine.request import Request, SamplingParams
from zoo import ZOO, make_model

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no quick bf16 products"
)


def made(name: str, tiny_models: Any, tokenizer: Any) -> Backbone:
    model = make_model(ZOO[name].name, tokenizer) if name in ("gpt_oss", "qwen2_moe") else tiny_models(name)
    return Backbone.from_model(model.to(torch.bfloat16), tokenizer, f"tiny-{name}")


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gpt_neox", "qwen3", "opt", "qwen2_moe", "gpt_oss", "bart", "t5", "t5_gated"]
)
def test_logits_are_the_plain_ones(name: str, tiny_models: Any, tiny_tokenizer: Any, random_ids: Any) -> None:
    backbone = made(name, tiny_models, tiny_tokenizer)
    before = {name: parameter.clone() for name, parameter in backbone.model.named_parameters()}
    packed = prepack(backbone)
    linears = [module for module in packed.model.modules() if isinstance(module, PrepackedLinear)]
    assert len(linears) == sum(type(m) in (nn.Linear, Conv1D) for m in backbone.model.modules()) > 0
    assert packed.geometry == backbone.geometry
    inputs = {"input_ids": torch.tensor([random_ids(9), random_ids(9, 1)])}
    if backbone.kind == "encoder-decoder":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.inference_mode():
        plain, other = (each.model(**inputs).logits.float() for each in (backbone, packed))
    # A bf16 has 8 bits; sums in another order may round otherwise.
    assert (other - plain).norm() <= 0.01 * plain.norm()
    # The given one is as it was, and shares all else.
    assert all(torch.equal(before[name], p) for name, p in backbone.model.named_parameters())
    assert packed.model.get_input_embeddings().weight is backbone.model.get_input_embeddings().weight


def test_the_engine_runs_on_it(tiny_models: Any, tiny_tokenizer: Any, random_ids: Any, random_prefix: Any) -> None:
    backbone = made("llama", tiny_models, tiny_tokenizer)
    asked = [
        Request(
            tuple(random_ids(count, count)),
            random_prefix(backbone, 4, count).detach(),
            SamplingParams(max_new_tokens=8, min_new_tokens=8),
        )
        for count in (3, 9, 20)
    ]
    engine = Engine(backbone)
    assert engine.backbone is not backbone
    assert prepack(engine.backbone) is engine.backbone, "once is enough"
    plain = Engine(backbone, EngineConfig(prepack=False))
    assert plain.backbone is backbone
    for one, other in zip(engine.run(asked), plain.run(asked), strict=True):
        assert one[0].finish_reason == other[0].finish_reason == "length"


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_little_memory_keeps_one_copy(
    share: float, tiny_models: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In panels there is one copy anyway.
    monkeypatch.setattr("prefixtune.backbone.prepack.panel_kernel", lambda: None)
    monkeypatch.setattr("prefixtune.backbone.prepack._SHARE_OF_MEMORY", share)
    packed = prepack(made("llama", tiny_models, tiny_tokenizer))
    linears = [module for module in packed.model.modules() if isinstance(module, PrepackedLinear)]
    assert {module._matrix is None for module in linears} == {share == 0.0}


def test_what_cannot_gain_stays_as_it_is(tiny_models: Any, tiny_tokenizer: Any, tiny_backbone: Any) -> None:
    in_float32 = tiny_backbone("llama")
    assert prepack(in_float32) is in_float32
    trained = made("llama", tiny_models, tiny_tokenizer)
    trained.model.lm_head.weight.requires_grad_()
    assert type(prepack(trained).model.lm_head) is nn.Linear


def test_a_model_that_it_does_not_suit_is_left(
    tiny_models: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = made("llama", tiny_models, tiny_tokenizer)
    monkeypatch.setattr(
        PrepackedLinear, "forward", lambda self, given: given.new_ones(*given.shape[:-1], self.out_features)
    )
    assert prepack(backbone) is backbone
