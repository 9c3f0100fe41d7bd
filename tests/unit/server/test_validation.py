"""What a prefix file is checked by before it is served."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefixtune.backbone.prefixes import make_header
from prefixtune.errors import CheckpointError, RequestError
from prefixtune.prefix.artifact import save_prefix
from prefixtune.prefix.prefix import Head, Prefix
from prefixtune.server.models.store import PrefixStore


def test_prefixes_that_cannot_be_served_are_refused_with_the_reason(
    tmp_path: Path, save: Any, llama: Any, random_prefix: Any, tiny_backbone: Any
):
    save("good")
    save("lora", adapter="adapter")
    save("labels", labels={"kind": "classification", "by": "words", "names": ["a"], "words": ["b"]})
    save("infix", placement="infix")
    made = random_prefix(llama, 2)
    head = Head(torch.zeros(2, llama.hidden_size), torch.zeros(2))
    save_prefix(tmp_path / "head.safetensors", Prefix(made.layers, make_header(llama), head))
    other = tiny_backbone("gpt2")
    save_prefix(tmp_path / "shapes.safetensors", Prefix(random_prefix(other, 2).layers, make_header(other)))
    sister = tiny_backbone("llama", seed=1)
    save_prefix(tmp_path / "sister.safetensors", Prefix(made.layers, make_header(sister)))
    store = PrefixStore(tmp_path, llama)
    assert store.names() == ["good"]
    reported = {
        "lora": "LoRA",
        "labels": "words do not match",
        "head": "a head, but no labels",
        "infix": "placement",
        "shapes": "shapes",
        "sister": "other weights",
    }
    assert store.refused.keys() == reported.keys()
    for name, word in reported.items():
        assert word in store.refused[name]
        with pytest.raises(CheckpointError, match=word):
            store.get(name)
    allowed = PrefixStore(tmp_path, llama, allow_other_backbone=True)
    assert allowed.names() == ["good", "sister"]
    allowed.get("sister")


def hostile(path: Path, header: bytes, body: bytes = b"", length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + body)


def tensors(shape: object, dtype: str = "F32", offsets: object = (0, 0), metadata: object = None) -> bytes:
    facts: dict[str, object] = {"decoder.0.key": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
    facts["__metadata__"] = {"prefixtune": "{}"} if metadata is None else metadata
    return json.dumps(facts).encode()


@pytest.mark.parametrize(
    ("header", "body", "length"),
    [
        (b"", b"", None),
        (b"{}", b"", 2**63),
        (b"{}", b"", 100),
        (b"not JSON", b"", None),
        (b"[]", b"", None),
        (b"[" * 100_000, b"", None),
        (b'{"__metadata__": {}}', b"", None),
        (tensors([2, 3, 8], metadata={"prefixtune": "[]"}), b"", None),
        (tensors([2, 3, 8], metadata={"prefixtune": '{"a": NaN}'}), bytes(192), None),
        (tensors([2, 3, 8], metadata={"prefixtune": 5}), b"", None),
        (tensors([2, 3, 8], metadata=[]), b"", None),
        (tensors([2, 3, 8]), bytes(100), None),
        (tensors([10**9, 10**9, 10**9]), b"", None),
        (tensors([-1, -1, 8]), bytes(32), None),
        (tensors([float("inf"), 1, 1]), b"", None),
        (tensors("abc"), b"", None),
        (tensors([2, 3, 8], dtype="I64"), bytes(384), None),
        (tensors([2, 3, 8], offsets=[0, 192]), bytes(192), None),
    ],
)
def test_hostile_files_are_refused_and_reported(
    header: bytes, body: bytes, length: int | None, tmp_path: Path, save: Any, llama: Any
):
    save("good")
    hostile(tmp_path / "bad.safetensors", header, body, length)
    store = PrefixStore(tmp_path, llama)
    assert store.names() == ["good"]
    assert store.refused["bad"]
    assert str(tmp_path) not in store.refused["bad"]
    with pytest.raises(CheckpointError) as error:
        store.get("bad")
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(CheckpointError):
        store.put("new", tmp_path / "bad.safetensors")
    store.get("good")


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damaged_files_are_never_served(data: st.DataObject, tmp_path: Path, save: Any, llama: Any):
    path = save("p", length=1)
    whole = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    if data.draw(st.booleans()):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    else:
        place = data.draw(st.integers(0, start - 1))
        whole[place] = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
        path.write_bytes(whole)
    store = PrefixStore(tmp_path, llama)
    try:
        prefix = store.get("p")
    except (CheckpointError, RequestError):
        return
    # A changed letter within the header's words may pass; shapes and numbers are right all the same.
    assert prefix.geometry == {"decoder": llama.geometry["decoder"]}
    assert prefix.is_finite()


def test_what_only_a_whole_check_finds_is_refused_at_the_first_request(tmp_path: Path, save: Any, llama: Any):
    path = save("p")
    whole = bytearray(path.read_bytes())
    whole[-4:] = struct.pack("<f", float("nan"))
    path.write_bytes(whole)
    store = PrefixStore(tmp_path, llama)
    assert store.names() == ["p"]
    with pytest.raises(CheckpointError, match="damaged") as error:
        store.get("p")
    assert str(tmp_path) not in str(error.value)
    assert "prefixtune-" not in str(error.value)
    assert (store.names(), list(store.refused)) == ([], ["p"])
    store.reload()
    assert list(store.refused) == ["p"]
    save("p", 3)
    store.get("p")
    assert (store.names(), store.refused) == (["p"], {})


def test_numbers_that_the_backbones_dtype_cannot_hold(tmp_path: Path, tiny_models: Any, tiny_tokenizer: Any):
    from prefixtune.backbone.backbone import Backbone

    half = Backbone.from_model(tiny_models("llama").half(), tiny_tokenizer, "half")
    layers = tuple((torch.full((2, 1, 8), 1e6), torch.zeros(2, 1, 8)) for _ in range(3))
    save_prefix(tmp_path / "p.safetensors", Prefix({"decoder": layers}))
    with pytest.raises(CheckpointError, match="float16"):
        PrefixStore(tmp_path, half).get("p")
