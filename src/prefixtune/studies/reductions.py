"""What a study leaves out of the paper's protocol, or makes smaller, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prefixtune.data import TASKS
from prefixtune.studies.config import StudyConfig, planned_steps
from prefixtune.studies.kinds import UNTRAINED, base_method
from prefixtune.training.config import TrainConfig

__all__ = ["describe_reductions", "idle_patience"]


def describe_reductions(
    config: StudyConfig, left: Sequence[str], num_cells: int, *, is_over_budget: bool = False
) -> list[str]:
    """Every reduction as a phrase, for reports.

    Args:
        config: The study.
        left: Ids of the cells that were not run.
        num_cells: All cells.
        is_over_budget: Whether they were not run because the time was up.
    """
    reductions = [*_sizes(config), *_counts(config), *_values(config), *_steps(config), *idle_patience(config)]
    if left:
        reason = f" within {config.budget:g} minutes" if is_over_budget else ""
        reductions.append(f"{len(left)} of {num_cells} runs are not done{reason}: {', '.join(left)}")
    return reductions


def idle_patience(config: StudyConfig) -> list[str]:
    """Where patience cannot stop a run, as that has too few evaluations, in words; each case once.

    >>> idle_patience(StudyConfig(name="low-data", sizes=[50], patience=9))
    ['patience 9 stops no run of 200 steps, which is evaluated every 20 steps']
    """
    cases: list[str] = []
    for method in config.methods:
        if method in UNTRAINED:
            continue
        settings = {"patience": config.patience, **config.settings_of(method)}
        patience, every = settings["patience"], settings.get("eval_every", TrainConfig.default("eval_every"))
        for size in config.sizes:
            steps = config.steps_of(method, size)
            planned = planned_steps({**settings, **({"max_steps": steps} if steps else {})}, size)
            # Of a set that is used whole the epochs have as many steps as are not known here.
            if patience and planned and not 0 < every * (patience + 1) < planned:
                rhythm = f"every {every} steps" if every else "at its end alone"
                cases.append(f"patience {patience} stops no run of {planned} steps, which is evaluated {rhythm}")
    return list(dict.fromkeys(cases))


def _sizes(config: StudyConfig) -> Iterator[str]:
    """Samples, beams and short tries."""
    if config.test_limit:
        yield f"scored on a fixed random sample of {config.test_limit} test sources"
    for size in config.sizes:
        if size:
            yield f"trained on samples of {size:,} targets"
    default_beams = TASKS[config.task].decoding.get("num_beams", 1)
    if config.num_beams and config.num_beams != default_beams:
        beams = f"{config.num_beams} beams" if config.num_beams > 1 else "no beams"
        yield f"decoded with {beams} instead of {default_beams}"
    if config.try_steps:
        yield f"learning rates chosen by runs of {config.try_steps} steps"


def _counts(config: StudyConfig) -> Iterator[str]:
    """Fewer repetitions or tries, or less patience, than the study has by default."""
    defaults = StudyConfig(name=config.name)
    tries = len(next(iter(config.learning_rates.values()), ())) or config.tries
    counts = [("subsets", config.subsets), ("seeds", config.seeds)]
    if config.repetitions:
        if config.repetitions < len(defaults.repeats):
            grid = f"{defaults.subsets} subsets with {defaults.seeds} seeds each"
            yield f"{config.repetitions} subsets, each with a seed of its own, instead of {grid}"
        counts = []
    for name, count in (*counts, ("tries", tries)):
        if count < getattr(defaults, name):
            singular = {"subsets": "subset", "seeds": "seed", "tries": "try"}[name]
            yield f"{count} {singular if count == 1 else name} instead of {getattr(defaults, name)}"
    if config.patience < defaults.patience:
        yield f"patience {config.patience} instead of {defaults.patience}"


def _values(config: StudyConfig) -> Iterator[str]:
    """Methods, sizes, lengths or starts of the paper's study that are missing."""
    for name in ("methods", "sizes", "lengths", "starts"):
        names = [config.method_of(str(value)) for value in getattr(config, name)]
        # LoRA of rank 4 stands for LoRA, and not for LoRA of rank 1.
        present = {*names, *map(base_method, names)}
        if name in ("lengths", "starts") and config.variants:
            continue  # Variants have their own.
        expected = config.kind.defaults.get(name, ())
        missing = [str(value) for value in expected if str(value) not in present]
        if missing and len(expected) > 1:
            yield f"{name} without {', '.join(missing)}"


def _steps(config: StudyConfig) -> Iterator[str]:
    """Fewer optimizer steps on a size than the study has by default."""
    for size, default in config.kind.defaults.get("steps_by_size", {}).items():
        steps = config.steps_by_size.get(size, config.train_settings.get("max_steps", default))
        if int(size) in config.sizes and steps < default:
            yield f"{steps} steps on {size} targets instead of {default}"
