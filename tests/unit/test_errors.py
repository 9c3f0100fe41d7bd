"""What messages quote may come from anybody."""

import pytest

from prefixtune.errors import PrefixError, describe_value, short_repr


@pytest.mark.parametrize("quoted", ["a\nerror: forged", "\x1b[2J", "\ud800", "\u2028", "x" * 500_000])
def test_an_error_is_one_printable_line_whatever_it_quotes(quoted):
    error = PrefixError(f"the file is for {quoted}.", hint=f"get {quoted} again.")
    for text in (error.message, error.hint, str(error), error.args[0]):
        assert text.isprintable()
        assert len(text) < 10_000
    assert short_repr(quoted).isprintable()
    assert len(short_repr(quoted)) <= 60
    assert len(describe_value(quoted)) <= 80


def test_a_number_that_python_refuses_to_write():
    assert short_repr(10**5000)
    assert describe_value(10**5000)
