"""Translation edit rate (Snover et al. 2006): how few edits and shifts of blocks turn a text into its reference.

The rules are those of sacrebleu's TER, and so of Tercom, down to which shift is tried first and which of two equal ones
is taken; only the arithmetic is another. The edit distance of a shifted text is told by bit-parallel steps over whole
columns, begun where the shift begins, and the search ends where no shift can help: the words that two texts do not
share must be edited whatever their order. That is an order of magnitude quicker.

Knows nothing of files, tokenization and other metrics: words in, numbers out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence

__all__ = ["edits"]

# Tercom's limits, and sacrebleu's on the number of shifts looked at.
_MAX_SHIFT_SIZE = 10
_MAX_SHIFT_DISTANCE = 50
_MAX_CANDIDATES = 1000

_KEEP, _SUBSTITUTE, _DELETE, _INSERT = range(4)


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
    distance = _Distance(reference)
    while True:
        states, now = distance.start(words)
        if now == least:
            return shifts + now
        best: tuple[int, int, int, int] | None = None
        shifted = words
        for start, size, target in _shifts(words, reference):
            moved = _move(words, start, size, target)
            candidate = (now - distance.resume(states, moved, min(start, target)), size, -start, -target)
            looked += 1
            if best is None or candidate > best:
                best, shifted = candidate, moved
            if looked >= _MAX_CANDIDATES:
                return shifts + now
        if best is None or best[0] <= 0:
            return shifts + now
        words, shifts = shifted, shifts + 1


class _Distance:
    """Levenshtein distances to one reference (Myers 1999, Hyyrö 2003): a column of the table is two bit masks."""

    def __init__(self, reference: Sequence[Hashable]) -> None:
        self.size = len(reference)
        self.mask = (1 << self.size) - 1
        self.where: dict[Hashable, int] = defaultdict(int)
        for position, word in enumerate(reference):
            self.where[word] |= 1 << position

    def start(self, words: Sequence[Hashable]) -> tuple[list[tuple[int, int, int]], int]:
        """The state before each word, and the distance."""
        states = [(self.mask, 0, self.size)]
        for word in words:
            states.append(self._steps(states[-1], (word,)))
        return states, states[-1][2]

    def resume(self, states: Sequence[tuple[int, int, int]], words: Sequence[Hashable], position: int) -> int:
        """The distance of words that are the old ones before a position."""
        return self._steps(states[position], words[position:])[2]

    def _steps(self, state: tuple[int, int, int], words: Sequence[Hashable]) -> tuple[int, int, int]:
        up, down, score = state  # bits: where a cell is one above, or one below, the cell before it in its column
        mask, where, last = self.mask, self.where, 1 << (self.size - 1)
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
        return up, down, score


def _shifts(words: Sequence[Hashable], reference: Sequence[Hashable]) -> Iterator[tuple[int, int, int]]:
    """Start, size and target of every shift that Tercom looks at, in its order."""
    align, wrong_words, wrong_reference = _alignment(words, reference)
    places: dict[Hashable, list[int]] = defaultdict(list)
    for position, word in enumerate(reference):
        places[word].append(position)
    for start, first in enumerate(words):
        for there in places.get(first, ()):
            if abs(there - start) > _MAX_SHIFT_DISTANCE:
                continue
            most = min(_MAX_SHIFT_SIZE, len(words) - start, len(reference) - there)
            for size in range(1, most + 1):
                if words[start + size - 1] != reference[there + size - 1]:
                    break
                # Both sides must be wrong now, and the block must not already stand within its own place.
                if not any(wrong_words[start : start + size]) or not any(wrong_reference[there : there + size]):
                    continue
                if start <= align[there] < start + size:
                    continue
                before = -1
                for place in range(there - 1, there + size):
                    target = 0 if place < 0 else align[place] + 1
                    if target != before:
                        before = target
                        yield start, size, target


def _move(words: list[Hashable], start: int, size: int, target: int) -> list[Hashable]:
    """Take a block out and put it before the word that stands at `target` (behind it, where it is within the block)."""
    block, end = words[start : start + size], start + size
    if target < start:
        return words[:target] + block + words[target:start] + words[end:]
    if target > end:
        return words[:start] + words[end:target] + block + words[target:]
    return words[:start] + words[end : target + size] + block + words[target + size :]


def _alignment(words: Sequence[Hashable], reference: Sequence[Hashable]) -> tuple[list[int], list[bool], list[bool]]:
    """For each word of the reference where it stands in the text, and which words of either are in error.

    Of equally short ways the one is taken that keeps or substitutes rather than deletes, and deletes rather than
    inserts, seen from the end.
    """
    row = list(range(len(reference) + 1))
    ways = [[_INSERT] * len(row)]
    for number, word in enumerate(words, start=1):
        above, row, way = row, [number], [_DELETE]
        for column, other in enumerate(reference, start=1):
            same = word == other
            cost, step = above[column - 1] + (not same), _KEEP if same else _SUBSTITUTE
            if above[column] + 1 < cost:
                cost, step = above[column] + 1, _DELETE
            if row[column - 1] + 1 < cost:
                cost, step = row[column - 1] + 1, _INSERT
            row.append(cost)
            way.append(step)
        ways.append(way)
    align, wrong_words, wrong_reference = [0] * len(reference), [True] * len(words), [True] * len(reference)
    at, there = len(words), len(reference)
    while at or there:
        step = ways[at][there]
        at -= step != _INSERT
        there -= step != _DELETE
        if step == _INSERT:
            align[there] = at - 1
        elif step != _DELETE:
            align[there] = at
            wrong_words[at] = wrong_reference[there] = step == _SUBSTITUTE
    return align, wrong_words, wrong_reference
