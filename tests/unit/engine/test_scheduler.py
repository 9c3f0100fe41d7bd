"""Whose turn it is: fair shares of slots, prompts in pieces, and queues that leave nothing behind."""

from collections import Counter

from prefixtune.engine.request import Request
from prefixtune.engine.scheduler import Scheduler
from prefixtune.engine.sequence import TokenSequence
from prefixtune.sampling.detokenizer import Detokenizer


def make(tenant="", prompt=1, number=0):
    request = Request((1,) * prompt, tenant=tenant, id=f"{tenant}-{number}")
    return TokenSequence(request, 0, Detokenizer(str))


def work_off(scheduler):
    """Compute a step, in thought."""
    for work in scheduler.schedule():
        work.sequence.num_computed_tokens += work.num_tokens


# --- fair admission --------------------------------------------------------------------------------------------------


def test_shares_are_equal_however_long_the_texts_are():
    """One tenant's texts run ten times as long, and its slots are not given to it ten times as often."""
    scheduler = Scheduler(6, 64)
    for tenant in ("long", "short", "other"):
        scheduler.add(make(tenant, number=n) for n in range(500))
    ages = {}
    held = Counter()
    for _ in range(300):
        scheduler.admit()
        for sequence in list(scheduler.running):
            ages[sequence] = ages.get(sequence, 0) + 1
            held[sequence.request.tenant] += 1
            if ages[sequence] >= (30 if sequence.request.tenant == "long" else 3):
                scheduler.release(sequence)
    assert max(held.values()) <= 1.05 * min(held.values())


def test_a_text_that_finds_no_room_waits_and_those_behind_it_too():
    scheduler = Scheduler(4, 64)
    scheduler.add([make("one", prompt=9, number=1), make("one", number=2), make("two", number=3)])
    assert scheduler.admit(lambda sequence: len(sequence.request.prompt) < 9) == []
    assert len(scheduler.waiting) == 3
    assert [s.request.id for s in scheduler.admit()] == ["one-1", "two-3", "one-2"]


# --- prompts in pieces -----------------------------------------------------------------------------------------------


def test_running_texts_are_not_held_up_by_prompts():
    scheduler = Scheduler(8, 16)
    writing = [make(number=n) for n in range(3)]
    scheduler.add([*writing, make(prompt=1000, number=9)])
    scheduler.admit()
    for _ in range(5):
        work = scheduler.schedule()
        decodes, prefills = work[:3], work[3:]
        assert [one.sequence for one in decodes] == writing
        assert sum(one.num_tokens for one in prefills) == 16
        assert not any(one.needs_logits for one in prefills)
        for one in prefills:
            one.sequence.num_computed_tokens += one.num_tokens


def test_a_short_prompt_passes_a_long_one_which_goes_on():
    # Nobody waits meanwhile: four times the tokens.
    scheduler = Scheduler(8, 4)
    long, short = make(prompt=1000, number=1), make(prompt=6, number=2)
    scheduler.add([long, short])
    scheduler.admit()
    prefills = scheduler.schedule()
    assert {work.sequence: work.num_tokens for work in prefills} == {long: 10, short: 6}
    assert [work.needs_logits for work in prefills] == [False, True]


def test_the_oldest_prompt_is_not_starved_by_short_ones():
    scheduler = Scheduler(4, 16)
    long = make(prompt=160, number=0)
    scheduler.add([long])
    scheduler.admit()
    steps = 0
    while long.num_uncomputed > 1:
        scheduler.add([make(prompt=16, number=steps)])
        scheduler.admit()
        work_off(scheduler)
        for sequence in list(scheduler.running):
            if sequence is not long and not sequence.num_uncomputed:
                scheduler.release(sequence)
        steps += 1
    assert steps <= 20
