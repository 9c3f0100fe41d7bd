"""Sequence-state files of llama.cpp: their bytes."""

import struct

import pytest
import torch

from prefixtune.engine.llama_state import encode_file, placeholders_for, rows_of
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.interop.llama_cpp.export import export_llama_cpp

ROWS = [(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([[0.5, -1.0], [2.0, -2.0], [4.0, -4.0]]))]
"""One layer, three positions, one head of size two."""

TOKENS = [7, 8, 9]

CELLS = struct.pack("<II iIi iIi iIi", 1, 3, 0, 1, 0, 1, 1, 0, 2, 1, 0)


def test_a_file_spelled_out():
    written = encode_file(ROWS, TOKENS, version=4, kv_type="f32")
    expected = struct.pack("<III3i", 0x67677371, 4, 3, 7, 8, 9) + CELLS + struct.pack("<IIII", 0, 1, 0, 0)
    expected += struct.pack("<iQ6f", 0, 8, 1, 2, 3, 4, 5, 6) + struct.pack("<iQ6f", 0, 8, 0.5, -1, 2, -2, 4, -4)
    assert written == expected


@pytest.mark.parametrize("version", [2, 3])
def test_earlier_versions_say_nothing_of_rotation_and_values_may_be_transposed(version):
    written = encode_file(ROWS, TOKENS, version=version, kv_type="f16", transposed=True)
    expected = struct.pack("<III3i", 0x67677371, version, 3, 7, 8, 9) + CELLS + struct.pack("<II", 1, 1)
    expected += struct.pack("<iQ6e", 1, 4, 1, 2, 3, 4, 5, 6) + struct.pack("<iII6e", 1, 2, 2, 0.5, 2, 4, -1, -2, -4)
    assert written == expected


@pytest.mark.parametrize("options", [{"version": 5}, {"version": 1}, {"kv_type": "q8_0"}])
def test_unknown_layouts_are_refused(options):
    with pytest.raises(ConfigError):
        encode_file(ROWS, TOKENS, **options)


def test_numbers_beyond_half_precision_are_refused():
    large = [(ROWS[0][0] * 1e5, ROWS[0][1])]
    with pytest.raises(ConfigError, match="float16") as caught:
        encode_file(large, TOKENS)
    assert "f32" in caught.value.hint
    assert encode_file(large, TOKENS, kv_type="f32")


def test_keys_of_llama_are_interleaved_and_values_never(tiny_backbone, random_prefix):
    for name, order in (("llama", [0, 4, 1, 5, 2, 6, 3, 7]), ("qwen2", list(range(8)))):
        backbone = tiny_backbone(name)
        prefix = random_prefix(backbone, 3)
        key, value = prefix.layers["decoder"][1]
        rows = rows_of(prefix, backbone)[1]
        for head in (0, 1):
            assert torch.equal(rows[0][:, head * 8 : head * 8 + 8], key[head][:, order])
            assert torch.equal(rows[1][:, head * 8 : head * 8 + 8], value[head])


def test_placeholders_follow_from_the_numbers(tiny_backbone, random_prefix):
    backbone = tiny_backbone("llama")
    prefix = random_prefix(backbone, 40)
    tokens = placeholders_for(prefix, backbone)
    assert len(tokens) == 40
    assert tokens == placeholders_for(random_prefix(backbone, 40), backbone)
    assert tokens != placeholders_for(random_prefix(backbone, 40, seed=1), backbone)
    assert not set(tokens) & set(backbone.tokenizer.all_special_ids)


# --- the folder ------------------------------------------------------------------------------------------------------


def test_model_types_that_were_not_compared_are_refused(tiny_backbone, random_prefix, tmp_path):
    backbone = tiny_backbone("gemma")
    with pytest.raises(BackboneError, match="gemma"):
        export_llama_cpp(random_prefix(backbone, 3), backbone, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_refused(tiny_backbone, random_prefix, tmp_path, monkeypatch):
    backbone = tiny_backbone("llama")
    monkeypatch.setattr("prefixtune.interop.llama_cpp.export.has_adapter", lambda model: True)
    with pytest.raises(BackboneError):
        export_llama_cpp(random_prefix(backbone, 3), backbone, tmp_path / "out")
