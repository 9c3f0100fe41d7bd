"""A model's output head, and what is computed of its logits: some rows at a time, so that they never are in memory."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefixtune.attention.layout import using

if TYPE_CHECKING:
    from prefixtune.backbone.backbone import Backbone

Compute = Callable[[Tensor, slice, Tensor | None], tuple[Tensor, ...]]
"""Takes the logits (n, V) of some rows, which these are, and where d loss / d logits goes (None: it is not wanted).
Returns n numbers or rows of numbers each; of several, the first is the loss."""

_CPU_BYTES = 3 * 2**20
"""What logits that are computed with at a time take on a CPU, in float32: 16 rows of 49,152, which its caches hold."""
_CPU_HEAD_BYTES = 48 * 2**20
"""What logits that are made at a time take on a CPU, in float32: enough rows for quick products."""
_BYTES = 2**27
"""Both elsewhere, where few large steps are quick."""

_catching: contextvars.ContextVar[list[Tensor]] = contextvars.ContextVar("catching")


def _catch(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Keep what a head is given, and have it make a single row of logits; not of another thread's calls."""
    caught = _catching.get(None)
    if caught is None:
        return None
    caught.append(given[0])
    return given[0][:1, :1], *given[1:]


class OutputHead:
    """What makes logits of a model's last hidden states, wherever the model itself has scores in between.

    The model runs as a whole, so that its own code (and whatever splits its weights among processes) decides what the
    head reads; but of its logits a single row is made.

    Attributes:
        width: V, the tokens of the vocabulary that get a score.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone, self._module = backbone, backbone.model.get_output_embeddings()
        ids = torch.arange(4, device=backbone.device)[None] % backbone.num_embeddings
        decoder = {"decoder_input_ids": ids} if backbone.kind == "encoder-decoder" else {}
        self._rest: Callable[[Tensor], Tensor] | None = None
        with torch.no_grad():
            logits: Tensor = backbone.forward(ids, **decoder).logits
            hidden = self._caught(ids, **decoder)
            self.width = int(logits.shape[-1])
            if hidden is not None and hidden.shape[:2] == logits.shape[:2]:
                for self._rest in _rests(backbone.model):
                    if torch.equal(self(hidden).to(logits.dtype), logits):
                        return
        # This model does something else with its scores.
        self._rest = None

    @property
    def trains(self) -> bool:
        """Whether it has weights that are trained."""
        return any(parameter.requires_grad for parameter in self._module.parameters())

    def inputs(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Float[Tensor, "B T E"]:
        """What it reads; arguments as for `Backbone.forward`. Of a model that is not understood: the logits."""
        hidden = None if self._rest is None else self._caught(input_ids, attention_mask, **kwargs)
        if hidden is None:
            hidden = self._backbone.forward(input_ids, attention_mask, **kwargs).logits
        return hidden

    def _caught(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """What the head is given in a run of the model; None: the model does not call it."""
        caught: list[Tensor] = []
        hook = self._module.register_forward_pre_hook(_catch)
        try:
            with using(_catching, caught):
                self._backbone.forward(*args, **kwargs)
        finally:
            hook.remove()
        return caught[0] if caught else None

    def __call__(self, hidden: Float[Tensor, "*N E"]) -> Float[Tensor, "*N V"]:
        """The logits of what it reads."""
        if self._rest is None:
            return hidden
        with self._backbone.autocast():
            return self._rest(self._module(hidden))


def _rests(model: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """What models do with the scores of their output layer: nothing, a cap, a scale or a bias."""
    config = model.config.get_text_config(decoder=True)
    yield lambda scores: scores
    if cap := getattr(config, "final_logit_softcapping", None):
        yield lambda scores: torch.tanh(scores / cap) * cap
    if scale := getattr(config, "logits_scaling", None):
        yield lambda scores: scores / scale
    if factor := getattr(config, "logit_scale", None):
        yield lambda scores: scores * factor
    if (bias := getattr(model, "final_logits_bias", None)) is not None:
        yield lambda scores: scores + bias.to(scores.device)


def head_pass(head: OutputHead, hidden: Float[Tensor, "N E"], compute: Compute) -> tuple[Tensor, ...]:
    """What `compute` makes of the logits of N rows; its loss is differentiable in the hidden states.

    The gradient by the hidden states is computed in the same pass, so that of N x V numbers only a few rows are in
    memory; but for a head whose own weights are trained.

    Args:
        head: The model's.
        hidden: What it reads (`OutputHead.inputs`), one row per label.
        compute: Called with some rows at a time, in order.
    """
    if head.trains and torch.is_grad_enabled():
        return pass_in_chunks(lambda logits: logits, head(hidden), head.width, compute)
    return pass_in_chunks(head, hidden, head.width, compute)


def pass_in_chunks(
    head: Callable[[Tensor], Tensor], hidden: Float[Tensor, "N E"], width: int, compute: Compute
) -> tuple[Tensor, ...]:
    """`head_pass` through any function of rows that has nothing to train and gives `width` logits for each."""
    made: tuple[Tensor, ...] = _HeadPass.apply(hidden, head, width, compute)  # type: ignore[no-untyped-call]
    return made


def _chunks(count: int, width: int, size: int) -> Iterator[slice]:
    """Rows of so many numbers in float32 as take at most `size` bytes, even if there are none."""
    most = max(1, size // (4 * width))
    return (slice(first, min(first + most, count)) for first in range(0, max(count, 1), most))


class _HeadPass(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, hidden: Tensor, head: Callable[[Tensor], Tensor], width: int, compute: Compute) -> Any:
        wanted = context.needs_input_grad[0]
        slopes, on_cpu, made = torch.empty_like(hidden) if wanted else None, hidden.device.type == "cpu", []
        for rows in _chunks(len(hidden), width, _CPU_HEAD_BYTES if on_cpu else _BYTES):
            given = hidden[rows].detach()
            with torch.set_grad_enabled(wanted):
                logits = head(given.requires_grad_() if wanted else given)
            scores, by_logits = logits.detach(), torch.empty_like(logits) if wanted else None
            for part in _chunks(len(scores), width, _CPU_BYTES if on_cpu else _BYTES):
                where = slice(rows.start + part.start, rows.start + part.stop)
                made.append(compute(scores[part], where, None if by_logits is None else by_logits[part]))
            if slopes is not None:
                (slopes[rows],) = torch.autograd.grad(logits, given, by_logits)
        context.slopes, found = slopes, tuple(torch.cat(parts) for parts in zip(*made, strict=True))
        context.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        slopes: Tensor = context.slopes
        return (slopes * gradients[0][:, None]).to(slopes.dtype), None, None, None
