"""Run a study: its cells one by one, each kept when it is done, shared among any number of processes.

A cell is trained at a learning rate that is chosen for its group of repetitions, by development loss, among as many
tries as every other method gets. A cell belongs to the process that holds its lock; a process that dies lets go of it.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import check_loadable
from prefixtune.errors import ConfigError, PrefixError, first_line, is_out_of_memory
from prefixtune.evaluation.overlap import find_overlap
from prefixtune.studies.cell import StudyInputs, check_cell, check_settings, remove_leftovers, run_cell
from prefixtune.studies.compare import write_comparisons
from prefixtune.studies.config import StudyConfig
from prefixtune.studies.data import SharedBackbone, StudyData, count_targets
from prefixtune.studies.grid import Cell, plan
from prefixtune.studies.kinds import Split
from prefixtune.studies.records import (
    ERROR_FILE,
    STUDY_FILE,
    OnEvent,
    Outcome,
    Provenance,
    begun_study,
    cell_folder,
    cell_status,
    check_not_corrected,
    check_same_dtype,
    check_same_study,
    chosen_rate,
    lock_path,
    make_event,
    make_folders,
    read_outcome,
    remove_outdated,
    write_cell,
    write_study,
    written_at,
)
from prefixtune.studies.reductions import idle_patience
from prefixtune.utils.files import check_writable, write_text
from prefixtune.utils.locks import file_lock
from prefixtune.utils.machine import command_line

__all__ = ["outcome_of", "run_study"]


_POLL_SECONDS = 2.0
"""How long to wait for other processes before looking again."""
_LOCK = ".study.lock"
"""Held while a process begins a study or goes on with it, and while it reads or writes the settings afterwards."""


def run_study(
    config: StudyConfig,
    *,
    backbone: Backbone | None = None,
    on_event: OnEvent | None = None,
    command: str = "",
) -> Outcome:
    """Run what is still to be done of a study.

    Args:
        config: The study.
        backbone: Already loaded, for the methods that leave it as it is; None: loaded when needed. Methods that change
            weights load their own. A study of several backbones loads them itself.
        on_event: Called with every event: `overlap` (test or development sources are in the training set, too),
            `warning` (outputs that did not end, for example), `cell` (begun, done, failed), `try`, `decoded`, and those
            of training with `cell` and `learning_rate` added.
        command: How it was started, for the report.

    Raises:
        ConfigError: The folder holds another study; a run cannot be what its settings say; or a backbone is given to a
            study of several.
        DataError: The data cannot be read, or is too small for the grid.
        KeyboardInterrupt: Ctrl-C; everything done so far is kept.
    """
    if backbone is not None and config.backbones:
        raise ConfigError("a loaded backbone was given, but the study has several.", hint="leave one of the two out.")
    inputs = StudyInputs(config, StudyData(config), SharedBackbone(config, backbone), on_event or (lambda event: None))
    cells, budget = plan(config), _Budget(config.budget)
    provenance = _prepare(inputs, cells, command or command_line())

    def save(*, is_over_budget: bool = False) -> None:
        # A process that begins meanwhile would not see what is written here, nor this one what that one writes.
        with file_lock(config.folder / _LOCK, timeout=60):
            write_study(config, cells, provenance, is_over_budget=is_over_budget)

    # Of processes that begin together with other settings, one is the first.
    with file_lock(config.folder / _LOCK, timeout=60):
        _check_settings_again(config)
        write_study(config, cells, provenance, begins=True)
    # Of processes that begin together, one may be the first to write down its dtype.
    check_same_dtype(config, cells, provenance.dtype)
    is_over_budget = False
    try:
        is_over_budget = _run_cells(inputs, cells, budget, save)
    finally:
        save(is_over_budget=is_over_budget)
    write_comparisons(config, cells)
    return read_outcome(config, cells)


def outcome_of(config: StudyConfig) -> Outcome:
    """How far a study has come; runs and writes nothing."""
    return read_outcome(config, plan(config))


@dataclass(frozen=True)
class _Budget:
    """The minutes in which a process may start runs; 0: no limit."""

    minutes: float
    started: float = field(default_factory=time.monotonic)

    def is_over(self) -> bool:
        return bool(self.minutes) and time.monotonic() - self.started > self.minutes * 60


# --- before the first cell --------------------------------------------------------------------------------------------


def _prepare(inputs: StudyInputs, cells: Sequence[Cell], command: str) -> Provenance:
    """Check settings, data and folder before anything is trained, and make the folders."""
    config = inputs.config
    check_writable(config.folder / STUDY_FILE)
    stored = begun_study(config)
    if stored is not None:
        check_same_study(config, stored)
    left = [cell for cell in cells if cell_status(config, cell) != "done"]
    provenance = Provenance(command)
    if left:
        check_same_dtype(config, cells, inputs.backbone.dtype_name)
        _check_cells(inputs, left)
        before = stored or {}
        provenance = _check_data(inputs, left, command, before.get("data_digests") or {})
        # Last, as it loads every model.
        fingerprints = _check_models(inputs, left, before.get("fingerprints") or {})
        provenance = replace(provenance, dtype=inputs.backbone.dtype_name, fingerprints=fingerprints)
        for text in idle_patience(config):
            inputs.on_event(make_event("warning", text=text))
    make_folders(config)
    return provenance


def _check_settings_again(config: StudyConfig) -> None:
    """The folder's study is still the same one; what failed with settings that were corrected is removed."""
    stored = begun_study(config)
    if stored is not None:
        check_same_study(config, stored)
    remove_outdated(config)


def _check_cells(inputs: StudyInputs, left: Sequence[Cell]) -> None:
    """Report wrong settings and data that is too small at once, not run by run."""
    config = inputs.config
    has_lora = any(cell.base_method == "lora" for cell in left)
    if not inputs.backbone.is_preloaded or has_lora:
        for backbone in config.backbones or (config.backbone,):
            check_loadable(backbone, dtype=config.dtype, device=config.device, adapter_rank=int(has_lora))
    for cell in _one_of_each_group(left):
        check_settings(inputs, cell)


def _check_models(inputs: StudyInputs, left: Sequence[Cell], stored: Mapping[str, str]) -> dict[str, str]:
    """Load every model: it must be the one that the study began with, and can do what is left; its fingerprint."""
    fingerprints: dict[str, str] = {}
    for name in inputs.config.backbones or ("",):
        fingerprints[name] = inputs.backbone.check_same(name, stored)
        for cell in _one_of_each_group(left):
            if name in ("", cell.backbone):
                check_cell(inputs, cell)
    return fingerprints


def _one_of_each_group(cells: Sequence[Cell]) -> list[Cell]:
    """The first of the repetitions of each point."""
    return list({cell.group: cell for cell in reversed(cells)}.values())[::-1]


def _check_data(
    inputs: StudyInputs, left: Sequence[Cell], command: str, stored_digests: Mapping[str, str]
) -> Provenance:
    """Compare the data with what the study began with, and look for sources that are in two of its sets."""
    data, config = inputs.data, inputs.config
    # A study of the bare model needs no more than a test set.
    splits: tuple[Split, ...] = ("dev", "test", "train") if any(cell.trains for cell in left) else ("test",)
    digests = data.check_digests(splits, stored_digests)
    if "train" not in splits:
        return Provenance(command, digests)
    train = config.train or config.data
    overlap = find_overlap(data.test, data.train, train)
    dev_overlap = find_overlap(data.dev, data.train, train, split="development")
    test_dev = find_overlap(data.test, data.dev, config.dev or config.data, other="development")
    for found in (overlap, dev_overlap, test_dev):
        if found.count:
            inputs.on_event(make_event("overlap", text=str(found), split=found.split, **found.to_dict()))
    return Provenance(
        command,
        digests,
        overlap.to_dict(),
        dev_overlap.to_dict(),
        test_dev.to_dict(),
        count_targets(data.train),
    )


# --- the loop ---------------------------------------------------------------------------------------------------------


def _run_cells(inputs: StudyInputs, cells: Sequence[Cell], budget: _Budget, save: Callable[[], None]) -> bool:
    """Run cells until none is left that this process can run, or the budget is over (True); `save` follows each."""
    config = inputs.config
    # What failed before is tried once more; what fails now, in whichever process, is not.
    failed_before = {cell.id: written_at(config, cell) for cell in cells if cell_status(config, cell) == "failed"}

    def is_left(cell: Cell) -> bool:
        status = cell_status(config, cell)
        return status == "waiting" or (status == "failed" and failed_before.get(cell.id) == written_at(config, cell))

    while True:
        waiting = progressed = False
        for cell in cells:
            if not is_left(cell):
                continue
            if budget.is_over():
                return True
            with file_lock(lock_path(config, cell)) as acquired:
                if not acquired or (cell.trains and not cell.is_first and chosen_rate(config, cell) is None):
                    # Another process works on it, or chooses its learning rate.
                    waiting = waiting or not _rate_failed(config, cells, cell)
                    continue
                if not is_left(cell):
                    # Another process has done it in the meantime, or failed.
                    continue
                with file_lock(config.folder / _LOCK, timeout=60):
                    # Another process that begins sees this cell's lock from now on, and leaves its settings.
                    check_not_corrected(config)
                failed_before.pop(cell.id, None)
                _attempt(inputs, cells, cell)
                save()
                gc.collect()
                progressed = True
        if not progressed:
            if not waiting:
                return False
            time.sleep(_POLL_SECONDS)


def _rate_failed(config: StudyConfig, cells: Sequence[Cell], cell: Cell) -> bool:
    """Whether a cell waits for a learning rate that will not come, as the run that chooses it has failed."""
    first = next((other for other in cells if other.group == cell.group and other.is_first), None)
    return first is not None and first.id != cell.id and cell_status(config, first) == "failed"


def _attempt(inputs: StudyInputs, cells: Sequence[Cell], cell: Cell) -> None:
    """Run a cell; an error in it is stored with the cell, and the others go on."""
    config = inputs.config
    number = sum(cell_status(config, other) == "done" for other in cells) + 1
    inputs.on_event(make_event("cell", cell=cell.id, status="begun", number=number))
    error_file = cell_folder(config, cell) / ERROR_FILE
    try:
        figures = run_cell(inputs, cell)
    except Exception as error:
        message = _describe(error)
        if not isinstance(error, PrefixError):
            # Such as a model that does not fit the device; the traceback is kept for whoever needs it.
            write_text(error_file, "".join(traceback.format_exception(error)))
            error.__traceback__ = None
        write_cell(config, cell, "failed", {}, message)
        inputs.on_event(make_event("cell", cell=cell.id, status="failed", error=message))
    else:
        error_file.unlink(missing_ok=True)
        write_cell(config, cell, "done", figures)
        remove_leftovers(config, cell)
        inputs.on_event(make_event("cell", cell=cell.id, status="done", figures=figures))


def _describe(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, PrefixError):
        return f"{error.message} {error.hint}".strip()
    advice = ""
    if is_out_of_memory(error):
        advice = " Lower batch_size or max_length in a table [train_settings.METHOD], or decode_batch."
    return f"{type(error).__name__}: {first_line(error).removesuffix('.')}.{advice} The traceback is in {ERROR_FILE}."
