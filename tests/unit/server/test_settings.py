"""The configuration: the file, the environment, flags, and all faults at once."""

import pytest

from prefixtune.errors import ConfigError
from prefixtune.server.auth import hash_key
from prefixtune.server.settings import KeyConfig, ServeConfig, is_loopback
from prefixtune.utils.config import Layer


def write(folder, text):
    path = folder / "serve.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path=None, environment=None, **flags):
    with pytest.raises(ConfigError) as caught:
        ServeConfig.from_layers(*ServeConfig.sources(path, environment or {}), Layer(flags))
    return caught.value.message


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "server.example"])
def test_without_a_key_only_loopback(host):
    assert "--new-key" in refusal(None, None, host=host)
    key = KeyConfig(hash=hash_key("pt-a"))
    assert ServeConfig(host=host, keys={"a": key})
    assert not is_loopback(host)


def test_options_of_another_engine_are_refused_by_name():
    assert ServeConfig(engine="llama.cpp", threads=2).threads == 2
    for engine, options in (("torch", {"gguf": "a.gguf", "threads": 2}), ("llama.cpp", {"kv_cache_mib": 5})):
        message = refusal(engine=engine, **options)
        assert all(name in message for name in options)


def test_faults_of_keys_do_not_repeat_the_keys(tmp_path):
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


def test_the_backbones_name_is_not_a_path():
    assert ServeConfig(backbone="/srv/models/tiny").model_id == "tiny"
    assert ServeConfig(backbone="/srv/models/tiny.gguf").model_id == "tiny"
    assert ServeConfig(backbone="/srv/models/tiny", backbone_id="base").model_id == "base"


def test_the_address_of_the_database_is_checked_and_never_shown():
    message = refusal(database_url="postgres://me:secret@db/jobs")
    assert "database_url must begin with postgresql:// or sqlite:///" in message
    assert "secret" not in message
