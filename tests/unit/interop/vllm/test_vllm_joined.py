"""Several prefixes in one request: joined by the worker, under one reference, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_vllm import FakeVLLM, call, save
from prefixtune.backbone.load import load_backbone
from prefixtune.errors import CheckpointError
from prefixtune.interop.vllm import worker_cache
from prefixtune.interop.vllm.folder import PrefixFolder
from prefixtune.interop.vllm.reference import PrefixReference
from prefixtune.interop.vllm.worker_cache import WorkerCache
from prefixtune.prefix.prefix import read_artifact

Make = Callable[..., Any]

LENGTHS = {"manual": 5, "user-42": 3, "style": 4}
COMPLETIONS = "/v1/completions"


def rotation_of(backbone: Any) -> dict[str, Any]:
    """The header's rotation of a LLaMA."""
    shapes = backbone.geometry["decoder"]
    half = shapes[0].key_dim // 2
    frequencies = [10_000.0 ** (-pair / half) for pair in range(half)]
    turns = {"first": list(range(half)), "second": list(range(half, 2 * half)), "frequencies": frequencies}
    return {"positions": "rotary", "turns": [turns], "layers": {"decoder": [0] * len(shapes)}}


@pytest.fixture
def parts(folder: PrefixFolder, model_folder: Path, random_prefix: Make) -> PrefixFolder:
    """A folder with three prefixes that can be joined, and two older ones without a rotation."""
    backbone = load_backbone(model_folder, dtype="float32", device="cpu")
    rotation = rotation_of(backbone)
    for seed, (name, length) in enumerate({**LENGTHS, "old": 2, "older": 2}.items()):
        path = folder.settings.prefixes / f"{name}.safetensors"
        save(backbone, random_prefix(backbone, length, seed=seed), path, rotation=None if length == 2 else rotation)
    return folder


@pytest.fixture
def joined_app(app: FakeVLLM, parts: PrefixFolder) -> FakeVLLM:
    app.reply = {"model": "base", "choices": [{}], "usage": {"prompt_tokens": 100, "total_tokens": 100}}
    return app


@pytest.mark.parametrize(
    "names",
    [
        {"model": "manual+user-42+style"},
        {"prefixes": ["manual", "user-42", "style"]},
        {"model": "base", "prefixes": ["manual", "user-42", "style"]},
        {"model": "manual+user-42+style", "prefixes": ["manual", "user-42", "style"]},
    ],
)
def test_a_request_names_several(joined_app: FakeVLLM, parts: PrefixFolder, names: dict[str, Any]):
    status, response = call(joined_app, COMPLETIONS, {"prompt": "name", "temperature": 0, **names})
    assert status == 200
    (body,) = joined_app.bodies
    assert body["model"] == "base"
    assert "prefixes" not in body
    assert body["prompt"][12:] == joined_app.encode("name")
    assert len(set(body["prompt"][:12])) == 1
    reference = PrefixReference.from_kv_transfer_params(body["kv_transfer_params"], b"drawn")
    assert reference is not None
    assert reference.is_proven
    assert [(part.name, part.length) for part in reference.parts] == list(LENGTHS.items())
    assert reference.length == 12
    assert response["model"] == "manual+user-42+style"
    assert response["usage"]["prompt_tokens"] == 100 - 12


def test_another_order_never_shares_cached_blocks(joined_app: FakeVLLM):
    for model in ("manual+style", "style+manual", "manual+user-42+style", "manual"):
        call(joined_app, COMPLETIONS, {"model": model, "prompt": "a"})
    assert len({body["cache_salt"] for body in joined_app.bodies}) == 4


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "manual+nobody"}, 404, "model"),
        ({"prefixes": ["nobody"]}, 404, "prefixes"),
        ({"model": "manual+manual"}, 400, "model"),
        ({"model": "manual+base"}, 400, "model"),
        ({"model": "+".join(["manual"] * 9)}, 400, "model"),
        ({"prefixes": []}, 400, "prefixes"),
        ({"prefixes": ["manual", 3]}, 400, "prefixes"),
        ({"model": "style", "prefixes": ["manual"]}, 400, "model"),
        ({"prefixes": ["old", "older"]}, 400, "prefixes"),
    ],
)
def test_what_is_not_joined(joined_app: FakeVLLM, fields: dict[str, Any], status: int, param: str):
    got, response = call(joined_app, COMPLETIONS, {"prompt": "a", **fields})
    assert (got, response["error"]["param"]) == (status, param)
    assert not joined_app.bodies


def test_limits(joined_app: FakeVLLM):
    body = {"model": "manual+style", "prompt": "a"}
    joined_app.options.update(max_joined_prefixes=1)
    assert call(joined_app, COMPLETIONS, body)[0] == 400
    joined_app.options.update(max_joined_prefixes=2)
    for most, status in ((9, 400), (10, 200)):
        joined_app.state.vllm_config.model_config.max_model_len = most
        assert call(joined_app, COMPLETIONS, body)[0] == status


def test_other_models_may_have_any_name(joined_app: FakeVLLM):
    """An adapter of vLLM's own, say."""
    call(joined_app, COMPLETIONS, {"model": "adapter+two", "prompt": "a"})
    assert joined_app.bodies == [{"model": "adapter+two", "prompt": "a"}]


def turn_by_hand(key: Tensor, offset: int) -> Tensor:
    """LLaMA's keys (H, P, D) some positions further on, as complex numbers in float64."""
    half = key.shape[-1] // 2
    angle = offset * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    numbers = torch.complex(key[..., :half].double(), key[..., half:].double()) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat([numbers.real, numbers.imag], dim=-1).float()


def joined_reference(folder: PrefixFolder, *names: str) -> PrefixReference:
    found = [folder.find(name) for name in names]
    return folder.join([prefix for prefix in found if prefix is not None]).reference


def test_a_worker_joins_with_keys_turned_on(parts: PrefixFolder):
    heads = slice(1, 2)
    cache = WorkerCache(parts.settings, parts.geometry["decoder"], heads, torch.device("cpu"), torch.float32)
    names = ("style", "manual", "user-42")
    got = cache.get(joined_reference(parts, *names))
    stored = [read_artifact(parts.settings.prefixes / f"{name}.safetensors").layers["decoder"] for name in names]
    for index, (key, value) in enumerate(got):
        offset, keys = 0, []
        for name, layers in zip(names, stored, strict=True):
            keys.append(turn_by_hand(layers[index][0][heads], offset))
            offset += LENGTHS[name]
        torch.testing.assert_close(key, torch.cat(keys, dim=1).transpose(0, 1), rtol=1e-5, atol=1e-5)
        assert torch.equal(value, torch.cat([layers[index][1][heads] for layers in stored], dim=1).transpose(0, 1))


def test_joined_prefixes_are_kept_and_made_anew_when_a_part_changes(
    parts: PrefixFolder, model_folder: Path, random_prefix: Make, monkeypatch: pytest.MonkeyPatch
):
    reads: list[Path] = []

    def read(path: Path) -> Any:
        reads.append(path)
        return read_artifact(path)

    monkeypatch.setattr(worker_cache, "read_artifact", read)
    cache = WorkerCache(parts.settings, parts.geometry["decoder"], slice(0, 2), torch.device("cpu"), torch.float32)
    first = joined_reference(parts, "manual", "style")
    before = cache.get(first)
    assert cache.get(joined_reference(parts, "manual", "style")) is before
    assert len(reads) == 2
    backbone = load_backbone(model_folder, dtype="float32", device="cpu")
    path = parts.settings.prefixes / "style.safetensors"
    save(backbone, random_prefix(backbone, 4, seed=9), path, rotation=rotation_of(backbone))
    after = cache.get(joined_reference(parts, "manual", "style"))
    assert len(reads) == 4
    assert not torch.equal(before[0][0], after[0][0])
    with pytest.raises(CheckpointError, match="the file of 'style' was replaced"):
        WorkerCache(parts.settings, cache.shapes, cache.heads, cache.device, cache.dtype).get(first)


def test_a_chat_over_joined_prefixes(joined_app: FakeVLLM):
    call(
        joined_app,
        "/v1/chat/completions",
        {"prefixes": ["manual", "style"], "messages": [{"role": "user", "content": "a"}]},
    )
    (body,) = joined_app.bodies
    placeholders = next(text for text in body["chat_template_kwargs"].values())
    assert len(joined_app.encode(placeholders)) == 9
    assert "prefixes" not in json.dumps(body["messages"])
