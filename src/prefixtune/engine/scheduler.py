"""What a step computes: the next token of every running sequence, and pieces of prompts of bounded size."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from prefixtune.engine.request import Request
from prefixtune.engine.sequence import TokenSequence

IDLE_PREFILL_FACTOR = 4
"""How much larger pieces of prompts are while no sequence is delayed by them: larger products are faster."""


@dataclass(frozen=True, eq=False)
class ScheduledSequence:
    """Tokens of one sequence to compute in a step.

    Attributes:
        sequence: The sequence.
        num_tokens: How many of its tokens, from the first that is not computed yet.
    """

    sequence: TokenSequence
    num_tokens: int

    @property
    def is_last(self) -> bool:
        """Whether nothing of the sequence is left to compute after it."""
        return self.num_tokens == self.sequence.num_uncomputed

    @property
    def needs_logits(self) -> bool:
        """Whether the sequence's next token is sampled after it."""
        return self.is_last and self.sequence.request.sampling.max_new_tokens > 0

    @property
    def num_prompt_logits(self) -> int:
        """After how many of the tokens, the first ones, the log-probability of the prompt's next token is wanted."""
        sequence = self.sequence
        if sequence.request.sampling.prompt_logprobs is None:
            return 0
        return max(0, min(self.num_tokens, sequence.num_input_ids - 1 - sequence.num_computed_tokens))


class _Text(Protocol):
    """A text of a request."""

    request: Request


T = TypeVar("T", bound=_Text)


class FairQueue(Generic[T]):
    """Texts that wait for a slot. The tenant with the fewest slots comes first; within it, first come, first served."""

    def __init__(self) -> None:
        # The tenant who has waited longest for a turn comes first.
        self._waiting: dict[str, deque[T]] = {}
        self._slots_held: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, text: T) -> None:
        """Let a text wait."""
        self._waiting.setdefault(text.request.tenant, deque()).append(text)

    def first(self) -> T:
        """The text whose turn it is; there must be one."""
        # The first of those with the fewest slots.
        return self._waiting[min(self._waiting, key=self._slots_held.__getitem__)][0]

    def take(self, text: T) -> None:
        """Give a slot to the first text."""
        tenant = text.request.tenant
        queue = self._waiting.pop(tenant)
        queue.popleft()
        if queue:
            self._waiting[tenant] = queue
        self._slots_held[tenant] += 1

    def release(self, text: T, *, has_slot: bool) -> None:
        """A text has ended, with a slot or before it had one."""
        tenant = text.request.tenant
        if has_slot:
            self._slots_held[tenant] -= 1
            if not self._slots_held[tenant]:
                del self._slots_held[tenant]
        elif text in self._waiting.get(tenant, ()):
            self._waiting[tenant].remove(text)
            if not self._waiting[tenant]:
                del self._waiting[tenant]


class Scheduler:
    """Queues and slots.

    Args:
        num_slots: Sequences that run at once.
        prefill_tokens: Most prompt tokens computed in a step while sequences are being generated; if there are none,
            four times as many.
        max_prompt_logits: Most tokens in a step of prompts whose log-probabilities are wanted: bounds their memory.
    """

    def __init__(self, num_slots: int, prefill_tokens: int, max_prompt_logits: int = 1024) -> None:
        self.prefill_tokens, self.max_prompt_logits = prefill_tokens, max_prompt_logits
        self.waiting = FairQueue[TokenSequence]()
        self.running: list[TokenSequence] = []
        self.free_slots = list(range(num_slots))

    def add(self, sequences: Iterable[TokenSequence]) -> None:
        """Queue the sequences of one request."""
        for sequence in sequences:
            self.waiting.add(sequence)

    def admit(self, take_room: Callable[[TokenSequence], bool] = lambda _: True) -> list[TokenSequence]:
        """Assign free slots to waiting sequences; returns those that got one.

        Args:
            take_room: Reserves memory for a sequence. If there is none now, this sequence and all behind it wait.
        """
        admitted = []
        while self.free_slots and len(self.waiting) and take_room(sequence := self.waiting.first()):
            self.waiting.take(sequence)
            sequence.slot = heapq.heappop(self.free_slots)
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def schedule(self) -> list[ScheduledSequence]:
        """The next step's work: decodes (one token each), then prefills (pieces of prompts), the oldest first.

        Up to half of the prompt tokens of a step go to the oldest prompt; the rest to the shortest prompts first, which
        need not wait behind long ones.
        """
        ready = [s for s in self.running if not s.num_unencoded]
        decodes = [s for s in ready if s.num_uncomputed == 1]
        # Of sequences with one prompt, the first computes it, and the others wait for it (see `shared_prompts`).
        first_of_request = {s.request.id: s for s in reversed(ready) if s.num_uncomputed > 1}
        prefills = [s for s in ready if first_of_request.get(s.request.id) is s]
        counts = dict.fromkeys(prefills, 0)
        budget = self._prompt_budget(delays_others=bool(decodes))
        logits_budget = self.max_prompt_logits
        # The oldest has the first half, and takes part in the rest.
        shares = [(s, (budget + 1) // 2) for s in prefills[:1]]
        shares += [(s, budget) for s in sorted(prefills, key=lambda s: s.num_uncomputed)]
        for sequence, share in shares:
            more = min(sequence.num_uncomputed - counts[sequence], share, budget)
            if sequence.request.sampling.prompt_logprobs is not None:
                more = min(more, logits_budget)
                logits_budget -= more
            counts[sequence] += more
            budget -= more
        pieces = [ScheduledSequence(s, count) for s, count in counts.items() if count]
        return [ScheduledSequence(s, 1) for s in decodes] + pieces

    def shared_prompts(self) -> list[tuple[TokenSequence, TokenSequence]]:
        """Pairs of one request: a sequence whose prompt is not computed yet, and one whose prompt is."""
        computed: dict[str, TokenSequence] = {}
        uncomputed = []
        for sequence in self.running:
            if sequence.request.n > 1:
                if sequence.num_unencoded or sequence.num_uncomputed > 1:
                    uncomputed.append(sequence)
                elif sequence.num_computed_tokens >= sequence.num_input_ids - 1:
                    computed.setdefault(sequence.request.id, sequence)
        return [(s, computed[s.request.id]) for s in uncomputed if s.request.id in computed]

    def sequences_to_encode(self) -> list[TokenSequence]:
        """Sequences whose source the encoder reads next: one of a request, the oldest first, as many as fit.

        A source is read in one piece; at least one is read, however long it is.
        """
        chosen: dict[str, TokenSequence] = {}
        budget = self._prompt_budget(delays_others=any(not s.num_unencoded for s in self.running))
        for sequence in self.running:
            if sequence.num_unencoded and sequence.request.id not in chosen:
                if chosen and sequence.num_unencoded > budget:
                    break
                chosen[sequence.request.id] = sequence
                budget -= sequence.num_unencoded
        return list(chosen.values())

    def _prompt_budget(self, *, delays_others: bool) -> int:
        return self.prefill_tokens * (1 if delays_others else IDLE_PREFILL_FACTOR)

    def release(self, sequence: TokenSequence) -> None:
        """Remove a sequence, running or waiting; its slot is free at once."""
        self.waiting.release(sequence, has_slot=sequence.slot >= 0)
        if sequence.slot >= 0:
            self.running.remove(sequence)
            heapq.heappush(self.free_slots, sequence.slot)
            sequence.slot = -1
