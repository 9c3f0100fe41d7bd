"""`prefixtune serve`: file, environment and options of one configuration; a new key."""

import tomllib

import pytest

from command_line import run
from prefixtune.server.auth import hash_key
from prefixtune.server.settings import ServeConfig


def test_the_printed_configuration_is_that_of_all_sources(tmp_path, monkeypatch):
    digest, path = hash_key("pt-alice"), tmp_path / "serve.toml"
    path.write_text(f'port = 1\nnum_slots = 1\ndeadline = 1e2\n[keys.alice]\nhash = "{digest}"\n')
    # Of Kubernetes, for a service called prefixtune.
    monkeypatch.setenv("PREFIXTUNE_PORT", "tcp://10.0.0.1:80")
    monkeypatch.setenv("PREFIXTUNE_SERVE_NUM_SLOTS", "2")
    monkeypatch.setenv("PREFIXTUNE_SERVE_DTYPE", "float32")
    options = ("--dtype", "bfloat16", "--no-playground", "--cors-origins", "https://a.example,https://b.example")
    printed, _ = run("serve", "--config", str(path), "--print-config", *options)
    config = ServeConfig(**tomllib.loads(printed))
    assert config == ServeConfig(
        port=1,
        num_slots=2,
        deadline=100,
        dtype="bfloat16",
        playground=False,
        cors_origins=["https://a.example", "https://b.example"],
        keys={"alice": {"hash": digest}},
    )


def test_each_fault_is_named_as_it_was_written_and_no_key_is_repeated(tmp_path, monkeypatch):
    path = tmp_path / "serve.toml"
    path.write_text('host = "0.0.0.0"\n[keys]\nbob = "pt-clear"\n')
    monkeypatch.setenv("PREFIXTUNE_SERVE_PROT", "80")
    _, err = run("serve", "--config", str(path), "--num-slots", "x", code=2)
    for named in ("PREFIXTUNE_SERVE_PROT", "--num-slots is 'x'"):
        assert named in err
    assert "pt-clear" not in err


@pytest.mark.parametrize("name", ["a b", '😀"\x7f'])
def test_a_new_key_comes_with_its_table(name, monkeypatch):
    monkeypatch.setenv("PREFIXTUNE_SERVE_PROT", "80")
    out, _ = run("serve", "--new-key", name)
    key = next(line.strip() for line in out.splitlines() if line.strip().startswith("pt-"))
    config = ServeConfig(**tomllib.loads(out[out.index("[keys") :]))
    assert config.keys[name].hash == hash_key(key)
