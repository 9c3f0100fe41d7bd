"""The two sides of the comparison, each with its own training step: PEFT's prefix tuning and this project's.

Both take the same pairs, average the loss over the target tokens, clip the gradient and update the prefix's MLP with
AdamW. Each side prepares its own tensors, since that is part of its step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from bench.peft_setup import model_folder, silence_peft
from bench.results import DifferenceError
from bench.training.steps import BOTTLENECK_SIZE, Trained, gradients, make_optimizer
from prefixtune.attention.forward import gradient_checkpointing
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.batch import Batch
from prefixtune.backbone.load import DEFAULT_BACKBONE, load_backbone
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import collate, divide
from prefixtune.data.encoding import TokenizedExample
from prefixtune.prefix.encoder import PrefixEncoder
from prefixtune.training.loop import MOST_POSITIONS, PendingStep, forward_backward

TOLERANCE = 1e-4
TIMES = 2

Gradients: TypeAlias = tuple[float, Tensor, list[Tensor]]
"""Loss, the flat prefix's gradient, and every parameter's."""

VARIANTS = {
    "peft-fp32": ("PEFT", "float32"),
    "peft-bf16": ("PEFT", "bfloat16"),
    "ours-fp32": ("prefixtune", "float32"),
    "ours-bf16": ("prefixtune", "bfloat16"),
}

RECOMPUTED = "-recomputed"
"""Appended to the name of our variant: layers are recomputed in the backward pass."""


class Side(Trained, Protocol):
    """One way to train a prefix."""

    def site(self) -> nn.Module:
        """The module whose output is the flat prefix, (P, S) or one such matrix per row."""

    def positions(self, batch: Sequence[TokenizedExample]) -> int:
        """Text positions that the backbone computes for a batch, padding included."""


class PeftSide:
    """PEFT as its users run it: one right-padded row per pair, labels -100 where there is no loss."""

    def __init__(self, backbone_name: str, dtype: str, prefix_length: int) -> None:
        from peft import PrefixTuningConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        silence_peft()
        folder = model_folder(backbone_name)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
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

    def loss(self, batch: Sequence[TokenizedExample]) -> Tensor:
        """Mean loss over target tokens, as the model computes it from `labels`."""
        loss: Tensor = self.peft(**self.collate(batch)).loss
        return loss

    def backward(self, batch: Sequence[TokenizedExample]) -> float:
        """See `Trained`."""
        loss = self.loss(batch)
        loss.backward()
        return float(loss.detach())

    def collate(self, batch: Sequence[TokenizedExample]) -> dict[str, Tensor]:
        """Ids, mask and labels of a right-padded batch."""
        pairs = [(group.prompt, target) for group in batch for target in group.targets]
        width = max(len(prompt) + len(target) for prompt, target in pairs)
        ids = torch.full((len(pairs), width), self.pad_id)
        mask = torch.zeros(len(pairs), width, dtype=torch.long)
        labels = torch.full((len(pairs), width), -100)
        for row, (prompt, target) in enumerate(pairs):
            stop = len(prompt) + len(target)
            ids[row, :stop] = torch.tensor(prompt + target)
            mask[row, :stop] = 1
            labels[row, len(prompt) : stop] = torch.tensor(target)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def in_float64(self, batch: Sequence[TokenizedExample]) -> Gradients:
        """Loss and gradients computed in float64."""
        self.peft.double()
        try:
            return _gradients(self, batch)
        finally:
            self.peft.float()

    def weights(self) -> list[nn.Parameter]:
        """See `Side`."""
        first, _, last = self.encoder.transform
        return [self.encoder.embedding.weight, first.weight, first.bias, last.weight, last.bias]

    def site(self) -> nn.Module:
        """See `Side`."""
        encoder: nn.Module = self.encoder
        return encoder

    def positions(self, batch: Sequence[TokenizedExample]) -> int:
        """See `Side`."""
        return self.collate(batch)["input_ids"].numel()


class OurSide:
    """This project's step, as `TrainLoop` takes it: packed rows, one pass of the MLP, logits only at labels."""

    def __init__(self, backbone: Backbone, prefix_length: int, embedding_size: int | None = None) -> None:
        self.backbone = backbone
        self.model = backbone.model
        self.module = PrefixEncoder(
            "mlp",
            backbone.geometry,
            prefix_length,
            embedding_size=embedding_size or backbone.hidden_size,
            bottleneck_size=BOTTLENECK_SIZE,
        )
        self.optimizer = make_optimizer(self.weights())
        self.checkpointing: Any = None

    def loss(self, batch: Sequence[TokenizedExample]) -> Tensor:
        """Mean loss over target tokens."""
        return self.loss_of(collate(self.backbone, batch))

    def loss_of(self, row: Batch) -> Tensor:
        """`loss` of a batch of tensors."""
        losses = batch_loss(self.backbone, self.module(), row)
        return (losses * row.weights("token", row.num_targets, len(row.labels))).sum()

    def rows(self, batch: Sequence[TokenizedExample]) -> list[Batch]:
        """The packed rows of a step, one pass each."""
        parts = divide(self.backbone, batch, MOST_POSITIONS, share_beginnings=True)
        return [collate(self.backbone, part, share_beginnings=True) for part in parts]

    def backward(self, batch: Sequence[TokenizedExample]) -> float:
        """See `Trained`."""
        batches = self.rows(batch)
        num_tokens = sum(len(part.labels) for part in batches)
        prefix = self.module()
        leaf = prefix.leaves()
        weights = [part.weights("token", part.num_targets, num_tokens) for part in batches]
        step = PendingStep(0.0, batches, weights, prefix, leaf, 0, num_tokens)
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

    def site(self) -> Any:
        """See `Side`."""
        return self.module.sites["decoder"]

    def positions(self, batch: Sequence[TokenizedExample]) -> int:
        """See `Side`."""
        return sum(row.input_ids.numel() for row in self.rows(batch))


def kv_width(backbone: Backbone) -> int:
    """The width of PEFT's embedding: one layer's keys."""
    shape = backbone.geometry["decoder"][0]
    return shape.num_kv_heads * shape.key_dim


def make_side(variant: str, prefix_length: int, backbone_name: str = DEFAULT_BACKBONE) -> PeftSide | OurSide:
    """Load a backbone with a trainable prefix, of the same size on both sides."""
    torch.manual_seed(0)
    library, dtype = VARIANTS[variant.removesuffix(RECOMPUTED)]
    if library == "PEFT":
        return PeftSide(backbone_name, dtype, prefix_length)
    backbone = load_backbone(backbone_name, dtype=dtype, device="cpu")
    side = OurSide(backbone, prefix_length, kv_width(backbone))
    # Entered for the side's whole life; the attribute keeps it alive.
    side.checkpointing = gradient_checkpointing(backbone.model, variant.endswith(RECOMPUTED))
    side.checkpointing.__enter__()
    return side


def num_target_tokens(batch: Sequence[TokenizedExample]) -> int:
    """Tokens with a loss: those of every target, with its end token."""
    return sum(len(target) for group in batch for target in group.targets)


# --- do both compute the same? ---------------------------------------------------------------------------------------


@torch.no_grad()
def copy_weights(source: Side, target: Side) -> None:
    """Copy a side's prefix to another, bit for bit.

    Raises:
        DifferenceError: Their shapes differ.
    """
    for old, new in zip(source.weights(), target.weights(), strict=True):
        if old.shape != new.shape:
            raise DifferenceError(f"parameters differ in shape: {tuple(old.shape)} and {tuple(new.shape)}.")
        new.copy_(old)


def require_same_backbone(one: PeftSide | OurSide, other: PeftSide | OurSide) -> None:
    """Check that two backbones are equal bit for bit.

    Raises:
        DifferenceError: They are not.
    """
    # PEFT's prompt encoder is not a part of the model.
    first, second = (
        {name.removeprefix("base_model."): value for name, value in side.model.state_dict().items()}
        for side in (one, other)
    )
    if first.keys() != second.keys() or not all(torch.equal(first[name], second[name]) for name in first):
        raise DifferenceError("the two backbones' weights differ.")


def compare(reference: Side, other: Side, batch: Sequence[TokenizedExample]) -> dict[str, float]:
    """Relative differences of loss, flat prefix's gradient and all parameters' gradients, at equal parameters."""
    copy_weights(reference, other)
    return _distances(_gradients(reference, batch), _gradients(other, batch))


def _distances(one: Gradients, other: Gradients) -> dict[str, float]:
    (one_loss, one_flat, one_weights), (other_loss, other_flat, other_weights) = one, other
    names = "embedding", "weight_1", "bias_1", "weight_2", "bias_2"
    return {
        "loss": abs(one_loss - other_loss) / abs(one_loss),
        "prefix_gradient": distance(one_flat, other_flat),
        **{f"{name}_gradient": distance(a, b) for name, a, b in zip(names, one_weights, other_weights, strict=True)},
    }


def require_equal(reference: PeftSide, other: Side, batch: Sequence[TokenizedExample]) -> dict[str, float]:
    """`compare`, and refuse differences larger than rounding.

    A difference above `TOLERANCE` is rounding where both are as near to float64's result: a gradient can be a small sum
    of large numbers, as that of a long random prefix is.

    Raises:
        DifferenceError: Loss or a gradient differs by more than `TOLERANCE`, and is more than `TIMES` as far from
            float64's as the reference's.
    """
    differences = compare(reference, other, batch)
    wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE}
    if wrong:
        exact = reference.in_float64(batch)
        own = _distances(exact, _gradients(reference, batch))
        others = _distances(exact, _gradients(other, batch))
        wrong = {name: value for name, value in wrong.items() if not others[name] <= TIMES * own[name]}
    if wrong:
        listed = ", ".join(f"{name} by {value:.2e}" for name, value in wrong.items())
        raise DifferenceError(
            f"PEFT and prefixtune do not compute the same in float32 (allowed {TOLERANCE:g}): {listed}."
        )
    return differences


def _gradients(side: Side, batch: Sequence[TokenizedExample]) -> Gradients:
    flat: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        flat.append(output)

    handle = side.site().register_forward_hook(keep)
    try:
        loss, copies = gradients(side, batch)
    finally:
        handle.remove()
    gradient = flat[0].grad
    assert gradient is not None
    # PEFT computes the prefix once per row.
    summed = gradient.sum(0) if gradient.dim() == 3 else gradient
    return loss, summed, copies


def distance(one: Tensor, other: Tensor) -> float:
    """The norm of the difference of two tensors, relative to the first."""
    return float((one - other).norm() / one.norm())
