"""Part `flops`: the share of the machine's matrix-product speed that a training step reaches.

The products that the step needs are counted, 2mnk operations each:

- every linear layer, forward; again for the gradient of its input where that is needed (not at the first layer's query,
  key and value, whose input is no function of the prefix); none for the gradient of a frozen weight;
- the output head at label positions only, forward and backward;
- attention, dense within a source's group (masked entries included, nothing across groups): two products forward, four
  backward (three in the first layer), no recomputation;
- the prefix's MLP: forward, and the gradients of input and weight.

They are counted on the plain model, whose layers can be watched; torch's own counter must find as many there, attention
and the head apart. The timed steps compute the same with fused operations.

Not counted: normalizations, activations, rotary embeddings, softmax, the loss, clipping and AdamW. They take time,
so the share stays below 1.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.data import Batch, Data, encode, first_batches
from bench.results import DifferenceError, Figure, Log, Results
from bench.training.sides import OurSide, num_target_tokens
from bench.training.steps import step
from prefixtune.backbone.load import load_backbone
from prefixtune.data.encoding import TokenizedExample

ROWS, CUBE = 600, 2048


def run(
    data: Data,
    *,
    backbone_name: str,
    setting: tuple[int, int],
    repeats: int,
    prefix_length: int,
    seed: int,
    quick: bool,
    log: Log,
) -> Results:
    """Time steps and plain products in turn, in fp32 and in bf16."""
    values: dict[str, Any] = {"batch_size": setting[0], "targets_per_source": setting[1], "dtypes": {}}
    figures: list[Figure] = []
    encoded: Sequence[TokenizedExample] = ()
    for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
        torch.manual_seed(0)
        backbone = load_backbone(backbone_name, dtype=dtype, device="cpu")
        side = OurSide(backbone, prefix_length)
        encoded = encoded or encode(backbone, data, prefix_length)
        size, most = setting
        batches = first_batches(encoded, batch_size=size, targets_per_source=most, num_batches=repeats + 1, seed=seed)
        result = measure(side, batches, product_shapes(side, quick), log)
        values["dtypes"][dtype] = result
        speed, peak = result["step_gflops"], result["product_gflops"]
        title = f"{size} pairs, <= {most} per source"
        figures += [
            Figure("flops", f"{short}: torch.mm, best ({result['best_product']})", peak, "GFLOP/s"),
            Figure(
                "flops",
                f"{short}: needed by a step of {title}",
                median(f["total"] for f in result["flops"]) / 1e9,
                "GFLOP",
            ),
            Figure("flops", f"{short}: a step", speed, "GFLOP/s"),
            Figure("flops", f"{short}: a step's share of torch.mm", result["share"]),
        ]
        del side, backbone
        gc.collect()
    return values, figures


def product_shapes(side: OurSide, quick: bool) -> list[tuple[int, int, int]]:
    """Shapes (m, k, n) of plain products: the model's widest layer at some hundred rows, and a large cube."""
    head = output_head(side)
    linears = [module for module in side.model.modules() if _is_linear(module) and module is not head]
    # (narrow, wide), whichever is the input.
    narrow, wide = min(max((tuple(sorted(m.weight.shape)) for m in linears), key=lambda s: s[0] * s[1]), (1 << 30, 0))
    return [(ROWS, narrow, wide), (ROWS, wide, narrow), (512,) * 3 if quick else (CUBE,) * 3]


def measure(
    side: OurSide,
    batches: list[Batch],
    shapes: Sequence[tuple[int, int, int]],
    log: Log,
) -> dict[str, Any]:
    """Steps and products in turn; the first batch warms up, and torch counts it as well."""
    dtype = side.backbone.dtype
    operands = {shape: (torch.randn(shape[0], shape[1]), torch.randn(shape[2], shape[1])) for shape in shapes}
    operands = {shape: (a.to(dtype), b.to(dtype)) for shape, (a, b) in operands.items()}
    products: dict[str, list[float]] = {_shape_name(shape): [] for shape in shapes}
    step(side, batches[0])
    seconds = []
    for index, batch in enumerate(batches[1:], 1):
        for shape, (a, b) in operands.items():
            products[_shape_name(shape)].append(product_speed(a, b))
        gc.collect()
        began = time.perf_counter()
        step(side, batch)
        seconds.append(time.perf_counter() - began)
        log(f"flops, {dtype}: {index}/{len(batches) - 1}: {seconds[-1]:.2f} s")
    flops = [count_flops(side, batch) for batch in batches[1:]]
    cross_check = check_count(side, batches[0])
    best = max(products, key=lambda name: max(products[name]))
    peak = max(products[best])
    speed = median(f["total"] / s / 1e9 for f, s in zip(flops, seconds, strict=True))
    return {
        "products_gflops": products,
        "best_product": best,
        "product_gflops": peak,
        "seconds": seconds,
        "flops": flops,
        "step_gflops": speed,
        "share": speed / peak,
        "cross_check": cross_check,
    }


def check_count(side: OurSide, batch: Sequence[TokenizedExample]) -> dict[str, Any]:
    """A step's operations as they are counted here and by torch.

    Raises:
        DifferenceError: Apart from attention, of which torch sees a part, they differ. The head's products are among
            torch's or not, depending on what computes the loss.
    """
    counted = count_flops(side, batch)
    with FlopCounterMode(display=False) as counter:
        side.backward(batch)
    side.optimizer.zero_grad(set_to_none=True)
    found = {str(op): n for op, n in counter.get_flop_counts().get("Global", {}).items()}
    layers = counted["linear_forward"] + counted["linear_backward"] + counted["mlp"]
    head = counted["head_forward"] + counted["head_backward"]
    torch_s = sum(found.get(name, 0) for name in ("aten.mm", "aten.addmm"))
    if all(abs(ours - torch_s) > 0.001 * torch_s for ours in (layers, layers + head)):
        raise DifferenceError(
            f"{layers:,} operations of layers and {head:,} of the head were counted, and {torch_s:,} by torch."
        )
    return {
        "counted_here": counted,
        "torch_flop_counter": {"total": counter.get_total_flops(), "by_operator": found},
    }


def product_speed(a: torch.Tensor, b: torch.Tensor, least_seconds: float = 0.1) -> float:
    """GFLOP/s of a @ b.T, the product of a linear layer."""
    transposed = b.t()
    torch.mm(a, transposed)
    done, began = 0, time.perf_counter()
    while (taken := time.perf_counter() - began) < least_seconds or not done:
        torch.mm(a, transposed)
        done += 1
    return 2.0 * a.shape[0] * a.shape[1] * b.shape[0] * done / taken / 1e9


def output_head(side: OurSide) -> nn.Module:
    """The layer that computes logits."""
    head: Any = side.backbone.model
    output: nn.Module = head.get_output_embeddings()
    return output


def count_flops(side: OurSide, batch: Sequence[TokenizedExample]) -> dict[str, int]:
    """Operations of the products that a step needs, by kind; see the module's docstring."""
    head = output_head(side)
    # Its logits are computed a few at a time, without a call of the layer.
    of_head = 2 * num_target_tokens(batch) * head.get_parameter("weight").numel()
    counts = {"linear_forward": 0, "linear_backward": 0, "head_forward": of_head, "head_backward": of_head, "mlp": 0}

    def count_backbone(module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: Any) -> None:
        operations = 2 * (inputs[0].numel() // inputs[0].shape[-1]) * module.get_parameter("weight").numel()
        counts["linear_forward"] += operations
        if inputs[0].requires_grad:
            counts["linear_backward"] += operations

    def count_mlp(module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: Any) -> None:
        counts["mlp"] += 3 * 2 * inputs[0].shape[0] * module.get_parameter("weight").numel()

    handles = [m.register_forward_hook(count_backbone) for m in side.model.modules() if _is_linear(m) and m is not head]
    handles += [m.register_forward_hook(count_mlp) for m in side.module.modules() if isinstance(m, nn.Linear)]
    try:
        side.backward(batch)
        side.optimizer.zero_grad(set_to_none=True)
    finally:
        for handle in handles:
            handle.remove()
    forward, backward = count_attention(side, batch)
    counts |= {"attention_forward": forward, "attention_backward": backward}
    return {**counts, "total": sum(counts.values())}


def count_attention(side: OurSide, batch: Sequence[TokenizedExample]) -> tuple[int, int]:
    """Operations of attention's products over all layers, forward and backward."""
    heads = side.model.config.get_text_config(decoder=True).num_attention_heads
    forward = backward = 0
    for group in (group for row in side.rows(batch) if row.packing is not None for group in row.packing.groups):
        length = group.stop - group.start
        pairs = heads * length * (side.module.bake().length() + length)
        for index, shape in enumerate(side.backbone.geometry["decoder"]):
            scores, mix = 2 * pairs * shape.key_dim, 2 * pairs * shape.value_dim
            forward += scores + mix
            # Gradients of query, key, probabilities and value; the first layer's query needs none.
            backward += (1 if index == 0 else 2) * scores + 2 * mix
    return forward, backward


def _is_linear(module: nn.Module) -> bool:
    # Conv1D is GPT-2's linear layer, with its weight transposed.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _shape_name(shape: tuple[int, int, int]) -> str:
    return " x ".join(map(str, shape))
