"""Examples -> tokens in files, a part at a time, kept in the cache for the next run of the same data."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from prefixtune import __version__
from prefixtune.attention.injection import interruption
from prefixtune.backbone.backbone import Backbone
from prefixtune.data.cache import ColumnWriter, stored
from prefixtune.data.examples import Example
from prefixtune.data.stored_examples import FEW, StoredExamples
from prefixtune.data.tokenized import DTYPES, Columns, TokenizedDataset, TokenTable

__all__ = ["encode_stored", "tokenizer_key"]

_VERSION = 3
"""Of how examples become tokens: to be raised when that changes within a version of the package."""
_PART = 2048
"""Examples that are tokenized at a time."""
_ORIGINS = "origins"
_FACTS = tuple(field.name for field in dataclasses.fields(TokenizedDataset) if field.name not in ("examples", _ORIGINS))
"""Figures of a data set: sums over its parts, but for the longest prompt."""

Encode = Callable[[Sequence[Example], int], TokenizedDataset]
"""Tokenizes some examples; the second argument is the number of the first one, from 1, for messages."""


def encode_stored(
    examples: Sequence[Example],
    encode: Encode,
    *,
    key: str | None = None,
    on_part: Callable[[int], None] | None = None,
) -> TokenizedDataset:
    """Tokenize examples at once where they are few, else a part at a time, into files.

    Args:
        examples: All of them.
        encode: Tokenizes a part of them; of each example independently of the others.
        key: Names all that the tokens depend on, so that they are kept from run to run; None: they are not.
        on_part: Called after each part with the number of examples so far.

    Raises:
        DataError: From `encode`.
        PrefixError: The disk is full.
    """
    if not isinstance(examples, StoredExamples) and len(examples) <= FEW:
        return encode(examples, 1)
    entry = stored(key, lambda writer: _write(writer, examples, encode, on_part))
    columns: dict[str, Any] = dict(entry.columns)
    origins = columns.pop(_ORIGINS, ())
    return TokenizedDataset(TokenTable(**columns), origins=origins, **entry.facts)


def _write(
    writer: ColumnWriter, examples: Sequence[Example], encode: Encode, on_part: Callable[[int], None] | None
) -> Mapping[str, Any]:
    columns = Columns()
    facts = dict.fromkeys(_FACTS, 0)
    done, has_origins = 0, False
    for count, part in _encoded(examples, encode):
        columns.extend(part.examples)
        for name, numbers in columns.take().items():
            writer.append(name, numbers)
        has_origins |= len(part.origins) > 0
        origins = np.asarray(part.origins if len(part.origins) else range(count), np.int64)
        writer.append(_ORIGINS, origins + done)
        for name in facts:
            value = getattr(part, name)
            facts[name] = max(facts[name], value) if name == "longest_prompt" else facts[name] + value
        done += count
        if on_part is not None:
            on_part(done)
    for name in {*DTYPES, _ORIGINS} - columns.used - ({_ORIGINS} if has_origins else set()):
        writer.drop(name)
    return facts


def _encoded(examples: Sequence[Example], encode: Encode) -> Iterator[tuple[int, TokenizedDataset]]:
    """The tokens of each part, and its number of examples; a part is tokenized while the one before it is written.

    Where this thread may be interrupted, it tokenizes them itself: what it then does may need the same tokenizer.
    """
    stream, first = iter(examples), 1
    if interruption.get() is not None:
        while part := list(itertools.islice(stream, _PART)):
            yield len(part), encode(part, first)
            first += len(part)
        return
    waiting: tuple[int, Future[TokenizedDataset]] | None = None
    pool = ThreadPoolExecutor(1)
    try:
        while part := list(itertools.islice(stream, _PART)):
            before, waiting = waiting, (len(part), pool.submit(encode, part, first))
            first += len(part)
            if before is not None:
                yield before[0], before[1].result()
        if waiting is not None:
            yield waiting[0], waiting[1].result()
    finally:
        pool.shutdown(cancel_futures=True)


def tokenizer_key(backbone: Backbone) -> str | None:
    """Tells what a backbone makes of texts from what others make of them; None: its tokenizer does not say."""
    tokenizer = backbone.tokenizer
    if not tokenizer.is_fast:
        return None
    facts = {
        "version": [__version__, _VERSION],
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "class": type(tokenizer).__name__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
        "languages": [getattr(tokenizer, name, None) for name in ("src_lang", "tgt_lang")],
        "kind": backbone.kind,
        "end": backbone.end,
        "separator": backbone.separator,
        "positions": [backbone.max_positions, backbone.longrope_limit],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
