"""Show people the events of a training: messages and a progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from prefixtune.training.run_folder import Event
from prefixtune.utils.console import Console, Progress

_START_NAMES = {"random": "random numbers", "prefix": "another prefix", "text": "a text", "examples": "solved examples"}


@contextlib.contextmanager
def show_training(
    console: Console, on_event: Callable[[Event], None] | None = None, *, num_runs: int = 1
) -> Iterator[Callable[[Event], None]]:
    """Yield a function that shows events, one by one.

    Args:
        console: Where they are shown.
        on_event: Called with each, once it is shown.
        num_runs: Runs that train together; their events name the `run`, and share one bar.
    """
    steps: dict[str, int] = {}
    total_steps: dict[str, int] = {}
    bar: Progress | None = None

    with contextlib.ExitStack() as stack:

        def show(event: Event) -> None:
            nonlocal bar
            kind, run = event["event"], event.get("run", "")
            if kind in ("start", "resume"):
                steps[run], total_steps[run] = event.get("step", 0), event["total_steps"]
            if kind == "step":
                if bar is None:
                    title = "training" if num_runs == 1 else f"training {num_runs} prefixes"
                    total = sum(total_steps.values()) or None
                    bar = stack.enter_context(console.progress(title, total, start=sum(steps.values())))
                steps[run] = event["step"]
                figures: dict[str, float] = {"loss": round(event["loss_per_token"], 4)}
                if num_runs == 1:
                    figures["tokens_per_second"] = round(event["target_tokens"] / max(event["seconds"], 1e-9))
                bar.update(sum(steps.values()), **figures)
            elif (num_runs == 1 or kind == "evaluation") and (message := _describe(event)):
                console.info(f"{run}: {message}" if run else message)
            if on_event is not None:
                on_event(event)

        yield show


def _describe(event: Event) -> str:
    """What a message says of an event; empty: nothing."""
    if event["event"] == "resume":
        return f"resuming after step {event['step']} of {event['total_steps']}"
    if event["event"] == "evaluation" and "loss" in event:
        best = f" (best {event['best_loss']:.4f})"
        return f"step {event['step']}: development loss {event['loss']:.4f} per token{best}"
    if event["event"] != "start":
        return ""
    total, epoch = event["total_steps"], event["steps_per_epoch"]
    targets = f"{event['num_targets']:,} targets of {event['num_sources']:,} sources"
    if 0 < total < epoch:
        targets += f", of which {total:,} {'step reads' if total == 1 else 'steps read'} {total / epoch:.0%}"
    notes = {
        "num_cut": "{} sources truncated to fit",
        "num_dropped_turns": "{:,} turns at the end of conversations left out to fit",
    }
    targets = ", ".join([targets, *(text.format(event[name]) for name, text in notes.items() if event.get(name))])
    counts = f"{event['num_trained']:,} parameters train, {event['num_stored']:,} are stored"
    return f"{_describe_prefix(event)}{targets}; {counts}; {event['dtype']} on {event['device']}"


def _describe_prefix(event: Event) -> str:
    """The prefix at the start of a run: its length, and where it starts."""
    length, start = event.get("prefix_length", 0), event["initialization"]
    if not length:
        return ""
    source = _START_NAMES.get(start["kind"], start["kind"])
    if chosen := start.get("examples"):
        source = f"{len(chosen)} solved {'examples' if len(chosen) > 1 else 'example'}"
    if start.get("head") == "left out":
        source += ", whose head is for other labels and is left out"
    nested = ", every length trains" if event.get("nested") else ""
    beside = f", up to {event['beside']['others']} others beside it" if event.get("beside") else ""
    hidden = f", {event['prefix_dropout']:.0%} of it hidden at a time" if event.get("prefix_dropout") else ""
    return f"starts from {source}, P = {length}{nested}{hidden}{beside}; "
