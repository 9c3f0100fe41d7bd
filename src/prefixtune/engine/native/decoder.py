"""Call the compiled step through a decoder's layers (`decoder_step.cpp`)."""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import Future
from pathlib import Path
from typing import ClassVar

from prefixtune.backbone.native.panels import MatrixArguments
from prefixtune.engine.decoder_layers import DecoderLayer
from prefixtune.utils.native.build import start
from prefixtune.utils.native.library import NativeLibrary

__all__ = ["DecoderKernel", "LayerArguments", "StepArguments", "decoder_kernel"]

_Strides = ctypes.c_int64 * 2


class LayerArguments(ctypes.Structure):
    """A layer; as in `decoder_step.cpp`."""

    _fields_ = [
        *((name, MatrixArguments) for name in ("query", "key", "value", "out", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((f"{name}_strides", _Strides) for name in ("keys", "values")),
        ("window", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, layer: DecoderLayer) -> LayerArguments:
        """Points to a layer's matrices and norms, which must be kept meanwhile; keys and values are missing."""
        norms = layer.attention_norm, layer.mlp_norm, layer.query_norm, layer.key_norm
        weights = (None if norm is None else norm.weight.data_ptr() for norm in norms)
        return cls(*(MatrixArguments.of(matrix) for matrix in layer.matrices), *weights, window=layer.window or 0)


class StepArguments(ctypes.Structure):
    """A step; as in `decoder_step.cpp`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("layers", "norm")),
        ("head", MatrixArguments),
        *((name, ctypes.c_void_p) for name in ("hidden", "cos", "sin", "kept", "logits", "spans")),
        *((name, ctypes.c_int64) for name in ("num_layers", "heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_int64) for name in ("tokens", "num_kept", "num_spans", "threads")),
        *((name, ctypes.c_float) for name in ("epsilon", "scale")),
    ]


class DecoderKernel(NativeLibrary):
    """The compiled step."""

    structures: ClassVar[dict[str, type[ctypes.Structure]]] = {
        "decoder_layer_size": LayerArguments,
        "decoder_step_size": StepArguments,
    }

    def bind(self, library: ctypes.CDLL) -> None:
        """See `NativeLibrary`."""
        self._step = library.decoder_step
        self._step.argtypes, self._step.restype = [ctypes.POINTER(StepArguments)], ctypes.c_int

    def computes(self) -> bool:
        """Each model's step is compared with the model instead (`DecoderStep.make`)."""
        return True

    def __call__(self, step: StepArguments) -> None:
        """Compute a step.

        Raises:
            MemoryError: There is not enough.
        """
        if self._step(ctypes.byref(step)):
            raise MemoryError("a step had not enough memory.")


@functools.cache
def decoder_kernel() -> Future[DecoderKernel | None]:
    """The compiled step, as soon as it is made; None: it cannot be made here, which is logged once."""
    return start(Path(__file__).with_name("decoder_step.cpp"), DecoderKernel, "a step of running texts is computed")
