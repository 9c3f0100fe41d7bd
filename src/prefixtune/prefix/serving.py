"""Whether a prefix can be served in front of a model's text."""

from __future__ import annotations

from prefixtune.errors import BackboneError
from prefixtune.prefix.chat_format import is_allowed
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.prefix.geometry import Geometry
from prefixtune.prefix.header import backbone_origin
from prefixtune.prefix.prefix import Prefix, check_fits
from prefixtune.prefix.text_format import read_text_format


def incompatibilities(
    prefix: Prefix, geometry: Geometry, name: str, fingerprint: str | None = None, *, classifies: bool = False
) -> list[str]:
    """Why a prefix cannot be served in front of a model's text; empty: no reason is known.

    Args:
        prefix: Perhaps without its numbers, as `read_outline` returns it.
        geometry: The model's.
        name: The model's, for messages.
        fingerprint: The model's; None: weights are not compared.
        classifies: Prefixes that classify or tag are served too.
    """
    header, reasons = prefix.header, list[str]()
    text_format, origin = read_text_format(header), backbone_origin(header).fingerprint
    if text_format is not None and not is_allowed(text_format.chat_template):
        reasons.append("it has a chat template of its own, which nobody named (--chat-templates)")
    if prefix.head is not None and not header.get("labels"):
        reasons.append("it has a head, but no labels")
    elif header.get("labels") and not classifies:
        reasons.append("it classifies, and writes no text")
    if header.get("adapter"):
        reasons.append("it was trained together with a LoRA adapter")
    try:
        check_fits(prefix, geometry, name)
    except BackboneError as error:
        return [*reasons, error.message.rstrip(".")]
    if origin and fingerprint is not None and not fingerprints_match(origin, fingerprint):
        reasons.append(f"it was trained for other weights than those of {name!r}")
    return reasons
