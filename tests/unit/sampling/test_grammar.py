"""JSON schemas that would take too much time or memory are refused before they are compiled."""

import pytest

from prefixtune.errors import RequestError
from prefixtune.sampling.grammar import check_json_schema


def divisible(by):
    return {"type": "number", "multipleOf": by}


@pytest.mark.parametrize("by", [1, 10_000, -7, 1e-9, 12.34])
def test_divisors_that_may_be_used(by):
    assert "multipleOf" in check_json_schema(divisible(by))


@pytest.mark.parametrize("by", [10_001, -1_234_567, 12.345, 5e-324, 1e308])
def test_a_large_divisor(by):
    with pytest.raises(RequestError, match="multipleOf"):
        check_json_schema({"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}, divisible(by)]}}})


def test_small_divisors_that_have_a_large_multiple_in_common():
    check_json_schema({"type": "object", "properties": {"price": divisible(0.01), "number": divisible(1_000)}})
    check_json_schema({"allOf": [divisible(97), divisible(89)]})
    check_json_schema({"a": divisible(100), "b": divisible(500)})
    # Zero, which no number is a multiple of, hides none of the others.
    parts = [divisible(0), divisible(97), divisible(89), divisible(2)]
    for schema in ({"allOf": parts}, {"$ref": "#/$defs/a", **divisible(991), "$defs": {"a": divisible(997)}}):
        with pytest.raises(RequestError, match="multipleOf"):
            check_json_schema(schema)


def test_what_looks_like_a_divisor():
    for value in (True, "12345678", None, {"type": "string"}):
        check_json_schema({"properties": {"multipleOf": value}, "multipleOf": value})
    with pytest.raises(RequestError, match="is not JSON"):
        check_json_schema('{"multipleOf": 1e999}')
