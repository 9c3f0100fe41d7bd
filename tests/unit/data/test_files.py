"""Opening data files: what separates fields, encodings, Parquet, pipes; what is refused says why in one line."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import os
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from data_files import write
from prefixtune.data import read_task, streams
from prefixtune.data.files import iter_file, read_file
from prefixtune.errors import ConfigError, DataError


def rows_of(path: Path, data: str | bytes) -> list[dict[str, Any]]:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return [row.values for row in read_file(path)]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        # Semicolons, decimal commas, quoted semicolons, blank lines first.
        ("name;price\nAromi;1,50\n", [{"name": "Aromi", "price": "1,50"}]),
        ('\n;\nname;text\nAromi;"Eat; go."\n', [{"name": "Aromi", "text": "Eat; go."}]),
        ('"name, first";text\nAromi;Eat.\n', [{"name, first": "Aromi", "text": "Eat."}]),
        # Where a header has both, the first row tells, then the number of columns; what is quoted separates nothing.
        ("name;x,text\nAromi,a;b\n", [{"name;x": "Aromi", "text": "a;b"}]),
        ("name;x,text\nAromi,Eat.\n", [{"name;x": "Aromi", "text": "Eat."}]),
        ("name;text, long\nAromi;Eat.\n", [{"name": "Aromi", "text, long": "Eat."}]),
        (
            'name;"price, EUR";text\nAromi;1,50;Eat.\nBibi;2,50;"Eat; go."\n',
            [
                {"name": "Aromi", "price, EUR": "1,50", "text": "Eat."},
                {"name": "Bibi", "price, EUR": "2,50", "text": "Eat; go."},
            ],
        ),
        # Excel's first line, in the forms in which it is met.
        ("sep=;\nname;text\nAromi;Eat, go.\n", [{"name": "Aromi", "text": "Eat, go."}]),
        ('"sep=,"\r\nname,text;long\r\nAromi,Eat.\r\n', [{"name": "Aromi", "text;long": "Eat."}]),
        ("SEP=\t\nname\ttext\nAromi\tEat, go.\n", [{"name": "Aromi", "text": "Eat, go."}]),
        ('"a;b"\nx;y\n', [{"a;b": "x;y"}]),
        # One column.
        ("text\nEat; go.\n", [{"text": "Eat; go."}]),
    ],
)
def test_what_separates_the_fields_of_a_csv(text: str, rows: list[dict[str, str]], tmp_path: Path) -> None:
    assert rows_of(tmp_path / "a.csv", text) == rows


def test_a_declared_separator_is_one_that_is_read_and_keeps_the_numbers_of_the_lines(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv, line 1 says that '\|' separates the fields"):
        rows_of(tmp_path / "a.csv", "sep=|\nname|text\nAromi|Eat.\n")
    with pytest.raises(DataError, match=r"a\.csv, line 3 has 3 fields; the header has 2: name, text"):
        rows_of(tmp_path / "a.csv", "sep=;\nname;text\nAromi;Eat;go.\n")
    assert rows_of(tmp_path / "a.tsv", "sep=\t\nname\ttext\nAromi\tEat.\n") == [{"name": "Aromi", "text": "Eat."}]


def test_quoted_fields_of_a_tsv_may_hold_lines_and_tabs(tmp_path: Path) -> None:
    text = 'code\tname\n"a\n\tb"\t"x\n\ty"\n'
    assert rows_of(tmp_path / "a.tsv", text) == [{"code": "a\n\tb", "name": "x\n\ty"}]


def test_a_row_of_another_length_names_the_separator(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv, line 2 has 3 fields; the header has 2: name, text") as raised:
        rows_of(tmp_path / "a.csv", "name;text\nAromi;Eat; go.\n")
    assert "';'" in raised.value.hint


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ],
)
def test_text_with_a_byte_order_mark_is_read(mark: bytes, encoding: str, tmp_path: Path) -> None:
    data = mark + "name,text\nCafé,日本\n".encode(encoding)
    assert rows_of(tmp_path / "a.csv", data) == [{"name": "Café", "text": "日本"}]


@pytest.mark.parametrize(
    ("name", "data", "reported", "hint"),
    [
        ("a.csv", "name\nCafé\n".encode("latin-1"), "line 2: byte 0xe9 is not UTF-8", "iconv -f WINDOWS-1252"),
        ("a.csv", "name\nx\n".encode("utf-16-le"), "line 1: there is a NUL character", ""),
        ("a.csv", codecs.BOM_UTF16_LE + b"a\x00b", "is not UTF-16-LE", "UTF-8"),
        ("a.csv.gz", b"name\nx\n", "ends with .gz but is not a gzip file", "remove .gz"),
        ("a.csv.gz", gzip.compress(b"name\nx\n", mtime=0)[:-9], "is a broken gzip file", "again"),
        ("a.csv", gzip.compress(b"name\nx\n", mtime=0), "does not end with .gz", "add .gz"),
        (
            "a.tsv",
            b'text\tlabel\n"Wow\tgood\nFine\tgood\nSo"\tbad\n',
            "line 2: a field that starts with a quote",
            "JSON lines",
        ),
        ("a.json", b'{"text": "a"}\n{"text": "b"}\n', "has one object a line", ".jsonl"),
        ("a.json", b'{"text": "a",\n "b": }', "line 2, column 7: not JSON", "missing quote"),
        ("a.xlsx", b"PK", "has the ending '.xlsx'; allowed: .jsonl, .json, .csv, .tsv, .parquet", ""),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    name: str, data: bytes, reported: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as raised:
        rows_of(tmp_path / name, data)
    assert reported in raised.value.message
    assert hint in raised.value.hint
    assert "\n" not in str(raised.value)


def test_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read_file(tmp_path / "a.csv")


def test_what_unzips_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_STREAM_BYTES", 2**22)
    with pytest.raises(DataError, match="holds more than 4,194,304 bytes"):
        rows_of(tmp_path / "a.csv.gz", gzip.compress(b"x" * 2**24))


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="pyarrow, which is not installed") as raised:
        read_file(tmp_path / "a.parquet")
    assert "prefixtune[datasets]" in raised.value.hint


def test_a_stream_gives_the_rows_of_the_whole_file_whatever_its_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = 'name;text\r\nAromi;"Eat;\r\ngo. é"\rBibi;x\u2028y\n\nCafé;"a ""b"""'
    lines = '{"name": "é\u2028"}\n\n{"name": "日本"}\r\n'
    whole = [rows_of(tmp_path / "a.csv", table), rows_of(tmp_path / "a.jsonl", lines)]
    assert whole[0][1] == {"name": "Bibi", "text": "x\u2028y"}
    for size in (3, 4, 7):
        monkeypatch.setattr(streams, "_CHUNK", size)
        for mark, encoding in ((b"", "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le")):
            (tmp_path / "b.csv.gz").write_bytes(gzip.compress(mark + table.encode(encoding)))
            assert [row.values for row in iter_file(tmp_path / "b.csv.gz")] == whole[0], (size, encoding)
            assert rows_of(tmp_path / "b.jsonl", mark + lines.encode(encoding)) == whole[1]


def test_a_wrong_row_far_down_is_named_when_it_is_reached(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = ['{"a": "é"}'] * 7_000
    path.write_text("\n".join([*rows, '{"a"', "{}"]), encoding="utf-8")
    stream = iter_file(path)
    assert sum(1 for _, _row in zip(range(7_000), stream, strict=False)) == 7_000
    with pytest.raises(DataError, match=r"a\.jsonl, line 7001, column 5: not JSON"):
        next(stream)
    path.write_bytes("\n".join(rows).encode() + b"\n{}\n\xff\n" + b"x" * 2_000_000)
    with pytest.raises(DataError, match=r"a\.jsonl, line 7002: byte 0xff is not UTF-8"):
        list(iter_file(path))
    table = tmp_path / "a.csv"
    table.write_bytes(b"a,b\n" + b"1,2\n" * 7_000 + b"1\n")
    with pytest.raises(DataError, match=r"a\.csv, line 7002 has 1 fields; the header has 2"):
        list(iter_file(table))


def test_a_stream_holds_one_piece_of_the_file_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        for _ in range(20):
            file.write(('{"a": "' + "x" * 10_000 + '"}\n') * 100)
    tracemalloc.start()
    assert sum(1 for _ in iter_file(path)) == 2_000  # 20 MB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


def test_a_field_may_be_longer_than_the_csv_module_allows_and_its_limit_stays(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    assert rows_of(tmp_path / "a.csv", f"a,b\n{'x' * 300_000},y\n")[0]["a"] == "x" * 300_000
    assert csv.field_size_limit() == limit


def test_a_row_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_ROW_CHARS", 2**20)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 has more than 1,048,576 characters"):
        rows_of(tmp_path / "a.jsonl", "{}\n" + "x" * 2**22)


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Give these bytes as standard input."""

    def pipe(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return pipe


@pytest.mark.parametrize(
    "data",
    [b'{"a": "1", "b": "2"}\n', b' [{"a": "1", "b": "2"}]', b"a,b\n1,2\n", b"a\tb\n1\t2\n", b"\xef\xbb\xbfa;b\n1;2\n",
     gzip.compress(b'{"a": "1", "b": "2"}\n', mtime=0), '{"a": "1", "b": "2"}\n'.encode("utf-16")],
    ids=["lines", "array", "commas", "tabs", "semicolons", "gzip", "utf-16"],
)  # fmt: skip
def test_standard_input_is_recognized_and_can_be_read_twice(piped: Callable[[bytes], None], data: bytes) -> None:
    piped(data)
    for _ in range(2):
        assert [row.values for row in iter_file(Path("-"))] == [{"a": "1", "b": "2"}]


TRIPLES = '{"triples": [["a", "b", "c"]], "references": ["x"]}\n'
XML = (
    '<benchmark><entries><entry category="City" eid="1"><modifiedtripleset><mtriple>a | b | c</mtriple>'
    '</modifiedtripleset><lex comment="good">x</lex></entry></entries></benchmark>'
)


@pytest.mark.parametrize(
    ("task", "name", "text"),
    [
        ("tagging", "a.jsonl", '{"tokens": ["The", "Owl"], "tags": ["O", "B-X"]}\n'),
        ("tagging", "a.json", '[{"tokens": ["The", "Owl"], "tags": ["O", "B-X"]}]'),
        ("tagging", "a.conll", "The O\nOwl B-X\n\nHello O\n"),
        ("e2e", "a.csv", 'mr,ref\n"name[A], food[B]",x\n'),
        ("e2e", "a.jsonl", '{"mr": "name[A], food[B]", "references": ["x"]}\n'),
        ("webnlg", "a.jsonl", TRIPLES),
        ("webnlg", "a.xml", XML),
        ("dart", "a.jsonl", TRIPLES),
        ("dart", "a.xml", XML),
        ("scitldr", "a.jsonl", '{"document": "d", "references": ["x"]}\n'),
    ],
)
def test_every_task_reads_from_standard_input_what_it_reads_from_a_file(
    piped: Callable[[bytes], None], tmp_path: Path, task: str, name: str, text: str
) -> None:
    piped(text.encode())
    assert read_task(task, "-") == read_task(task, write(tmp_path / name, text))


def test_a_task_names_standard_input_that_is_wrong(piped: Callable[[bytes], None]) -> None:
    piped(b"The O\nOwl\n")
    with pytest.raises(DataError, match=r"^stdin, line 2 is 'Owl' alone"):
        read_task("tagging", "-")
    piped(b"mr,ref\n")
    with pytest.raises(DataError, match=r"^stdin, line 1, column 1: not XML"):
        read_task("webnlg", "-")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
@pytest.mark.parametrize("data", [b'{"a": "1"}\n', gzip.compress(b'{"a": "1"}\n', mtime=0)], ids=["plain", "gzip"])
def test_a_pipe_can_be_read_twice(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.jsonl"
    os.mkfifo(path)
    with ThreadPoolExecutor() as writer:
        written = writer.submit(path.write_bytes, data)
        for _ in range(2):
            assert [row.values for row in iter_file(path)] == [{"a": "1"}]
        assert written.result() == len(data)


def test_standard_input_that_is_wrong_is_named(piped: Callable[[bytes], None]) -> None:
    piped(b'{"a": 1}\n{"a"\n')
    with pytest.raises(DataError, match=r"^stdin, line 2, column 5: not JSON"):
        read_file(Path("-"))
    piped(b"")
    with pytest.raises(DataError, match=r"^stdin is empty; at least one row is needed"):
        read_file(Path("-"))
    piped(b"a,b\n1,2\n")
    with pytest.raises(DataError, match=r"^stdin holds a table, or text; allowed: \.jsonl, \.json"):
        read_file(Path("-"), (".jsonl", ".json"))
