"""Labels: the names of a training set, and sets that have others."""

from __future__ import annotations

import pytest

from prefixtune.data import Example
from prefixtune.data.forms import tagged
from prefixtune.data.labels import check_labels, label_names
from prefixtune.errors import DataError


def labelled(*labels: str) -> list[Example]:
    return [Example(f"text {number}", (label,)) for number, label in enumerate(labels)]


def test_the_names_are_the_distinct_labels_in_order() -> None:
    assert label_names(labelled("b", "a", "b", "c")) == ("a", "b", "c")
    assert label_names(iter(labelled("10", "9"))) == ("10", "9")


def test_the_names_of_tags_are_whole_pairs_after_o() -> None:
    examples = [tagged(["a", "b"], ["B-Y", "O"]), tagged(["a"], ["I-X-2"])]
    assert label_names(iter(examples), "tagging") == ("O", "B-X-2", "I-X-2", "B-Y", "I-Y")


@pytest.mark.parametrize("examples", [[], labelled("a", "a"), [*labelled("a", "b"), Example("x", ("a", "b"))]])
def test_one_label_is_no_classification(examples: list[Example]) -> None:
    with pytest.raises(DataError):
        label_names(examples)


@pytest.mark.parametrize("examples", [[], [tagged(["a"], ["O"])], [tagged(["a"], ["B-X"]), Example("x", ("O",))]])
def test_no_span_is_no_tagging(examples: list[Example]) -> None:
    with pytest.raises(DataError):
        label_names(examples, "tagging")


def test_an_unknown_label_is_named_with_its_example_and_the_nearest_known_one() -> None:
    names = label_names([tagged(["a"], ["B-STATION"])], "tagging")
    check_labels([tagged(["a", "b"], ["B-STATION", "I-STATION"])], names, "tagging")
    with pytest.raises(DataError, match=r"'B-STATIN' of example 2 .*'B-STATION'"):
        check_labels([tagged(["a"], ["O"]), tagged(["b"], ["B-STATIN"])], names, "tagging")
    with pytest.raises(DataError, match=r"'bda' of example 1 .*'bad'"):
        check_labels(labelled("bda"), ["bad", "good"])
