"""A frozen model's element-wise operations fused, for training on a processor: norms, gated activations, rotations.

Each takes one pass over the numbers instead of up to ten, and keeps less for the backward pass. The model itself stays
as it is; its twin shares all weights with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefixtune.attention.compute import prefix_from_tokens
from prefixtune.attention.native.packed import SMALLEST, packed_kernel
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.native.gate import gate_kernel, use_gate
from prefixtune.backbone.native.norm import norm_kernel, norm_of
from prefixtune.backbone.native.rotation import rotation_kernel, use_rotation
from prefixtune.backbone.products import gains, use_products
from prefixtune.backbone.twin import make_twin

__all__ = ["with_fused_operations"]

_TOKENS = 8
_NEAR = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.1, 0.5)}
"""How far logits and a prefix's gradient may be from the plain model's, as shares of their norms: a model adds its
layers' rounding up, and each module was compared before."""


def with_fused_operations(backbone: Backbone) -> Backbone:
    """The same backbone for training a prefix, quicker on a CPU where there is a compiler; see `Backbone.for_training`.

    The same object where nothing is gained: where weights train, on other devices, and without such operations.

    Args:
        backbone: Frozen. In float32 or bfloat16, quantized or not.
    """
    model = backbone.model
    if (
        backbone.adapter is not None
        or backbone.compute_dtype is not None
        or backbone.dtype not in _NEAR
        or hasattr(model, "hf_device_map")
        or any(p.requires_grad or p.device.type != "cpu" or hasattr(p, "device_mesh") for p in model.parameters())
    ):
        return backbone
    # All are compiled at the same time; a step's attention waits for its own.
    if model.get_input_embeddings().weight.shape[-1] >= SMALLEST:
        packed_kernel()
    kernels = norm_kernel(), gate_kernel(), rotation_kernel()
    if all(kernel.result() is None for kernel in kernels) and not gains():
        return backbone
    with torch.inference_mode(False):
        twin = make_twin(backbone)
    if not (_fuse(twin) and _agree(backbone, twin)):
        return backbone
    # The twin's own is itself.
    vars(twin)["for_training"] = twin
    return twin


def _fuse(twin: Backbone) -> bool:
    """Let modules of a model use compiled code; returns whether any does."""
    gate, rotation = gate_kernel().result(), rotation_kernel().result()
    fused = False
    for parent in list(twin.model.modules()):
        for name, child in list(parent.named_children()):
            norm = norm_of(child)
            if norm is not None and norm.use_kernel():
                setattr(parent, name, norm)
                fused = True
        if gate is not None:
            fused |= use_gate(parent, gate)
        fused |= use_products(parent)
        if rotation is not None and parent in twin.layout.layer_of:
            fused |= use_rotation(parent, rotation, twin.dtype)
    return fused


def _agree(backbone: Backbone, twin: Backbone) -> bool:
    """Whether both have the same logits and gradients for a few tokens."""
    try:
        (plain, slopes), (other, other_slopes) = map(_logits_and_gradient, (backbone, twin))
    except (RuntimeError, AttributeError, TypeError):
        return False
    near, near_slopes = _NEAR[backbone.dtype]
    return bool(
        (other - plain).norm() <= near * plain.norm() and (other_slopes - slopes).norm() <= near_slopes * slopes.norm()
    )


def _logits_and_gradient(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """The outputs of a few tokens with a prefix in front, and the gradient of their weighted sum in the prefix."""
    size = int(backbone.model.get_input_embeddings().weight.shape[0])
    ids = torch.arange(_TOKENS)[None] * 7 % size
    prefix = prefix_from_tokens(backbone.model, backbone.layout, ids[:, :2]).leaves()
    inputs = {"decoder_input_ids": ids} if backbone.kind == "encoder-decoder" else {}
    with torch.inference_mode(False), torch.enable_grad():
        outputs = backbone.forward(ids, prefixes=prefix, **inputs)[0].float()
        # A plain sum of normed numbers may hardly depend on them.
        weights = torch.linspace(-1, 1, outputs.numel()).view(outputs.shape)
        slopes = torch.autograd.grad((outputs * weights).sum(), prefix.tensors(), materialize_grads=True)
    return outputs.detach(), torch.cat([slope.flatten() for slope in slopes])
