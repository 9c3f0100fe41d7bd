"""All compiled code, by the compiler that pip installs where a machine has none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import prefixtune
from prefixtune.attention.native.packed import PackedKernel
from prefixtune.backbone.native import panels
from prefixtune.backbone.native.gate import GateKernel
from prefixtune.backbone.native.linear import RowKernel
from prefixtune.backbone.native.loss import LossKernel
from prefixtune.backbone.native.norm import NormKernel
from prefixtune.backbone.native.panels import PanelKernel
from prefixtune.backbone.native.rotation import RotationKernel
from prefixtune.engine.native.decoder import DecoderKernel
from prefixtune.engine.native.kernel import AttentionKernel
from prefixtune.utils.native import build
from prefixtune.utils.native.library import NativeLibrary

pytest.importorskip("ziglang")

SOURCES = {path.stem: path for path in Path(prefixtune.__file__).parent.rglob("*.cpp")}
LIBRARIES: dict[str, type[NativeLibrary]] = {
    "packed_attention": PackedKernel,
    "gate": GateKernel,
    "linear": RowKernel,
    "loss": LossKernel,
    "norm": NormKernel,
    "panels": PanelKernel,
    "rotation": RotationKernel,
    "decoder_step": DecoderKernel,
    "slot_attention": AttentionKernel,
}
NEED_BFLOAT16 = ("panels", "decoder_step")


def test_every_source_is_here() -> None:
    assert SOURCES.keys() == LIBRARIES.keys()


@pytest.mark.parametrize("name", LIBRARIES)
def test_pips_compiler_serves_where_there_is_no_other(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if name in NEED_BFLOAT16 and not panels._gains():
        pytest.skip("the processor has no products of bfloat16")
    which = shutil.which
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda program: None if "+" in program else which(program))
    # Loading compares results with torch's.
    LIBRARIES[name](build.build(SOURCES[name], tmp_path / "native"))
    assert [path.suffix for path in (tmp_path / "native").iterdir()] == [".so"]
