"""The artifact and the training state: what is kept, and every refusal."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from file_format import checksum_by_hand
from prefixtune.backbone.prefixes import PrefixValidator, load_prefix, make_header
from prefixtune.errors import BackboneError, CheckpointError, ConfigError, PrefixError
from prefixtune.inference.generate import generate
from prefixtune.prefix.file import is_unread
from prefixtune.prefix.prefix import Head, Prefix, read_outline, save_prefix
from prefixtune.training.checkpoint import load_state, save_state


@pytest.fixture
def prefix(llama, random_prefix):
    made = random_prefix(llama, 4).detach()
    return Prefix(made.layers, make_header(llama, task="toy", license="CC0"))


@pytest.fixture
def path(tmp_path, prefix):
    return save_prefix(tmp_path / "p.safetensors", prefix)


def rewrite(path, tensors=dict, header=dict):
    """Change a file's tensors or header by hand, with a checksum that fits."""
    with safe_open(path, "pt") as handle:
        stored = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        facts = json.loads(handle.metadata()["prefixtune"])
    return write_by_hand(path, tensors(stored), json.dumps(header(facts)))


def write_by_hand(path, tensors, header):
    save_file(tensors, path, {"prefixtune": header, "prefixtune_checksum": checksum_by_hand(tensors, header)})
    return path


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_equal_prefixes_are_equal_files(path, prefix):
    described = Prefix(prefix.layers, {**prefix.header, "description": 'é \x1f\x7f \\ / "\n\u2028 😀'})
    for made in (prefix, described):
        files = {save_prefix(path.parent / f"{number}.safetensors", made).read_bytes() for number in range(12)}
        assert len(files) == 1
        assert load_prefix(path.parent / "0.safetensors").equal(prefix)
    assert load_prefix(path.parent / "0.safetensors").header["description"] == described.header["description"]


def test_more_than_ten_layers_keep_their_order(tmp_path):
    layers = tuple((torch.full((1, 2, 3), float(n)), torch.full((1, 2, 3), -float(n))) for n in range(12))
    prefix = Prefix({"decoder": layers})
    assert load_prefix(save_prefix(tmp_path / "p.safetensors", prefix)).equal(prefix)


def test_a_head_stays_in_float32_in_the_file_and_in_service(path, llama, tmp_path):
    head = Head(torch.randn(3, llama.hidden_size), torch.randn(3))
    labels = {"kind": "classification", "by": "head", "names": ["a", "b", "c"]}
    made = load_prefix(path)
    classifier = Prefix(made.layers, {**made.header, "labels": labels}, head)
    file = save_prefix(tmp_path / "head.safetensors", classifier, dtype=torch.bfloat16)
    half = dataclasses.replace(llama, compute_dtype=torch.bfloat16)
    PrefixValidator(half, 10**6).read_header(file)
    for prefix in (load_prefix(file, llama), PrefixValidator(half, 10**6).load(file, "head")):
        assert prefix.dtype == torch.bfloat16
        assert torch.equal(prefix.head.weight, head.weight)
        assert torch.equal(prefix.head.bias, head.bias)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_other_weights_are_refused_and_may_be_allowed(path, prefix, tiny_backbone, llama):
    other = tiny_backbone("llama", seed=1)
    with pytest.raises(BackboneError) as error:
        load_prefix(path, other)
    # Both sides are named.
    for backbone in (llama, other):
        shape, _, samples = backbone.fingerprint.partition(":")
        assert f"{shape[:8]}:{samples[:8]}" in error.value.message
    assert "allow_other_backbone" in error.value.hint
    allowed = load_prefix(path, other, allow_other_backbone=True)
    assert allowed.equal(prefix)
    # So it is where a prefix is used that was read before.
    with pytest.raises(BackboneError):
        generate(other, ["abc"], load_prefix(path), max_new_tokens=2)
    generate(other, ["abc"], allowed, max_new_tokens=2)
    assert load_prefix(path, llama).equal(prefix)


def test_other_shapes_are_always_refused(path, tiny_backbone):
    for other in (tiny_backbone("qwen3"), tiny_backbone("llama", num_hidden_layers=2)):
        with pytest.raises(BackboneError):
            load_prefix(path, other, allow_other_backbone=True)


def test_numbers_that_are_not_finite_are_refused(path, prefix, tmp_path):
    def poison(tensors):
        tensors["decoder.1.key"][0, 0, 0] = torch.nan
        return tensors

    with pytest.raises(CheckpointError):
        load_prefix(rewrite(path, poison))
    poisoned = prefix.detach()
    poisoned.tensors()[0][0, 0, 0] = torch.inf
    target = tmp_path / "new.safetensors"
    with pytest.raises(CheckpointError):
        save_prefix(target, poisoned)
    assert not target.exists()


def test_a_safetensors_file_of_something_else_is_refused(tmp_path, path):
    other = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, other, {"format": "pt"})
    with pytest.raises(CheckpointError):
        load_prefix(other)
    with pytest.raises(CheckpointError):
        load_state(path)
    save_state(other, {"a": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError):
        load_prefix(other)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "lm_head.weight": torch.zeros(2)},
        lambda t: {**t, "decoder.0.key": torch.zeros(2, 4, 8).to(torch.float8_e4m3fn)},
        lambda t: {**t, "head.weight": torch.zeros(2, 8)},
        lambda t: {k: v for k, v in t.items() if k != "decoder.1.value"},
        lambda t: {**t, "decoder.0.key": t["decoder.0.key"][:, :2].contiguous()},
        lambda _: {},
    ],
)
def test_foreign_or_missing_tensors_are_refused(change, path):
    rewrite(path, change)
    with pytest.raises(CheckpointError) as error:
        load_prefix(path)
    assert repr(str(path)) in error.value.message
    with pytest.raises(CheckpointError):
        read_outline(path)


def test_a_file_without_positions_is_refused(prefix, path):
    empty = Prefix({"decoder": [(key[:, :0], value[:, :0]) for key, value in prefix.layers["decoder"]]}, prefix.header)
    with pytest.raises(CheckpointError):
        load_prefix(save_prefix(path, empty))


@pytest.mark.parametrize("rows", [None, 2])
def test_a_head_has_a_row_for_each_label(rows, prefix, tmp_path):
    labels = {"kind": "classification", "by": "head", "names": ["a", "b", "c"]}
    head = None if rows is None else Head(torch.zeros(rows, 8), torch.zeros(rows))
    with pytest.raises(CheckpointError):
        save_prefix(tmp_path / "p.safetensors", Prefix(prefix.layers, {**prefix.header, "labels": labels}, head))
    assert list(tmp_path.iterdir()) == []


def test_a_read_error_and_a_name_that_none_can_have(path, prefix, monkeypatch):
    with pytest.raises(PrefixError):
        save_prefix(path.parent / "a\0b.safetensors", prefix)
    with pytest.raises(PrefixError):
        load_prefix(path.parent / "a\0b.safetensors")

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("prefixtune.prefix.file.safe_open", fail)
    with pytest.raises(CheckpointError) as error:
        load_prefix(path)
    assert is_unread(error.value)


def test_a_pickle_is_refused_and_never_run(tmp_path):
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (ran,)

    bad = tmp_path / "p.safetensors"
    bad.write_bytes(pickle.dumps(Bomb()))
    for load in (load_prefix, load_state):
        with pytest.raises(CheckpointError):
            load(bad)
    torch.save({"decoder.0.key": torch.zeros(1, 2, 3)}, bad)
    with pytest.raises(CheckpointError):
        load_prefix(bad)
    assert not ran.exists()


def test_paths_are_checked(tmp_path, prefix):
    with pytest.raises(CheckpointError):
        load_prefix(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError):
        load_prefix(tmp_path)
    with pytest.raises(CheckpointError) as error:
        save_prefix(tmp_path / "p.bin", prefix)
    assert "p.safetensors" in error.value.hint
    (tmp_path / "file").write_text("")
    with pytest.raises(PrefixError):
        save_prefix(tmp_path / "file" / "p.safetensors", prefix)


def test_a_dtype_that_could_not_be_read_again_is_refused(path, prefix):
    before = path.read_bytes()
    with pytest.raises(ConfigError):
        save_prefix(path, prefix, dtype=torch.float8_e4m3fn)
    assert path.read_bytes() == before
    assert load_prefix(save_prefix(path, prefix, dtype=torch.float64)).dtype == torch.float64
