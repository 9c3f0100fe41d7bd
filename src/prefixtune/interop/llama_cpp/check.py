"""Ask a running llama-server whether the exported prefix is in effect; exits with 1, saying why, if it is not.

    python check.py http://127.0.0.1:8080 [--slot 0] [--text "..."] [--api-key KEY]

It is exported together with export.json, and needs nothing but Python. The exported state must be in the server's
--slot-save-path.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_TIMEOUT = 600.0
_MIN_DIFFERENCE = 0.02
"""Log-probabilities that differ by less may differ by rounding alone."""


class NotInEffectError(Exception):
    """The server does not answer with the prefix; the message says what was seen."""


def check(
    url: str, facts: Mapping[str, Any], *, slot: int = 0, text: str = "", api_key: str = "", timeout: float = _TIMEOUT
) -> list[str]:
    """Restore the slot, and send a prompt with the prefix, with its placeholders as tokens, and without both.

    Args:
        url: The server's address.
        facts: The content of export.json.
        slot: The slot to restore; the others are not used.
        text: The prompt; empty: the prompt of the text format.
        api_key: The one that the server was started with; empty: none.
        timeout: For each request, in seconds.

    Returns:
        What was seen, one line each.

    Raises:
        NotInEffectError: The file was not restored whole, a request did not find it, or it changes nothing.
    """
    length, placeholders = int(facts["prefix_length"]), list(facts["placeholders"])
    text = text or str(facts["text_format"]["prompt"]).replace("{source}", "A short text.")

    def post(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return _post(f"{url.rstrip('/')}/{path}", body, api_key, timeout)

    def restore() -> int:
        restored = int(post(f"slots/{slot}?action=restore", {"filename": facts["file"]}).get("n_restored", 0))
        if restored < length:
            raise NotInEffectError(f"n_restored is {restored}, but the prefix has {length} positions.")
        return restored

    def complete(prompt: Sequence[int | str], cached: bool) -> tuple[int, dict[int, float]]:
        body = {"prompt": list(prompt), "id_slot": slot, "cache_prompt": cached, "n_predict": 1, "n_probs": 10}
        reply = post("completion", {**body, "temperature": 0})
        first = (reply.get("completion_probabilities") or [{}])[0].get("top_logprobs") or []
        if not first:
            raise NotInEffectError("the server returned no probabilities (n_probs), so nothing can be compared.")
        num_cached = int((reply.get("timings") or {}).get("cache_n", -1))
        return num_cached, {int(entry["id"]): float(entry["logprob"]) for entry in first}

    restored = restore()
    num_cached, with_prefix = complete([*placeholders, text], True)
    if num_cached < length:
        what = f"timings.cache_n is {num_cached}, but must be {length} or more"
        raise NotInEffectError(f"{what}: the placeholders were read as ordinary tokens.")
    _, as_tokens = complete([*placeholders, text], False)
    _, without = complete([text], False)
    lines = [f"n_restored {restored}, timings.cache_n {num_cached}"]
    for name, other in {"the placeholders read as tokens": as_tokens, "no prefix": without}.items():
        shared = with_prefix.keys() & other.keys()
        difference = max((abs(with_prefix[token] - other[token]) for token in shared), default=float("inf"))
        if difference < _MIN_DIFFERENCE:
            raise NotInEffectError(f"the first token is as likely with the prefix as with {name}: it changes nothing.")
        lines.append(f"against {name}: log-probabilities of the first token differ by up to {difference:.4g}")
    restore()  # the last request removed the prefix from the slot
    return lines


def _post(url: str, body: Mapping[str, Any], api_key: str, timeout: float) -> dict[str, Any]:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
    try:
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return dict(json.load(reply))
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise NotInEffectError("the server wants a key: give --api-key or LLAMA_API_KEY.") from error
        raise NotInEffectError(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:300]}") from error
    except (OSError, ValueError, TypeError, http.client.HTTPException) as error:
        raise NotInEffectError(f"{url} cannot be reached: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; returns the exit code."""
    parser = argparse.ArgumentParser(description="Ask a running llama-server whether the exported prefix is in effect.")
    key, facts = os.environ.get("LLAMA_API_KEY", ""), str(Path(__file__).resolve().parent / "export.json")
    parser.add_argument("url", help="such as http://127.0.0.1:8080")
    parser.add_argument("--slot", type=int, default=0, help="the slot to restore (default: 0)")
    parser.add_argument("--text", default="", help="the prompt")
    parser.add_argument("--api-key", default=key, metavar="KEY", help="the server's (default: LLAMA_API_KEY)")
    parser.add_argument("--export", default=facts, metavar="FILE", help="export.json (default: beside this file)")
    options = parser.parse_args(arguments)
    try:
        facts = json.loads(Path(options.export).read_text(encoding="utf-8"))
        if "placeholders" not in facts:
            raise ValueError("it is of another kind of export")
    except (OSError, ValueError) as error:
        parser.error(f"{options.export} is no export.json for llama.cpp: {error}")
    try:
        lines = check(options.url, facts, slot=options.slot, text=options.text, api_key=options.api_key)
    except NotInEffectError as error:
        print(f"error: the prefix is not in effect: {error}", file=sys.stderr)
        return 1
    print("\n".join([*lines, "the prefix is in effect"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
