"""What no export accepts: a reason is given, and nothing is written."""

import dataclasses

import pytest
import torch

from prefixtune.backbone.prefixes import make_header
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.interop.export import check_exportable
from prefixtune.interop.llama_cpp.export import export_llama_cpp
from prefixtune.prefix.prefix import Head, Prefix

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 64,
}

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bart", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
        ("deepseek_v3", {}),
        ("llama4_text", {}),
        ("mistral", {"sliding_window": 63, "max_position_embeddings": 64}),
        ("phi3", {"rope_parameters": LONGROPE}),
        ("llama", {"rope_parameters": DYNAMIC}),
    ],
)
def test_backbones_that_no_runtime_can_use(name, changes, tiny_backbone, random_prefix):
    backbone = tiny_backbone(name, **changes)
    with pytest.raises(BackboneError, match="ONNX"):
        check_exportable(random_prefix(backbone, 3), backbone, "ONNX")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": 64, "max_position_embeddings": 64}),
        ("qwen2", {"sliding_window": 5, "use_sliding_window": False}),
    ],
)
def test_backbones_that_see_the_whole_text(name, changes, tiny_backbone, random_prefix):
    backbone = tiny_backbone(name, **changes)
    check_exportable(random_prefix(backbone, 3), backbone, "llama.cpp")


def test_prefixes_that_no_runtime_gets(tiny_backbone, random_prefix, tmp_path):
    backbone = tiny_backbone("llama")
    good = random_prefix(backbone, 3).detach()
    empty = Prefix({"decoder": tuple((key[:, :0], value[:, :0]) for key, value in good.layers["decoder"])})
    infinite = Prefix({"decoder": tuple((key / 0, value) for key, value in good.layers["decoder"])})
    cases = [
        (dataclasses.replace(good, head=Head(torch.zeros(2, 32), torch.zeros(2))), "a head for labels"),
        (empty, "P = 0"),
        (infinite, "NaN or infinity"),
    ]
    for prefix, message in cases:
        with pytest.raises(ConfigError, match=message):
            export_llama_cpp(prefix, backbone, tmp_path / "out")
    with pytest.raises(BackboneError, match="the prefix has"):
        export_llama_cpp(random_prefix(tiny_backbone("qwen3"), 3), backbone, tmp_path / "out")
    other = make_header(dataclasses.replace(backbone, fingerprint=tiny_backbone("mistral").fingerprint))
    with pytest.raises(BackboneError):
        export_llama_cpp(Prefix(good.layers, other), backbone, tmp_path / "out")
    with pytest.raises(ConfigError):
        export_llama_cpp(good, backbone, tmp_path / "out", name="../out")
    assert not (tmp_path / "out").exists()
