"""Jinja templates that came in a file, rendered within limits: transformers' sandbox bounds neither time nor memory.

A template is rewritten when it is compiled, so that whatever takes time or makes something larger is paid for from a
budget: turns of loops, sums, slices, comparisons, calls, filters and output. The same template gives the same text as
in transformers.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_MAX_WORK = 2**24
"""Characters, list items and steps that one text may take."""
_MAX_SECONDS = 2.0
_STEP = 64
"""What a turn of a loop or a call takes besides the text in it."""
_MAX_NUMBER = 2**31
_MAX_RANGE = 10_000

_STRING_METHODS = frozenset(
    {"capitalize", "endswith", "find", "lower", "lstrip", "removeprefix", "removesuffix", "rsplit", "rstrip", "split"}
    | {"splitlines", "startswith", "strip", "title", "upper"}
)
_DICT_METHODS = frozenset({"get", "items", "keys", "values"})
_FILTERS = frozenset(
    {"capitalize", "count", "d", "default", "first", "last", "length", "list", "lower", "rejectattr", "safe"}
    | {"selectattr", "string", "title", "trim", "upper"}
)
_TESTS = frozenset(
    {"boolean", "defined", "even", "false", "integer", "iterable", "mapping", "none", "number", "odd", "sequence"}
    | {"string", "true", "undefined"}
)


class TemplateFault(Exception):
    """A template cannot be compiled, refuses the messages, or takes too much; the message says why."""


class _Budget:
    """What is left of the work and the time for one text."""

    def __init__(self) -> None:
        self._left = _MAX_WORK
        self._deadline = time.monotonic() + _MAX_SECONDS

    def spend(self, amount: int) -> None:
        self._left -= amount
        if self._left < 0:
            raise SecurityError(f"it takes more than {_MAX_WORK:,} steps and characters")
        if time.monotonic() > self._deadline:
            raise SecurityError(f"it takes more than {_MAX_SECONDS:g} seconds")


_budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)


def render_bounded(template: str, variables: Mapping[str, Any]) -> str:
    """The text of a template.

    >>> render_bounded("{% for m in messages %}<{{ m.role }}>{% endfor %}", {"messages": [{"role": "user"}]})
    '<user>'

    Args:
        template: Its text.
        variables: What it reads: strings, numbers, lists and dicts.

    Raises:
        TemplateFault: It cannot be compiled, raises an error, or takes too much.
    """
    compiled = compile_template(template)
    token = _budget.set(_Budget())
    try:
        return str(compiled.render(variables))
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise TemplateFault(_one_line(error)) from None
    except RecursionError:
        raise TemplateFault("it is nested too deeply") from None
    finally:
        _budget.reset(token)


@functools.lru_cache(maxsize=64)
def compile_template(template: str) -> Any:
    """Compile a template, within the same limits.

    Raises:
        TemplateFault: It is no template, or uses what is not allowed.
    """
    try:
        return _environment().from_string(template)
    except (TemplateError, SyntaxError, ValueError, TypeError, AssertionError) as error:
        line = getattr(error, "lineno", None)
        raise TemplateFault(f"{f'line {line}: ' if line else ''}{_one_line(error)}") from None
    except (RecursionError, MemoryError):
        raise TemplateFault("it is nested too deeply") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _spend(amount: int) -> None:
    budget = _budget.get()
    # None: the template is being compiled.
    if budget is not None:
        budget.spend(amount)


def _weigh(value: Any) -> Any:
    """The value itself; its size is paid for, that of everything within it too."""
    if isinstance(value, str):
        _spend(1 + len(value))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _weigh(key)
            _weigh(item)
    elif isinstance(value, list | tuple):
        _spend(1)
        for item in value:
            _weigh(item)
    else:
        _spend(1)
    return value


def _count(values: Any, cost: int) -> Iterator[Any]:
    """The values, each paid for."""
    for value in values:
        _spend(cost)
        yield value


def _raise(message: Any) -> None:
    raise TemplateError(str(message)[:300])


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 8):
        raise SecurityError("tojson takes an indent from 0 to 8")
    _weigh(value)
    made = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return str(_weigh(made))


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > _MAX_RANGE:
        raise SecurityError(f"a range has more than {_MAX_RANGE:,} numbers")
    return numbers


class _Namespace(Namespace):
    """Jinja's, without names that begin with an underscore, which reach Python's own attributes."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *others = args
        values = dict(*others, **kwargs)
        for name in values:
            _Namespace._check(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise SecurityError(f"a namespace has no attribute {name!r}")


class _Generation(Extension):
    """`{% generation %}`, by which transformers marks what the assistant wrote: nothing but what is in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return _Bounds().visit(tree)  # type: ignore[no-any-return]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and not isinstance(left, int | float):
            _weigh(left)
            _weigh(right)
        elif operator == "**" or not all(
            isinstance(side, int | float) and abs(side) < _MAX_NUMBER for side in (left, right)
        ):
            raise SecurityError(f"it calculates {operator!r} with something else than small numbers")
        return super().call_binop(context, operator, left, right)

    def is_safe_callable(self, obj: Any) -> bool:
        if isinstance(obj, Macro) or obj in (_raise, _range, _Namespace):
            return True
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name in _STRING_METHODS:
            _spend(len(owner))
            return True
        if isinstance(owner, dict) and name in _DICT_METHODS:
            return True
        raise SecurityError(f"it calls {name or type(obj).__name__!r}, which a stored template may not")

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _spend(_STEP)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str | list | tuple):
            _weigh(result)
        return result


class _Bounds(NodeTransformer):
    """Has a compiled template pay for what it does."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.recursive:
            raise SecurityError("recursive loops are not allowed")
        texts = [text.data for text in node.find_all(nodes.TemplateData)]
        texts += [text.value for text in node.find_all(nodes.Const) if isinstance(text.value, str)]
        cost = nodes.Const(_STEP + sum(map(len, texts)))
        node.iter = nodes.Filter(node.iter, "_count", [cost], [], None, None)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts: list[nodes.Expr] = [_filter(part, "string") for part in node.nodes]
        return functools.reduce(nodes.Add, parts)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filter(node.expr, "_weigh")
        for operand in node.ops:
            operand.expr = _filter(operand.expr, "_weigh")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, "_weigh") if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, "_weigh")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, "_weigh")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, "_weigh") if node.ctx == "load" else node


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


def _paid(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for the texts and lists that it takes and returns."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, str | list | tuple | dict):
                _weigh(value)
        result = function(*args, **kwargs)
        return _weigh(result) if isinstance(result, str | list | tuple) else result

    return call


@functools.cache
def _environment() -> _BoundedEnvironment:
    environment = _BoundedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        # Constants would be computed while there is no budget.
        optimized=False,
        extensions=[_Generation, loopcontrols],
        finalize=_weigh,
    )
    environment.filters = {name: _paid(environment.filters[name]) for name in _FILTERS}
    environment.filters |= {"tojson": _to_json, "_count": _count, "_weigh": _weigh}
    environment.tests = {name: environment.tests[name] for name in _TESTS}
    environment.globals = {"raise_exception": _raise, "range": _range, "namespace": _Namespace}
    return environment
