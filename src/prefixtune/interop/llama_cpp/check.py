"""Ask a running llama-server whether the exported prefix is in effect; exits with 1, saying why, if it is not.

    python check.py http://127.0.0.1:8080 [--slot 0] [--text "..."]

Stands beside export.json, and needs nothing but Python. The exported file must lie in the server's --slot-save-path.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["NotInEffectError", "check", "main"]


_TIMEOUT = 600.0
_NEAR = 0.02
"""Log-probabilities that differ by less may differ by rounding alone."""


class NotInEffectError(Exception):
    """The server does not answer with the prefix; says what was seen."""


def check(url: str, facts: Mapping[str, Any], *, slot: int = 0, text: str = "", timeout: float = _TIMEOUT) -> list[str]:
    """Restore the slot, and ask with the prefix, with its placeholders alone, and without both.

    Args:
        url: The server's address.
        facts: What export.json says.
        slot: The slot to restore; the others are left alone.
        text: What to ask; empty: the prompt of the text format.
        timeout: Of each request, in seconds.

    Returns:
        What was seen, one line each.

    Raises:
        NotInEffectError: The file was not restored whole, a request did not find it, or it changes nothing.
    """
    length, placeholders = int(facts["prefix_length"]), list(facts["placeholders"])
    text = text or str(facts["text_format"]["prompt"]).replace("{source}", "A short text.")

    def restore() -> int:
        reply = _post(url, f"/slots/{slot}?action=restore", {"filename": facts["file"]}, timeout)
        return int(reply.get("n_restored", 0))

    def ask(prompt: Sequence[int | str], cached: bool) -> tuple[int, dict[int, float]]:
        body = {"prompt": list(prompt), "id_slot": slot, "cache_prompt": cached, "n_predict": 1, "n_probs": 10}
        reply = _post(url, "/completion", {**body, "temperature": 0}, timeout)
        first = (reply.get("completion_probabilities") or [{}])[0].get("top_logprobs") or []
        if not first:
            raise NotInEffectError("the server told no probabilities (n_probs), so that nothing can be compared.")
        found = int((reply.get("timings") or {}).get("cache_n", -1))
        return found, {int(entry["id"]): float(entry["logprob"]) for entry in first}

    restored = restore()
    if restored < length:
        raise NotInEffectError(f"n_restored is {restored}, but the prefix has {length} positions.")
    found, with_prefix = ask([*placeholders, text], True)
    if found < length:
        raise NotInEffectError(
            f"timings.cache_n is {found}, but must be {length} or more: the placeholders were read as ordinary tokens."
        )
    _, as_tokens = ask([*placeholders, text], False)
    _, without = ask([text], False)
    apart = {"the placeholders read as tokens": as_tokens, "no prefix": without}
    lines = [f"n_restored {restored}, timings.cache_n {found}"]
    for name, other in apart.items():
        difference = _difference(with_prefix, other)
        if difference < _NEAR:
            raise NotInEffectError(f"the first token is as likely with the prefix as with {name}: it changes nothing.")
        lines.append(f"against {name}: {_words(difference)}")
    # The last request took the prefix out of the slot.
    if restore() < length:
        raise NotInEffectError("the slot could not be restored a second time.")
    return lines


def _difference(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """The largest difference over tokens that both name; infinite where they share none."""
    shared = one.keys() & other.keys()
    return max((abs(one[token] - other[token]) for token in shared), default=float("inf"))


def _words(difference: float) -> str:
    if difference == float("inf"):
        return "none of the likeliest first tokens are the same"
    return f"log-probabilities of the first token differ by up to {difference:.4g}"


def _post(url: str, path: str, body: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    data = json.dumps(body).encode()
    request = urllib.request.Request(url.rstrip("/") + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            answer = json.load(reply)
    except urllib.error.HTTPError as error:
        raise NotInEffectError(
            f"{path} answered {error.code}: {error.read().decode(errors='replace')[:300]}"
        ) from error
    except (OSError, ValueError) as error:
        raise NotInEffectError(f"{url}{path} cannot be reached: {error}") from error
    if not isinstance(answer, dict):
        raise NotInEffectError(f"{path} answered no JSON object.")
    return answer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; returns the exit code."""
    parser = argparse.ArgumentParser(description="Ask a running llama-server whether the exported prefix is in effect.")
    parser.add_argument("url", help="such as http://127.0.0.1:8080")
    parser.add_argument("--slot", type=int, default=0, help="the slot to restore (default: 0)")
    parser.add_argument("--text", default="", help="what to ask")
    parser.add_argument(
        "--export",
        default=str(Path(__file__).resolve().parent / "export.json"),
        metavar="FILE",
        help="export.json (default: the one beside this file)",
    )
    options = parser.parse_args(arguments)
    facts = json.loads(Path(options.export).read_text(encoding="utf-8"))
    try:
        lines = check(options.url, facts, slot=options.slot, text=options.text)
    except NotInEffectError as error:
        print(f"error: the prefix is not in effect: {error}", file=sys.stderr)
        return 1
    print("\n".join([*lines, "the prefix is in effect"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
