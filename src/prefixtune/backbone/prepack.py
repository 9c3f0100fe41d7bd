"""A frozen model's matrices made ready for inference on a processor, instead of at every call.

Products of one or two rows, which one text at a time consists of, are computed by compiled code where there is a
compiler (see `native.linear`), from the matrices as they are. For products of more rows, `prepack` lays the matrices
out once as the processor's bf16 products want them: in panels, for compiled code that computes all products
(`native.panels`), or else in oneDNN's order.

For inference alone: no gradient flows through it. The model itself stays as it is; the packed one shares everything
with it but the matrices that are laid out otherwise.
"""

from __future__ import annotations

from typing import Any

import psutil
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.native.linear import MOST_ROWS, RowKernel, RowMatrix, row_kernel
from prefixtune.backbone.native.norm import norm_of
from prefixtune.backbone.native.panels import PanelKernel, PanelMatrix, panel_kernel
from prefixtune.backbone.twin import make_twin

__all__ = ["Int8Linear", "PrepackedLinear", "prepack"]


_ROWS = 32
"""For how many rows the layout is chosen; it serves any number."""
_SHARE_OF_MEMORY = 0.25
"""Of the free memory that a second copy of the matrices may take."""
_NEAR = 0.05
"""How far logits may be from the plain model's, as a share of their norm: bf16 has 8 bits, and norms may be rounded
otherwise."""
_NEAR_IN_PANELS = 0.2
"""The same where sums are rounded otherwise. On SmolLM2-135M they are 0.03 apart, and both 0.57 from float32's."""


class _RowLinear(nn.Module):
    """A linear layer of which compiled code computes one or two rows, and `forward` others.

    Args:
        matrix: What compiled code reads; None: it computes nothing.
        out_features: Of the layer.
        in_features: Of the layer.
    """

    def __init__(self, matrix: RowMatrix | None, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self._matrix = matrix
        self._kernel: RowKernel | None = None

    def _multiply(self, inputs: Float[Tensor, "*B K"]) -> Float[Tensor, "*B N"] | None:
        """The product by compiled code; None: it does not compute it."""
        if (
            self._matrix is None
            or inputs.numel() > MOST_ROWS * self.in_features
            or inputs.dtype != torch.bfloat16
            or torch.compiler.is_compiling()
        ):
            return None
        if self._kernel is None:
            if not row_kernel().done():
                return None
            self._kernel = row_kernel().result()
            if self._kernel is None:
                # There never will be any.
                self._matrix = None
                return None
        return self._kernel.multiply(inputs, self._matrix)


class PrepackedLinear(_RowLinear):
    """A linear layer for inference in bf16.

    Args:
        weight: The layer's.
        bias: The layer's; None: it has none.
        reorder: Keep a copy of the weight in another order: in `panels` if possible, else in oneDNN's for products of
            many rows.
        by_row: Unless it is in panels, keep the weight as it is, too, for products of one or two rows.
        panels: Computes all products; None: nothing does.

    Attributes:
        panels: What it is laid out as for compiled code; None: it is not.
    """

    def __init__(
        self,
        weight: Float[Tensor, "N K"],
        bias: Float[Tensor, " N"] | None,
        *,
        reorder: bool,
        by_row: bool = True,
        panels: PanelKernel | None = None,
    ) -> None:
        in_panels = reorder and panels is not None and PanelMatrix.suits(weight, bias)
        by_row = by_row and not in_panels and RowMatrix.suits(weight, bias)
        super().__init__(RowMatrix(weight, bias) if by_row else None, *weight.shape)
        self.bias, self.reordered = bias, reorder
        self.panels = PanelMatrix(panels, weight, bias) if in_panels and panels is not None else None
        # No buffer: it cannot be copied or saved as others are. Models that ask for a weight's dtype find it.
        if self.panels is not None:
            self.weight = self.panels.panels
        else:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS) if reorder else weight

    def forward(self, inputs: Float[Tensor, "*B K"]) -> Float[Tensor, "*B N"]:
        """The product, and the bias."""
        if self.panels is not None:
            return self.panels.multiply(inputs)
        product = self._multiply(inputs)
        if product is not None:
            return product
        if self.reordered:
            laid_out: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
            return laid_out
        return F.linear(inputs, self.weight, self.bias)


class Int8Linear(_RowLinear):
    """A linear layer for inference of which torchao rounded the weight to 8 bits.

    Args:
        linear: The layer.
        panels: Computes all products; None: of one or two rows alone, compiled code does.

    Attributes:
        panels: What it is laid out as for compiled code; None: it is not.
    """

    def __init__(self, linear: nn.Linear, panels: PanelKernel | None = None) -> None:
        weight: Any = linear.weight
        bias = None if linear.bias is None else linear.bias.detach()
        parts = weight.qdata, bias, weight.scale.flatten()
        in_panels = panels is not None and PanelMatrix.suits(*parts)
        super().__init__(None if in_panels else RowMatrix(*parts), linear.out_features, linear.in_features)
        self.panels = PanelMatrix(panels, *parts) if in_panels and panels is not None else None
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, inputs: Float[Tensor, "*B K"]) -> Float[Tensor, "*B N"]:
        """The product, and the bias."""
        if self.panels is not None:
            return self.panels.multiply(inputs)
        product = self._multiply(inputs)
        return F.linear(inputs, self.weight, self.bias) if product is None else product


@torch.no_grad()
def prepack(backbone: Backbone) -> Backbone:
    """The same backbone for inference, quicker on a CPU in bf16; the same object where there is nothing to gain.

    On two cores a decode step of 32 texts on SmolLM2-135M takes a sixth less time (`bench.serving.serve`), and that of
    one text half (`bench.serving.one_text`). The matrices are in memory twice until the first backbone is freed; where
    compiled code reads them as well, for good, but only if they take less than a quarter of the free memory.

    Args:
        backbone: Frozen. Layers that are in neither bf16 nor torchao's int8 stay as they are.
    """
    panels = panel_kernel() if _packs(backbone, reorder=True) else None
    packed = backbone if panels is None else _packed(backbone, reorder=True, panels=panels)
    return _packed(backbone, reorder=True) if packed is backbone else packed


def _packs(backbone: Backbone, *, reorder: bool) -> bool:
    """Whether there is something to pack."""
    model = backbone.model
    if backbone.device.type != "cpu" or hasattr(model, "hf_device_map") or (reorder and not _supported()):
        return False
    return any(_matrix(module) is not None or _is_int8(module) for module in model.modules())


def _packed(backbone: Backbone, *, reorder: bool, panels: PanelKernel | None = None) -> Backbone:
    if not _packs(backbone, reorder=reorder):
        return backbone
    model = backbone.model
    weights = {id(module.weight): module.weight for module in model.modules() if _matrix(module) is not None}
    num_bytes = sum(weight.numel() * weight.element_size() for weight in weights.values())
    by_row = not reorder or num_bytes < _SHARE_OF_MEMORY * psutil.virtual_memory().available
    if by_row:
        row_kernel()
    twin = make_twin(backbone)
    order: dict[str, Any] = {"reorder": reorder, "by_row": by_row, "panels": panels}
    for parent in list(twin.model.modules()):
        for name, child in list(parent.named_children()):
            if _is_int8(child):
                setattr(parent, name, Int8Linear(child, panels))
            elif (norm := norm_of(child)) is not None:
                setattr(parent, name, norm)
            weight = _matrix(child)
            if weight is not None and (reorder or weight.is_contiguous()):
                setattr(parent, name, PrepackedLinear(weight.contiguous(), child.bias, **order))
    return twin if _agree(backbone, twin, _NEAR if panels is None else _NEAR_IN_PANELS) else backbone


def _supported() -> bool:
    ops = torch.ops.mkldnn
    return bool(hasattr(ops, "_reorder_linear_weight") and ops._is_mkldnn_bf16_supported())


def _matrix(module: nn.Module) -> Float[Tensor, "N K"] | None:
    """The weight of a linear layer that can be packed; None: it is another layer, or is quantized or trained."""
    from transformers.pytorch_utils import Conv1D

    if type(module) not in (nn.Linear, Conv1D) or type(module.weight) is not nn.Parameter:
        return None
    weight = module.weight
    if weight.dtype != torch.bfloat16 or weight.requires_grad:
        return None
    # GPT-2's lie the other way round.
    return weight.detach() if type(module) is nn.Linear else weight.detach().t()


def _is_int8(module: nn.Module) -> bool:
    """Whether it is a linear layer of torchao's with 8-bit weights, a scale for each of their rows, and no more."""
    weight: Any = getattr(module, "weight", None)
    numbers, scales = getattr(weight, "qdata", None), getattr(weight, "scale", None)
    if type(module) is not nn.Linear or not isinstance(numbers, Tensor) or not isinstance(scales, Tensor):
        return False
    extras = [getattr(weight, name, None) for name in ("act_quant_kwargs", "act_quant_scale", "act_pre_scale")]
    zero_point = getattr(weight, "zero_point", None)
    return (
        all(extra is None for extra in extras)
        and weight.dtype == torch.bfloat16
        and scales.numel() == len(numbers)
        and (zero_point is None or not bool(zero_point.any()))
        and RowMatrix.suits(numbers, None if module.bias is None else module.bias.detach(), scales.flatten())
    )


def _agree(backbone: Backbone, packed: Backbone, near: float) -> bool:
    """Whether both compute the same for a few tokens."""
    ids = torch.arange(8)[None] % int(backbone.model.get_input_embeddings().weight.shape[0])
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if backbone.kind == "encoder-decoder" else {})}
    try:
        plain, other = (model(**inputs)[0].float() for model in (backbone.model, packed.model))
    except (RuntimeError, AttributeError, TypeError):
        # A model that does more with a layer than to call it.
        return False
    return float((other - plain).norm()) <= near * float(plain.norm())
