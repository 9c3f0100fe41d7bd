"""The configuration: the file, the environment, flags, and all faults at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefixtune.engine.config import MAX_SLOTS, EngineConfig
from prefixtune.errors import ConfigError
from prefixtune.server.auth import hash_key
from prefixtune.server.settings import KeyConfig, ServeConfig
from prefixtune.utils.config import Layer


def write(folder: Path, text: str) -> Path:
    path = folder / "serve.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path | None = None, environment: dict[str, str] | None = None, **flags: object) -> str:
    with pytest.raises(ConfigError) as caught:
        ServeConfig.from_layers(*ServeConfig.sources(path, environment or {}), Layer(flags))
    return caught.value.message


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, 'port = 1\nnum_slots = 1\ndtype = "bfloat16"\ncors_origins = ["https://a.example"]\n')
    environment = {
        "PREFIXTUNE_SERVE_PORT": "2",
        "PREFIXTUNE_SERVE_NUM_SLOTS": "2",
        "PREFIXTUNE_SERVE_PLAYGROUND": "false",
        # Of other programs, and of Kubernetes for a service called prefixtune.
        "PREFIXTUNE_PORT": "tcp://10.0.0.1:80",
        "PREFIXTUNE_HOME": "/somewhere",
    }
    config = ServeConfig.from_layers(*ServeConfig.sources(path, environment), Layer({"port": 3}))
    assert (config.port, config.num_slots, config.dtype, config.playground) == (3, 2, "bfloat16", False)
    assert config.cors_origins == ("https://a.example",)
    environment = {"PREFIXTUNE_SERVE_CORS_ORIGINS": "https://a.example, https://b.example"}
    listed = ServeConfig.from_layers(*ServeConfig.sources(None, environment))
    assert listed.cors_origins == ("https://a.example", "https://b.example")


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, 'num_slots = "many"\nmax_texts = 0\ndeadline = nan\ncors_origins = ["a.example"]\n')
    message = refusal(path, {"PREFIXTUNE_SERVE_PORT": "eighty", "PREFIXTUNE_SERVE_HOTS": "x"}, dtype="flaot32")
    names = ("num_slots", "max_texts", "deadline", "cors_origins", "SERVER_PORT", "SERVER_HOTS", "flaot32")
    assert [name for name in names if name.replace("SERVER", "PREFIXTUNE_SERVE") not in message] == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "server.example"])
def test_without_a_key_only_loopback(host: str) -> None:
    assert "--new-key" in refusal(None, None, host=host)
    key = KeyConfig(hash=hash_key("pt-a"))
    assert not ServeConfig(host=host, keys={"a": key}).is_loopback


def test_slots_have_the_engines_limit() -> None:
    assert ServeConfig(num_slots=MAX_SLOTS).num_slots == EngineConfig(num_slots=MAX_SLOTS).num_slots
    for config in (ServeConfig, EngineConfig):
        with pytest.raises(ConfigError, match="num_slots"):
            config(num_slots=MAX_SLOTS + 1)


def test_options_of_another_engine_are_refused_by_name() -> None:
    assert ServeConfig(engine="llama.cpp", threads=2).threads == 2
    for engine, options in (("torch", {"gguf": "a.gguf", "threads": 2}), ("llama.cpp", {"kv_cache_mib": 5})):
        message = refusal(engine=engine, **options)
        assert all(name in message for name in options)


def test_keys_come_from_tables(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        f'host = "0.0.0.0"\n[keys.alice]\nhash = "{hash_key("pt-alice")}"\nprefixes = ["a-*"]\n'
        f'requests_per_minute = 60\n[keys."bob b"]\nhash = "{hash_key("pt-bob")}"\nadmin = true\n',
    )
    keys = ServeConfig.from_file(path).keys
    assert keys["alice"] == KeyConfig(hash=hash_key("pt-alice"), prefixes=("a-*",), requests_per_minute=60)
    assert keys["bob b"].admin
    assert not keys["alice"].admin


def test_faults_of_keys_do_not_repeat_the_keys(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'host = "0.0.0.0"\n[keys.a]\nhash = "pt-in-the-clear"\n[keys.b]\nadmni = true\nconcurrent = -1\n'
        f'[keys.c]\nhash = "{hash_key("x")}"\nprefixes = "a-*"\n[keys.d]\nhash = "{hash_key("x")}"\n',
    )
    message = refusal(path)
    assert "pt-in-the-clear" not in message
    assert "no key is configured" not in message
    for name in ("keys.a.hash", "admni", "keys.b.concurrent", "keys.b.hash", "keys.c.prefixes"):
        assert name in message
    twice = f'[keys.a]\nhash = "{hash_key("x")}"\n[keys.b]\nhash = "{hash_key("x")}"\n'
    assert "two keys have the same hash" in refusal(write(tmp_path, twice))


def test_the_backbones_name_is_not_a_path() -> None:
    assert ServeConfig(backbone="/srv/models/tiny").model_id == "tiny"
    assert ServeConfig(backbone="/srv/models/tiny.gguf").model_id == "tiny"
    assert ServeConfig(backbone="/srv/models/tiny", backbone_id="base").model_id == "base"


def test_the_address_of_the_database_is_checked_and_never_shown() -> None:
    message = refusal(database_url="postgres://me:secret@db/jobs")
    assert "database_url must begin with postgresql:// or sqlite:///" in message
    assert "secret" not in message
    assert ServeConfig(database_url="postgresql://me@db/jobs", train_workers=0).takes_jobs
    assert ServeConfig().takes_jobs
    assert not ServeConfig(train_workers=0).takes_jobs
