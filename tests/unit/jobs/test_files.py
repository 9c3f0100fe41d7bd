"""Uploaded files: checked as training reads them, whole or not at all."""

import gzip
import io
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from child_process import kill, start_child
from prefixtune.errors import RequestError
from prefixtune.jobs import files
from prefixtune.jobs.files import FileStore
from prefixtune.jobs.folder import DataFolder

ROW = '{{"prompt": "question {0}", "completion": "answer {0}"}}\n'
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


def rows(count):
    return "".join(ROW.format(number) for number in range(count)).encode()


@pytest.fixture
def folder(tmp_path):
    return DataFolder(tmp_path / "data")


@pytest.fixture
def store(folder):
    return FileStore(folder)


@pytest.fixture
def put(store):
    def upload(data, filename, purpose="fine-tune", **options):
        return store.put("ann", io.BytesIO(data), filename, purpose, **options)

    return upload


def names(folder):
    return [path.name for path in folder.files.glob("*") if not path.name.endswith(".lock")]


@pytest.mark.parametrize(
    ("filename", "data", "form", "counts", "ending"),
    [
        ("a.jsonl", rows(3), "prompt", (3, 3, 3), ".jsonl"),
        ("upload", gzip.compress(rows(3), mtime=0), "prompt", (3, 3, 3), ".jsonl.gz"),
        ("chat.json", json.dumps([CHAT, CHAT]).encode(), "messages", (2, 1, 2), ".json"),
        ("upload", b"text\tlabel\nfine\tgood\n", "label", (1, 1, 1), ".tsv"),
        ("questions.jsonl", b'{"question": "Why?"}\n', "question", (1, 1, 0), ".jsonl"),
        ("two.csv", b"prompt,completion,question,answer\n1,2,3,4\n", "", (1, 0, 0), ".csv"),
    ],
)
def test_forms_of_data(put, store, filename, data, form, counts, ending):
    stored = put(data, filename)
    facts = stored.facts
    assert facts is not None, stored.status_details
    assert (facts.form, (facts.rows, facts.examples, facts.targets), stored.ending) == (form, counts, ending)
    assert (stored.status, stored.filename, stored.bytes) == ("processed", filename, len(data))
    assert store.path(stored).read_bytes() == data
    assert store.path(stored).name.endswith(ending)


@pytest.mark.parametrize(
    ("filename", "data", "message"),
    [
        ("a.jsonl", rows(7000) + b'{"prompt": "no answer"}\n' + rows(10), "a.jsonl, line 7001"),
        ("a.jsonl.gz", gzip.compress(rows(50), mtime=0)[:-20], "a.jsonl.gz is a broken gzip file"),
        ("a.csv", b"food,price\nsoup,3\n", "a.csv, line 2 has the columns food, price"),
        ("a.jsonl", rows(1) + b'{"prompt": "a", "completion": "' + b"x " * 600_000 + b'"}\n', "a.jsonl, line 2"),
    ],
)
def test_a_wrong_row_is_named_and_the_file_stays_readable(put, store, tmp_path, filename, data, message):
    stored = put(data, filename)
    assert (stored.status, stored.facts) == ("error", None)
    assert stored.status_details.startswith(message)
    assert str(tmp_path) not in stored.status_details
    assert "--" not in stored.status_details
    assert store.path(stored).read_bytes() == data


def test_documents(put):
    facts = put(b"Owls fly at night.", "../owls.md", "document").facts
    assert facts is not None
    assert (facts.form, facts.characters) == ("document", 18)
    for data in (b" \n\n", b"... --- ...", b"ab\xff"):
        assert put(data, "a.txt", "document").status == "error"


def test_a_large_file_is_checked_in_a_process_within_time_and_memory(put, monkeypatch):
    monkeypatch.setattr(files, "_INLINE_BYTES", 100)
    facts = put(rows(2000), "a.jsonl").facts
    assert facts is not None
    assert (facts.rows, facts.targets) == (2000, 2000)
    for name, value in (("_SECONDS", 0.0), ("_MODULE", "prefixtune.no_module")):
        with monkeypatch.context() as patched:
            patched.setattr(files, name, value)
            assert put(rows(100), "a.jsonl").status == "error"


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_in_little_memory(put):
    line = gzip.compress(b"x" * 2**20)
    # Members of gzip that follow each other are one file.
    stored = put(line * 100, "bomb.jsonl.gz")
    assert stored.status_details.startswith("bomb.jsonl.gz, line 1")


def test_owners_see_their_own_files(put, store):
    first, second = put(rows(1), "a.jsonl"), put(rows(2), "b.jsonl")
    assert [file.id for file in store.list("ann")] == [second.id, first.id]
    assert [file.id for file in store.list(None)] == [second.id, first.id]
    assert store.list("ben") == []
    assert store.get(None, first.id) == store.get("ann", first.id) == first
    for owner, file_id in (("ben", first.id), ("ann", "file-1"), ("ann", "../../x"), (None, f"file-{'0' * 24}")):
        assert store.get(owner, file_id) is None
    store.delete(first)
    # Again, as by another request at the same time.
    store.delete(first)
    assert [file.id for file in store.list("ann")] == [second.id]


@pytest.mark.parametrize("refused", [1, 2])
def test_a_file_without_room_leaves_nothing(put, folder, refused):
    asked = []

    def check(size, uploads):
        asked.append((size, len(uploads)))
        if len(asked) == refused:
            raise RequestError("no room")

    first = put(rows(1), "a.jsonl")
    with pytest.raises(RequestError):
        put(rows(2), "b.jsonl", check_room=check)
    # Before it is read, and again when it is kept: another upload may have come in between.
    assert asked == [(len(rows(2)), 1)] * refused
    assert names(folder) == [first.id]


def test_metrics_are_kept_once_whoever_writes_them(store, folder):
    job_id = "ftjob-0123456789abcdef01234567"
    with ThreadPoolExecutor(4) as pool:
        written = {
            one.id for one in pool.map(lambda _: store.put_metrics("ann", job_id, b"step,loss\n1,2\n"), range(4))
        }
    assert written == {"file-0123456789abcdef01234567"}
    stored = store.get("ann", *written)
    assert (stored.purpose, stored.filename, stored.status) == ("fine-tune-results", "step_metrics.csv", "processed")
    assert store.path(stored).read_bytes() == b"step,loss\n1,2\n"
    assert names(folder) == [*written]
    # Results are no uploads, which are counted.
    uploads = []
    store.put("ann", io.BytesIO(rows(1)), "a.jsonl", "fine-tune", lambda _, files: uploads.append(files))
    assert uploads == [[], []]


_CHILD = """
import io
from prefixtune.jobs.files import FileStore
from prefixtune.jobs.folder import DataFolder
import prefixtune.jobs.files
def wait(*_):
    print("ready", flush=True)
    time.sleep(60)
prefixtune.jobs.files.check_file = wait
FileStore(DataFolder(Path(sys.argv[1]))).put("ann", io.BytesIO(b"row"), "a.jsonl", "fine-tune")
"""


def test_what_a_killed_upload_left_is_removed(folder, store, put):
    child = start_child(_CHILD, folder.root)
    assert names(folder) != []
    kill(child)
    assert store.list("ann") == []
    stored = put(rows(1), "a.jsonl")
    assert names(folder) == [stored.id]
