"""Run a study: cell by cell, each kept when done, any number of processes on one folder.

A cell is trained at a learning rate that was chosen for its point of the grid, by development loss among as many tries
as every other method gets; the best try is the first repetition itself, unless tries are shorter than runs. A cell
belongs to the process that holds its lock, which a process that dies lets go.

    FOLDER/study.json             the study and its settings, what was cut
    FOLDER/comparisons.json       differences between runs, and whether they are more than chance
    FOLDER/tuning/GROUP.json      the rates tried and the one chosen
    FOLDER/cells/ID/              a training run and its evaluation, with cell.json

Knows nothing of how results are shown.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import json
import math
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import check_loadable, load_backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data import TASKS, Example, read_task
from prefixtune.errors import ConfigError, DataError, PrefixError
from prefixtune.evaluation.decode import DECODED_FILE
from prefixtune.evaluation.evaluate import evaluate
from prefixtune.evaluation.overlap import find_overlap
from prefixtune.evaluation.prompting import instruction_format
from prefixtune.evaluation.records import write_evaluation
from prefixtune.inference.config import GenerateConfig
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat
from prefixtune.studies.cell import clear_folder, describe_storage, read_rate, shorten_config
from prefixtune.studies.compare import compare_runs
from prefixtune.studies.config import StudyConfig
from prefixtune.studies.data import digest_examples, sample_examples, sample_pairs, sample_sources, sample_targets
from prefixtune.studies.grid import Cell, plan
from prefixtune.studies.records import (
    CELL_FILE,
    COMPARISONS_FILE,
    ERROR_FILE,
    MAY_CHANGE,
    STUDY_FILE,
    Event,
    Outcome,
    read_json_file,
)
from prefixtune.training.checkpoint import PREFIX_FILE, STATE_FILE, WEIGHTS_FILE, load_tuned
from prefixtune.training.config import TrainConfig
from prefixtune.training.distributed import SINGLE_PROCESS
from prefixtune.training.train import train
from prefixtune.utils.files import write_text
from prefixtune.utils.locks import file_lock
from prefixtune.utils.machine import describe_machine, peak_memory_mib, reset_peak_memory, versions
from prefixtune.utils.writable import check_writable

__all__ = ["outcome_of", "run_study"]

_POLL_SECONDS = 2.0


def run_study(
    config: StudyConfig,
    *,
    backbone: Backbone | None = None,
    on_event: Callable[[Event], None] | None = None,
    command: str = "",
) -> Outcome:
    """Run what is still to be done of a study.

    Args:
        config: The study.
        backbone: Already loaded, for the methods that leave it as it is; None: loaded when needed. Methods that change
            weights load their own.
        on_event: Called with every event: `overlap` (test sources stand in the training set), `cell` (begun, done,
            failed), `try`, and those of training with `cell` added.
        command: How it was started, for the report.

    Raises:
        ConfigError: The folder holds another study.
        DataError: The data cannot be read, or is too small for the grid.
        KeyboardInterrupt: Ctrl-C; everything done so far is kept.
    """
    study = _Study(config, backbone, on_event or (lambda event: None), command)
    study.begin()
    try:
        study.run()
    finally:
        study.write()
    study.compare()
    return study.outcome()


def outcome_of(config: StudyConfig) -> Outcome:
    """How far a study has come, without doing anything."""
    return _Study(config, None, lambda event: None, "").outcome()


class _Study:
    """A study in progress, as this process sees it."""

    def __init__(
        self, config: StudyConfig, backbone: Backbone | None, on_event: Callable[[Event], None], command: str
    ) -> None:
        self.config, self.given, self.on_event = config, backbone, on_event
        self.command = command or " ".join(["prefixtune", *sys.argv[1:]])
        self.folder, self.cells, self.task = config.folder, plan(config), TASKS[config.task]
        self.began = time.monotonic()
        self.over_budget = False
        self.data_digests: dict[str, str] = {}
        self.overlap: dict[str, Any] = {}

    # --- what is needed, when it is needed --------------------------------------------------------------------------

    @cached_property
    def backbone(self) -> Backbone:
        """The frozen model, loaded once for all that leave it as it is."""
        if self.given is not None:
            return self.given
        return load_backbone(self.config.backbone, dtype=self.config.dtype, device=self.config.device)

    def _read(self, split: str) -> list[Example]:
        given = getattr(self.config, split) or self.config.data
        if not given:
            raise ConfigError(
                f"the study has no {split} data.", hint=f"set data (a folder) or {split}, here or with a flag."
            )
        # Templates of the user's own columns, as in `prefixtune train`.
        columns = {name: self.config.train_settings.get(name) for name in ("source", "target")}
        examples = [e for e in read_task(self.config.task, given, split=split, **columns) if e.targets]
        if not examples:
            raise DataError(f"{given} has no example with a target.", hint="give data with references.")
        return examples

    @cached_property
    def train_examples(self) -> list[Example]:
        return self._read("train")

    @cached_property
    def dev_examples(self) -> list[Example]:
        return self._read("dev")

    @cached_property
    def test_examples(self) -> list[Example]:
        return sample_examples(self._read("test"), self.config.test_limit, "test")

    def data_of(self, cell: Cell) -> tuple[list[Example], list[Example]]:
        """What a cell trains on, and what it is chosen by."""
        config = self.config
        chosen = sample_targets(self.train_examples, cell.num_targets, config.sample, f"train/{cell.subset}")
        total = sum(len(example.targets) for example in chosen)
        available = sum(len(example.targets) for example in self.dev_examples)
        if config.dev_share:
            count = min(available, max(1, round(config.dev_share * total)))
            return chosen, sample_pairs(self.dev_examples, count, f"dev/{cell.subset}")
        if not 0 < config.dev_limit < available:
            return chosen, self.dev_examples
        return chosen, sample_sources(self.dev_examples, config.dev_limit, "dev")

    # --- the whole ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Make the folder, or see that it is this study's."""
        check_writable(self.folder / STUDY_FILE)
        stored = self._stored()
        if stored is not None:
            self._check_same(stored)
        # Wrong settings and broken data are told at once, not run by run.
        left = [cell for cell in self.cells if self.state(cell) != "done"]
        if left and self.given is None:
            check_loadable(self.config.backbone, dtype=self.config.dtype, device=self.config.device)
        for cell in left:
            if cell.trains:
                self._train_config(cell, self.config.rates(cell.method)[0], self.path(cell), cell.num_targets)
                if cell.is_first:
                    self.data_of(cell)
            elif cell.method == "few-shot":
                self._shown()
        if left:
            self._check_data((stored or {}).get("data_digests") or {})
        for part in ("cells", "tuning", "tries"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        self.write()

    def _stored(self) -> dict[str, Any] | None:
        """What `study.json` says; None where there is none."""
        path = self.folder / STUDY_FILE
        return read_json_file(path, "config") if path.exists() else None

    def _changed(self, stored: Mapping[str, Any]) -> dict[str, str]:
        """What is otherwise than in the study as it was begun, and more than growth."""
        # What an older version did not know was as it is by default.
        before, now = {**StudyConfig().to_dict(), **stored["config"]}, self.config.to_dict()
        return {
            key: f"{key} was {before[key]!r}, is {now[key]!r}"
            for key in now
            if before[key] != now[key] and key not in MAY_CHANGE and not self.config.grows(before, key)
        }

    def _check_same(self, stored: Mapping[str, Any]) -> None:
        changed = self._changed(stored)
        if changed:
            raise ConfigError(
                f"the study in {str(self.folder)!r} was begun otherwise: {', '.join(changed.values())}.",
                hint="go on with the same settings or with more of them (methods, sizes, lengths, starts, subsets, "
                "seeds, learning rates), or choose another output.",
            )

    def _check_data(self, known: Mapping[str, str]) -> None:
        """Files may move, but runs on other examples do not compare."""
        left = [cell for cell in self.cells if self.state(cell) != "done"]
        # A study of the bare model needs no more than a test set.
        needed = {"test"} | ({"train", "dev"} if any(cell.trains for cell in left) else set())
        self.data_digests = {split: digest_examples(getattr(self, f"{split}_examples")) for split in sorted(needed)}
        other = [split for split, digest in self.data_digests.items() if known.get(split, digest) != digest]
        if other:
            raise DataError(
                f"the {' and '.join(other)} data is not what the study in {str(self.folder)!r} was begun on.",
                hint="give the same data, or choose another output.",
            )
        if "train" in needed:
            name = self.config.train or self.config.data
            found = find_overlap(self.test_examples, self.train_examples, name)
            self.overlap = found.to_dict()
            if found.count:
                self.on_event({"event": "overlap", "text": str(found), **self.overlap})

    def run(self) -> None:
        """Do cells until none is left that this process could do."""
        # What failed before is tried once more; what fails now, in whichever process, is not.
        again = {cell.id for cell in self.cells if self.state(cell) == "failed"}
        while True:
            waiting = progressed = False
            for cell in self.cells:
                state = self.state(cell)
                if state == "done" or (state == "failed" and cell.id not in again):
                    continue
                if self._budget_is_over():
                    return
                with self._claim(cell) as mine:
                    if not mine or (cell.trains and not cell.is_first and self.rate(cell) is None):
                        # Another process is at it, or at choosing its learning rate.
                        waiting = waiting or not self._given_up(cell)
                        continue
                    if self.state(cell) != state:
                        # Another process has done it meanwhile.
                        continue
                    again.discard(cell.id)
                    self._attempt(cell)
                    progressed = True
            if not progressed:
                if not waiting:
                    return
                time.sleep(_POLL_SECONDS)

    def _budget_is_over(self) -> bool:
        budget = self.config.budget
        self.over_budget = self.over_budget or bool(budget and time.monotonic() - self.began > budget * 60)
        return self.over_budget

    def _given_up(self, cell: Cell) -> bool:
        """Whether a cell waits for a learning rate that will not come."""
        first = next((other for other in self.cells if other.group == cell.group and other.is_first), None)
        return first is not None and first.id != cell.id and self.state(first) == "failed"

    @contextlib.contextmanager
    def _claim(self, cell: Cell) -> Iterator[bool]:
        """Hold a cell's lock while the block runs; yields whether it could be had."""
        with file_lock(self.folder / "cells" / f".{cell.id}.lock") as mine:
            yield mine

    def path(self, cell: Cell) -> Path:
        """A cell's folder."""
        return self.folder / "cells" / cell.id

    def state(self, cell: Cell) -> str:
        """`done`, `failed` or `waiting`; a cell that was done at a rate which is no more the chosen one waits."""
        path = self.path(cell) / CELL_FILE
        if not path.exists():
            return "waiting"
        facts = read_json_file(path, "status", "figures")
        status = str(facts["status"])
        if status == "done" and cell.trains and facts["figures"].get("learning_rate") != self.rate(cell):
            return "waiting"
        return status

    def _attempt(self, cell: Cell) -> None:
        """Do a cell; what goes wrong in it is kept beside it, and the others go on."""
        self.on_event({"event": "cell", "cell": cell.id, "status": "begun", "number": self._count("done") + 1})
        try:
            figures = self._do(cell)
        except Exception as error:
            told = _told(error)
            if not isinstance(error, PrefixError):
                # Such as a model that does not fit the device; where it came from is kept for whoever looks for it.
                write_text(self.path(cell) / ERROR_FILE, "".join(traceback.format_exception(error)))
                error.__traceback__ = None
            self._write_cell(cell, "failed", {}, told)
            self.on_event({"event": "cell", "cell": cell.id, "status": "failed", "error": told})
        else:
            (self.path(cell) / ERROR_FILE).unlink(missing_ok=True)
            self._write_cell(cell, "done", figures, None)
            self._tidy(cell)
            self.on_event({"event": "cell", "cell": cell.id, "status": "done", "figures": figures})
        self.write()
        gc.collect()

    def _count(self, state: str) -> int:
        return sum(self.state(cell) == state for cell in self.cells)

    def outcome(self) -> Outcome:
        """How far it came."""
        states = {cell.id: self.state(cell) for cell in self.cells}
        errors = {
            cell.id: str(read_json_file(self.path(cell) / CELL_FILE, "error")["error"])
            for cell in self.cells
            if states[cell.id] == "failed"
        }
        done = tuple(name for name, state in states.items() if state == "done")
        return Outcome(self.folder, done, errors, tuple(n for n, state in states.items() if state == "waiting"))

    # --- one cell -----------------------------------------------------------------------------------------------------

    def _do(self, cell: Cell) -> dict[str, Any]:
        if not cell.trains:
            figures: dict[str, Any] = {"trained_parameters": 0, "stored_parameters": 0, "file_bytes": 0}
            return {**figures, **self._score(cell)}
        rate = self.rate(cell)
        before = self._figures(cell)
        if rate is None:
            rate = self._choose_rate(cell)
        for tried in (self.folder / "tries").glob(f"{cell.id}@*"):
            shutil.rmtree(tried, ignore_errors=True)
        if before.get("learning_rate") == rate:
            # Done before, and no further rate was better.
            return before
        if before:
            # From here on nothing of it counts.
            self._write_cell(cell, "waiting", {}, None)
        figures = self._train(cell, rate, self.path(cell))
        return {**figures, "learning_rate": rate, **self._score(cell)}

    def _figures(self, cell: Cell) -> dict[str, Any]:
        """The figures of a cell that was done, at whatever rate; empty where it was not."""
        return dict(read_json_file(self.path(cell) / CELL_FILE, "figures")["figures"])

    def rate(self, cell: Cell) -> float | None:
        """The learning rate that was chosen for a cell's group; None: not yet, or not of all that are to be tried."""
        path = self.folder / "tuning" / f"{cell.group}.json"
        if not path.exists():
            return None
        facts = read_json_file(path, "learning_rate", "chosen")
        complete = {f"{rate:g}" for rate in self.config.rates(cell.method)} <= facts["learning_rate"].keys()
        return float(facts["chosen"]) if complete else None

    def _tried(self, cell: Cell) -> dict[float, float | None]:
        """The development loss at each rate that was tried for a cell's group."""
        path = self.folder / "tuning" / f"{cell.group}.json"
        tried = read_json_file(path, "learning_rate")["learning_rate"] if path.exists() else {}
        return {float(rate): loss for rate, loss in tried.items()}

    def _choose_rate(self, cell: Cell) -> float:
        """Train at every rate; a whole run with the lowest development loss becomes the cell's own."""
        rates, old = self.config.rates(cell.method), self._tried(cell)
        short = self.config.try_steps > 0 and len(rates) > 1
        losses: dict[float, float | None] = {}
        for rate in rates:
            known_as = float(f"{rate:g}")
            if known_as in old:
                losses[rate] = old[known_as]
                continue
            # One rate is no choice: its run is the cell's from the start.
            folder = self.path(cell) if len(rates) == 1 else self.folder / "tries" / f"{cell.id}@{rate:g}"
            try:
                losses[rate] = self._train(cell, rate, folder, short=short)["dev_loss"]
            except PrefixError as error:
                self.on_event({"event": "try", "cell": cell.id, "learning_rate": rate, "error": error.message})
                losses[rate] = None
                continue
            self.on_event({"event": "try", "cell": cell.id, "learning_rate": rate, "dev_loss": losses[rate]})
            (folder / STATE_FILE).unlink(missing_ok=True)
        known = {rate: loss for rate, loss in losses.items() if loss is not None and math.isfinite(loss)}
        if not known:
            raise ConfigError(
                f"no learning rate of {', '.join(f'{rate:g}' for rate in rates)} came to an end for {cell.group}.",
                hint="give lower ones in learning_rates.",
            )
        best = min(known, key=known.__getitem__)
        if float(f"{best:g}") not in old and len(rates) > 1 and not short:
            clear_folder(self.path(cell))
            # Copied, not moved: the tries go only after the choice is written down.
            shutil.copytree(self.folder / "tries" / f"{cell.id}@{best:g}", self.path(cell), dirs_exist_ok=True)
        # Those of a study that was larger stay, too.
        tried = {f"{rate:g}": loss for rate, loss in (old | losses).items()}
        facts = {"group": cell.group, "learning_rate": tried, "chosen": best}
        write_text(self.folder / "tuning" / f"{cell.group}.json", json.dumps(facts, indent=1) + "\n")
        self._set_back()
        return best

    def _train_config(
        self, cell: Cell, rate: float, folder: Path, num_targets: int, *, short: bool = False
    ) -> TrainConfig:
        config = self.config
        values: dict[str, Any] = {"patience": config.patience, **config.settings_of(cell.method)}
        steps = config.steps_by_size.get(str(num_targets))
        if steps:
            values["max_steps"] = steps
        if cell.prefix_length:
            words = {"task": config.task_words, "unrelated": config.unrelated_words}.get(cell.initialization)
            values["prefix_length"] = cell.prefix_length
            values |= {"initialization": "random"} if words is None else {"init_text": words}
        own = {"method": cell.method.partition(":")[0], "learning_rate": rate, "seed": cell.seed, "output": str(folder)}
        where = {"backbone": config.backbone, "dtype": config.dtype, "device": config.device, "task": config.task}
        if short:
            values = shorten_config(values, config.try_steps, num_targets)
        return TrainConfig.from_mapping(
            {"save_dtype": describe_storage(cell, config), **values, **own, **where}, where="the study"
        )

    def _train(self, cell: Cell, rate: float, folder: Path, *, short: bool = False) -> dict[str, Any]:
        """A cell's training (or a short try of it) in a folder, from where it was; returns its figures."""
        done = folder / "figures.json"
        if done.exists():
            known = read_json_file(done)
            if known.get("learning_rate", rate) == rate:
                return known
            # The cell's own, at a rate that was the best before more were tried.
            clear_folder(folder)
        examples, dev = self.data_of(cell)
        total = sum(len(example.targets) for example in examples)
        config = self._train_config(cell, rate, folder, total, short=short)
        resume = (folder / STATE_FILE).exists() and read_rate(folder) == rate
        if not resume:
            # A run that was stopped before its first save, or at a rate that is no more the chosen one.
            clear_folder(folder)
        if not config.trains_prefix:
            # It loads a model of its own; a second one beside it would count as its memory.
            self.__dict__.pop("backbone", None)
        reset_peak_memory()

        def told(event: Event) -> None:
            self.on_event({**event, "cell": cell.id, "learning_rate": rate})

        result = train(
            config,
            backbone=self.backbone if config.trains_prefix else None,
            examples=examples,
            dev_examples=dev,
            resume=resume,
            progress=False,
            on_event=told,
            # However many processes there are: each does cells of its own.
            processes=SINGLE_PROCESS,
        )
        peak = peak_memory_mib()
        steps = [event for event in result.events if event["event"] == "step"]
        figures = {
            "trained_parameters": result.num_trained,
            "stored_parameters": result.num_trained if result.prefix is None else result.prefix.num_parameters,
            "file_bytes": result.path.stat().st_size,
            "train_seconds": round(sum(event["seconds"] for event in steps), 3),
            "steps": result.steps,
            "num_targets": total,
            "peak_memory_mib": None if peak is None else round(peak),
            "dev_loss": None if math.isnan(result.best_loss) else result.best_loss,
            "learning_rate": rate,
        }
        write_text(done, json.dumps(figures) + "\n")
        return figures

    def _score(self, cell: Cell) -> dict[str, Any]:
        """Decode and score the test set; returns what it took."""
        folder = self.path(cell)
        backbone, prefix, form = self._model_of(cell)
        values = dict(self.task.decoding)
        values |= {"num_beams": self.config.num_beams} if self.config.num_beams else {}
        decoding = GenerateConfig.from_mapping({**values, "batch_size": self.config.decode_batch})
        outcome = evaluate(
            backbone,
            self.test_examples,
            prefix,
            text_format=form,
            config=decoding,
            protocol=self.task.protocol,
            metrics=self.task.metrics,
            intervals=True,
            resume_file=folder / DECODED_FILE,
            on_batch=lambda count: self.on_event(
                {"event": "decoded", "cell": cell.id, "count": count, "total": len(self.test_examples)}
            ),
        )
        facts = {
            "title": cell.id,
            "task": self.config.task,
            "data": Path(self.config.test or self.config.data).name,
            "split": "test",
            "method": cell.method,
            "backbone": self.config.backbone,
            "prefix": None,
            "settings": {
                "decoding": dataclasses.asdict(decoding),
                "protocol": self.task.protocol,
                "test_limit": self.config.test_limit,
                "dtype": str(backbone.dtype).removeprefix("torch."),
                **({} if cell.trains or form is None else {"prompt": form.prompt}),
            },
        }
        write_evaluation(folder, outcome, self.test_examples, facts, protocol=self.task.protocol)
        return {"evaluate_seconds": round(outcome.seconds, 3)}

    def _model_of(self, cell: Cell) -> tuple[Backbone, Prefix | None, TextFormat | None]:
        folder = self.path(cell)
        if not cell.trains:
            shown = self._shown() if cell.method == "few-shot" else ()
            return self.backbone, None, instruction_format(self.backbone, self.config.task_words, shown)
        if (folder / WEIGHTS_FILE).exists():
            backbone, trained_form = load_tuned(
                folder / WEIGHTS_FILE,
                name_or_path=self.config.backbone,
                dtype=self.config.dtype,
                device=self.config.device,
            )
            return backbone, None, trained_form
        return self.backbone, load_prefix(folder / PREFIX_FILE, self.backbone), None

    def _shown(self) -> list[Example]:
        """What few-shot shows: of the smallest sample that other methods train on."""
        size = min((size for size in self.config.sizes if size), default=0)
        known = sample_targets(self.train_examples, size, self.config.sample, "train/0")
        shots = self.config.shots
        if shots > len(known):
            raise DataError(
                f"{shots} solved examples are to be shown, but there are {len(known)}.", hint="lower shots."
            )
        return sample_examples(known, shots, "shots")

    def _tidy(self, cell: Cell) -> None:
        """Remove what a cell that is done needs no more."""
        folder = self.path(cell)
        for name in (STATE_FILE, DECODED_FILE, *(() if self.config.keep_weights else (WEIGHTS_FILE,))):
            (folder / name).unlink(missing_ok=True)

    # --- what is written ----------------------------------------------------------------------------------------------

    def _write_cell(self, cell: Cell, status: str, figures: Mapping[str, Any], error: str | None) -> None:
        facts = {"id": cell.id, "factors": cell.factors(), "status": status, "error": error, "figures": figures}
        self.path(cell).mkdir(parents=True, exist_ok=True)
        write_text(self.path(cell) / CELL_FILE, json.dumps(facts, indent=1) + "\n")

    def write(self) -> None:
        """Write down the study as it stands."""
        for cell in self.cells:
            if not (self.path(cell) / CELL_FILE).exists():
                # Made known to reports, without touching a run in its folder.
                self._write_cell(cell, "waiting", {}, None)
        self._set_back()
        before = self._stored() or {}
        if before and self._changed(before):
            # It has grown since this process began.
            return
        config = self.config
        about = config.kind.description
        facts = {
            "kind": "study",
            "name": config.name,
            "title": f"{about[0].upper()}{about[1:]}: {config.task}, {config.backbone}",
            "task": config.task,
            "backbone": config.backbone,
            "factors": list(config.kind.factors),
            "axis": config.kind.axis,
            "metric": self.task.metrics[0],
            "budget_minutes": config.budget or None,
            "cut": self._cut(),
            "tuning": self._tuning(),
            "machine": describe_machine(),
            "versions": versions(),
            "command": self.command,
            "date": before.get("date") or datetime.date.today().isoformat(),
            "overlap": self.overlap or before.get("overlap", {}),
            "data_digests": {**before.get("data_digests", {}), **self.data_digests},
            "config": config.to_dict(),
        }
        write_text(self.folder / STUDY_FILE, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")

    def _set_back(self) -> None:
        """Cells that were done at a rate which is no more the chosen one wait again; their figures are kept."""
        for cell in self.cells:
            tuning = self.folder / "tuning" / f"{cell.group}.json"
            if not (cell.trains and tuning.exists() and (self.path(cell) / CELL_FILE).exists()):
                continue
            facts = read_json_file(self.path(cell) / CELL_FILE, "status", "figures")
            chosen = read_json_file(tuning, "chosen")["chosen"]
            if facts["status"] == "done" and facts["figures"].get("learning_rate") != chosen:
                self._write_cell(cell, "waiting", facts["figures"], None)

    def compare(self) -> None:
        """Write down how the runs that are done differ."""
        stored = self._stored()
        if stored is None or self._changed(stored):
            return
        path = self.folder / COMPARISONS_FILE
        known = read_json_file(path, "pairs") if path.exists() else None
        facts = compare_runs(self.config, self.task.metrics[0], self.task.protocol, self.outcome().done, known)
        write_text(path, json.dumps(facts, indent=1) + "\n")

    def _tuning(self) -> dict[str, Any]:
        found = [read_json_file(path) for path in sorted((self.folder / "tuning").glob("*.json"))]
        return {each["group"]: {"learning_rate": each["learning_rate"], "chosen": each["chosen"]} for each in found}

    def _cut(self) -> list[str]:
        """What the study leaves out, or makes smaller than the whole, in words."""
        config, cut = self.config, []
        if config.test_limit:
            cut.append(f"scored on a fixed random sample of {config.test_limit} test sources")
        for size in config.sizes:
            if size:
                cut.append(f"trained on samples of {size:,} targets")
        if config.num_beams and config.num_beams != self.task.decoding.get("num_beams", 1):
            how = f"{config.num_beams} beams" if config.num_beams > 1 else "no beams"
            cut.append(f"decoded with {how} instead of {self.task.decoding.get('num_beams', 1)}")
        if config.try_steps:
            cut.append(f"learning rates chosen by runs of {config.try_steps} steps")
        usual = {**StudyConfig().to_dict(), **config.kind.defaults}
        counts = {"subsets": "subset", "seeds": "seed", "tries": "try", "patience": ""}
        for name, singular in counts.items():
            tried = len(next(iter(config.learning_rates.values()), ())) if name == "tries" else 0
            now = tried or getattr(config, name)
            if now < usual[name]:
                told = f"patience {now}" if name == "patience" else f"{now} {name if now != 1 else singular}"
                cut.append(f"{told} instead of {usual[name]}")
        for name in ("methods", "sizes", "lengths", "starts"):
            given = {str(value).partition(":")[0] for value in getattr(config, name)}
            meant = config.kind.defaults.get(name, ())
            absent = [str(value) for value in meant if str(value) not in given]
            if absent and len(meant) > 1:
                cut.append(f"{name} without {', '.join(absent)}")
        for size, steps in config.kind.defaults.get("steps_by_size", {}).items():
            now = config.steps_by_size.get(size, config.train_settings.get("max_steps", steps))
            if int(size) in config.sizes and now < steps:
                cut.append(f"{now} steps on {size} targets instead of {steps}")
        left = [cell.id for cell in self.cells if self.state(cell) == "waiting"]
        if left:
            why = f" within {config.budget:g} minutes" if self.over_budget else ""
            cut.append(f"{len(left)} of {len(self.cells)} runs are not done{why}: {', '.join(left)}")
        return cut


def _told(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, PrefixError):
        return f"{error.message} {error.hint}".strip()
    first, _, _ = str(error).strip().partition("\n")
    return f"{type(error).__name__}: {first}. The traceback is in {ERROR_FILE}."
