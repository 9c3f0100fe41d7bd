"""The two sides of the comparison, each with its own training step: PEFT's prefix tuning and this project's.

Both take the same pairs, average the loss over the target tokens, clip the gradient and update the prefix's MLP with
AdamW. Each side prepares its own tensors, since that is part of its step.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bench.machine import memory_mib, reset_peak_memory, wait
from bench.models import make_backbone, make_model, silence_peft
from bench.results import DifferenceError
from prefixtune.backbone.backbone import Backbone
from prefixtune.data.batching import collate, divide
from prefixtune.data.encoding import TokenizedExample
from prefixtune.prefix.encoder import PrefixEncoder
from prefixtune.training.loop import PendingStep, forward_backward
from prefixtune.training.score import MOST_POSITIONS

BOTTLENECK_SIZE = 512
LEARNING_RATE = 5e-4
MAX_GRAD_NORM = 1.0
TOLERANCE = 1e-4

VARIANTS = {
    "peft-fp32": ("PEFT", "float32"),
    "peft-bf16": ("PEFT", "bfloat16"),
    "ours-fp32": ("prefixtune", "float32"),
    "ours-bf16": ("prefixtune", "bfloat16"),
}


class Side(Protocol):
    """One way to train a prefix."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def backward(self, batch: Sequence[TokenizedExample]) -> float:
        """Mean loss of the batch's target tokens; adds its gradients to those of the prefix's parameters."""

    def weights(self) -> list[nn.Parameter]:
        """The MLP's parameters: embedding, first layer's weight and bias, last layer's weight and bias."""


# --- a step -----------------------------------------------------------------------------------------------------------


def make_optimizer(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with the settings of all sides; fused, as transformers' `Trainer` has it by default."""
    return torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def step(side: Side, batch: Sequence[TokenizedExample]) -> float:
    """One optimizer step; returns its loss."""
    side.optimizer.zero_grad(set_to_none=True)
    loss = side.backward(batch)
    nn.utils.clip_grad_norm_(side.weights(), MAX_GRAD_NORM)
    side.optimizer.step()
    return loss


def timed_step(side: Side, batch: Sequence[TokenizedExample]) -> tuple[float, float]:
    """A step's seconds, and its loss."""
    device = side.weights()[0].device
    gc.collect()
    wait(device)
    began = time.perf_counter()
    loss = step(side, batch)
    wait(device)
    return time.perf_counter() - began, loss


@torch.no_grad()
def set_weights(side: Side, values: Iterable[Tensor]) -> None:
    """Start a side again, with these parameters and an empty optimizer."""
    for weight, value in zip(side.weights(), values, strict=True):
        weight.copy_(value)
    side.optimizer.state.clear()


def measure_peak(side: Side, batches: Iterable[Sequence[TokenizedExample]]) -> dict[str, float | None]:
    """The most memory over some steps, and what they add to the loaded model, in MiB: of the side's device."""
    device = side.weights()[0].device
    with torch.no_grad():
        for parameter in side.model.parameters():
            # Weights may be mapped from their file, and not loaded yet: read from every page.
            parameter.flatten()[:: 2048 // parameter.element_size()].sum()
    reset_peak_memory(device)
    loaded = memory_mib(device)
    for batch in batches:
        step(side, batch)
        gc.collect()
    peak = memory_mib(device, peak=True)
    return {"peak_mib": peak, "loaded_mib": loaded, "step_mib": peak - loaded if peak and loaded else None}


# --- the sides --------------------------------------------------------------------------------------------------------


class PeftSide:
    """PEFT as its users run it: one right-padded row per pair, labels -100 where there is no loss."""

    def __init__(self, model: Any, pad_id: int, prefix_length: int) -> None:
        from peft import PrefixTuningConfig, get_peft_model

        silence_peft()
        self.model, self.pad_id = model, pad_id
        config = PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=prefix_length,
            prefix_projection=True,
            encoder_hidden_size=BOTTLENECK_SIZE,
        )
        self.peft = get_peft_model(self.model, config)
        self.peft.train()
        self.encoder = self.peft.prompt_encoder["default"]
        self.optimizer = make_optimizer(self.weights())

    def backward(self, batch: Sequence[TokenizedExample]) -> float:
        """See `Side`; the model computes the loss from `labels`."""
        loss: Tensor = self.peft(**self.collate(batch)).loss
        loss.backward()
        return float(loss.detach())

    def collate(self, batch: Sequence[TokenizedExample]) -> dict[str, Tensor]:
        """Ids, mask and labels of a right-padded batch."""
        pairs = [(group.prompt, target) for group in batch for target in group.targets]
        columns = {
            "input_ids": ([prompt + target for prompt, target in pairs], self.pad_id),
            "attention_mask": ([(1,) * len(prompt + target) for prompt, target in pairs], 0),
            "labels": ([(-100,) * len(prompt) + target for prompt, target in pairs], -100),
        }
        return {
            name: pad_sequence([torch.tensor(row) for row in rows], True, padding).to(self.model.device)
            for name, (rows, padding) in columns.items()
        }

    def weights(self) -> list[nn.Parameter]:
        """See `Side`."""
        first, _, last = self.encoder.transform
        return [self.encoder.embedding.weight, first.weight, first.bias, last.weight, last.bias]


class OurSide:
    """This project's step, as `TrainLoop` takes it: packed rows, one pass of the MLP, logits only at labels."""

    def __init__(self, backbone: Backbone, prefix_length: int) -> None:
        self.backbone, self.model = backbone, backbone.model
        # PEFT's embedding is as wide as one layer's keys.
        shape = backbone.geometry["decoder"][0]
        self.module = PrefixEncoder(
            "mlp",
            backbone.geometry,
            prefix_length,
            embedding_size=shape.num_kv_heads * shape.key_dim,
            bottleneck_size=BOTTLENECK_SIZE,
        ).to(backbone.device)
        self.optimizer = make_optimizer(self.weights())

    def backward(self, batch: Sequence[TokenizedExample]) -> float:
        """See `Side`."""
        parts = divide(self.backbone, batch, MOST_POSITIONS, share_beginnings=True)
        batches = [collate(self.backbone, part, share_beginnings=True) for part in parts]
        num_tokens = sum(len(part.labels) for part in batches)
        prefix = self.module()
        leaf = prefix.leaves()
        step = PendingStep(0.0, batches, [1 / num_tokens] * len(batches), prefix, leaf, 0, num_tokens)
        forward_backward(self.backbone, [step])
        torch.autograd.backward(prefix.stored_tensors(), [tensor.grad for tensor in leaf.stored_tensors()])
        return step.loss

    def weights(self) -> list[nn.Parameter]:
        """See `Side`; site after site."""
        return [
            weight
            for site in self.module.sites.values()
            for layer in map(site.get_submodule, ("embedding", "hidden", "output"))
            for weight in layer.parameters()
        ]


def make_side(variant: str, prefix_length: int, backbone_name: str, device: str = "cpu") -> Side:
    """Load a backbone with a trainable prefix, of the same size on both sides."""
    library, dtype = VARIANTS[variant]
    torch.manual_seed(0)
    if library == "PEFT":
        model = make_model(backbone_name, dtype, device)
        pad_id = model.config.pad_token_id
        return PeftSide(model, model.config.eos_token_id if pad_id is None else pad_id, prefix_length)
    return OurSide(make_backbone(backbone_name, dtype, device), prefix_length)


def num_target_tokens(batch: Sequence[TokenizedExample]) -> int:
    """Tokens with a loss: those of every target, with its end token."""
    return sum(len(target) for group in batch for target in group.targets)


# --- do both compute the same? ---------------------------------------------------------------------------------------


def compare(reference: Side, other: Side, batch: Sequence[TokenizedExample]) -> dict[str, float]:
    """Relative differences of the loss and of all parameters' gradients, at equal parameters."""
    set_weights(other, reference.weights())
    (one_loss, one_weights), (other_loss, other_weights) = _gradients(reference, batch), _gradients(other, batch)
    names = "embedding", "weight_1", "bias_1", "weight_2", "bias_2"
    return {
        "loss": abs(one_loss - other_loss) / abs(one_loss),
        **{
            f"{name}_gradient": float((one - other).norm() / one.norm())
            for name, one, other in zip(names, one_weights, other_weights, strict=True)
        },
    }


def require_equal(reference: Side, other: Side, batch: Sequence[TokenizedExample]) -> dict[str, float]:
    """`compare`, and refuse another loss; gradients can be small sums of large numbers, and are reported alone.

    Raises:
        DifferenceError: The loss differs by more than `TOLERANCE`.
    """
    differences = compare(reference, other, batch)
    if not differences["loss"] <= TOLERANCE:
        raise DifferenceError(f"PEFT and prefixtune differ in float32: {differences}.")
    return differences


def _gradients(side: Side, batch: Sequence[TokenizedExample]) -> tuple[float, list[Tensor]]:
    """Loss, and every parameter's gradient."""
    side.optimizer.zero_grad(set_to_none=True)
    loss = side.backward(batch)
    copies = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in side.weights()]
    side.optimizer.zero_grad(set_to_none=True)
    return loss, copies
