"""Files against damage: the checksum, versions, old files, and headers that anybody may have written."""

import contextlib
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from file_format import checksum_by_hand
from prefixtune.backbone.prefixes import load_prefix, make_header
from prefixtune.cli.main import main
from prefixtune.errors import CheckpointError
from prefixtune.prefix.header import Header
from prefixtune.prefix.prefix import Prefix, read_outline, save_prefix
from prefixtune.server.prefixes import PrefixFolder
from prefixtune.training.artifact import load_weights, save_weights
from prefixtune.training.checkpoint import load_state, save_state

DOCS = Path(__file__).resolve().parents[3] / "docs"


@pytest.fixture
def prefix(llama, random_prefix):
    form = {"prompt": " {source} {separator}", "target": " {target} ", "separator": "<s>", "end": "</s>", "source": ""}
    header = make_header(llama, task="toy", method="prefix", text_format=form, license="CC0")
    return Prefix(random_prefix(llama, 2).detach().layers, header)


@pytest.fixture(params=["prefix", "state", "weights"])
def kept(request, tmp_path, prefix):
    """A file of each kind, and what reads it."""
    path = tmp_path / f"{request.param}.safetensors"
    tensors = {"module.a": torch.randn(3, 5), "optimizer.0.step": torch.tensor(5.0), "b": torch.randn(7).bfloat16()}
    if request.param == "prefix":
        return save_prefix(path, prefix), load_prefix
    if request.param == "state":
        save_state(path, tensors, {"step": 5, "best_loss": None, "config": {"task": "toy"}})
        return path, load_state
    save_weights(path, tensors, {"method": "top", "method_size": 2, **prefix.header})
    return path, load_weights


def test_no_flipped_bit_is_read(kept):
    path, load = kept
    load(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(0)
    # One bit of every third byte of the header, and of every ninth byte of the numbers.
    for place in [*range(8), *range(8, header, 3), *range(header, len(whole), 9)]:
        bit = chance.randrange(8)
        broken = bytearray(whole)
        broken[place] ^= 1 << bit
        path.write_bytes(broken)
        try:
            load(path)
        except CheckpointError:
            continue
        # Blanks behind the header, which nobody reads, may become a line break or the like.
        assert json.loads(broken[8:header]) == json.loads(whole[8:header]), (place, bit)
        assert broken[header:] == whole[header:], (place, bit)


def test_the_checksum_is_that_of_the_documentation(tmp_path, prefix):
    path = save_prefix(tmp_path / "p.safetensors", prefix, dtype=torch.bfloat16)
    with safe_open(path, "pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        facts = handle.metadata()
    assert facts["prefixtune_checksum"] == checksum_by_hand(tensors, facts["prefixtune"])


# --- versions ---------------------------------------------------------------------------------------------------------


def test_every_field_is_documented(tmp_path, prefix):
    page = (DOCS / "format.md").read_text(encoding="utf-8")
    header = load_prefix(save_prefix(tmp_path / "p.safetensors", prefix)).header
    for field in header:
        assert f"`{field}`" in page, field
    for field in Header.model_fields:
        assert f"`{field}`" in page, field


# --- headers that anybody may have written ----------------------------------------------------------------------------


def with_header(path, prefix, header):
    tensors = {
        f"{site}.{number}.{part}": tensor
        for site, layers in prefix.layers.items()
        for number, pair in enumerate(layers)
        for part, tensor in zip(("key", "value"), pair, strict=True)
    }
    save_file(tensors, path, {"prefixtune": header, "prefixtune_checksum": checksum_by_hand(tensors, header)})
    return path


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ('{"format_version": 2, "training": {"dev_loss": 1e999}}', "JSON"),
        ('{"format_version": 2, "deep": ' + "[" * 50_000 + "]" * 50_000 + "}", "JSON"),
        ('{"format_version": 2, "long": "' + "a" * 2**20 + '"}', "bytes, but may take 1,048,576"),
        ('{"format_version": 2, "backbone": {"name": 3}}', "backbone.name"),
        ('{"format_version": 2, "text_format": {"prompt": null, "end": 7}}', "text format"),
        ('{"format_version": 2, "labels": {"kind": "tagging", "by": "head", "names": ["a", 2]}}', "labels.names"),
        ('{"format_version": 2, "placement": "infix"}', "placement"),
        ('{"format_version": 2, "job": {"id": "a"}}', "job.owner"),
        ('{"format_version": 1}', "version 1"),
    ],
)
def test_headers_that_nobody_can_use_are_refused(text, reported, tmp_path, prefix, llama, capsys):
    path = with_header(tmp_path / "p.safetensors", prefix, text)
    with pytest.raises(CheckpointError) as error:
        load_prefix(path)
    assert reported in str(error.value)
    with pytest.raises(CheckpointError):
        read_outline(path)
    store = PrefixFolder(tmp_path, llama)
    assert store.names() == []
    assert "p" in store.refused
    assert main(["inspect", str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_what_could_not_be_read_is_not_written(tmp_path, prefix):
    path = tmp_path / "p.safetensors"
    for header in ({"task": 3}, {"license": "\ud800"}, {"training": {"x": float("inf")}}, {"note": "a" * 2**20}):
        with pytest.raises(CheckpointError):
            save_prefix(path, Prefix(prefix.layers, header))
    assert list(tmp_path.iterdir()) == []


def test_every_header_that_is_written_can_be_listed(tmp_path, prefix):
    path = tmp_path / "p.safetensors"
    longest, letter = 0, "日"
    for count in (2**16, 2**17, 2**18, 2**19):
        with contextlib.suppress(CheckpointError):
            save_prefix(path, Prefix(prefix.layers, {"task": letter * count}))
            longest = count
    # The last one that could be written.
    assert longest
    assert read_outline(path).header["task"] == load_prefix(path).header["task"] == letter * longest
    with pytest.raises(CheckpointError):
        save_prefix(path, Prefix(prefix.layers, {"task": letter * 2**20}))
    with pytest.raises(CheckpointError):
        save_prefix(path, Prefix(prefix.layers, {"training": {"dev_loss": torch.tensor(1.5)}}))
