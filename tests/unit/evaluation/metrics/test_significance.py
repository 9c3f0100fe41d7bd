"""Intervals, comparisons and parts: against scoring texts anew, and as statistics should behave."""

import random
from itertools import product

import pytest

from prefixtune.evaluation.metrics import bootstrap, measure, randomize

METRICS = ["bleu", "nist", "rouge_1", "ter", "chrf"]
WORDS = list("abcdefghijklmnopq")


def items(count, wrong, seed=0):
    """Random references, and outputs of which a share of the words is wrong."""
    rng = random.Random(f"references {seed}")
    references = [[" ".join(rng.choices(WORDS, k=rng.randint(6, 14))) for _ in range(2)] for _ in range(count)]
    rng = random.Random(f"outputs {seed} {wrong}")
    outputs = [
        " ".join(rng.choice(WORDS) if rng.random() < wrong else word for word in item[0].split()) for item in references
    ]
    return outputs, references


def compare(first, second, references, metric, **draws):
    one, other = (measure(texts, references, metrics=[metric])[metric] for texts in (first, second))
    return randomize(one, other, **draws)


@pytest.mark.parametrize("metric", METRICS)
def test_a_part_scores_as_its_texts_scored_anew(metric):
    outputs, references = items(30, 0.3)
    chosen = [4, 0, 0, 17, 17, 29]
    part = measure(outputs, references, metrics=[metric])[metric].part(chosen)
    anew = measure([outputs[number] for number in chosen], [references[number] for number in chosen], metrics=[metric])
    assert part.score == pytest.approx(anew[metric].score)
    # A part of a part counts from the part's own beginning.
    again = measure([outputs[0], outputs[29]], [references[0], references[29]], metrics=[metric])[metric]
    assert part.part([1, 5]).score == pytest.approx(again.score)


def test_a_part_is_padded_to_its_own_references():
    protocol = "dart"
    outputs, references = (
        ["the cat is on", "a b c d e f"],
        [["the cat is on the mat in the house"], ["a b c", "d", "e"]],
    )
    part = measure(outputs, references, protocol=protocol, metrics=["bleu"])["bleu"].part([0])
    alone = measure(outputs[:1], references[:1], protocol=protocol, metrics=["bleu"])["bleu"]
    assert part.score == pytest.approx(alone.score)


def test_an_interval_is_that_of_sacrebleus_bootstrap():
    import sacrebleu

    outputs, references = items(200, 0.3)
    low, high = bootstrap(measure(outputs, references, metrics=["bleu"])["bleu"])
    theirs = sacrebleu.BLEU().corpus_score(outputs, list(zip(*references, strict=True)), n_bootstrap=1000)
    assert (high - low) / 2 == pytest.approx(theirs._ci, rel=0.15)
    assert (low + high) / 2 == pytest.approx(theirs._mean, rel=0.02)


@pytest.mark.parametrize("metric", ["bleu", "ter"])
def test_a_system_compares_with_itself_and_with_a_worse_one(metric):
    good, references = items(120, 0.2)
    bad, _ = items(120, 0.5)
    same = compare(good, list(good), references, metric)
    assert (same.difference, same.p_value) == (0, 1)
    found = compare(good, bad, references, metric)
    assert found.p_value == 1 / 1001
    assert (found.difference > 0) == found.higher_is_better == (metric != "ter")
    assert (found.first, found.second) == (
        measure(good, references, metrics=[metric])[metric].score,
        measure(bad, references, metrics=[metric])[metric].score,
    )
    turned = compare(bad, good, references, metric)
    assert (turned.difference, turned.p_value) == (-found.difference, found.p_value)
    assert "randomization" in found.method


def test_a_p_value_is_the_share_of_all_exchanges():
    """Every one of the 2 ** 9 exchanges, each scored by its texts, against random ones."""
    (first, references), (second, _), metric = items(9, 0.2), items(9, 0.45), "rouge_1"
    texts = list(zip(first, second, strict=True))

    def difference(exchanges):
        sides = ([pair[one != swapped] for pair, swapped in zip(texts, exchanges, strict=True)] for one in (0, 1))
        one, other = (measure(side, references, metrics=[metric])[metric].score for side in sides)
        return one - other

    observed = abs(difference([False] * 9))
    reached = [abs(difference(exchanges)) >= observed - 1e-9 for exchanges in product([False, True], repeat=9)]
    found = compare(first, second, references, metric, samples=20_000)
    assert found.p_value == pytest.approx(sum(reached) / len(reached), abs=0.01)


def test_one_better_item_is_not_significant():
    """Whichever way the coin falls for that item, the difference is as large."""
    outputs, references = items(40, 0.3)
    better = [references[0][0], *outputs[1:]]
    assert compare(better, outputs, references, "ter").p_value == 1
