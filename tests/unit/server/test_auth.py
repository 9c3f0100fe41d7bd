"""Who may ask, for what, and how often."""

from __future__ import annotations

import pytest

from prefixtune.server.auth import Caller, Keyring, hash_key, new_key
from prefixtune.server.limits import RateLimited, RequestLimit
from prefixtune.server.settings import KeyConfig


def test_keys_are_long_and_new_each_time() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    # 256 bits in base64: 43 characters.
    assert all(key.startswith("pt-") and len(key) == 46 for key in keys)


def test_a_key_is_found_by_its_hash_only() -> None:
    keyring = Keyring({"a": KeyConfig(hash_key("pt-a")), "b": KeyConfig(hash_key("pt-b"))})
    assert not keyring.is_open
    found = keyring.find("Bearer pt-b")
    assert found is not None
    assert found.name == "b"
    assert keyring.find("bearer  pt-a ") is keyring.find("Bearer pt-a")
    for wrong in (None, "", "Bearer", "Bearer ", "pt-a", "Basic pt-a", "Bearer pt-ab", f"Bearer {hash_key('pt-a')}"):
        assert keyring.find(wrong) is None
    # Whatever bytes a header holds.
    assert keyring.find("Bearer \udcff\x00é") is None


def test_without_keys_everybody_is_local_and_no_admin() -> None:
    caller = Keyring({}).find(None)
    assert caller is not None
    assert caller.may_use("anything")
    assert not caller.rules.admin


def test_patterns_tell_which_models() -> None:
    caller = Caller.from_config("a", KeyConfig("", prefixes=("acme-*", "base")))
    assert [name for name in ("acme-1", "acme-", "base", "base2", "Acme-1", "x-acme-1") if caller.may_use(name)] == [
        "acme-1",
        "acme-",
        "base",
    ]
    assert not Caller.from_config("b", KeyConfig("", prefixes=())).may_use("base")


def test_requests_a_minute() -> None:
    now = [0.0]
    limit = RequestLimit("a", per_minute=3, clock=lambda: now[0])

    def ask() -> None:
        with limit.request():
            pass

    for _ in range(3):
        ask()
    with pytest.raises(RateLimited) as caught:
        ask()
    assert caught.value.reason == "rate"
    assert caught.value.retry_after == 20
    # A third of a minute later there is room for one, and for one only.
    now[0] = 20.0
    ask()
    with pytest.raises(RateLimited):
        ask()
    # A long pause does not save up more than a minute's.
    now[0] = 10_000.0
    for _ in range(3):
        ask()
    with pytest.raises(RateLimited):
        ask()


def test_requests_at_once_are_counted_down_whatever_happens() -> None:
    limit = RequestLimit("a", concurrent=2)
    with limit.request(), limit.request():
        with pytest.raises(RateLimited) as caught, limit.request():
            pass
        assert caught.value.reason == "concurrency"
    with pytest.raises(OSError, match="gone"), limit.request():
        raise OSError("gone")
    with limit.request(), limit.request():
        pass
