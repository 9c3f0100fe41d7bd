"""Templates that come with a prefix are rendered within limits: none of them hangs, or takes the memory."""

from __future__ import annotations

import time

import pytest

from prefixtune.errors import CheckpointError
from prefixtune.prefix.bounded_template import TemplateFault, compile_template, render_bounded
from prefixtune.prefix.text_format import read_text_format

MESSAGES = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for i in range(100000) %}{% endfor %}", "a range has more than"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "it takes more than"),
        ("{% for i in range(9999) %}" + "x" * 15000 + "{% endfor %}", "it takes more than"),
        ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "recursive loops"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nested too deeply"),
        ("{% set x = 'a' * 1000000000 %}", "small numbers"),
        ("{{ 9**9**9 }}", "small numbers"),
        ("{{ '%1000000000d' % 1 }}", "small numbers"),
        ("{{ 'a'.center(1000000000) }}", "calls 'center'"),
        ("{{ '{:1000000000}'.format(1) }}", "which a stored template may not"),
        ("{{ 'ab'.replace('', 'c') }}", "calls 'replace'"),
        ("{% set x = 'aaaaaaaa' %}" + "{% set x = x ~ x %}" * 60, "it takes more than"),
        ("{% set x = 'aaaaaaaa' %}" + "{% set x = x + x %}" * 60, "it takes more than"),
        ("{% set x %}aaaa{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60, "it takes more than"),
        ("{% set x = messages %}" + "{% set x = x + x %}" * 60 + "{{ x }}", "it takes more than"),
        ("{% set a = [1] %}" + "{% set a = [a, a] %}" * 60 + "{{ a == a }}", "it takes more than"),
        (r"{% set x = '\\' %}" + "{% set x = x | tojson %}" * 200, "it takes more than"),
        (
            "{% set ns = namespace(x='ab') %}{% for i in range(999) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
            "it takes",
        ),
        ("{{ messages | map(attribute='content') | join }}", "No filter named 'join'"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ namespace(__class__='x') }}", "no attribute"),
        ("{% include 'x' %}", "no loader"),
        ("{{ raise_exception('only two roles') }}", "only two roles"),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
    ],
)
def test_what_is_refused(template: str, says: str) -> None:
    start = time.monotonic()
    with pytest.raises(TemplateFault) as caught:
        render_bounded(template, {"messages": MESSAGES})
    assert says in str(caught.value)
    assert time.monotonic() - start < 10


def test_long_conversations_are_rendered() -> None:
    messages = [{"role": ("user", "assistant")[n % 2], "content": "word " * 400} for n in range(1000)]
    template = (
        "{% for m in messages %}{% if m.role != 'x' %}[{{ m.role }}]{{ m.content + '\\n' }}{% endif %}{% endfor %}"
    )
    assert render_bounded(template, {"messages": messages}).count("[user]") == 500


def test_marks_of_the_assistants_turns_change_nothing() -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert render_bounded(template, {"messages": MESSAGES}) == "SHi"


def test_a_header_with_a_template_that_cannot_be_used() -> None:
    with pytest.raises(CheckpointError, match="No filter named 'join'"):
        read_text_format({"text_format": {"chat_template": "{{ messages | join }}"}})
    with pytest.raises(CheckpointError, match="chat_template"):
        read_text_format({"text_format": {"chat_template": "x" * 16385}})
    stored = read_text_format({"text_format": {"chat_template": "{{ messages[0].content }}"}})
    assert stored is not None
    assert stored.is_chat
    assert compile_template(stored.chat_template) is compile_template(stored.chat_template)
