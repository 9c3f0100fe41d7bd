"""What a notebook shows of a prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefixtune.prefix.geometry import describe
from prefixtune.prefix.prefix import Prefix
from prefixtune.utils.console import format_figure
from prefixtune.utils.notebook import facts_html

__all__ = ["prefix_facts", "prefix_html"]


def prefix_html(prefix: Prefix) -> str:
    """A small table: its shape, its size, and what its header says of where it comes from."""
    return facts_html("Prefix", prefix_facts(prefix))


def prefix_facts(prefix: Prefix) -> dict[str, Any]:
    """What is known of a prefix, by name; the header's texts may be anybody's."""
    header = prefix.header
    training, start, labels, composition = (
        _object(header, name) for name in ("training", "initialization", "labels", "composition")
    )
    lengths = ", ".join(f"{site} {prefix.length(site)}" for site in prefix.sites)
    dtype = str(prefix.dtype).removeprefix("torch.")
    parts = composition.get("parts")
    return {
        "backbone": _object(header, "backbone").get("name"),
        "positions": f"{prefix.length()}" if prefix.sites == ("decoder",) else lengths,
        "sites": describe(prefix.geometry),
        "size": f"{prefix.num_parameters:,} numbers, {prefix.num_bytes:,} bytes in {dtype}",
        "placement": prefix.placement if prefix.placement != "front" else None,
        "task": header.get("task"),
        "labels": ", ".join(map(str, labels.get("names", ()))) if labels else None,
        "start": start.get("text") or start.get("kind"),
        "trained on": _describe_data(training),
        "development loss": _figure(training.get("dev_loss")),
        "text format": _describe_format(_object(header, "text_format")),
        "joined from": f"{len(parts)} prefixes" if isinstance(parts, list) else None,
        "license": header.get("license"),
    }


def _describe_data(training: Mapping[str, Any]) -> str:
    targets, steps, dataset = (training.get(name) for name in ("num_targets", "steps", "dataset"))
    parts = [
        f"{format_figure(targets)} targets" if isinstance(targets, int) else "",
        f"of {dataset}" if dataset else "",
        f"in {format_figure(steps)} steps" if isinstance(steps, int) else "",
    ]
    return " ".join(part for part in parts if part)


def _describe_format(text_format: Mapping[str, Any]) -> str:
    template = text_format.get("chat_template")
    if template:
        return "the model's chat template" if template == "model" else "a chat template of its own"
    return f"{text_format.get('prompt')!r} {text_format.get('target')!r}" if text_format else ""


def _figure(value: object) -> str:
    return format_figure(value) if isinstance(value, int | float) else ""


def _object(header: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = header.get(name)
    return value if isinstance(value, Mapping) else {}
