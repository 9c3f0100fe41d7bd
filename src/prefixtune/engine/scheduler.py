"""Who computes what in the next step: every running text its next token, and prompts in bounded pieces beside them.

A free slot goes to the tenant who holds the fewest, so that none starves another; within a tenant, first come, first
served. Knows nothing of models.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from prefixtune.engine.sequence import TokenSequence

__all__ = ["ScheduledSequence", "Scheduler"]


IDLE_PREFILL_FACTOR = 4
"""How much larger pieces of prompts are where no text is held up by them: larger products are quicker."""


@dataclass(frozen=True, eq=False)
class ScheduledSequence:
    """A piece of one text to be computed in a step.

    Attributes:
        sequence: The text.
        count: How many of its tokens, from the first that is not computed yet.
    """

    sequence: TokenSequence
    count: int

    @property
    def wants_logits(self) -> bool:
        """Whether the text's next token follows from it."""
        return self.count == self.sequence.num_uncomputed


class Scheduler:
    """Queues and slots.

    Args:
        num_slots: Texts that run at once.
        prefill_tokens: Most prompt tokens computed in a step beside texts that are being written, which wait meanwhile;
            where there are none, four times as many.
    """

    def __init__(self, num_slots: int, prefill_tokens: int) -> None:
        self.prefill_tokens = prefill_tokens
        # The tenant whose turn was longest ago comes first.
        self.waiting: OrderedDict[str, deque[TokenSequence]] = OrderedDict()
        self.num_waiting = 0
        self.running: list[TokenSequence] = []
        self.free = list(range(num_slots))
        self._held: Counter[str] = Counter()

    def add(self, sequences: Iterable[TokenSequence]) -> None:
        """Queue texts of one request."""
        for sequence in sequences:
            self.waiting.setdefault(sequence.request.tenant, deque()).append(sequence)
            self.num_waiting += 1

    def admit(self) -> list[TokenSequence]:
        """Give free slots to waiting texts; returns those that got one."""
        admitted = []
        while self.free and self.waiting:
            # The first of those who hold the fewest.
            tenant = min(self.waiting, key=self._held.__getitem__)
            queue = self.waiting.pop(tenant)
            sequence = queue.popleft()
            self.num_waiting -= 1
            if queue:
                self.waiting[tenant] = queue
            # The lowest free slot: running slots stay close together.
            sequence.slot = heapq.heappop(self.free)
            self._held[tenant] += 1
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def plan(self) -> tuple[list[ScheduledSequence], list[ScheduledSequence]]:
        """The next step's work: texts that add one token, by slot; and pieces of prompts, the oldest first.

        Up to half of the room for prompts goes to the oldest; the rest to the shortest first, which need not wait
        behind long ones.
        """
        ready = [s for s in self.running if not s.to_encode]
        singles = sorted((s for s in ready if s.num_uncomputed == 1), key=lambda s: s.slot)
        # Of texts with one prompt, the first computes it, and the others wait for it (see `followers`).
        firsts = {s.request.id: s for s in reversed(ready) if s.num_uncomputed > 1}
        prompts = [s for s in ready if firsts.get(s.request.id) is s]
        counts = dict.fromkeys(prompts, 0)
        room = self._room(bool(singles))
        if prompts:
            counts[prompts[0]] = min(prompts[0].num_uncomputed, (room + 1) // 2)
            room -= counts[prompts[0]]
        for sequence in sorted(prompts, key=lambda s: s.num_uncomputed):
            more = min(sequence.num_uncomputed - counts[sequence], room)
            counts[sequence] += more
            room -= more
        return [ScheduledSequence(s, 1) for s in singles], [
            ScheduledSequence(s, count) for s, count in counts.items() if count
        ]

    def followers(self) -> list[tuple[TokenSequence, TokenSequence]]:
        """Texts that still lack what another text of the same request has computed of their prompt, each with that."""
        known: dict[str, TokenSequence] = {}
        lacking = []
        for sequence in self.running:
            if sequence.to_encode or sequence.num_uncomputed > 1:
                if sequence.request.n > 1:
                    lacking.append(sequence)
            elif sequence.num_computed_tokens >= sequence.num_given - 1:
                known.setdefault(sequence.request.id, sequence)
        return [(sequence, known[sequence.request.id]) for sequence in lacking if sequence.request.id in known]

    def sources(self) -> list[TokenSequence]:
        """Texts whose sources an encoder reads next: the oldest first, one of a request, as many as there is room for.

        A source is read in one piece; one at least is read, however long it is.
        """
        chosen: dict[str, TokenSequence] = {}
        room = self._room(any(not s.to_encode for s in self.running))
        for sequence in self.running:
            if sequence.to_encode and sequence.request.id not in chosen:
                if chosen and sequence.to_encode > room:
                    break
                chosen[sequence.request.id] = sequence
                room -= sequence.to_encode
        return list(chosen.values())

    def _room(self, someone_waits: bool) -> int:
        return self.prefill_tokens * (1 if someone_waits else IDLE_PREFILL_FACTOR)

    def release(self, sequence: TokenSequence) -> None:
        """Take a text out, wherever it is; its slot is free at once."""
        tenant = sequence.request.tenant
        if sequence.slot >= 0:
            self.running.remove(sequence)
            heapq.heappush(self.free, sequence.slot)
            sequence.slot = -1
            self._held[tenant] -= 1
            if not self._held[tenant]:
                del self._held[tenant]
            return
        queue = self.waiting.get(tenant)
        if queue is not None and sequence in queue:
            queue.remove(sequence)
            self.num_waiting -= 1
            if not queue:
                del self.waiting[tenant]
