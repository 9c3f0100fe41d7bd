"""The files of a study and its cells: where they are, what they say, and whether a study has changed.

FOLDER/study.json             the study and its settings, and what it leaves out
FOLDER/comparisons.json       differences between runs, and whether they are more than chance
FOLDER/tuning/GROUP.json      the learning rates tried and the one chosen
FOLDER/cells/ID/              a training run and its evaluation, with cell.json
FOLDER/tries/ID@RATE/         a try of a learning rate, until the rate is chosen
"""

from __future__ import annotations

import datetime
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefixtune.data import TASKS
from prefixtune.errors import ConfigError, DataError, short_repr
from prefixtune.evaluation.records import EVALUATION_FILE
from prefixtune.studies.config import StudyConfig, training_defaults
from prefixtune.studies.grid import Cell, plan
from prefixtune.studies.reductions import describe_reductions
from prefixtune.utils.files import write_text
from prefixtune.utils.locks import file_lock
from prefixtune.utils.machine import describe_machine, versions

__all__ = ["CellStatus", "Event", "EventKind", "OnEvent", "Outcome", "Provenance", "RateChoice", "make_event"]


STUDY_FILE, CELL_FILE, COMPARISONS_FILE, ERROR_FILE = "study.json", "cell.json", "comparisons.json", "error.txt"
_MAY_CHANGE = ("output", "budget", "keep_weights", "decode_batch", "device", "dtype", "data", "train", "dev", "test")
"""Of these, a dtype that `auto` chose is compared with what the runs were computed in."""
_OLD_DEFAULTS = {"reparameterization": "residual"}
"""Of training, for a study whose file does not have them."""
_HINT = "delete it, and run the study again."

CellStatus = Literal["done", "failed", "waiting"]
"""As in `cell.json`; a cell that a process works on is still waiting."""
Event = dict[str, Any]
EventKind = Literal["overlap", "warning", "cell", "try", "decoded"]
"""Of a study itself; those of training are added to them."""
OnEvent = Callable[[Event], None]


def make_event(kind: EventKind, **facts: Any) -> Event:
    """An event of a study, as `on_event` gets it and `--json` prints it."""
    return {"event": kind, **facts}


@dataclass(frozen=True)
class Outcome:
    """How far a study has come.

    Attributes:
        folder: Its folder.
        done: Ids of the cells that are done.
        failed: Id of a failed cell -> why it failed.
        left: Ids of the cells that are still to be run.
    """

    folder: Path
    done: tuple[str, ...]
    failed: dict[str, str]
    left: tuple[str, ...]


@dataclass(frozen=True)
class Provenance:
    """How this process runs a study: what `study.json` says that the settings do not.

    Attributes:
        command: What it was started with.
        data_digests: Split -> digest of its examples, of the splits that were read.
        overlap: Test sources that are in the training set too, as `Overlap.to_dict`.
        dev_overlap: Likewise, of development sources.
        test_dev_overlap: Test sources that are in the development set, which chooses rates and steps.
        train_targets: How many targets samples are drawn from; 0: the training set was not read.
        dtype: What this process computes in; empty: it runs nothing.
        fingerprints: Name of a model -> its fingerprint; of a study with one model the name is empty.
    """

    command: str
    data_digests: Mapping[str, str] = field(default_factory=dict)
    overlap: Mapping[str, Any] = field(default_factory=dict)
    dev_overlap: Mapping[str, Any] = field(default_factory=dict)
    test_dev_overlap: Mapping[str, Any] = field(default_factory=dict)
    train_targets: int = 0
    dtype: str = ""
    fingerprints: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RateChoice:
    """The learning rate of a group of cells.

    Attributes:
        losses: Learning rate -> development loss; None: the try did not reach its end.
        chosen: The rate with the lowest loss.
    """

    losses: Mapping[float, float | None]
    chosen: float


# --- where ------------------------------------------------------------------------------------------------------------


def cell_folder(config: StudyConfig, cell: Cell) -> Path:
    """The folder of a cell's run."""
    return config.folder / "cells" / cell.id


def lock_path(config: StudyConfig, cell: Cell) -> Path:
    """The lock that a process holds while it works on a cell."""
    return config.folder / "cells" / f".{cell.id}.lock"


def try_folder(config: StudyConfig, cell: Cell, rate: float) -> Path:
    """The folder of a try of one learning rate."""
    return config.folder / "tries" / f"{cell.id}@{rate:g}"


def try_folders(config: StudyConfig, cell: Cell) -> list[Path]:
    """The folders of all tries that are still there."""
    return list((config.folder / "tries").glob(f"{cell.id}@*"))


def _tuning_path(config: StudyConfig, group: str) -> Path:
    return config.folder / "tuning" / f"{group}.json"


def make_folders(config: StudyConfig) -> None:
    """Make the folders that are missing."""
    for name in ("cells", "tuning", "tries"):
        (config.folder / name).mkdir(parents=True, exist_ok=True)


# --- cells ------------------------------------------------------------------------------------------------------------


def cell_status(config: StudyConfig, cell: Cell) -> CellStatus:
    """The state of a cell; one that was done at a learning rate that is no longer the chosen one waits."""
    path = cell_folder(config, cell) / CELL_FILE
    if not path.exists():
        return "waiting"
    facts = read_json_file(path, "status", "figures")
    if facts["status"] == "failed":
        return "failed"
    if facts["status"] != "done":
        return "waiting"
    if cell.trains and facts["figures"].get("learning_rate") != chosen_rate(config, cell):
        return "waiting"
    return "done"


def written_at(config: StudyConfig, cell: Cell) -> int:
    """When a cell's `cell.json` was written, in nanoseconds; 0: there is none."""
    path = cell_folder(config, cell) / CELL_FILE
    return path.stat().st_mtime_ns if path.exists() else 0


def read_figures(config: StudyConfig, cell: Cell) -> dict[str, Any]:
    """The figures of a cell that was done, at whatever rate; empty where it was not."""
    return dict(read_json_file(cell_folder(config, cell) / CELL_FILE, "figures")["figures"])


def write_cell(
    config: StudyConfig, cell: Cell, status: CellStatus, figures: Mapping[str, Any], error: str | None = None
) -> None:
    """Write a cell's `cell.json`."""
    facts = {"id": cell.id, "factors": cell.factors(), "status": status, "error": error, "figures": figures}
    write_text(cell_folder(config, cell) / CELL_FILE, json.dumps(facts, indent=1) + "\n")


def requeue(config: StudyConfig, cells: Sequence[Cell]) -> None:
    """Let cells wait again that were done at a rate that is no longer the chosen one; their figures are kept."""
    for cell in cells:
        path = cell_folder(config, cell) / CELL_FILE
        if not cell.trains or not path.exists():
            continue
        choice = read_rate_choice(config, cell)
        if choice is None:
            continue
        facts = read_json_file(path, "status", "figures")
        if facts["status"] == "done" and facts["figures"].get("learning_rate") != choice.chosen:
            write_cell(config, cell, "waiting", facts["figures"])


def read_outcome(config: StudyConfig, cells: Sequence[Cell]) -> Outcome:
    """How far a study has come."""
    by_status: dict[CellStatus, list[Cell]] = {"done": [], "failed": [], "waiting": []}
    for cell in cells:
        by_status[cell_status(config, cell)].append(cell)
    errors = {
        cell.id: str(read_json_file(cell_folder(config, cell) / CELL_FILE, "error")["error"])
        for cell in by_status["failed"]
    }
    done, waiting = (tuple(cell.id for cell in by_status[status]) for status in ("done", "waiting"))
    return Outcome(config.folder, done, errors, waiting)


# --- learning rates ---------------------------------------------------------------------------------------------------


def read_rate_choice(config: StudyConfig, cell: Cell) -> RateChoice | None:
    """The learning rates that were tried for a cell's group; None: the choice is not made yet."""
    path = _tuning_path(config, cell.group)
    if not path.exists():
        return None
    facts = read_json_file(path, "learning_rate", "chosen")
    try:
        return RateChoice({float(rate): loss for rate, loss in facts["learning_rate"].items()}, float(facts["chosen"]))
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path} has no learning rates: {error}.", hint=_HINT) from error


def chosen_rate(config: StudyConfig, cell: Cell) -> float | None:
    """The learning rate of a cell's group; None: it is not chosen yet, or not among all that are to be tried."""
    choice = read_rate_choice(config, cell)
    if choice is None:
        return None
    is_complete = {as_stored(rate) for rate in config.rates(cell.method)} <= choice.losses.keys()
    return choice.chosen if is_complete else None


def as_stored(rate: float) -> float:
    """A learning rate as it is after it was written to a file and read again."""
    return float(f"{rate:g}")


def write_rate_choice(config: StudyConfig, cell: Cell, choice: RateChoice) -> None:
    """Write down the choice for a cell's group."""
    losses = {f"{rate:g}": loss for rate, loss in choice.losses.items()}
    facts = {"group": cell.group, "learning_rate": losses, "chosen": choice.chosen}
    write_text(_tuning_path(config, cell.group), json.dumps(facts, indent=1) + "\n")


# --- the study --------------------------------------------------------------------------------------------------------


def read_study(config: StudyConfig) -> dict[str, Any] | None:
    """The contents of `study.json`; None where there is none."""
    path = config.folder / STUDY_FILE
    return read_json_file(path, "config") if path.exists() else None


def begun_study(config: StudyConfig) -> dict[str, Any] | None:
    """The contents of `study.json` with those settings alone that something depends on; None: nothing does.

    So what let every run of a method, a length or a start fail can be corrected, or left out.
    """
    stored = read_study(config)
    if stored is None or stored["config"].get("name", config.name) != config.name:
        return stored
    before = {**StudyConfig(name=config.name).to_dict(), **stored["config"]}
    found = _begun_cells(config, before)
    if found is None:
        return stored
    begun = found[1]
    if not begun:
        return None
    methods, starts = {cell.method for cell in begun}, {cell.initialization for cell in begun}
    has_few_shot, trained = "few-shot" in methods, [cell for cell in begun if cell.trains]
    used: dict[str, set[Any]] = {
        "methods": methods,
        "once": methods,
        "starts": starts,
        "lengths": {cell.prefix_length for cell in begun},
        # Few-shot shows examples of the smallest sample.
        "sizes": {cell.num_targets for cell in trained} | ({found[0].smallest_size} if has_few_shot else set()),
        "backbones": {cell.backbone for cell in begun},
    }
    part = before | {key: [value for value in before[key] if value in values] for key, values in used.items()}
    variants = before["variants"]
    part["variants"] = {name: values for name, values in variants.items() if name in methods}
    rates = before["learning_rates"].items()
    part["learning_rates"] = {name: own for name, own in rates if name in methods or name not in variants}
    is_used = {
        "shots": has_few_shot,
        "sample": has_few_shot or bool(trained),
        "task_words": "task" in starts or len(trained) < len(begun),
        "unrelated_words": "unrelated" in starts,
        "prompt_text": "prompt" in starts,
        **dict.fromkeys(("try_steps", "dev_limit", "dev_share", "patience"), bool(trained)),
    }
    part |= {key: getattr(config, key) for key, used_by_some in is_used.items() if not used_by_some}
    return {**stored, "config": part}


def _begun_cells(config: StudyConfig, before: Mapping[str, Any]) -> tuple[StudyConfig, list[Cell]] | None:
    """An earlier study in a study's folder, and its cells that have begun; None: its settings cannot be read."""
    earlier = config.read(before)
    if earlier is None:
        return None
    earlier = earlier.replace(output=str(config.folder))
    return earlier, [cell for cell in plan(earlier) if _has_begun(earlier, cell)]


def _has_begun(config: StudyConfig, cell: Cell) -> bool:
    """Whether something depends on a cell's settings: work that did not fail, a learning rate, a process at work."""
    folder, lock = cell_folder(config, cell), lock_path(config, cell)
    path = folder / CELL_FILE
    facts = read_json_file(path, "status", "figures") if path.exists() else {"status": "waiting", "figures": {}}
    if facts["figures"] or _tuning_path(config, cell.group).exists():
        return True
    was_stopped = try_folders(config, cell) or any(file != path for file in folder.glob("*"))
    if facts["status"] != "failed" and was_stopped:
        return True
    if not lock.exists():
        return False
    with file_lock(lock) as is_free:
        return not is_free


def remove_outdated(config: StudyConfig) -> None:
    """Remove what failed cells have left behind, where a study's settings were corrected: they begin again."""
    stored = read_study(config)
    if stored is None or not changed_settings(config, stored):
        return
    found = _begun_cells(config, {**StudyConfig(name=config.name).to_dict(), **stored["config"]})
    if found is None:
        return
    earlier, begun = found
    kept = set(begun)
    for cell in plan(earlier):
        if cell not in kept:
            with file_lock(lock_path(earlier, cell)) as is_free:
                for folder in (cell_folder(earlier, cell), *try_folders(earlier, cell)) if is_free else ():
                    shutil.rmtree(folder, ignore_errors=True)


def changed_settings(config: StudyConfig, stored: Mapping[str, Any]) -> list[str]:
    """The settings that differ from those in `study.json` by more than growth, in words."""
    defaults = stored.get("train_defaults", _OLD_DEFAULTS)
    # A setting that an older version did not have was at its default.
    before = _with_settings({**StudyConfig(name=config.name).to_dict(), **stored["config"]}, defaults)
    now = _with_settings(config.to_dict(), training_defaults())
    reasons = {} if config.keeps_shots(before) else {"sizes": " (few-shot shows examples of the smallest sample)"}
    return [
        f"{key} was {before[key]!r}, is {now[key]!r}{reasons.get(key, '')}"
        for key in now
        if before[key] != now[key]
        and key not in _MAY_CHANGE
        and not config.grows(before, key)
        and not (key == "backbone" and _is_same_folder(before[key], now[key]))
    ]


def _is_same_folder(first: str, second: str) -> bool:
    return Path(first).is_dir() and Path(first).resolve() == Path(second).resolve()


def _with_settings(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A study's values, with the defaults of training that held for it among its settings."""
    return {**values, "train_settings": {**defaults, **values["train_settings"]}}


def check_same_study(config: StudyConfig, stored: Mapping[str, Any]) -> None:
    """Refuse to go on in a folder with a study of other settings.

    Raises:
        ConfigError: The folder holds another study.
    """
    changed = changed_settings(config, stored)
    if changed:
        raise ConfigError(
            f"the study in {str(config.folder)!r} began with other settings: {', '.join(changed)}.",
            hint="go on with the same settings or with more of them (methods, sizes, lengths, starts, subsets, "
            "seeds, learning rates; with few-shot no smaller sizes), or choose another output. Only settings of which "
            "nothing is done yet may change.",
        )


def check_not_corrected(config: StudyConfig) -> None:
    """Refuse to go on where another process has corrected the study's settings since this one began.

    Raises:
        ConfigError: It has. A study that another process has only made larger is the same one.
    """
    stored = read_study(config)
    if stored is None:
        return
    changed = _settings_changed_since(config, stored)
    if changed:
        raise ConfigError(
            f"the study in {str(config.folder)!r} has been corrected since this process began: {', '.join(changed)}.",
            hint="start it again with the new settings.",
        )


def _settings_changed_since(config: StudyConfig, stored: Mapping[str, Any]) -> list[str]:
    """The settings that another process has changed by more than growth since this one began, in words."""
    values = {key: value for key, value in stored["config"].items() if key in StudyConfig.model_fields}
    values = _with_settings({**values, "name": config.name}, stored.get("train_defaults", _OLD_DEFAULTS))
    newer = StudyConfig(**values)
    return changed_settings(newer, {"config": config.to_dict(), "train_defaults": training_defaults()})


def _is_current(config: StudyConfig, stored: Mapping[str, Any]) -> bool:
    """Whether the stored settings are those of this process, neither more nor fewer."""
    return not changed_settings(config, stored) and not _settings_changed_since(config, stored)


def check_same_dtype(config: StudyConfig, cells: Sequence[Cell], dtype: str) -> None:
    """Refuse to mix, on another machine, what `auto` chose on two of them; a dtype that is named is meant.

    Args:
        config: The study.
        cells: Of the study.
        dtype: What this machine computes in; empty: it runs nothing, so nothing is mixed.

    Raises:
        ConfigError: The study began in another dtype, or runs that are done were computed in one, and none was named.
    """
    if not dtype:
        return
    begun = (read_study(config) or {}).get("dtype") or dtype
    others = [name for name in (begun, *_dtypes(config, cells)) if name != dtype]
    if others and config.dtype == "auto":
        raise ConfigError(
            f"runs of the study in {str(config.folder)!r} were computed in {others[0]}, but this machine would compute "
            f"in {dtype}.",
            hint=f"go on with --dtype {others[0]}, or name --dtype {dtype} to have both in one study.",
        )


def _dtypes(config: StudyConfig, cells: Sequence[Cell]) -> Counter[str]:
    """In which dtype how many of the runs that are done were computed."""
    return Counter(str(settings["dtype"]) for settings in _scored_with(config, cells) if settings.get("dtype"))


def _limits(config: StudyConfig, cells: Sequence[Cell]) -> Counter[str]:
    """With how many tokens at most how many of the runs that are done wrote their outputs."""
    decodings = [settings.get("decoding") or {} for settings in _scored_with(config, cells)]
    return Counter(str(own["max_new_tokens"]) for own in decodings if "max_new_tokens" in own)


def _scored_with(config: StudyConfig, cells: Sequence[Cell]) -> list[Mapping[str, Any]]:
    """The settings of the evaluations of all runs that are done."""
    done = [cell_folder(config, cell) / EVALUATION_FILE for cell in cells if cell_status(config, cell) == "done"]
    return [read_json_file(path).get("settings") or {} for path in done if path.exists()]


def _unended(config: StudyConfig, cells: Sequence[Cell]) -> list[str]:
    """The points of the grid with outputs that did not end, each with their number."""
    counts: Counter[str] = Counter()
    for cell in cells:
        if cell_status(config, cell) == "done":
            counts[cell.group] += read_figures(config, cell).get("unended_outputs", 0)
    return [f"{name} ({count})" for name, count in counts.items() if count]


def write_study(
    config: StudyConfig,
    cells: Sequence[Cell],
    provenance: Provenance,
    *,
    is_over_budget: bool = False,
    begins: bool = False,
) -> None:
    """Write down how far the study has come, and make every cell known to reports.

    Args:
        config: The study.
        cells: Of it.
        provenance: How this process runs it.
        is_over_budget: Whether cells are left because the time was up.
        begins: This process begins now, after `check_same_study`: settings may have been corrected.
    """
    before = (begun_study(config) if begins else read_study(config)) or {}
    if before and not begins and not _is_current(config, before):
        # Another process has made it larger since this one began, or corrected it.
        return
    for cell in cells:
        if not (cell_folder(config, cell) / CELL_FILE).exists():
            write_cell(config, cell, "waiting", {})
    requeue(config, cells)
    task, kind, backbones = TASKS[config.task], config.kind, ", ".join(config.backbones) or config.backbone
    left = [cell.id for cell in cells if cell_status(config, cell) == "waiting"]
    cut = describe_reductions(config, left, len(cells), is_over_budget=is_over_budget)
    for what, counts in (
        ("computed in", _dtypes(config, cells)),
        ("most tokens of an output:", _limits(config, cells)),
    ):
        if len(counts) > 1:
            cut.append(f"{what} {' and '.join(f'{name} ({count} runs)' for name, count in counts.items())}")
    if unended := _unended(config, cells):
        cut.append(f"outputs that did not end within the tokens they may have: {', '.join(unended)}")
    # Where nothing is run, the study remains what another process made, from its files and in its dtype.
    origin = {"machine": describe_machine(), "versions": versions(), "command": provenance.command}
    settings = config.to_dict()
    if not provenance.dtype:
        origin |= {key: before[key] for key in origin if key in before}
        settings |= {key: value for key, value in before.get("config", {}).items() if key in _MAY_CHANGE}
    facts = {
        "kind": "study",
        "name": config.name,
        "title": f"{kind.description[0].upper()}{kind.description[1:]}: {config.task}, {backbones}",
        "task": config.task,
        "backbone": backbones,
        "factors": list(kind.factors),
        "axis": kind.axis,
        "metric": task.metrics[0],
        "budget_minutes": config.budget or None,
        "cut": cut,
        "tuning": _read_all_tuning(config),
        **origin,
        "date": before.get("date") or datetime.date.today().isoformat(),
        "overlap": provenance.overlap or before.get("overlap", {}),
        "dev_overlap": provenance.dev_overlap or before.get("dev_overlap", {}),
        "test_dev_overlap": provenance.test_dev_overlap or before.get("test_dev_overlap", {}),
        "train_targets": provenance.train_targets or before.get("train_targets", 0),
        "data_digests": {**before.get("data_digests", {}), **provenance.data_digests},
        "dtype": before.get("dtype") or provenance.dtype,
        "fingerprints": {**provenance.fingerprints, **before.get("fingerprints", {})},
        "config": settings,
        "train_defaults": training_defaults(),
    }
    write_text(config.folder / STUDY_FILE, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def _read_all_tuning(config: StudyConfig) -> dict[str, Any]:
    keys = ("group", "learning_rate", "chosen")
    files = [read_json_file(path, *keys) for path in sorted((config.folder / "tuning").glob("*.json"))]
    return {facts["group"]: {key: facts[key] for key in keys[1:]} for facts in files}


def read_json_file(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object that has some keys.

    Raises:
        DataError: It cannot be read, or is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.", hint=_HINT) from error
    missing = [key for key in keys if not isinstance(value, dict) or value.get(key) is None]
    if not isinstance(value, dict) or missing:
        problem = f"has no {', '.join(missing)}" if missing else "is not a JSON object"
        raise DataError(f"{path} {problem}.", hint=_HINT)
    for key in {"config", "figures"}.intersection(keys):
        if not isinstance(value[key], dict):
            raise DataError(f"{path} has {key} {short_repr(value[key])}, but it must be an object.", hint=_HINT)
    return value
