"""Files and folders that the user may not read or write are one line with the path and the reason, in every command."""

import contextlib
import ctypes
import json
import os

import pytest
import torch

from prefixtune.cli.main import main
from prefixtune.prefix.prefix import Prefix, save_prefix

CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1 << 1, 1 << 2

COMMANDS = [
    "generate --prefix unread.safetensors a",
    "train --train unread.jsonl --backbone model",
    "compose p.safetensors --length 2 --output closed/x.safetensors",
    "demo --output closed",
    "serve --backbone model --prefixes closed",
]


@contextlib.contextmanager
def usual_user():
    """For the superuser, too, permissions hold: Linux's capabilities to ignore them are laid down."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None)
    # Version 3 of the header, of this thread; effective, permitted and inheritable bits.
    header, bits = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, bits)
    before = bits[0]
    bits[0] &= ~(CAP_DAC_OVERRIDE | CAP_DAC_READ_SEARCH)
    libc.capset(header, bits)
    try:
        yield
    finally:
        bits[0] = before
        libc.capset(header, bits)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in which the user may not read or enter everything."""
    for inner in ("closed", "model"):
        (tmp_path / inner).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for rows in ("rows.jsonl", "unread.jsonl"):
        (tmp_path / rows).write_text(json.dumps({"source": "a", "target": "b"}) + "\n")
    pair = torch.zeros(2, 4, 8), torch.ones(2, 4, 8)
    prefix = Prefix({"decoder": (pair,) * 2}, {"backbone": {"name": "model", "kind": "decoder"}})
    for file in ("p.safetensors", "unread.safetensors"):
        save_prefix(tmp_path / file, prefix)
    for closed in ("closed", "unread.jsonl", "unread.safetensors"):
        (tmp_path / closed).chmod(0)
    monkeypatch.chdir(tmp_path)
    with usual_user():
        yield tmp_path
    (tmp_path / "closed").chmod(0o700)


def test_a_path_that_is_closed_is_one_line(folder, capsys):
    for command in COMMANDS:
        assert main(command.split()) == 2, command
        err = capsys.readouterr().err
        assert "error: " in err, command
        assert "closed" in err or "unread" in err, command
