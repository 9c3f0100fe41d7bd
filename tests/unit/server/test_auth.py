"""API keys: who calls, and what they may use."""

from __future__ import annotations

from prefixtune.server.auth import Caller, Keyring, hash_key
from prefixtune.server.settings import KeyConfig


def test_a_key_is_found_by_its_hash_only() -> None:
    keyring = Keyring({"a": KeyConfig(hash=hash_key("pt-a")), "b": KeyConfig(hash=hash_key("pt-b"))})
    assert not keyring.is_open
    caller = keyring.find("Bearer pt-b")
    assert caller is not None
    assert caller.name == "b"
    assert keyring.find("bearer  pt-a ") is keyring.find("Bearer pt-a")
    for wrong in (None, "", "Bearer", "Bearer ", "pt-a", "Basic pt-a", "Bearer pt-ab", f"Bearer {hash_key('pt-a')}"):
        assert keyring.find(wrong) is None
    # Any bytes may be in a header.
    assert keyring.find("Bearer \udcff\x00é") is None


def test_patterns_name_the_allowed_models() -> None:
    caller = Caller.from_config("a", KeyConfig(hash=hash_key(""), prefixes=("acme-*", "base")))
    assert [name for name in ("acme-1", "acme-", "base", "base2", "Acme-1", "x-acme-1") if caller.may_use(name)] == [
        "acme-1",
        "acme-",
        "base",
    ]
    assert not Caller.from_config("b", KeyConfig(hash=hash_key(""), prefixes=())).may_use("base")
