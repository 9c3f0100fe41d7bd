"""Decode steps as CUDA graphs: what a step of a given size launches is recorded once and then replayed from one call.

A step of a decoder-only model in which every text adds one token always launches the same kernels, so that most of its
time on a GPU is Python's. Its row has one token for each of the first slots, a power of two of them, and attends to a
power of two of their positions; a slot that adds no token in the step has a token all the same, whose keys and values
go to an idle slot and whose logits are dropped. What differs from step to step lies in buffers on the device.

Nothing here was run on a GPU yet; tests replay the operations that were recorded on a CPU.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from prefixtune.attention.forward import forward_with_backend
from prefixtune.attention.kernels import ScoreOptions
from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.attention import QuerySpan, batch_attention, slot_mask
from prefixtune.engine.kv_cache import INITIAL_CAPACITY, KVCache
from prefixtune.prefix.geometry import Site

__all__ = ["WAITING", "DecodeGraphs", "RefuseWaits", "can_capture", "capture"]

_log = logging.getLogger(__name__)
_MOST_GRAPHS = 32
"""Sizes of steps that are kept; of more, the one that was used longest ago is recorded anew when it comes again."""
WAITING = tuple(f"aten.{name}" for name in ("item", "_local_scalar_dense", "is_nonzero", "equal", "nonzero"))
"""What operations are called that need a tensor's numbers on the processor."""
_COPIES = ("aten._to_copy", "aten.copy_")
_WARMUPS = 2
"""Times that a step runs before it is recorded, so that libraries choose their kernels and take their memory."""

Compute = Callable[[], Tensor]


def can_capture(backbone: Backbone) -> bool:
    """Whether steps of a model may be recorded: a decoder-only one, as a whole on one CUDA device."""
    return (
        backbone.device.type == "cuda" and backbone.kind == "decoder" and not hasattr(backbone.model, "hf_device_map")
    )


def capture(compute: Compute, device: torch.device, pool: Any) -> Compute:
    """Record what a function launches on a CUDA device; the result launches it again.

    Args:
        compute: Reads and writes the same memory in every call.
        device: Where.
        pool: Of the memory between its kernels, which graphs that never run at once may share.

    Raises:
        RuntimeError: It waits for the device. A recording is not even begun then: one that fails leaves the stream and
            the random generator of the device as they are within one.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        own, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(own)
        with torch.cuda.stream(stream), RefuseWaits():
            for _ in range(_WARMUPS):
                compute()
        own.wait_stream(stream)
        try:
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                out = compute()
        finally:
            # After a failure torch may leave the stream of the recording in place.
            torch.cuda.set_stream(own)

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


class RefuseWaits(TorchDispatchMode):
    """Refuses operations for which the processor waits for a device, as no graph can have them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every operation."""
        name = str(func)
        if name.startswith(WAITING):
            raise RuntimeError(f"{name} waits for the device")
        out = func(*args, **(kwargs or {}))
        if name.startswith(_COPIES) and len({tensor.device.type for tensor in _tensors((args, out))}) > 1:
            raise RuntimeError(f"{name} copies between devices")
        return out


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_iter(values) if isinstance(value, Tensor)]


class DecodeGraphs:
    """Steps in which every text adds one token, as CUDA graphs, recorded when a size comes for the first time.

    Args:
        backbone: A model that `can_capture` allows.
        kv_cache: Keys and values of all slots; the last one is idle: nobody's.
    """

    def __init__(self, backbone: Backbone, kv_cache: KVCache) -> None:
        self._backbone, self._kv_cache = backbone, kv_cache
        self._num_slots = self._idle_slot = kv_cache.num_slots - 1
        self._failed = False
        self._graphs: OrderedDict[tuple[int, int], Compute] = OrderedDict()
        self._recorded_on: list[tuple[int, int]] = []
        self._pool: Any = None
        with torch.inference_mode():
            # Per row: its token, its position, the slot that its keys and values go to, and the length of its prefix.
            self._inputs = torch.zeros(4, self._num_slots, dtype=torch.long, device=backbone.device)

    def __call__(self, ids: Sequence[int], spans: Sequence[QuerySpan]) -> Float[Tensor, "B V"] | None:
        """The logits of a step; None: no graph can be made, which is logged once.

        Args:
            ids: One token of each text.
            spans: Where the tokens are, by slot; their slots have room for them.
        """
        if self._failed:
            return None
        try:
            with torch.inference_mode():
                return self._run(ids, spans)
        # Whatever it is, the same step can be computed without a graph: it writes the same again.
        except Exception as error:
            self._failed = True
            self._graphs.clear()
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            _log.warning("steps of %s run without CUDA graphs: %s", self._backbone.name, first)
            return None

    def _run(self, ids: Sequence[int], spans: Sequence[QuerySpan]) -> Float[Tensor, "B V"]:
        rows = min(self._num_slots, _power_of_two(spans[-1].slot + 1))
        needed = max(INITIAL_CAPACITY, *(span.stop for span in spans))
        length = min(self._kv_cache.capacity, _power_of_two(needed))
        self._fill(rows, ids, spans)
        logits = self._graph(rows, length)()
        slots = torch.tensor([span.slot for span in spans], device=logits.device)
        # A copy: the next step writes its own logits there.
        return logits[0, slots]

    def _fill(self, rows: int, ids: Sequence[int], spans: Sequence[QuerySpan]) -> None:
        """Set what the step reads; rows without a text compute token 0 at position 0 of the idle slot."""
        values = [[0] * rows, [0] * rows, [self._idle_slot] * rows, [0] * rows]
        for token, span in zip(ids, spans, strict=True):
            for row, value in zip(values, (token, span.start, span.slot, span.prefix_length), strict=True):
                row[span.slot] = value
        self._inputs[:, :rows].copy_(torch.tensor(values))

    def _graph(self, rows: int, length: int) -> Compute:
        """What computes steps of a size."""
        buffers = (*self._kv_cache.keys, *self._kv_cache.values)
        present = [(buffer.data_ptr(), buffer.shape[2]) for buffer in buffers]
        if present != self._recorded_on:
            # The slots have grown: graphs would write to memory that is no longer theirs.
            self._graphs.clear()
            self._recorded_on, self._pool = present, torch.cuda.graph_pool_handle()
        size = rows, length
        if size not in self._graphs:
            while len(self._graphs) >= _MOST_GRAPHS:
                self._graphs.popitem(last=False)
            self._graphs[size] = capture(lambda: self._compute(rows, length), self._backbone.device, self._pool)
        self._graphs.move_to_end(size)
        return self._graphs[size]

    def _compute(self, rows: int, length: int) -> Float[Tensor, "1 R V"]:
        """Compute the buffers' step; everything that differs from step to step is read on the device."""
        ids, positions, slots, prefix_lengths = self._inputs[:, :rows]
        attention = _RowAttention(self._kv_cache, length, positions, slots, prefix_lengths)
        backbone = self._backbone
        with backbone.autocast():
            return forward_with_backend(
                backbone.model, backbone.layout, ids[None], positions[None], attention, logits_to_keep=None
            )


@dataclass(eq=False)
class _RowAttention:
    """Attention of a step with one token for each of the first slots.

    Attributes:
        kv_cache: The slots.
        length: How many of a slot's positions are attended to at most.
        positions: Each token's, in its slot.
        slots: Where each token's keys and values go; another slot than the row's hides the row's own token.
        prefix_lengths: Of each slot's text.
    """

    kv_cache: KVCache
    length: int
    positions: Int[Tensor, " R"]
    slots: Int[Tensor, " R"]
    prefix_lengths: Int[Tensor, " R"]
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(
        self,
        layer: tuple[Site, int],
        query: Float[Tensor, "1 Hq R Dk"],
        key: Float[Tensor, "1 H R Dk"],
        value: Float[Tensor, "1 H R Dv"],
        scores: ScoreOptions,
    ) -> Float[Tensor, "1 R Hq Dv"]:
        """Write the tokens' keys and values, and attend to the slots."""
        keys, values = self.kv_cache.keys[layer[1]], self.kv_cache.values[layer[1]]
        keys[self.slots, :, self.positions] = key[0].transpose(0, 1)
        values[self.slots, :, self.positions] = value[0].transpose(0, 1)
        key, value = (buffer[: len(self.slots), :, : self.length] for buffer in (keys, values))
        mask = self._mask(scores.window, query.dtype)
        return batch_attention(query[0].transpose(0, 1), key, value, mask, scores)[None]

    def _mask(self, window: int | None, dtype: torch.dtype) -> Float[Tensor, "R 1 1 S"]:
        if window not in self._masks:
            columns = torch.arange(self.length, device=self.positions.device)
            rows = self.positions[:, None], columns, window, self.prefix_lengths[:, None], dtype
            self._masks[window] = slot_mask(*rows)[:, None, None]
        return self._masks[window]


def _power_of_two(number: int) -> int:
    """The lowest that is no less.

    >>> [_power_of_two(number) for number in (1, 2, 3, 33)]
    [1, 2, 4, 64]
    """
    return 1 << (number - 1).bit_length()
