"""Files from elsewhere that a fuzzer makes up or spoils, through what reads them: a good result or a `PrefixError`.

    make fuzz

PREFIXTUNE_FUZZ_SECONDS (600) is the time of all of it; PREFIXTUNE_FUZZ_SEED (a new one each time, and printed) makes a
run again. Requests that are made up: tests/e2e/test_server_openapi.py.
"""

import contextlib
import copy
import gzip
import io
import json
import os
import random
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from prefixtune.backbone.lora import adapter_config
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.cli.main import main
from prefixtune.data import TASKS, as_examples, read_task
from prefixtune.data.forms import check_template, render
from prefixtune.data.labels import labels_of
from prefixtune.errors import PrefixError
from prefixtune.prefix.file import HEADER_KEY
from prefixtune.prefix.prefix import Prefix, read_artifact, read_outline, save_prefix
from prefixtune.prefix.text_format import read_text_format
from prefixtune.training.artifact import load_weights, save_weights
from prefixtune.training.checkpoint import load_state, save_state
from prefixtune.training.config import TrainConfig

SECONDS = float(os.environ.get("PREFIXTUNE_FUZZ_SECONDS", "600"))
SEED = int(os.environ.get("PREFIXTUNE_FUZZ_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)
MOST = 100_000
"""Inputs of one kind, however much time there is."""
SLOWEST = 10.0
"""Seconds of processor time that no input of these sizes may take, with types checked at every call."""
KINDS = []
"""Tests below, which share the time."""

AT_ONCE = 10
# Shrinking an input that fails could take longer than all the rest.
_SETTINGS = settings(
    max_examples=AT_ONCE,
    deadline=None,
    database=None,
    print_blob=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "\ud800", "{source}" * 50, "1e999", "../..", "a" * 1000, 2**70, -1, 10**400, "\0"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(autouse=True)
def shown_seed():
    print(f"PREFIXTUNE_FUZZ_SEED={SEED}")


def fuzzed(**strategies):
    """Run a test with made-up inputs, until its share of the time is over."""

    def decorate(test):
        def whole(tmp_path):
            def timed(**inputs):
                began = time.process_time()
                test(tmp_path, **inputs)
                took = time.process_time() - began
                assert took < SLOWEST, f"an input of this size took {took:.1f} seconds"

            ends = time.monotonic() + SECONDS / len(KINDS)
            for number in range(MOST // AT_ONCE):
                if time.monotonic() < ends:
                    seed(SEED + number)(_SETTINGS(given(**strategies)(timed)))()

        whole.__name__ = whole.__qualname__ = test.__name__
        KINDS.append(test.__name__)
        return whole

    return decorate


@st.composite
def spoiled(draw, good):
    """A good file with a few edits: bytes flipped, cut, repeated, put in; or something else altogether."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        until = min(len(data), at + draw(st.integers(1, 30)))
        kind = draw(st.sampled_from(["flip", "cut", "repeat", "put", "end", "word"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:until]
        elif kind == "repeat":
            data[at:at] = data[at:until] * draw(st.sampled_from([1, 2, 50]))
        elif kind == "put":
            data[at:at] = draw(st.binary(max_size=8))
        elif kind == "end":
            del data[at:]
        else:
            words = [b"1e999", b"NaN", b"null", b"-1", b'"', b"[" * 2000, b"{", b"\xff\xfe", b"\\ud800", b"\n\n", b"0"]
            data[at:until] = draw(st.sampled_from([*words, b"9" * 5000, b"true", b"[]", b"{}", b";", b",", b"\t"]))
    return bytes(data)


@st.composite
def altered(draw, good):
    """A good JSON value with some of its values replaced, removed or joined by others."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 4))):
        holder, key = value, None
        while isinstance(holder, dict | list) and holder and (key is None or draw(st.booleans())):
            if key is not None:
                inner = holder[key]
                if not (isinstance(inner, dict | list) and inner):
                    break
                holder = inner
            key = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
        if key is None:
            return draw(JSON)
        if isinstance(holder, dict) and draw(st.integers(0, 4)) == 0:
            del holder[key]
        else:
            holder[key] = draw(JSON)
    return value


@contextlib.contextmanager
def refused():
    """A `PrefixError` is an answer, in one line; any other exception is a fault."""
    message = ""
    try:
        yield
    except PrefixError as error:
        message = str(error)
    assert len(message) < 20_000, f"an error of {len(message)} characters"


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# --- prefixes, weights, states ----------------------------------------------------------------------------------------

HEADER = {
    "backbone": {"name": "gpt2", "fingerprint": "a:b", "kind": "decoder"},
    "task": "records",
    "method": "prefix",
    "text_format": {"prompt": " {source} {separator}", "target": " {target} ", "separator": "<s>", "end": "</s>"},
    "labels": {"kind": "classification", "by": "words", "names": ["a", "b"], "words": ["a", "b"]},
    "training": {"steps": 3, "dev_loss": 1.5},
    "adapter": "adapter",
}


def good_files():
    """Every file of tensors, as this project writes it."""
    import tempfile

    pair = torch.linspace(-1, 1, 24).reshape(2, 3, 4), torch.linspace(0, 2, 24).reshape(2, 3, 4)
    facts = {"step": 1, "best_loss": None, "best_step": 1, "misses": 0, "fingerprint": "a", "dtype": "float32"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_prefix(folder / "prefix.safetensors", Prefix({"decoder": (pair, pair)}, HEADER))
        save_weights(folder / "weights.safetensors", {"w": pair[0]}, {"method": "full", "backbone": HEADER["backbone"]})
        save_state(
            folder / "state.safetensors", {"module.a": pair[0]}, {**facts, "data": "x", "config": {"max_steps": 3}}
        )
        return {path.name: path.read_bytes() for path in folder.iterdir()}


TENSORS = good_files()


def read_tensors_of_any_kind(path):
    for read in (read_artifact, read_outline, load_prefix, load_state, load_weights):
        with refused():
            read(path)


@fuzzed(
    name=st.sampled_from(sorted(TENSORS)), data=st.sampled_from(sorted(TENSORS)).flatmap(lambda n: spoiled(TENSORS[n]))
)
def test_files_of_tensors(folder, name, data):
    read_tensors_of_any_kind(write(folder / name, data))


@fuzzed(header=altered(HEADER), names=st.lists(st.sampled_from(["decoder", "encoder", "cross", "x"]), max_size=2))
def test_headers_of_prefixes(folder, header, names):
    path = folder / "prefix.safetensors"
    tensors = {f"{site}.0.{part}": torch.ones(2, 3, 4) for site in names or ["decoder"] for part in ("key", "value")}
    save_file(tensors, path, {HEADER_KEY: json.dumps(header)})
    read_tensors_of_any_kind(path)
    with refused():
        prefix = read_artifact(path)
        labels_of(prefix)
        form = read_text_format(prefix.header)
        if form is not None:
            assert len(form.format_prompt("x" * 1000, "<s>")) < 200_000
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["inspect", str(path)]) in (0, 2)
        assert main(["inspect", str(path), "--json"]) in (0, 2)


# --- data -------------------------------------------------------------------------------------------------------------

TRIPLES = [["Aromi", "food", "Italian"]]
EXAMPLES = {
    "e2e": [
        ("a.csv", b'mr,ref\n"name[Aromi], food[Italian]",Eat.\n'),
        ("a.jsonl", b'{"mr": "name[Aromi]", "references": ["Eat."]}\n'),
    ],
    "webnlg": [
        (
            "a.xml",
            b'<benchmark><entries><entry category="Food" eid="1" size="1"><modifiedtripleset><mtriple>a | b | c'
            b'</mtriple></modifiedtripleset><lex comment="good" lid="1">Text.</lex></entry></entries></benchmark>',
        ),
        ("a.jsonl", json.dumps({"category": "Food", "triples": TRIPLES, "references": ["Eat."]}).encode()),
    ],
    "dart": [
        ("a.json", json.dumps([{"tripleset": TRIPLES, "annotations": [{"source": "x", "text": "Eat."}]}]).encode()),
        ("a.jsonl", json.dumps({"triples": TRIPLES, "references": ["Eat."]}).encode()),
    ],
    "summarization": [("a.csv", b"document,summary\nLong text.,Short.\n")],
    "scitldr": [("a.jsonl", b'{"source": ["One.", "Two."], "target": ["Short."]}\n')],
    "records": [
        ("a.jsonl", b'{"name": "Ann", "text": ["a", "b"]}\n{"name": "Bo", "text": "c"}\n'),
        ("a.csv", b'name,text\nAnn,"a;b"\nBo,c\n'),
        ("a.tsv", b"name\ttext\nAnn\ta\n"),
        ("a.json", b'[{"name": "Ann", "text": 1.5}]'),
        ("a.csv.gz", gzip.compress(b"name,text\nAnn,a\n", mtime=0)),
    ],
    "classification": [("a.jsonl", b'{"text": "Good.", "label": "a"}\n{"text": "Bad.", "label": "b"}\n')],
    "tagging": [("a.jsonl", b'{"tokens": ["Ann"], "tags": ["B-X"]}\n')],
}
FILES = [(task, name, data) for task, files in EXAMPLES.items() for name, data in files]


def test_every_task_that_reads_files_is_tried(tmp_path):
    assert set(EXAMPLES) == {name for name, task in TASKS.items() if not task.parts}
    for number, (task, name, data) in enumerate(FILES):
        templates = ("name", "text") if task == "records" else (None, None)
        path = write(tmp_path / str(number) / name, data)
        assert read_task(task, path, source=templates[0], target=templates[1]), (task, name)


@fuzzed(
    chosen=st.sampled_from(FILES).flatmap(lambda file: st.tuples(st.just(file[:2]), spoiled(file[2]))),
    source=st.sampled_from(["name", "{name} is {text}", None]) | st.text(max_size=12),
)
def test_data_files(folder, chosen, source):
    (task, name), data = chosen
    path = write(folder / name, data)
    takes = TASKS[task].form is not None
    with refused():
        for example in read_task(task, path, source=source if takes else None, target="text" if takes else None):
            assert isinstance(example.source, str)
            example.source.encode("utf-8")
            assert len(example.source) < 100 * (len(data) + 1000)


TURNS = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
ROWS = [
    {"messages": [{"role": "system", "content": "a"}, *TURNS]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"prompt": TURNS[:1], "completion": TURNS[1:]},
    {"instruction": "a", "input": "b", "output": "c"},
    {"question": "a", "answers": ["b"]},
    {"text": "a"},
]


@fuzzed(rows=st.sampled_from(ROWS).flatmap(lambda row: st.lists(st.just(row) | altered(row), min_size=1, max_size=3)))
def test_forms(folder, rows):
    with refused():
        path = write(folder / "a.jsonl", "\n".join(map(json.dumps, rows)).encode())
        for example in read_task("records", path):
            example.source.encode("utf-8")
    with refused():
        as_examples([row for row in rows if isinstance(row, dict)], needs_targets=True)


@fuzzed(template=st.text(max_size=300) | st.text("{}ab \n", max_size=300), record=st.dictionaries(st.text(), JSON))
def test_templates(folder, template, record):
    with refused():
        check_template(template)
    with refused():
        render(template, record, "line 1")
    with refused():
        form = read_text_format({"text_format": {"prompt": template, "target": template}})
        assert form is not None
        assert len(form.format_prompt("x" * 1000, "</s>")) < 100_000
    with refused():
        TrainConfig(prompt_format=template, source=template, label_words=template, sites=template)


# --- commands ---------------------------------------------------------------------------------------------------------


ADAPTER = json.dumps({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "base_model_name_or_path": "gpt2"})


@fuzzed(
    config=spoiled(ADAPTER.encode()),
    data=st.sampled_from(sorted(TENSORS)).flatmap(lambda n: spoiled(TENSORS[n])),
    whole=st.booleans(),
)
def test_what_is_converted(folder, config, data, whole):
    write(folder / "adapter" / "adapter_config.json", config)
    write(folder / "adapter" / "adapter_model.safetensors", data)
    write(folder / "one.safetensors", data)
    with refused():
        adapter_config(folder / "adapter")
    given = folder / ("adapter" if whole else "one.safetensors")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["convert", str(given), str(folder / "out.safetensors"), "--to", "prefixtune"]) in (0, 2)
