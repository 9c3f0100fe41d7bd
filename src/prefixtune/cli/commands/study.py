"""`prefixtune study`: run a study, or what is left of it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from prefixtune.cli.common import AddCommand, print_json
from prefixtune.errors import ConfigError
from prefixtune.utils.console import Console

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `prefixtune study` takes."""
    from prefixtune.studies.config import StudyConfig
    from prefixtune.studies.kinds import STUDIES

    parser.add_argument("name", help="; ".join(f"{name}: {kind.description}" for name, kind in STUDIES.items()))
    parser.add_argument("--config", metavar="FILE", help="TOML file with the keys below; flags win over it")
    parser.add_argument("--plan", action="store_true", help="only show the runs that it takes")
    parser.add_argument("--json", action="store_true", help="print every event as JSON, one a line")
    parser.add_argument("--quiet", action="store_true", help="no progress, only results and errors")
    parser.add_argument(
        "--ray", type=int, metavar="N", default=0, help="share the runs out over N workers of a Ray cluster"
    )
    parser.add_argument(
        "--ray-address",
        metavar="TEXT",
        help="the cluster, as ray.init takes it: auto, or HOST:PORT (default: this machine)",
    )
    group = parser.add_argument_group("study", "tables can stand in the file alone: " + ", ".join(_tables()))
    varying = {key for kind in STUDIES.values() for key in kind.defaults}
    for each in dataclasses.fields(StudyConfig):
        if each.name in ("name", *_tables()):
            continue
        default: Any = each.default
        flag, kind = f"--{each.name.replace('_', '-')}", type(default)
        usual = ",".join(map(str, default)) if kind is tuple else default
        told = f"the study's own, else {usual}" if each.name in varying else str(usual or "")
        text = each.metadata["help"].replace("%", "%%") + (f" (default: {told})" if told else "")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            number = {int: int, float: float}.get(kind, str)
            metavar = {int: "N", float: "X"}.get(kind, "A,B,..." if kind is tuple else "TEXT")
            group.add_argument(flag, type=number, default=argparse.SUPPRESS, metavar=metavar, help=text)


def _tables() -> list[str]:
    from prefixtune.studies.config import StudyConfig

    return [each.name for each in dataclasses.fields(StudyConfig) if each.default_factory is not dataclasses.MISSING]


def run(options: argparse.Namespace) -> int:
    """`prefixtune study`."""
    from prefixtune.studies.config import StudyConfig
    from prefixtune.studies.grid import plan

    names = {each.name for each in dataclasses.fields(StudyConfig)} - {"name"}
    flags = {name: value for name, value in vars(options).items() if name in names}
    if options.config:
        config = StudyConfig.from_toml(options.name, options.config, flags)
    else:
        config = StudyConfig.from_mapping(options.name, flags, where="the command")
    console = Console(quiet=options.quiet or options.json)
    cells = plan(config)
    if options.plan:
        if options.json:
            print_json({"folder": str(config.folder), "runs": [{"id": cell.id, **cell.factors()} for cell in cells]})
        else:
            for cell in cells:
                print(cell.id)
        return 0
    from prefixtune.studies.runner import run_study

    with ExitStack() as stack:
        shown = print_json if options.json else _Shown(console, stack, len(cells)).show
        try:
            if options.ray or options.ray_address:
                from prefixtune.studies.cluster import run_on_ray

                command = " ".join(["prefixtune", *sys.argv[1:]])
                outcome = run_on_ray(
                    config, options.ray or 1, address=options.ray_address, on_event=shown, command=command
                )
            else:
                outcome = run_study(config, on_event=shown)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("what is done is kept; go on with the same command.") from None
    told = {
        "folder": str(outcome.folder),
        "done": list(outcome.done),
        "failed": outcome.failed,
        "left": list(outcome.left),
    }
    if options.json:
        print_json({"event": "result", **told})
    else:
        print(f"{outcome.folder}: {len(outcome.done)} of {len(cells)} runs done")
        for name, error in outcome.failed.items():
            console.warn(f"{name} failed: {error}")
        if outcome.left:
            console.info(f"{len(outcome.left)} left; go on with the same command")
        console.info(f"look at it: prefixtune report {outcome.folder} --output {outcome.folder}/report.html")
    if outcome.failed and not outcome.done:
        raise ConfigError("every run of the study failed.", hint=next(iter(outcome.failed.values())))
    return 0


class _Shown:
    """A study's events, as a person sees them."""

    def __init__(self, console: Console, stack: ExitStack, total: int) -> None:
        self.console, self.stack, self.total = console, stack, total
        self.bar: Any = None

    def show(self, event: Mapping[str, Any]) -> None:
        """Tell an event."""
        kind = event["event"]
        if "worker" in event and kind in ("start", "step", "decoded"):
            # Of several at once a bar would say nothing.
            return
        if kind == "overlap":
            self.console.warn(f"{event['text']}.")
        elif kind == "cell" and event["status"] == "begun":
            self._close()
            self.console.info(f"[{event['number']}/{self.total}] {event['cell']}")
        elif kind == "cell":
            self._close()
            self.console.info(f"  {event['status']}{': ' + event['error'] if event.get('error') else ''}")
        elif kind == "try":
            self._close()
            outcome = event.get("error") or f"development loss {event['dev_loss']:.4f}"
            self.console.info(f"  learning rate {event['learning_rate']:g}: {outcome}")
        elif kind == "start":
            self._open(f"training at {event['learning_rate']:g}", event["total_steps"])
        elif kind == "step" and self.bar is not None:
            self.bar.update(event["step"], loss=round(event["loss_per_token"], 3))
        elif kind == "decoded":
            if self.bar is None or self.title != "scoring":
                self._open("scoring", event["total"])
            self.bar.update(event["count"])

    def _open(self, title: str, total: int) -> None:
        self._close()
        self.title = title
        self.bar = self.stack.enter_context(self.console.progress(title, total))

    def _close(self) -> None:
        self.bar = None
        self.stack.close()


def register(command: AddCommand) -> None:
    """Add the command and its options to the command line."""
    parser = command(
        "study",
        run,
        "compare methods, sizes, lengths or starts: a grid of runs that can be stopped, resumed and shared out",
        """

examples:
  prefixtune study methods --config studies/methods.toml
  prefixtune study low-data --config studies/low_data.toml --budget 60
  prefixtune study length --task toy --train train --dev held_out --test held_out --sizes 0""",
    )
    add_arguments(parser)
