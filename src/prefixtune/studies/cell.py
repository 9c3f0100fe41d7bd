"""One cell of a study: choose its learning rate, train it, score it, and tidy up."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.devices import choose_device, choose_dtype
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data import TASKS, Example
from prefixtune.errors import ConfigError, PrefixError, TrainingError
from prefixtune.evaluation.decode import DECODED_FILE
from prefixtune.evaluation.evaluate import evaluate
from prefixtune.evaluation.prompting import instruction_format
from prefixtune.evaluation.records import write_evaluation
from prefixtune.inference.config import GenerateConfig
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat, read_text_format
from prefixtune.studies.config import StudyConfig, planned_steps
from prefixtune.studies.data import SharedBackbone, StudyData, count_targets
from prefixtune.studies.grid import Cell, plan
from prefixtune.studies.kinds import PREFIX_METHODS
from prefixtune.studies.records import (
    CELL_FILE,
    OnEvent,
    RateChoice,
    as_stored,
    cell_folder,
    chosen_rate,
    make_event,
    read_figures,
    read_json_file,
    read_rate_choice,
    requeue,
    try_folder,
    try_folders,
    write_cell,
    write_rate_choice,
)
from prefixtune.training.artifact import load_tuned
from prefixtune.training.config import TrainConfig
from prefixtune.training.data import read_data
from prefixtune.training.distributed import SINGLE_PROCESS
from prefixtune.training.folder import CONFIG_FILE, PREFIX_FILE, STATE_FILE, WEIGHTS_FILE
from prefixtune.training.forms import settle_form
from prefixtune.training.opening import check_run
from prefixtune.training.train import TrainResult, train
from prefixtune.utils.config import Layer
from prefixtune.utils.files import write_text
from prefixtune.utils.machine import peak_memory_mib, reset_peak_memory

__all__ = ["StudyInputs", "build_train_config", "check_cell", "check_settings", "remove_leftovers", "run_cell"]


_FIGURES_FILE = "figures.json"
_STUDY_KEYS = {
    "prefix_length": "lengths",
    "initialization": "starts",
    "init_text": "task_words, unrelated_words or prompt_text",
    "method_size": "the number after the method",
}
"""What a study calls options of training that it sets itself."""


@dataclass(frozen=True)
class StudyInputs:
    """What all cells of a study share.

    Attributes:
        config: The study.
        data: Its examples.
        backbone: The frozen model.
        on_event: Called with every event.
    """

    config: StudyConfig
    data: StudyData
    backbone: SharedBackbone
    on_event: OnEvent

    def for_cell(self, cell: Cell) -> StudyInputs:
        """The same, with a cell's backbone where there are several."""
        if not cell.backbone:
            return self
        self.backbone.choose(cell.backbone)
        return replace(self, config=self.config.replace(backbone=cell.backbone))


def check_settings(inputs: StudyInputs, cell: Cell) -> None:
    """Refuse what is wrong with a cell and can be seen without its backbone.

    Raises:
        ConfigError: Its settings are wrong.
        DataError: There is too little data for it.
    """
    if not cell.trains:
        if cell.base_method == "few-shot":
            inputs.data.shots()
        return
    examples, dev_examples = inputs.data.for_cell(cell)
    with _named(cell):
        config = _settled(inputs.for_cell(cell).config, cell, examples)
        read_data(config, examples, dev_examples, SINGLE_PROCESS, resume=True, loads_backbone=False)


def check_cell(inputs: StudyInputs, cell: Cell) -> None:
    """Refuse what a cell's backbone, which is loaded for that, cannot do.

    Raises:
        ConfigError: Its settings are wrong for this backbone.
        DataError: A solved example cannot be shown.
    """
    inputs = inputs.for_cell(cell)
    if not cell.trains:
        _instruction(inputs, cell)
        return
    examples, _ = inputs.data.for_cell(cell)
    with _named(cell):
        check_run(_settled(inputs.config, cell, examples), inputs.backbone.get(), examples)


def _settled(config: StudyConfig, cell: Cell, examples: Sequence[Example]) -> TrainConfig:
    """The training configuration of a cell as its run will have it, at any learning rate."""
    rate, folder = config.rates(cell.method)[0], cell_folder(config, cell)
    return settle_form(build_train_config(config, cell, rate, folder, count_targets(examples)), examples)


@contextlib.contextmanager
def _named(cell: Cell) -> Iterator[None]:
    """Say of which cell an error is, and what a study calls the options that it names."""
    try:
        yield
    except PrefixError as error:
        text = f"{error.message} {error.hint}".replace("-", "_")
        names = [f"{option} is {key}" for option, key in _STUDY_KEYS.items() if option in text]
        in_study = f" In a study, {', '.join(names)}, but for a variant's own keys." if names else ""
        raise ConfigError(f"{cell.group}: {error.message}", hint=f"{error.hint}{in_study}".strip()) from error


def run_cell(inputs: StudyInputs, cell: Cell) -> dict[str, Any]:
    """Train and score a cell, or what is left of it; returns its figures."""
    inputs = inputs.for_cell(cell)
    if not cell.trains:
        return {"trained_parameters": 0, "stored_parameters": 0, "file_bytes": 0, **_score(inputs, cell)}
    config = inputs.config
    rate = chosen_rate(config, cell)
    before = read_figures(config, cell)
    if rate is None:
        rate = choose_rate(inputs, cell)
    for folder in try_folders(config, cell):
        shutil.rmtree(folder, ignore_errors=True)
    if before.get("learning_rate") == rate:
        # It was done before, and none of the rates that were added is better.
        return before
    if before:
        # Its figures are of another rate, and count no longer.
        write_cell(config, cell, "waiting", {})
    figures = _train(inputs, cell, rate, cell_folder(config, cell))
    return {**figures, "learning_rate": rate, **_score(inputs, cell)}


def remove_leftovers(config: StudyConfig, cell: Cell) -> None:
    """Remove what a cell that is done no longer needs."""
    folder = cell_folder(config, cell)
    for name in (STATE_FILE, *(() if config.keep_weights else (WEIGHTS_FILE,))):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob(f"*{DECODED_FILE}"):
        path.unlink(missing_ok=True)


# --- the learning rate ------------------------------------------------------------------------------------------------


def choose_rate(inputs: StudyInputs, cell: Cell) -> float:
    """Train at every rate that was not tried yet, and choose the one with the lowest development loss.

    The run at the chosen rate becomes the cell's own, unless tries are shorter than runs.

    Raises:
        ConfigError: No try reached its end.
    """
    config, rates = inputs.config, inputs.config.rates(cell.method)
    before = read_rate_choice(config, cell)
    old = {} if before is None else before.losses
    is_short = config.try_steps > 0 and len(rates) > 1
    if is_short and len(old) == 1:
        # The loss of a single rate is that of a whole run, and compares with no short try.
        old = {}
    losses: dict[float, float | None] = {}
    errors: list[TrainingError] = []
    for rate in rates:
        stored = as_stored(rate)
        losses[rate] = old[stored] if stored in old else _try_rate(inputs, cell, rate, errors, is_short=is_short)
    finite = {rate: loss for rate, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if not finite:
        tried, reason = ", ".join(f"{rate:g}" for rate in rates), f": {errors[-1].message}" if errors else "."
        raise ConfigError(
            f"no run of {cell.group} reached its end at any learning rate of {tried}{reason}",
            hint="give lower ones in learning_rates, or correct what the message names.",
        )
    best = min(finite, key=finite.__getitem__)
    if as_stored(best) not in old and len(rates) > 1 and not is_short:
        folder = cell_folder(config, cell)
        clear_folder(folder)
        # Copied, not moved: the tries are removed only after the choice is written down.
        shutil.copytree(try_folder(config, cell, best), folder, dirs_exist_ok=True)
    # Rates of a larger study that was here before are kept as well.
    write_rate_choice(config, cell, RateChoice({**old, **losses}, best))
    requeue(config, plan(config))
    return best


def _try_rate(
    inputs: StudyInputs, cell: Cell, rate: float, errors: list[TrainingError], *, is_short: bool
) -> float | None:
    """The development loss of a run at one rate; None: it did not reach its end, and why is added to `errors`."""
    config = inputs.config
    # A single rate leaves nothing to choose: its run is the cell's own from the start.
    is_only = len(config.rates(cell.method)) == 1
    folder = cell_folder(config, cell) if is_only else try_folder(config, cell, rate)
    try:
        loss: float | None = _train(inputs, cell, rate, folder, is_short=is_short)["dev_loss"]
    except TrainingError as error:
        # Any other error is none of the rate's: the cell fails, and the rate is tried again.
        inputs.on_event(make_event("try", cell=cell.id, learning_rate=rate, error=error.message))
        errors.append(error)
        return None
    inputs.on_event(make_event("try", cell=cell.id, learning_rate=rate, dev_loss=loss))
    (folder / STATE_FILE).unlink(missing_ok=True)
    return loss


# --- training ---------------------------------------------------------------------------------------------------------


def build_train_config(
    config: StudyConfig, cell: Cell, rate: float, folder: Path, num_targets: int, *, is_short: bool = False
) -> TrainConfig:
    """The training configuration of a cell, or of a short try of it.

    Args:
        config: The study.
        cell: The cell.
        rate: The learning rate.
        folder: Of the run.
        num_targets: In its training set, also where that is used whole.
        is_short: Whether it is a short try.

    Raises:
        ConfigError: The study's settings are wrong for it.
    """
    values: dict[str, Any] = {"patience": config.patience, **config.settings_of(cell.method)}
    if steps := config.steps_of(cell.method, cell.num_targets):
        values["max_steps"] = steps
    if cell.prefix_length:
        values |= {"prefix_length": cell.prefix_length, **_start_settings(config, cell)}
    if is_short:
        values = shorten_config(values, config.try_steps, num_targets)
    values = {
        "save_dtype": _storage_dtype(config, cell),
        **values,
        "method": cell.base_method,
        "learning_rate": rate,
        "seed": cell.seed,
        "output": str(folder),
        "backbone": config.backbone,
        "dtype": config.dtype,
        "device": config.device,
        "task": config.task,
    }
    return TrainConfig.from_layers(Layer(values))


def _start_settings(config: StudyConfig, cell: Cell) -> dict[str, Any]:
    """The settings of training that a start stands for."""
    if cell.initialization == "prompt":
        return {"initialization": "text", "init_text": config.prompt_text}
    words = {"task": config.task_words, "unrelated": config.unrelated_words}.get(cell.initialization)
    if words is None:
        return {"initialization": cell.initialization}
    # Named, so that a setting which implies another start is refused.
    return {"initialization": "words", "init_text": words}


def _storage_dtype(config: StudyConfig, cell: Cell) -> str:
    """What trained values are stored in; whole layers in the backbone's dtype, as they are scored in it."""
    is_bfloat16 = choose_dtype(config.dtype, choose_device(config.device)) == torch.bfloat16
    return "bfloat16" if is_bfloat16 and cell.base_method in ("full", "top") else "float32"


def shorten_config(values: Mapping[str, Any], steps: int, num_targets: int) -> dict[str, Any]:
    """The settings of a try: at most `steps`, warmed up over the same share of them, evaluated at the end."""
    all_steps = planned_steps(values, num_targets)
    steps = max(min(steps, all_steps), 1)
    warmup = round(int(values.get("warmup_steps", TrainConfig.default("warmup_steps"))) * steps / max(all_steps, 1))
    return {**values, "warmup_steps": warmup, "max_steps": steps, "eval_every": steps, "patience": 0}


def _train(inputs: StudyInputs, cell: Cell, rate: float, folder: Path, *, is_short: bool = False) -> dict[str, Any]:
    """A cell's training (or a short try of it) in a folder, from where it stopped; returns its figures."""
    path = folder / _FIGURES_FILE
    dtype = _training_dtype(inputs, cell)
    is_same = begun_with(folder) in ((rate, dtype), (rate, "auto"))
    if is_same and path.exists() and any((folder / name).exists() for name in (PREFIX_FILE, WEIGHTS_FILE)):
        return read_json_file(path)
    examples, dev_examples = inputs.data.for_cell(cell)
    num_targets = count_targets(examples)
    config = build_train_config(inputs.config, cell, rate, folder, num_targets, is_short=is_short)
    # Named, so that the folder says on every machine what it was computed in.
    config = config.replace(dtype=dtype)
    resume = is_same and (folder / STATE_FILE).exists()
    if not resume:
        # It was stopped before its first save, is at a rate that is no longer the chosen one, or is of another dtype.
        clear_folder(folder)
    if not config.trains_prefix:
        # This method loads a model of its own; the shared one would count as its memory.
        inputs.backbone.release()
    reset_peak_memory()
    result = train(
        config,
        backbone=inputs.backbone.get() if config.trains_prefix else None,
        examples=examples,
        dev_examples=dev_examples,
        resume=resume,
        progress=False,
        on_event=lambda event: inputs.on_event({**event, "cell": cell.id, "learning_rate": rate}),
        # However many processes there are: each does cells of its own.
        processes=SINGLE_PROCESS,
    )
    figures = _figures_of(result, num_targets, rate)
    write_text(path, json.dumps(figures) + "\n")
    return figures


def _figures_of(result: TrainResult, num_targets: int, rate: float) -> dict[str, Any]:
    peak = peak_memory_mib()
    return {
        "trained_parameters": result.num_trained,
        "stored_parameters": result.num_trained if result.prefix is None else result.prefix.num_parameters,
        "file_bytes": result.path.stat().st_size,
        "train_seconds": round(sum(event["seconds"] for event in result.events if event["event"] == "step"), 3),
        "steps": result.steps,
        "num_targets": num_targets,
        "peak_memory_mib": None if peak is None else round(peak),
        "dev_loss": None if math.isnan(result.best_loss) else result.best_loss,
        "learning_rate": rate,
    }


def clear_folder(folder: Path) -> None:
    """Remove a run that starts again, but not the file by which reports know its cell."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != CELL_FILE:
            path.unlink(missing_ok=True)


def _training_dtype(inputs: StudyInputs, cell: Cell) -> str:
    """What a cell's training computes in: of a shared model in its dtype, and else in what the method loads."""
    is_shared = cell.base_method in PREFIX_METHODS
    return inputs.backbone.dtype_name if is_shared else inputs.backbone.own_dtype_name


def begun_with(folder: Path) -> tuple[float, str] | None:
    """The learning rate and the dtype of the training in a folder; None where there is none."""
    try:
        values = tomllib.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return float(values["learning_rate"]), str(values["dtype"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- scores -----------------------------------------------------------------------------------------------------------


def _score(inputs: StudyInputs, cell: Cell) -> dict[str, Any]:
    """Decode and score the test set; returns what it took."""
    config, examples = inputs.config, inputs.data.test
    folder, task = cell_folder(config, cell), TASKS[config.task]
    backbone, prefix, text_format = _load_model(inputs, cell)
    values = {**task.decoding, "batch_size": config.decode_batch}
    if config.num_beams:
        values["num_beams"] = config.num_beams
    if config.task == "records":
        stored = text_format if prefix is None else read_text_format(prefix.header)
        longest = stored.longest_target if cell.trains and stored is not None else _longest_target(inputs, backbone)
        values["max_new_tokens"] = max(values["max_new_tokens"], longest)
    decoding = GenerateConfig(**values)
    evaluation = evaluate(
        backbone,
        examples,
        prefix,
        text_format=text_format,
        config=decoding,
        protocol=task.protocol,
        metrics=task.metrics,
        intervals=True,
        # A run that was stopped may have begun in another dtype, or with more texts at once.
        resume_file=folder / f"{backbone.dtype_name}-{config.decode_batch}-{DECODED_FILE}",
        on_batch=lambda count: inputs.on_event(make_event("decoded", cell=cell.id, count=count, total=len(examples))),
    )
    facts = {
        "title": cell.id,
        "task": config.task,
        "data": Path(config.test or config.data).name,
        "split": "test",
        "method": cell.method,
        "backbone": config.backbone,
        "prefix": None,
        "settings": {
            "decoding": decoding.to_dict(),
            "protocol": task.protocol,
            "test_limit": config.test_limit,
            "dtype": backbone.dtype_name,
            **({} if cell.trains or text_format is None else {"prompt": text_format.prompt}),
        },
    }
    write_evaluation(folder, evaluation, examples, facts, protocol=task.protocol)
    if evaluation.num_unended:
        text = (
            f"{cell.id}: {evaluation.num_unended} of {len(examples)} outputs did not end within "
            f"{decoding.max_new_tokens} tokens, and are scored as they are"
        )
        inputs.on_event(make_event("warning", text=text, cell=cell.id))
    return {"evaluate_seconds": round(evaluation.seconds, 3), "unended_outputs": evaluation.num_unended}


def _longest_target(inputs: StudyInputs, backbone: Backbone) -> int:
    """Tokens of the longest training target, for a method that has seen none; 0: the study reads no training data."""
    if not any(cell.trains or cell.base_method == "few-shot" for cell in plan(inputs.config)):
        return 0
    targets = [target for example in inputs.data.train for target in example.targets]
    return max(map(len, backbone.encode_targets(targets)))


def _load_model(inputs: StudyInputs, cell: Cell) -> tuple[Backbone, Prefix | None, TextFormat | None]:
    """What is scored: the backbone, the prefix where there is one, and the text format where it is not the prefix's."""
    config, folder = inputs.config, cell_folder(inputs.config, cell)
    if not cell.trains:
        return inputs.backbone.get(), None, _instruction(inputs, cell)
    if (folder / WEIGHTS_FILE).exists():
        backbone, text_format = load_tuned(
            folder / WEIGHTS_FILE, name_or_path=config.backbone, dtype=config.dtype, device=config.device
        )
        return backbone, None, text_format
    backbone = inputs.backbone.get()
    return backbone, load_prefix(folder / PREFIX_FILE, backbone), None


def _instruction(inputs: StudyInputs, cell: Cell) -> TextFormat:
    """What asks the bare model, with the solved examples of few-shot."""
    shots = inputs.data.shots() if cell.base_method == "few-shot" else ()
    return instruction_format(inputs.backbone.get(), inputs.config.task_words, shots)
