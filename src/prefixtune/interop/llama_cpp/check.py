"""Ask a running llama-server whether the exported prefix is in effect; exits with 1, saying why, if it is not.

    python check.py http://127.0.0.1:8080 [--slot 0] [--text "..."] [--api-key KEY]

It is exported together with export.json, and needs nothing but Python. The exported state must be in the server's
--slot-save-path.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["NotInEffectError", "check", "main"]


_TIMEOUT = 600.0
_MIN_DIFFERENCE = 0.02
"""Log-probabilities that differ by less may differ by rounding alone."""


class NotInEffectError(Exception):
    """The server does not answer with the prefix; the message says what was seen."""


def check(
    url: str,
    facts: Mapping[str, Any],
    *,
    slot: int = 0,
    text: str = "",
    api_key: str = "",
    timeout: float = _TIMEOUT,
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
    url = url.rstrip("/")
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
    length, placeholders = int(facts["prefix_length"]), list(facts["placeholders"])
    text = text or str(facts["text_format"]["prompt"]).replace("{source}", "A short text.")

    def restore() -> int:
        reply = _post(f"{url}/slots/{slot}?action=restore", {"filename": facts["file"]}, headers, timeout)
        return int(reply.get("n_restored", 0))

    def complete(prompt: Sequence[int | str], cached: bool) -> tuple[int, dict[int, float]]:
        body = {"prompt": list(prompt), "id_slot": slot, "cache_prompt": cached, "n_predict": 1, "n_probs": 10}
        reply = _post(f"{url}/completion", {**body, "temperature": 0}, headers, timeout)
        first = (reply.get("completion_probabilities") or [{}])[0].get("top_logprobs") or []
        if not first:
            raise NotInEffectError("the server returned no probabilities (n_probs), so nothing can be compared.")
        num_cached = int((reply.get("timings") or {}).get("cache_n", -1))
        return num_cached, {int(entry["id"]): float(entry["logprob"]) for entry in first}

    restored = restore()
    if restored < length:
        raise NotInEffectError(f"n_restored is {restored}, but the prefix has {length} positions.")
    num_cached, with_prefix = complete([*placeholders, text], True)
    if num_cached < length:
        raise NotInEffectError(
            f"timings.cache_n is {num_cached}, but must be {length} or more: "
            "the placeholders were read as ordinary tokens."
        )
    _, as_tokens = complete([*placeholders, text], False)
    _, without = complete([text], False)
    others = {"the placeholders read as tokens": as_tokens, "no prefix": without}
    lines = [f"n_restored {restored}, timings.cache_n {num_cached}"]
    for name, other in others.items():
        difference = _difference(with_prefix, other)
        if difference < _MIN_DIFFERENCE:
            raise NotInEffectError(f"the first token is as likely with the prefix as with {name}: it changes nothing.")
        lines.append(f"against {name}: {_describe(difference)}")
    # The last request removed the prefix from the slot.
    if restore() < length:
        raise NotInEffectError("the slot could not be restored a second time.")
    return lines


def _difference(logprobs: Mapping[int, float], others: Mapping[int, float]) -> float:
    """The largest difference over the tokens that both have; infinite where they share none."""
    shared = logprobs.keys() & others.keys()
    return max((abs(logprobs[token] - others[token]) for token in shared), default=float("inf"))


def _describe(difference: float) -> str:
    if difference == float("inf"):
        return "none of the likeliest first tokens are the same"
    return f"log-probabilities of the first token differ by up to {difference:.4g}"


def _post(url: str, body: Mapping[str, Any], headers: Mapping[str, str], timeout: float) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), dict(headers))
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            answer = json.load(reply)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise NotInEffectError("the server wants a key: give --api-key or LLAMA_API_KEY.") from error
        raise NotInEffectError(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:300]}") from error
    except (OSError, ValueError) as error:
        raise NotInEffectError(f"{url} cannot be reached: {error}") from error
    if not isinstance(answer, dict):
        raise NotInEffectError(f"the response of {url} is not a JSON object.")
    return answer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; returns the exit code."""
    parser = argparse.ArgumentParser(description="Ask a running llama-server whether the exported prefix is in effect.")
    parser.add_argument("url", help="such as http://127.0.0.1:8080")
    parser.add_argument("--slot", type=int, default=0, help="the slot to restore (default: 0)")
    parser.add_argument("--text", default="", help="the prompt")
    parser.add_argument(
        "--api-key",
        default=os.environ.get("LLAMA_API_KEY", ""),
        metavar="KEY",
        help="the one that the server was started with (default: LLAMA_API_KEY)",
    )
    parser.add_argument(
        "--export",
        default=str(Path(__file__).resolve().parent / "export.json"),
        metavar="FILE",
        help="export.json (default: in the folder of this file)",
    )
    options = parser.parse_args(arguments)
    facts = json.loads(Path(options.export).read_text(encoding="utf-8"))
    try:
        lines = check(options.url, facts, slot=options.slot, text=options.text, api_key=options.api_key)
    except NotInEffectError as error:
        print(f"error: the prefix is not in effect: {error}", file=sys.stderr)
        return 1
    print("\n".join([*lines, "the prefix is in effect"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
