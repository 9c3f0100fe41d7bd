"""Numbers as people read them, and the names of what they measure."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

MISSING = "n/a"
Number = float | int

_NAMES: tuple[str, ...] = ("BLEU", "NIST", "METEOR", "CIDEr", "TER", "ROUGE-1", "ROUGE-2", "ROUGE-L")
_METRICS = {name.lower().replace("-", "_"): name for name in _NAMES}
_METRICS |= {"chrf": "chrF++", "macro_f1": "macro F1", "span_f1": "span F1"}


# What no document may hold: control characters, and halves of surrogate pairs, which UTF-8 cannot write.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def clean(text: Any) -> Any:
    r"""Replace what a document cannot hold by U+FFFD, and write every end of line as a line feed; only in strings.

    >>> clean("a\r\nb\x00"), clean(1)
    ('a\nb�', 1)
    """
    return _UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n")) if type(text) is str else text


def decimals_for(values: Sequence[Number]) -> int:
    """How many decimals a column of scores gets: four where all are below one (METEOR, TER), else two."""
    return 4 if values and max(abs(value) for value in values) < 1 else 2


def fixed(value: Number | None, decimals: int = 2) -> str:
    """A number with a fixed number of decimals, and with commas between thousands.

    >>> fixed(1234.5), fixed(-0.001), fixed(None)
    ('1,234.50', '0.00', 'n/a')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    text = f"{value:,.{decimals}f}"
    return text.lstrip("-") if not text.strip("-0.,") else text


def signed(value: Number, decimals: int) -> str:
    """A difference with its sign.

    >>> signed(0.5, 1), signed(-0.25, 2)
    ('+0.5', '-0.25')
    """
    return f"{'+' * (value >= 0)}{fixed(value, decimals)}"


def short(value: Number) -> str:
    """A number with at most four significant digits, without zeros at its end.

    >>> [short(value) for value in (0.001, 100, 2.34567, 5e-05, 123456)]
    ['0.001', '100', '2.346', '5e-05', '123,456']
    """
    if abs(value) < 1e15 and value == int(value):
        return f"{value:,.0f}"
    return f"{value:,.0f}" if 10_000 <= abs(value) < 1e15 else f"{value:.4g}"


def plain(value: object) -> str:
    """A value of a setting, in words.

    >>> plain(True), plain(None), plain(0.001), plain("e2e"), plain([1, 2])
    ('yes', 'none', '0.001', 'e2e', '1, 2')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return repr(value) if isinstance(value, float) else str(value)


def count(value: Number | None) -> str:
    """A whole number with commas between thousands."""
    return fixed(value, 0)


def size(value: Number | None) -> str:
    """A number of bytes.

    >>> size(640), size(184_912), size(3_700_000)
    ('640 B', '185 kB', '3.7 MB')
    """
    if value is None:
        return MISSING
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= 0.9995 * factor:
            scaled = value / factor
            return f"{scaled:.1f} {unit}" if scaled < 10 else f"{scaled:.0f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: Number | None) -> str:
    """A length of time.

    >>> duration(0.84), duration(43.2), duration(725), duration(7380)
    ('0.8 s', '43 s', '12 min 05 s', '2 h 03 min')
    """
    if seconds is None:
        return MISSING
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, second = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {second:02} s" if second else f"{minutes} min"
    hours, minute = divmod(round(seconds / 60), 60)
    return f"{hours} h {minute:02} min"


def metric_name(key: str) -> str:
    """How a metric is written.

    >>> metric_name("rouge_l"), metric_name("exact_match")
    ('ROUGE-L', 'exact match')
    """
    return _METRICS.get(key, words(key))


def words(key: str) -> str:
    """A key as words.

    >>> words("num_targets"), words("prefix_length")
    ('number of targets', 'prefix length')
    """
    return f"number of {key[4:]}".replace("_", " ") if key.startswith("num_") else key.replace("_", " ")


def natural(text: object) -> tuple[tuple[int, float, str], ...]:
    """A key to sort by, under which 2 comes before 10.

    >>> sorted(["10", "2", "b", "a"], key=natural)
    ['2', '10', 'a', 'b']
    """
    pieces = re.split(r"(\d+(?:\.\d+)?)", str(text))
    return tuple((0, float(piece), "") if index % 2 else (1, 0.0, piece) for index, piece in enumerate(pieces) if piece)


def spread_out(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spread, with the first and the last.

    >>> spread_out(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(items) <= most:
        return list(items)
    return [items[index * (len(items) - 1) // (most - 1)] for index in range(most)]
