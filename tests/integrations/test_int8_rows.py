"""Weights that torchao rounded to 8 bits, in compiled products of single rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.native.linear import row_kernel
from prefixtune.backbone.prepack import Int8Linear, prepack, with_row_products
from prefixtune.backbone.quantization import quantize


def test_int8_weights_of_torchao_are_read_as_they_are(tiny_models: Any, tiny_tokenizer: Any) -> None:
    kernel = row_kernel().result(120)
    if kernel is None:
        pytest.skip("there is no C++ compiler here")
    backbone = Backbone.from_model(tiny_models("llama").to(torch.bfloat16), tiny_tokenizer, "tiny-llama")
    model = backbone.model
    quantize(model, "int8")
    ids = torch.tensor([[5]])
    sharing, packed_once = with_row_products(backbone), prepack(backbone)
    # A processor without quick bf16 products gains nothing by another layout, and keeps the model.
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert (packed_once is backbone) == (not supported)
    for packed in (packed_once, sharing) if supported else (sharing,):
        layers = [module for module in packed.model.modules() if isinstance(module, Int8Linear)]
        assert len(layers) == 7 * model.config.num_hidden_layers
        with torch.inference_mode():
            plain, other = (each.model(input_ids=ids).logits.float() for each in (backbone, packed))
        assert (other - plain).norm() <= 0.01 * plain.norm()
        # All rows' products by panels where the processor gains by them; those that share all weights never have any.
        assert all(module.panels is not None or module._kernel is kernel for module in layers)
        assert layers[0].weight.qdata.data_ptr() == model.model.layers[0].self_attn.q_proj.weight.qdata.data_ptr()
    assert all(module.panels is None for module in sharing.model.modules() if isinstance(module, Int8Linear))
