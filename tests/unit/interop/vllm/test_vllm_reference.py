"""A request names its prefix by a signed reference."""

from __future__ import annotations

import json
from typing import Any

from prefixtune.interop.vllm.reference import PrefixPart, PrefixReference


def test_only_a_proof_makes_a_reference_valid():
    reference = PrefixReference((PrefixPart("pubs", (1, 2), 10), PrefixPart("trains", (3, 4), 5)))
    assert (reference.name, reference.length) == ("pubs+trains", 15)
    sent = json.loads(json.dumps(reference.to_kv_transfer_params(b"secret")))
    assert PrefixReference.from_kv_transfer_params(sent, b"secret") == reference
    for none in (None, {}, 3, {"other": 1}):
        assert PrefixReference.from_kv_transfer_params(none, b"secret") is None
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    signed = sent["prefixtune"]
    for forged in (
        3,
        {},
        {"prefix": None, "proof": ""},
        {"prefix": ["pubs", [1, 2], 10], "proof": "é"},
        {"prefix": ["pubs", [1, 2], 10], "proof": "\ud800"},
        {"prefix": deep, "proof": "x"},
        {**signed, "prefix": [["bars", [1, 2], 10], *signed["prefix"][1:]]},
        {**signed, "prefix": signed["prefix"][::-1]},
        {**signed, "prefix": signed["prefix"][:1]},
    ):
        reference = PrefixReference.from_kv_transfer_params({"prefixtune": forged}, b"secret")
        assert reference is not None
        assert not reference.is_proven
    reference = PrefixReference.from_kv_transfer_params(sent, b"another")
    assert reference is not None
    assert not reference.is_proven


def test_no_two_prefixes_versions_or_clients_share_blocks():
    first, second, third = PrefixPart("a", (1, 2), 10), PrefixPart("b", (1, 2), 10), PrefixPart("a", (1, 3), 10)
    joined = ((first,), (second,), (third,), (first, second), (second, first), (third, second))
    references = [PrefixReference(parts) for parts in joined]
    salts = [reference.cache_salt(b"secret", client) for reference in references for client in (None, "mine", "other")]
    assert len(set(salts)) == len(salts)
    assert (
        references[0].cache_salt(b"secret", None)
        == references[0].cache_salt(b"secret", None)
        != references[0].cache_salt(b"another", None)
    )
    # What vLLM takes as a salt.
    assert all(len(salt) <= 128 and salt.isalnum() for salt in salts)
