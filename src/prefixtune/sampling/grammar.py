"""Output that follows a JSON schema: which tokens may come next, by llguidance (the extra `json`)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import RequestError
from prefixtune.utils.extras import needs_extra
from prefixtune.utils.folders import expand_home

_MAX_SCHEMA_LENGTH = 2**16
_MAX_DEPTH = 64
_MAX_DIVISOR, _DECIMALS = 10_000, 9
"""A grammar has a state for every remainder of a division: 10,000 take 20 ms, a million 13 s and gigabytes."""
_WHITE_SPACE = r"[ \n\t]{0,16}"
"""Between the parts of a JSON text. Without a limit, a small model may never end it."""
# So limited, a usual schema takes some ms, and a large one up to 0.2 s and 12 MB; a step of a text's grammar, rarely
# above 10 ms.
_LIMITS = {
    "initial_lexer_fuel": 100_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 25_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}


def import_llguidance() -> Any:
    """The library.

    Raises:
        ConfigError: It is not installed.
    """
    with needs_extra("json", "output by a JSON schema", ", or ask for the form in the prompt"):
        import llguidance
        import llguidance.hf
        import llguidance.numpy
    return llguidance


class Grammar:
    """A JSON schema for one backbone's tokens, or how far one text is in it.

    What the texts of a schema find out about it is kept for all of them, up to a limit: of a grammar that reaches it,
    all texts fail.

    Args:
        matcher: llguidance's, at the beginning; this object's alone from now on.
        num_tokens: Of the vocabulary.
        schema: As JSON text.

    Attributes:
        finished: The text is complete, and nothing may follow.
    """

    def __init__(self, matcher: Any, num_tokens: int, schema: str) -> None:
        self.schema, self.finished = schema, False
        self._matcher, self._num_tokens = matcher, num_tokens

    def start(self) -> Grammar:
        """The same grammar, for a new text."""
        return Grammar(self._matcher.deep_copy(), self._num_tokens, self.schema)

    def accept(self, token: int) -> None:
        """Go on after a generated token, which must be allowed.

        Raises:
            RequestError: It is not allowed, or the grammar became too complex.
        """
        if not self._matcher.consume_token(token):
            raise self._error()
        self.finished = bool(self._matcher.is_stopped())

    @staticmethod
    def allowed(
        grammars: Mapping[int, Grammar], vocab_size: int, device: torch.device
    ) -> tuple[Bool[Tensor, "B V"], dict[int, RequestError]]:
        """Which tokens may come next in each text, in order; and by a text's number, why its grammar is too complex."""
        import llguidance.numpy

        num_tokens, failed = next(iter(grammars.values()))._num_tokens, dict[int, RequestError]()
        bits = torch.zeros(len(grammars), -(-num_tokens // 32), dtype=torch.int32, pin_memory=device.type == "cuda")
        for row, (number, grammar) in enumerate(grammars.items()):
            llguidance.numpy.fill_next_token_bitmask(grammar._matcher, bits.numpy(), row)
            if grammar._matcher.is_error():
                failed[number] = grammar._error()
        packed, places = bits.to(device, non_blocking=True).view(torch.uint8), torch.arange(8, device=device)
        mask = (packed[..., None] >> places.to(torch.uint8) & 1).flatten(1)[:, :num_tokens]
        # A model may have more scores than its tokenizer has tokens, or fewer.
        return torch.nn.functional.pad(mask[:, :vocab_size], (0, max(0, vocab_size - num_tokens))).bool(), failed

    def _error(self) -> RequestError:
        reason = _reason(self._matcher)
        reason = "nothing fits it" if reason == "NoExtensionBias" else reason
        return RequestError(f"the text cannot go on by its JSON schema: {reason}.", hint="use a simpler schema.")


def compile_json_schema(backbone: Backbone, schema: str | Mapping[str, Any]) -> Grammar:
    """A JSON schema as a grammar; takes some ms, and up to 0.2 s for the largest ones, without Python's lock.

    Args:
        backbone: Whose tokens are used.
        schema: The schema, as JSON text or an object.

    Raises:
        RequestError: It is no schema, too large, uses what is not supported, or nothing fits it; or the tokenizer
            cannot be used for this.
        ConfigError: llguidance is not installed.
    """
    library = import_llguidance()
    text = check_json_schema(schema)
    tokenizer = grammar_tokenizer(backbone)
    parsed = library.LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _WHITE_SPACE})
    matcher = library.LLMatcher(tokenizer, parsed, log_level=0, limits=library.LLParserLimits(**_LIMITS))
    grammar = Grammar(matcher, tokenizer.vocab_size, text)
    try:
        if matcher.is_error():
            raise RequestError(f"{_reason(matcher)}.")
        # What is too much for the first token shows at the second.
        state, cpu = grammar.start(), torch.device("cpu")
        mask, failed = Grammar.allowed({0: state}, tokenizer.vocab_size, cpu)
        if not failed:
            state.accept(int(mask.int().argmax()))
            failed = {} if state.finished else Grammar.allowed({0: state}, tokenizer.vocab_size, cpu)[1]
        if failed:
            raise failed[0]
    except RequestError as error:
        hint = 'leave that out of the schema, or use {"type": "object"}.'
        raise RequestError(f"the JSON schema cannot be used: {error.message}", hint=hint) from None
    return grammar


def check_json_schema(schema: str | Mapping[str, Any]) -> str:
    """A schema as compact JSON text.

    Raises:
        RequestError: It is not JSON, no object, or too large, or has a divisor (`multipleOf`) that is.
    """
    hint = 'write an object such as {"type": "object", "properties": {"name": {"type": "string"}}}.'
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"the JSON schema is not JSON: {error}.", hint=hint) from None
    if not isinstance(value, Mapping):
        raise RequestError("the JSON schema is not an object.", hint=hint)
    if len(text) > _MAX_SCHEMA_LENGTH:
        what = f"the JSON schema has {len(text):,} characters; at most {_MAX_SCHEMA_LENGTH:,} are allowed."
        raise RequestError(what, hint="leave out descriptions and examples.")
    if _depth(text) > _MAX_DEPTH:
        raise RequestError(f"the JSON schema is nested more than {_MAX_DEPTH} levels deep.", hint="use $defs and $ref.")
    _check_divisors(text)
    return text


def _check_divisors(schema: str) -> None:
    """Refuse large ones.

    A number may have to be a multiple of several, wherever they stand in the schema (`allOf`, `$ref`): of their least
    common multiple at the most.

    Raises:
        RequestError: Their least common multiple is too large, or one has too many decimals.
    """
    # Within a string, a backslash would stand before the second quotation mark.
    found = {abs(Fraction(number)) for number in re.findall(r'"multipleOf":(-?[\d.eE+-]+)', schema)}
    scaled = [number * 10**_DECIMALS for number in found if number]
    multiple = math.lcm(*(number.numerator for number in scaled))
    # 1.25, which is 1,250,000,000 here, counts as 125.
    for _ in range(_DECIMALS):
        multiple = multiple if multiple % 10 else multiple // 10
    if multiple > _MAX_DIVISOR or any(number.denominator > 1 for number in scaled):
        raise RequestError(
            f"the JSON schema's multipleOf have a least common multiple above {_MAX_DIVISOR:,} (without its decimal "
            f"point), or more than {_DECIMALS} decimals.",
            hint="leave multipleOf out, and check the numbers yourself.",
        )


def read_json_schema(value: str) -> str:
    """A schema as compact JSON text, from such a text or from a file.

    Raises:
        RequestError: It cannot be read, or as `check_json_schema`.
    """
    if not value.lstrip().startswith("{"):
        try:
            with open(expand_home(value), encoding="utf-8") as file:
                value = file.read(4 * _MAX_SCHEMA_LENGTH)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise RequestError(f"{value!r} cannot be read: {reason}.", hint="give a file with a JSON schema.") from None
    return check_json_schema(value)


def _depth(text: str) -> int:
    """At most how deep a JSON text is nested; brackets within strings count too."""
    depth = deepest = 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        deepest = max(deepest, depth)
    return deepest


def grammar_tokenizer(backbone: Backbone) -> Any:
    """Llguidance's view of a backbone's tokens; made once, which takes about a second, with Python's lock held.

    Raises:
        RequestError: llguidance cannot use the tokenizer.
        ConfigError: It is not installed.
    """
    tokenizer = backbone.tokenizer_cache.get("llguidance")
    if tokenizer is None:
        library = import_llguidance()
        size = max(backbone.vocab_size, len(backbone.tokenizer))
        try:
            ends = [backbone.eos_id, *backbone.more_end_ids]
            tokenizer = library.hf.from_tokenizer(backbone.tokenizer, n_vocab=size, eos_token=ends)
        except (KeyboardInterrupt, SystemExit):
            raise
        # A panic of the library's Rust is no Exception.
        except BaseException as error:
            what = f"the tokenizer of {backbone.name!r} cannot be used for JSON schemas: {error}."
            raise RequestError(what, hint="ask for the form in the prompt, or use another backbone.") from error
        backbone.tokenizer_cache["llguidance"] = tokenizer
    return tokenizer


def _reason(matcher: Any) -> str:
    """What is wrong, in one line; of a regular expression, the reason comes last, below a drawing of the place."""
    lines = str(matcher.get_error()).strip().splitlines()
    reason = f"{lines[0]} {lines[-1].removeprefix('error: ')}" if lines[0].endswith(":") else lines[0]
    return reason.rstrip(".")[:300]
