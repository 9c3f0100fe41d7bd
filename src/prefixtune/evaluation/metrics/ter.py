"""Translation edit rate (Snover et al. 2006): how few edits and shifts of blocks turn a text into its reference.

The rules are those of sacrebleu's TER, and so of Tercom, including which shift is tried first and which of two equal
shifts is taken; only the arithmetic differs. The edit distance of a shifted text is computed by bit-parallel steps over
whole columns, starting where the shift starts, and shifts that cannot gain enough are skipped: the words that two texts
do not share must be edited whatever their order. That is an order of magnitude faster.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from prefixtune.evaluation.metrics.base import Array, ItemStatistics
from prefixtune.evaluation.metrics.texts import Texts

__all__ = ["edits", "ter"]


# Tercom's limits, and sacrebleu's on the number of shifts looked at.
_MAX_SHIFT_SIZE = 10
_MAX_SHIFT_DISTANCE = 50
_MAX_CANDIDATES = 1000

_State: TypeAlias = tuple[int, int, int]


def ter(texts: Texts) -> ItemStatistics:
    """Translation edit rate, 0 upward, lower is better: the fewest edits over the mean length of the references.

    Case is ignored; words are separated by white space.
    """
    rows = []
    for hypothesis, references in zip(texts.hypotheses, texts.references, strict=True):
        words = hypothesis.lower().split()
        others = [reference.lower().split() for reference in references]
        rows.append([min(edits(words, other) for other in others), sum(map(len, others)) / len(others)])

    def total(sums: Array) -> float:
        return float(sums[0] / sums[1]) if sums[1] else float(sums[0] > 0)

    how = "sacrebleu's rules of TER, case:lc|tok:tercom|norm:no|punct:yes|asian:no"
    return ItemStatistics(np.array(rows, dtype=float), total, f"prefixtune ({how}); protocol {texts.protocol.name}")


def edits(hypothesis: Sequence[Hashable], reference: Sequence[Hashable]) -> int:
    """The number of insertions, deletions, substitutions and block shifts that make the reference of the hypothesis.

    Greedy in the shifts, as Tercom is: each is the one that lowers the edit distance most, until none does.

    >>> edits("a b c d e".split(), "d e a b c".split()), edits("a b".split(), "a x b".split())
    (1, 1)
    """
    if not reference:
        return len(hypothesis)
    words, shifts, looked = list(hypothesis), 0, 0
    common = (Counter(hypothesis) & Counter(reference)).total()
    least = max(len(hypothesis), len(reference)) - common
    where: dict[Hashable, int] = defaultdict(int)
    for position, word in enumerate(reference):
        where[word] |= 1 << position
    while True:
        states = _columns(((1 << len(reference)) - 1, 0, len(reference)), words, where, len(reference))
        now = states[-1][2]
        if now == least:
            return shifts + now
        best, shifted = (0, len(words), 0, 0), words  # a shift that gains nothing is none
        for start, size, target in _shifts(words, reference, states):
            looked += 1
            # Passing a block over some words is deleting and inserting the shorter of both: it gains no more than that.
            passed = start - target if target < start else target - start - size * (target > start + size)
            most = min(now - least, 2 * min(size, passed))
            if (most, size, -start, -target) > best:
                moved = _move(words, start, size, target)
                same = min(start, target)
                gain = now - _columns(states[same], moved[same:], where, len(reference))[-1][2]
                if (gain, size, -start, -target) > best:
                    best, shifted = (gain, size, -start, -target), moved
            if looked >= _MAX_CANDIDATES:
                return shifts + now
        if shifted is words:
            return shifts + now
        words, shifts = shifted, shifts + 1


def _columns(state: _State, words: Sequence[Hashable], where: Mapping[Hashable, int], size: int) -> list[_State]:
    """The columns of the table of edit distances (Myers 1999, Hyyrö 2003): a given one, and one more for each word.

    Args:
        state: Two bit masks: where a cell is one above, and where it is one below, the cell before it in its column;
            and the last cell, the distance to the whole reference.
        words: What follows.
        where: The positions of each word in the reference, as bits.
        size: Words of the reference.
    """
    up, down, score = state
    mask, last = (1 << size) - 1, 1 << (size - 1)
    states = [state]
    for word in words:
        equal = where.get(word, 0)
        same = ((((equal & up) + up) ^ up) | equal | down) & mask
        right_up = down | ((same | up) ^ mask)
        right_down = same & up
        if right_up & last:
            score += 1
        elif right_down & last:
            score -= 1
        right_up = ((right_up << 1) | 1) & mask
        right_down = (right_down << 1) & mask
        up = right_down | ((same | right_up) ^ mask)
        down = right_up & same
        states.append((up, down, score))
    return states


def _shifts(
    words: Sequence[Hashable], reference: Sequence[Hashable], states: Sequence[_State]
) -> Iterator[tuple[int, int, int]]:
    """Start, size and target of every shift that Tercom looks at, in its order."""
    align, wrong_words, wrong_reference = _alignment(words, reference, states)
    positions: dict[Hashable, list[int]] = defaultdict(list)
    for position, word in enumerate(reference):
        positions[word].append(position)
    for start, first in enumerate(words):
        for other in positions.get(first, ()):
            if abs(other - start) > _MAX_SHIFT_DISTANCE:
                continue
            most = min(_MAX_SHIFT_SIZE, len(words) - start, len(reference) - other)
            for size in range(1, most + 1):
                if words[start + size - 1] != reference[other + size - 1]:
                    break
                # Both sides must be wrong now, and the block may not overlap its own target.
                if not any(wrong_words[start : start + size]) or not any(wrong_reference[other : other + size]):
                    continue
                if start <= align[other] < start + size:
                    continue
                before = -1
                for index in range(other - 1, other + size):
                    target = 0 if index < 0 else align[index] + 1
                    if target != before:
                        before = target
                        yield start, size, target


def _move(words: list[Hashable], start: int, size: int, target: int) -> list[Hashable]:
    """Move a block before the word at `target` (behind that word if it is within the block)."""
    block, end = words[start : start + size], start + size
    if target < start:
        return words[:target] + block + words[target:start] + words[end:]
    if target > end:
        return words[:start] + words[end:target] + block + words[target:]
    return words[:start] + words[end : target + size] + block + words[target + size :]


def _alignment(
    words: Sequence[Hashable], reference: Sequence[Hashable], states: Sequence[_State]
) -> tuple[list[int], list[bool], list[bool]]:
    """The position in the text of each word of the reference, and which words of either are wrong.

    Of equally short edits, seen from the end, keeping or substituting is preferred to deleting, and deleting to
    inserting.
    """
    align, wrong_words, wrong_reference = [-1] * len(reference), [True] * len(words), [True] * len(reference)
    at, other, now = len(words), len(reference), states[-1][2]
    while other:
        if at:
            # Cells of the column before, from its bits: the distances of its words to `other - 1` and `other` words.
            up, down, _ = states[at - 1]
            here, mask = 1 << (other - 1), (1 << (other - 1)) - 1
            before = at - 1 + (up & mask).bit_count() - (down & mask).bit_count()
            wrong = words[at - 1] != reference[other - 1]
            if before + wrong == now:
                at, other, now = at - 1, other - 1, before
                align[other], wrong_words[at], wrong_reference[other] = at, wrong, wrong
                continue
            if before + bool(up & here) - bool(down & here) + 1 == now:
                at, now = at - 1, now - 1
                continue
        other, now = other - 1, now - 1
        align[other] = at - 1
    return align, wrong_words, wrong_reference
