"""What a command prints to and reads from: pipes that close, full disks, encodings that lack a character."""

import io
import json
import logging
import os
import subprocess
import sys

import pytest

from prefixtune.cli.main import main
from prefixtune.errors import PrefixError

NOT_UTF_8 = os.fsdecode(b"caf\xe9.safetensors")


@pytest.fixture
def folder(tmp_path):
    """Two broken prefixes, one under a name that is not UTF-8."""
    for name in ("\u65e5\u672c.safetensors", NOT_UTF_8):
        (tmp_path / name).write_bytes(b"cut")
    return tmp_path


@pytest.mark.parametrize("command", ["data --tasks --json", "train --help"])
def test_a_reader_that_has_enough_is_no_mistake(command):
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [sys.executable, "-m", "prefixtune", *command.split()], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert process.communicate()[1] == b""
    assert process.returncode == 0


def test_a_full_disk_is_one_line():
    with open("/dev/full", "wb") as full:
        process = subprocess.run(
            [sys.executable, "-m", "prefixtune", "data", "--tasks"], stdout=full, stderr=subprocess.PIPE
        )
    assert process.stderr.startswith(b"error: ")
    assert process.returncode == 2


def test_no_character_stops_a_command(folder, monkeypatch):
    def shown(encoding, *words):
        out = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, encoding=encoding))
        monkeypatch.setattr("sys.argv", ["prefixtune", *words])
        assert main() == 1
        return out.getvalue().decode(encoding)

    rows = json.loads(shown("latin-1", "inspect", str(folder), "--json"))["prefixes"]
    assert {row["name"] for row in rows} == {"\u65e5\u672c.safetensors", NOT_UTF_8}
    assert r"\u65e5\u672c.safetensors" in shown("ascii", "inspect", str(folder))


def test_with_json_no_library_logs_on_stderr(tmp_path, monkeypatch, capsys):
    logger = logging.getLogger("a library")
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)

    def load(*_):
        logger.warning("Retrying in 1s")
        raise PrefixError("the hub cannot be reached.")

    monkeypatch.setattr("prefixtune.backbone.prefixes.load_prefix", load)
    (tmp_path / "any.safetensors").touch()
    words = ["inspect", str(tmp_path / "any.safetensors")]
    assert main([*words, "--json"]) == 2
    assert json.loads(capsys.readouterr().err)["error"] == "the hub cannot be reached."
    assert main(words) == 2
    logger.removeHandler(handler)
    assert capsys.readouterr().err.startswith("Retrying in 1s\n")
