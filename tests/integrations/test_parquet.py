"""Parquet files, written by pyarrow."""

import datetime
import decimal
import io

import pyarrow
import pyarrow.parquet
import pytest

from prefixtune.data import read_task
from prefixtune.data.files import iter_file
from prefixtune.errors import DataError
from prefixtune.jobs.files import FileStore
from prefixtune.jobs.folder import DataFolder


def read_file(path):
    return list(iter_file(path))


def write_parquet(path):
    table = pyarrow.table(
        {
            "name": ["Aromi", None],
            "stars": [1, 2],
            "texts": [["Eat.", "Go."], []],
            "day": [datetime.date(2024, 2, 29), None],
            "price": [decimal.Decimal("1.50"), None],
        }
    )
    pyarrow.parquet.write_table(table, path)


def test_parquet_gives_what_json_lines_would(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path)
    first, second = (row.values for row in read_file(path))
    assert first == {"name": "Aromi", "stars": 1, "texts": ["Eat.", "Go."], "day": "2024-02-29", "price": "1.50"}
    assert second == {"name": None, "stars": 2, "texts": [], "day": None, "price": None}
    assert [row.location for row in read_file(path)] == [f"{path}, row 1", f"{path}, row 2"]
    with pytest.raises(DataError, match=r"a\.parquet, row 2: 'name'"):
        read_task("records", path, source="name")


def test_bytes_are_texts_where_they_can_be(tmp_path):
    path = tmp_path / "a.parquet"
    texts, images = pyarrow.array(["café".encode(), b"\xff\xd8"], pyarrow.binary()), [b"\x89PNG", b"\xff\xd8"]
    pyarrow.parquet.write_table(
        pyarrow.table({"name": texts, "turns": [[{"text": b"Hi"}], []], "image": images, "id": ["a", "b"]}), path
    )
    first = read_file(path)[0].values
    assert (first["name"], first["turns"], first["id"]) == ("café", [{"text": "Hi"}], "a")
    # An image that nothing asks for stops no file; one that is to be a text is named.
    assert [example.source for example in read_task("records", path, source="id")] == ["a", "b"]
    with pytest.raises(DataError, match=r"a\.parquet, row 2: 'name'"):
        read_task("records", path, source="name")


def test_what_is_no_whole_file_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"a\.parquet"):
        read_file(tmp_path / "a.parquet")


def test_an_uploaded_file_to_train_on(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a b", "c d"]}), tmp_path / "a.parquet")
    store = FileStore(DataFolder(tmp_path / "data"))

    def put(data):
        return store.put("ann", io.BytesIO(data), "a.parquet", "fine-tune")

    facts = put((tmp_path / "a.parquet").read_bytes()).facts
    assert facts is not None
    assert (facts.form, facts.rows) == ("text", 2)
    assert put(b"PAR1 and no more").status_details.startswith("a.parquet ")
