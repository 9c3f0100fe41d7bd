"""All compiled code of the package: each source, and the class that loads it and compares its results with torch's."""

from __future__ import annotations

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
from prefixtune.utils.native.library import NativeLibrary

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
_NEED_BFLOAT16 = ("panels", "decoder_step")


def skip_where_it_gains_nothing(name: str) -> None:
    """Skip a test of a source that this processor does not use."""
    if name in _NEED_BFLOAT16 and not panels._gains():
        pytest.skip("the processor has no products of bfloat16")
