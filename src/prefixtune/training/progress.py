"""A training's events as people see them: a progress bar and messages, for the command and for Python alike.

Knows nothing of how a training goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from prefixtune.utils.console import Console

__all__ = ["show_training"]


@contextmanager
def show_training(console: Console) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give a function that shows a run's events, one by one.

    Args:
        console: Where to.
    """
    with ExitStack() as stack:
        bar: list[Any] = []
        total = [0]

        def show(event: dict[str, Any]) -> None:
            if event["event"] == "start":
                total[0] = event["total_steps"]
                cut = f", {event['num_cut']} sources truncated to fit" if event["num_cut"] else ""
                console.info(
                    f"{event['num_targets']:,} targets of {event['num_sources']:,} sources{cut}; "
                    f"{event['num_trained']:,} parameters train, {event['num_stored']:,} are stored; "
                    f"{event['dtype']} on {event['device']}"
                )
            if event["event"] == "resume":
                total[0] = event["total_steps"]
                console.info(f"resuming after step {event['step']} of {event['total_steps']}")
            if event["event"] == "extend":
                console.info(
                    f"the run was planned with {event['planned']} steps; from here on the learning rate is that of "
                    f"{event['total_steps']}"
                )
            if event["event"] == "step":
                if not bar:
                    bar.append(
                        stack.enter_context(console.progress("training", total[0] or None, start=event["step"] - 1))
                    )
                rate = event["target_tokens"] / max(event["seconds"], 1e-9)
                bar[0].update(event["step"], loss=round(event["loss_per_token"], 4), tokens_per_second=round(rate))
            if event["event"] == "evaluation" and "loss" in event:
                best = f"(best {event['best_loss']:.4f})"
                console.info(f"step {event['step']}: development loss {event['loss']:.4f} per token {best}")

        yield show
