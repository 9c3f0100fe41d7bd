"""A whole step of the engine, from embeddings to logits, as one call of compiled code.

For LLaMA-like decoders in bfloat16 on a CPU whose matrices are laid out in panels (`backbone.prepack`). The code
computes what the model's own modules do, rounded at the same places; a step is used if it gives the model's logits for
some tokens. Any other model runs module by module.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefixtune.attention.forward import forward_with_backend
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.native.panels import MatrixArguments
from prefixtune.engine.attention import SlotAttention
from prefixtune.engine.decoder_layers import DecoderLayers
from prefixtune.engine.kv_cache import KVCache
from prefixtune.engine.native import AttentionKernel, make_spans
from prefixtune.engine.native.decoder import DecoderKernel, LayerArguments, StepArguments
from prefixtune.engine.span import QuerySpan

__all__ = ["DecoderStep"]

_log = logging.getLogger(__name__)
_TOKENS = 24
"""Of the row that is compared: with a part of a prompt and a decode."""
_NEAR = 0.002
"""How far logits may be from the modules', as a share of their norm: products and attention are the same code."""
_compared: weakref.WeakSet[Backbone] = weakref.WeakSet()
"""Backbones whose step gave the modules' logits."""


class DecoderStep:
    """A decoder's step by compiled code.

    Args:
        model: The prepacked model.
        found: What it is made of.
        kernel: The compiled step.
    """

    def __init__(self, model: Any, found: DecoderLayers, kernel: DecoderKernel) -> None:
        # Their memory is pointed to below.
        self._model, self._found, self._kernel = model, found, kernel
        self._layers = (LayerArguments * len(found.layers))(*(LayerArguments.of(layer) for layer in found.layers))
        self._arguments = StepArguments(
            layers=ctypes.addressof(self._layers),
            norm=found.norm.weight.data_ptr(),
            head=MatrixArguments.of(found.head),
            num_layers=len(found.layers),
            heads=found.heads,
            kv_heads=found.kv_heads,
            head_dim=found.head_dim,
            epsilon=found.norm.epsilon,
            scale=found.scale,
        )

    @classmethod
    def make(
        cls, backbone: Backbone, found: DecoderLayers, kernel: DecoderKernel, attention: AttentionKernel
    ) -> DecoderStep | None:
        """The step of a model; None: other logits come out. Those of a backbone are compared once.

        Args:
            backbone: Prepacked.
            found: Its parts, by `find_layers`.
            kernel: The compiled step.
            attention: What computes the attention of the model to compare with.
        """
        step = cls(backbone.model, found, kernel)
        if backbone in _compared:
            return step
        with contextlib.suppress(RuntimeError, TypeError, MemoryError):
            if step._agrees(backbone, attention):
                _compared.add(backbone)
                return step
        _log.warning("steps of %s run module by module: the compiled step computes something else.", backbone.name)
        return None

    def __call__(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        kv_cache: KVCache,
        spans: Sequence[QuerySpan],
        kept: Int[Tensor, " N"],
    ) -> Float[Tensor, "N V"]:
        """Compute tokens of several texts.

        Args:
            ids: The tokens.
            positions: Of each token in its text.
            kv_cache: The texts' slots, to which keys and values are written.
            spans: Which tokens are which text's, in order.
            kept: Of which tokens logits are wanted.

        Raises:
            MemoryError: There is not enough.
        """
        model = self._model.model
        hidden = model.embed_tokens(torch.tensor([ids])).contiguous()
        cos, sin = (turn.contiguous() for turn in model.rotary_emb(hidden, torch.tensor([positions])))
        if hidden.dtype != torch.bfloat16 or cos.dtype != torch.bfloat16 or cos.shape[-1] != self._found.head_dim:
            raise TypeError(f"hidden states of {hidden.dtype}, turned by {cos.dtype}, {tuple(cos.shape)}.")
        logits = torch.empty(len(kept), self._found.head.outer, dtype=torch.bfloat16)
        made = make_spans(spans)
        for layer, keys, values in zip(self._layers, kv_cache.keys, kv_cache.values, strict=True):
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
            layer.keys_strides[:], layer.values_strides[:] = keys.stride()[:2], values.stride()[:2]
        step = self._arguments
        step.hidden, step.cos, step.sin = hidden.data_ptr(), cos.data_ptr(), sin.data_ptr()
        step.kept, step.logits, step.spans = kept.data_ptr(), logits.data_ptr(), ctypes.addressof(made)
        step.tokens, step.num_kept, step.num_spans = len(ids), len(kept), len(made)
        step.threads = torch.get_num_threads()
        self._kernel(step)
        return logits

    @torch.inference_mode()
    def _agrees(self, backbone: Backbone, attention: AttentionKernel) -> bool:
        """Whether logits are near those of the modules: after a part of a prompt, of its rest and of another text."""
        vocabulary = int(self._model.get_input_embeddings().weight.shape[0])
        ids = [(7 + 31 * index) % vocabulary for index in range(_TOKENS + 2)]
        rows = (
            (ids[:_TOKENS], list(range(_TOKENS)), [QuerySpan(1, 0, _TOKENS, 0)]),
            (
                ids[:-3:-1] + ids[:3],
                [_TOKENS, _TOKENS + 1, 0, 1, 2],
                [QuerySpan(1, _TOKENS, 2, 0), QuerySpan(0, 0, 3, 0)],
            ),
        )
        caches = [
            KVCache(backbone.geometry["decoder"], 2, _TOKENS + 2, backbone.dtype, backbone.device) for _ in range(2)
        ]
        for tokens, positions, spans in rows:
            for cache in caches:
                cache.reserve(_TOKENS + 2)
            found = self(tokens, positions, caches[0], spans, torch.arange(len(tokens)))
            at = torch.tensor([positions])
            backend = SlotAttention(caches[1], (), spans, kernel=attention)
            plain = forward_with_backend(self._model, backbone.layout, torch.tensor([tokens]), at, backend, None)[0]
            difference = (found.float() - plain.float()).norm(dim=-1)
            if not bool((difference <= _NEAR * plain.float().norm(dim=-1)).all()):
                return False
        return True
