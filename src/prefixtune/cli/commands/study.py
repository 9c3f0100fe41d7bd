"""`prefixtune study`: run a study, or what is left of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from pydantic import Field

from prefixtune.cli.common import print_event, print_json
from prefixtune.cli.options import ConfigOptions, OutputOptions, command, json_option, positional
from prefixtune.errors import ConfigError
from prefixtune.studies.config import StudyConfig
from prefixtune.studies.kinds import StudyName
from prefixtune.utils.console import Console
from prefixtune.utils.machine import command_line

if TYPE_CHECKING:
    from prefixtune.studies.grid import Cell
    from prefixtune.studies.records import Outcome

__all__ = ["StudyOptions", "study"]


class StudyOptions(OutputOptions, ConfigOptions, StudyConfig):
    """The options of `prefixtune study`."""

    name: StudyName = positional(description=StudyConfig.model_fields["name"].description)
    plan: bool = Field(False, description="only list the runs of the study")
    as_json: bool = json_option("every event, one a line,")
    ray: int = Field(0, ge=0, description="distribute the runs over N workers of a Ray cluster")
    ray_address: str = Field(
        "", description="the cluster, as ray.init takes it: auto, or HOST:PORT; empty: this machine"
    )


@command
def study(options: StudyOptions) -> int:
    """Compare methods, sizes, lengths or starts: a grid of runs that can be stopped, resumed and distributed.

    The file of --config may also have the tables variants, train_settings, learning_rates and
    steps_by_size.

    For example:
        prefixtune study methods --config studies/methods.toml
        prefixtune study low-data --config studies/low_data.toml --budget 60
        prefixtune study length --task toy_copy --train train --dev dev --test held_out --sizes 0
    """
    from prefixtune.studies.grid import plan

    config = options.part(StudyConfig)
    if options.print_config:
        print(config.to_toml().rstrip())
        return 0
    cells = plan(config)
    if options.plan:
        _print_plan(options, config, cells)
        return 0
    console = Console(quiet=options.quiet)
    outcome = _run_study(console, options, config, len(cells))
    if options.as_json:
        print_json(
            {
                "event": "result",
                "folder": str(outcome.folder),
                "done": list(outcome.done),
                "failed": outcome.failed,
                "left": list(outcome.left),
            }
        )
    else:
        _print_outcome(console, outcome, len(cells))
    if outcome.failed and not outcome.done:
        raise ConfigError("every run of the study failed.", hint=next(iter(outcome.failed.values())))
    return 1 if outcome.failed else 0


def _print_plan(options: StudyOptions, config: StudyConfig, cells: Sequence[Cell]) -> None:
    """List the runs of a study."""
    if options.as_json:
        print_json({"folder": str(config.folder), "runs": [{"id": cell.id, **cell.factors()} for cell in cells]})
    else:
        for cell in cells:
            print(cell.id)


def _run_study(console: Console, options: StudyOptions, config: StudyConfig, num_runs: int) -> Outcome:
    """Run a study in this process or on Ray, with its events shown.

    Raises:
        KeyboardInterrupt: It was interrupted; the text says how to continue.
    """
    from prefixtune.studies.runner import run_study

    with ExitStack() as stack:
        on_event = print_event if options.as_json else _StudyProgress(console, stack, num_runs).show
        try:
            if not options.ray and not options.ray_address:
                return run_study(config, on_event=on_event)
            from prefixtune.studies.cluster import run_on_ray

            return run_on_ray(
                config,
                options.ray or 1,
                address=options.ray_address or None,
                on_event=on_event,
                command=command_line(),
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("finished runs are kept; go on with the same command.") from None


def _print_outcome(console: Console, outcome: Outcome, num_runs: int) -> None:
    """Print how many runs are done, which failed, and what to do next."""
    print(f"{outcome.folder}: {len(outcome.done)} of {num_runs} runs done")
    for name, error in outcome.failed.items():
        console.warn(f"{name} failed: {error}")
    if outcome.left:
        console.info(f"{len(outcome.left)} left; go on with the same command")
    console.info(f"look at it: prefixtune report {outcome.folder} --output {outcome.folder}/report.html")


class _StudyProgress:
    """Shows the events of a study to people."""

    def __init__(self, console: Console, stack: ExitStack, total: int) -> None:
        self.console, self.stack, self.total = console, stack, total
        self.bar: Any = None

    def show(self, event: Mapping[str, Any]) -> None:
        """Show an event."""
        kind = event["event"]
        if "worker" in event and kind in ("start", "step", "decoded"):
            # A bar of several runs at once would be meaningless.
            return
        if kind in ("overlap", "warning"):
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
