"""Time of work on outside text: it grows with the length of the text, and not with its square."""

import contextlib
import time

import pytest

from prefixtune.cli.loading import split_joined
from prefixtune.data.benchmarks import parse_mr
from prefixtune.data.files import iter_file, join_lines
from prefixtune.data.forms import check_template, render
from prefixtune.errors import ConfigError, PrefixError, did_you_mean
from prefixtune.evaluation.metrics.protocols import PROTOCOLS
from prefixtune.training.config import TrainConfig

SIZE = 25_000
"""Characters of the short text; the long one has four times as many."""
TEXTS = {
    "blanks": lambda n: "a" + " " * n + "b",
    "blanks and line breaks": lambda n: "a" + " \n" * (n // 2) + "b",
    "tabs and returns": lambda n: "a" + "\t\r\t\t" * (n // 4) + "b",
    "open brackets": lambda n: "[" * n,
    "open braces": lambda n: "{a" * (n // 2),
    "closed braces": lambda n: "{a}" * (n // 3),
    "digits": lambda n: "1" * n,
    "points": lambda n: "1." * (n // 2),
    "signs": lambda n: "i\u0307" * (n // 2),
    "one word": lambda n: "x" * n,
}
WORK = {
    "join_lines": join_lines,
    "parse_mr": parse_mr,
    "parse_mr's value": lambda text: parse_mr(f"name[{text}"),
    "check_template": check_template,
    "did_you_mean": lambda text: did_you_mean(text, ["prompt", "model", text[:9]]),
    "render": lambda text: render("{column} and {column}", {"column": text}, "the request"),
    **{f"protocol {name}": PROTOCOLS[name].prepare for name in ("plain", "dart")},
}


def seconds(do, text):
    """The least of three times of this process; refusing the text is work, too."""
    times = []
    for _ in range(3):
        begun = time.process_time()
        with contextlib.suppress(PrefixError):
            do(text)
        times.append(time.process_time() - begun)
    return min(times)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("work", WORK)
def test_time_grows_with_the_length_and_not_with_its_square(work, text):
    short, long = (seconds(WORK[work], TEXTS[text](size)) for size in (SIZE, 4 * SIZE))
    # Linear: 4 times; quadratic: 16 times. What takes next to no time is no danger, whatever the noise.
    assert long < max(10 * short, 0.25), f"{short:.4f} s, then {long:.4f} s"


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        (" a \n b ", "a b"), ("a  b", "a  b"), ("a\t \r\n\t\n b  c", "a b  c"), ("a\u2028b", "a\u2028b"),
        ("a \r b", "a b"), (" \n ", ""), ("a \x0b\n\x0c b", "a b"), ("a\u00a0\nb", "a b"),
    ],
)  # fmt: skip
def test_line_breaks_become_one_space_each(text, joined):
    assert join_lines(text) == joined


def test_a_name_of_many_parts_is_refused_at_once():
    begun = time.perf_counter()
    with pytest.raises(ConfigError):
        split_joined("+".join("a" * 100_000))
    assert time.perf_counter() - begun < 2


def test_a_path_with_a_zero_is_a_wrong_value():
    for options in ({"output": "a\0b"}, {"train": "a\0b"}, {"sites": "a\0b"}):
        with pytest.raises(ConfigError):
            TrainConfig(**options)


def test_a_header_of_many_columns_is_read_at_once(tmp_path):
    path = tmp_path / "wide.csv"
    columns = [f"c{number}" for number in range(20_000)]
    path.write_text(",".join(columns) + "\n" + ",".join("1" for _ in columns) + "\n", encoding="utf-8")
    begun = time.perf_counter()
    assert len(next(iter_file(path)).values) == len(columns)
    assert time.perf_counter() - begun < 2
