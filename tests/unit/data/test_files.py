"""Reading data files: formats, gzip, standard input, pipes; what is refused is named by file and line."""

import codecs
import gzip
import io
import json
import os
import sys
import tracemalloc
from pathlib import Path

import pytest

from data_files import write
from prefixtune.data import read_task, streams
from prefixtune.data.files import iter_file
from prefixtune.errors import ConfigError, DataError, PrefixError


def read_file(path, *formats):
    return list(iter_file(path, *formats))


def rows_of(path, data):
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return [row.values for row in read_file(path)]


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("a.csv", '\n,\n name,"price, EUR"\r\nAromi,"1,50"\n\n', [{"name": "Aromi", "price, EUR": "1,50"}]),
        ("a.csv", 'name,text\nBibi,"Eat;\ngo. ""é"""', [{"name": "Bibi", "text": 'Eat;\ngo. "é"'}]),
        ("a.csv", f"a,b\n{'x' * 300_000},y\u2028\n", [{"a": "x" * 300_000, "b": "y\u2028"}]),
        ("a.tsv", 'code\tname\n"a\n\tb"\t"x, y"\n', [{"code": "a\n\tb", "name": "x, y"}]),
        ("a.jsonl", '{"name": "é\u2028"}\n\n{"name": [1]}\r\n', [{"name": "é\u2028"}, {"name": [1]}]),
        ("a.json", ' [{"a": 1},\n{"b": null}]', [{"a": 1}, {"b": None}]),
    ],
)
def test_rows_are_read_plain_and_gzipped_with_and_without_a_byte_order_mark(name, text, rows, tmp_path):
    assert rows_of(tmp_path / name, text) == rows
    assert rows_of(tmp_path / f"{name}.gz", gzip.compress(codecs.BOM_UTF8 + text.encode(), mtime=0)) == rows


@pytest.mark.parametrize(
    ("name", "data", "reported"),
    [
        ("a.csv", "name\nCafé\n".encode("latin-1"), "a.csv, line 2: byte 0xe9"),
        ("a.csv.gz", gzip.compress(b"name\nx\n", mtime=0)[:-9], "a.csv.gz is a broken gzip file"),
        ("a.csv", b"name,text\nx,y\nAromi,Eat, go.\n", "a.csv, line 3 has 3 fields"),
        ("a.tsv", b'text\tlabel\n"Wow\tgood\nFine\tgood\nBad"\tbad\n', "a.tsv, line 2"),
        ("a.csv", b"name,text\n", "a.csv has no rows"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}\n', "line 2"),
        ("a.jsonl", b'{"a": 1}\n\n[]\n', "a.jsonl, line 3: 'the row' is []"),
        ("a.jsonl", b'{"a": "\\ud83d"}', "a.jsonl, line 1"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1"),
        ("a.xlsx", b"PK", ".jsonl, .json, .csv, .tsv, .parquet"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line_that_names_its_place(name, data, reported, tmp_path):
    with pytest.raises(DataError) as raised:
        rows_of(tmp_path / name, data)
    assert reported in raised.value.message
    assert "\n" not in str(raised.value)


def test_a_folder_and_what_is_nowhere_are_refused_by_name(tmp_path):
    (tmp_path / "a.csv").mkdir()
    for name, what in (("a.csv", "a folder"), ("b.csv", "does not exist"), ("a\0.csv", "cannot be read")):
        with pytest.raises(DataError, match=what):
            read_file(tmp_path / name)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError) as raised:
        read_file(tmp_path / "a.parquet")
    assert "prefixtune[datasets]" in raised.value.hint


def test_a_stream_holds_one_row_of_the_file_in_memory_and_a_row_has_an_end(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        for _ in range(20):
            file.write(('{"a": "' + "x" * 10_000 + '"}\n') * 100)
    tracemalloc.start()
    assert sum(1 for _ in iter_file(path)) == 2_000  # 20 MB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 2**10)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz, line 1"):
        read_file(path)


LONG = "x " * 600_000


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", json.dumps({"text": "a"}) + "\n" + json.dumps({"messages": [{"role": "user", "content": LONG}]})),
        ("a.csv", f"text\na\n{LONG}\n"),
        ("a.csv", "text\na\n" + '"' + "x\n" * 1_500_000),
        ("a.json", json.dumps([{"text": "a"}, {"text": LONG}])),
    ],
)
def test_a_row_that_is_too_long_is_refused_with_its_place(name, text, tmp_path):
    path = write(tmp_path / name, text)
    with pytest.raises(DataError, match=r"a\.\w+, (line|item) [23]"):
        read_file(path)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="a file that fails to be read")
def test_a_read_error_is_one_line(tmp_path):
    for name in ("a.jsonl", "a.csv", "a.parquet", "a.xml"):
        (tmp_path / name).symlink_to("/proc/self/mem")
        with pytest.raises(PrefixError, match=name):
            read_task("webnlg" if name == "a.xml" else "records", tmp_path / name)


@pytest.fixture
def piped(monkeypatch):
    """Give these bytes as standard input."""

    def pipe(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return pipe


@pytest.mark.parametrize(
    "data",
    [b'{"a": "1", "b": "2"}\n', b' [{"a": "1", "b": "2"}]', b"a,b\n1,2\n", b"\xef\xbb\xbfa\tb\n1\t2\n",
     gzip.compress(b'{"a": "1", "b": "2"}\n', mtime=0)],
    ids=["lines", "array", "commas", "tabs", "gzip"],
)  # fmt: skip
def test_standard_input_is_recognized_and_can_be_read_twice(piped, data):
    piped(data)
    for _ in range(2):
        assert [row.values for row in iter_file(Path("-"))] == [{"a": "1", "b": "2"}]


def test_every_task_reads_from_standard_input_what_it_reads_from_a_file(piped, tmp_path):
    text = 'mr,ref\n"name[A], food[B]",x\n'
    piped(text.encode())
    assert read_task("e2e", "-") == read_task("e2e", write(tmp_path / "a.csv", text))


def test_what_is_piped_has_a_bound(piped, monkeypatch):
    monkeypatch.setattr(streams, "MAX_FILE_BYTES", 10)
    piped(b'{"text": "aaaa"}\n')
    with pytest.raises(DataError, match="stdin"):
        read_task("records", "-")


def test_standard_input_that_is_wrong_is_named(piped):
    for data in (b'{"a": 1}\n{"a"\n', b""):
        piped(data)
        with pytest.raises(DataError, match=r"^stdin"):
            read_file(Path("-"))
