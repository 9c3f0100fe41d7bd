"""The configuration of a study: its grid, its data and what all runs share; read from TOML and from options."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixtune.data import TASKS
from prefixtune.errors import ConfigError, did_you_mean
from prefixtune.studies.kinds import METHODS, SIZED, STARTS, STUDIES, UNTRAINED, StudyKind, base_method, method_size
from prefixtune.training.config import TrainConfig, default_learning_rate
from prefixtune.utils.options import as_float, check_names, fit_types

__all__ = ["StudyConfig"]


_HINT = "`prefixtune study --help` explains every option."
_LISTS = {"methods": str, "sizes": int, "lengths": int, "starts": str}
_MINIMUM = dict.fromkeys(("subsets", "seeds", "tries", "decode_batch", "shots"), 1)
_MINIMUM |= dict.fromkeys(("test_limit", "num_beams", "dev_limit", "dev_share", "patience", "budget", "try_steps"), 0)
_RESERVED_KEYS = (
    *("task", "train", "dev", "backbone", "dtype", "device", "output", "method", "prefix_length", "limit"),
    *("learning_rate", "seed", "dev_limit", "initialization", "init_text"),
    *("quantize", "adapter", "train_adapter", "adapter_rank"),
)
"""Keys of `TrainConfig` that a study sets itself for every run, or cannot use, as all runs share one backbone."""


def _option(default: Any, text: str) -> Any:
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class StudyConfig:
    """A study. Every field is a key of the TOML file; all but the tables are also options of `prefixtune study`.

    Raises:
        ConfigError: One or more values are not allowed; all faults are listed at once.
    """

    name: str = _option("methods", f"which study: {', '.join(STUDIES)}")
    backbone: str = _option("smollm2-135m", "embedded name, hub id or local folder")
    dtype: str = _option("auto", "of the frozen weights: auto, float32, bfloat16 or float16")
    device: str = _option("auto", "cpu, cuda, cuda:0, mps or auto")
    task: str = _option("e2e", "how to read the data")
    data: str = _option("", "a folder with all three splits; or name them one by one:")
    train: str = _option("", "training file")
    dev: str = _option("", "development file: its loss chooses the learning rate and the best step")
    test: str = _option("", "test file, which is scored")
    output: str = _option("", "folder of the study (default: runs/NAME)")

    methods: tuple[str, ...] = _option(("prefix",), f"of {', '.join(METHODS)}; with a size as in adapter:8")
    sizes: tuple[int, ...] = _option((0,), "numbers of training targets; 0: all")
    lengths: tuple[int, ...] = _option((10,), "prefix lengths")
    starts: tuple[str, ...] = _option(("task",), f"of {', '.join(STARTS)}")
    subsets: int = _option(1, "how many samples of the training set, where it is not used whole")
    seeds: int = _option(1, "how many seeds for each")
    sample: str = _option("sources", "draw pairs one by one, or sources with all of their targets: pairs or sources")
    task_words: str = _option(
        "Describe the following data in one sentence:",
        "words of the start 'task'; also the instruction of zero-shot and few-shot",
    )
    unrelated_words: str = _option("elephant quarrel tin whistle overcoat", "words of the start 'unrelated'")
    shots: int = _option(3, "solved examples that few-shot shows")

    tries: int = _option(
        3, "learning rates tried for each method, by factors of 3 around its default; the same number for all"
    )
    try_steps: int = _option(
        0,
        "optimizer steps of a try, with a schedule of its own; the chosen rate then trains again; 0: a whole run",
    )
    test_limit: int = _option(0, "score a fixed random sample of N sources; 0: the whole test set")
    num_beams: int = _option(0, "beams; 0: the task's default")
    decode_batch: int = _option(32, "texts decoded together")
    dev_limit: int = _option(400, "development targets, a fixed random sample; 0: all")
    dev_share: float = _option(
        0.0, "development targets as a share of the training targets, in place of dev_limit; 0: use dev_limit"
    )
    patience: int = _option(0, "stop a run after N evaluations without a better development loss; 0: never")
    budget: float = _option(0.0, "minutes after which no run is started; what is left is reported; 0: no limit")
    keep_weights: bool = _option(False, "keep the weights of methods other than a prefix after they are scored")

    train_settings: Mapping[str, Any] = _option(
        {}, "table: values of `prefixtune train` for every run; [train_settings.full] for one method"
    )
    learning_rates: Mapping[str, Any] = _option({}, "table: method -> list of rates to try, the same number for each")
    steps_by_size: Mapping[str, Any] = _option({}, "table: training targets -> optimizer steps")

    def __new__(cls, *_: Any, **values: Any) -> StudyConfig:
        """Refuse unknown names, with the nearest known one."""
        check_names(cls, values, "StudyConfig has no such option", _HINT)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        # The other checks would be misleading for a value of a wrong type.
        faults = list(fit_types(self).values()) or [
            *self._name_faults(),
            *self._list_faults(),
            *self._number_faults(),
            *self._table_faults(),
        ]
        if faults:
            raise ConfigError("; ".join(faults) + ".", hint=_HINT)

    def _name_faults(self) -> Iterator[str]:
        if self.name not in STUDIES:
            yield f"there is no study {self.name!r} ({did_you_mean(self.name, STUDIES)})"
        if self.task not in TASKS:
            yield f"there is no task {self.task!r} ({did_you_mean(self.task, TASKS)})"
        elif TASKS[self.task].kind != "generation":
            yield f"task {self.task!r} is for {TASKS[self.task].kind}; studies are for tasks that generate"
        if self.sample not in ("pairs", "sources"):
            yield f"sample is {self.sample!r}, but must be pairs or sources"

    def _list_faults(self) -> Iterator[str]:
        for name, allowed in (("methods", METHODS), ("starts", STARTS)):
            for value in getattr(self, name):
                base, _, size = value.partition(":")
                if base not in allowed:
                    yield f"{name} has {value!r} ({did_you_mean(value, allowed)})"
                elif ":" in value and not (base in SIZED and size.isascii() and size.isdigit() and int(size)):
                    yield f"{name} has {value!r}, but a size goes with top, adapter and lora, as in adapter:8"
        for name in _LISTS:
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                yield f"{name} is {list(values)!r}, but must have at least one value, and none twice"
        for name, minimum in (("sizes", 0), ("lengths", 1)):
            if any(value < minimum for value in getattr(self, name)):
                yield f"{name} is {list(getattr(self, name))!r}, but each must be at least {minimum}"

    def _number_faults(self) -> Iterator[str]:
        for name, minimum in _MINIMUM.items():
            value = getattr(self, name)
            if not math.isfinite(value) or value < minimum:
                yield f"{name} is {value}, but must be at least {minimum}"

    def _table_faults(self) -> Iterator[str]:
        for size, steps in self.steps_by_size.items():
            if not str(size).isdigit() or not isinstance(steps, int) or steps < 1:
                yield f"steps_by_size has {size!r} = {steps!r}, but needs numbers of targets and of steps"
        trained = [method for method in self.methods if base_method(method) in METHODS and method not in UNTRAINED]
        faults = list(dict.fromkeys([*self._setting_faults(trained), *self._rate_faults()]))
        yield from faults
        # Rates that are wrong cannot be counted.
        counts = set() if faults else {len(self.rates(method)) for method in trained}
        if len(counts) > 1:
            yield "learning_rates gives methods different numbers of tries, but a comparison needs the same for each"

    def _setting_faults(self, trained: Sequence[str]) -> Iterator[str]:
        for key, value in self.train_settings.items():
            if key in METHODS and not isinstance(value, Mapping):
                yield f"train_settings.{key} is {value!r}, but must be a table"
        known = TrainConfig.model_fields.keys() - set(_RESERVED_KEYS)
        for method in trained:
            settings = self.settings_of(method)
            for key in sorted(settings.keys() & set(_RESERVED_KEYS)):
                yield f"train_settings has {key!r}, which the study sets itself"
            for key in sorted(settings.keys() - known - set(_RESERVED_KEYS)):
                yield f"train_settings has the unknown key {key!r} ({did_you_mean(key, known)})"
            try:
                TrainConfig(**{key: value for key, value in settings.items() if key in known})
            except ConfigError as error:
                yield f"train_settings: {error.message.removesuffix('.')}"

    def _rate_faults(self) -> Iterator[str]:
        for method, rates in self.learning_rates.items():
            if base_method(method) not in METHODS:
                yield f"learning_rates has {method!r} ({did_you_mean(method, METHODS)})"
            elif (
                not isinstance(rates, list | tuple)
                or not rates
                or not all(isinstance(r, int | float) and 0 < r < math.inf for r in rates)
                or len(set(rates)) < len(rates)
            ):
                yield f"learning_rates.{method} is {rates!r}, but must be a list of positive numbers, none twice"

    def settings_of(self, method: str) -> dict[str, Any]:
        """Values of `TrainConfig` for a method's runs; `adapter:8` has those of `adapter`, and its size."""
        shared = {key: value for key, value in self.train_settings.items() if key not in METHODS}
        own = self.train_settings.get(base_method(method), {})
        size = method_size(method)
        sized = {} if size is None else {"method_size": size}
        return {**shared, **(own if isinstance(own, Mapping) else {}), **sized}

    def rates(self, method: str) -> tuple[float, ...]:
        """The learning rates that are tried for a method.

        >>> [f"{rate:.1e}" for rate in StudyConfig(tries=3).rates("full")]
        ['3.3e-05', '1.0e-04', '3.0e-04']
        """
        base = base_method(method)
        rates = self.learning_rates.get(method, self.learning_rates.get(base))
        if rates is not None:
            return tuple(float(rate) for rate in rates)
        reparameterization = self.settings_of(method).get(
            "reparameterization", TrainConfig.default("reparameterization")
        )
        middle = default_learning_rate(reparameterization if base in ("prefix", "prompt", "infix") else base)
        # As many below the default as above; of an even number, one more above.
        powers = range(-((self.tries - 1) // 2), self.tries // 2 + 1)
        return tuple(float(f"{middle * 3.0**power:.2g}") for power in powers)

    def grows(self, before: Mapping[str, Any], key: str) -> bool:
        """Whether this study has all that an earlier one had under a key, so that the runs of that one still count.

        Args:
            before: All values of the earlier study, as from `to_dict`.
            key: One of them.

        >>> study = StudyConfig(methods=("prefix", "full"), tries=3)
        >>> study.grows(StudyConfig(methods=("full",)).to_dict(), "methods")
        True
        >>> study.grows(StudyConfig(methods=("lora",)).to_dict(), "methods")
        False
        """
        if key in _LISTS:
            return set(before[key]) <= set(getattr(self, key))
        if key in ("subsets", "seeds"):
            return bool(before[key] <= getattr(self, key))
        if key in ("tries", "learning_rates"):
            return self._has_rates_of(before)
        if key == "steps_by_size":
            # Only for sizes that are new; the number of targets in the whole set is not known here.
            sizes = {str(size) for size in before["sizes"]}
            if "0" in sizes:
                return False
            new_sizes = self.steps_by_size.keys() - before[key].keys()
            return before[key].items() <= self.steps_by_size.items() and not sizes & new_sizes
        return False

    def _has_rates_of(self, before: Mapping[str, Any]) -> bool:
        """Whether every rate of an earlier study is tried, whether it is written down or comes from its tries."""
        known = {field.name for field in dataclasses.fields(self)}
        try:
            other = StudyConfig.from_mapping(self.name, {key: value for key, value in before.items() if key in known})
        except ConfigError:
            return False
        trained = [method for method in other.methods if method not in UNTRAINED]
        return all(set(other.rates(method)) <= set(self.rates(method)) for method in trained)

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return Path(self.output or f"runs/{self.name}")

    @property
    def kind(self) -> StudyKind:
        """The study of the paper that it is."""
        return STUDIES[self.name]

    def to_dict(self) -> dict[str, Any]:
        """All values, as they are in JSON."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values

    @classmethod
    def from_mapping(cls, name: str, values: Mapping[str, Any], where: str = "the study") -> StudyConfig:
        """A study by name, with values over its defaults.

        Raises:
            ConfigError: Unknown keys (with the nearest known one), or values that are not allowed.
        """
        if name not in STUDIES:
            raise ConfigError(f"there is no study {name!r}.", hint=did_you_mean(name, STUDIES))
        if values.get("name", name) != name:
            raise ConfigError(
                f"{where} is for the study {values['name']!r}, not for {name!r}.", hint="give the file of that study."
            )
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        merged: dict[str, Any] = {**STUDIES[name].defaults, **values, "name": name}
        faults = []
        for key, value in merged.items():
            if key not in defaults:
                faults.append(f"unknown key {key!r} ({did_you_mean(key, defaults)})")
                continue
            try:
                merged[key] = _as_typed(key, value, defaults[key])
            except TypeError as error:
                faults.append(f"{key} is {value!r}, but must be {error}")
        if faults:
            raise ConfigError(f"{where}: {'; '.join(faults)}.", hint=_HINT)
        return cls(**merged)

    @classmethod
    def from_toml(cls, name: str, path: str | Path, overrides: Mapping[str, Any] | None = None) -> StudyConfig:
        """Read a TOML file; `overrides` win over it.

        Raises:
            ConfigError: The file is missing or is not TOML, or a key or value in it is wrong.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {str(path)!r}: {error}.", hint="check the path.") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{str(path)!r} is not TOML: {error}.", hint='write lines such as task = "e2e".'
            ) from error
        return cls.from_mapping(name, {**values, **(overrides or {})}, where=repr(str(path)))


def _as_typed(key: str, value: Any, default: Any) -> Any:
    """A value in the type of its field: lists, and the comma-separated text of an option, become tuples.

    Raises:
        TypeError: It does not fit; the message says what is needed.
    """
    if key in _LISTS:
        return _as_tuple(_LISTS[key], value)
    expected: Any = Mapping if default is dataclasses.MISSING else type(default)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return as_float(value)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise TypeError("a table" if expected is Mapping else f"of type {expected.__name__}")
    return value


def _as_tuple(kind: type, value: Any) -> tuple[Any, ...]:
    """The values of a list, or of a text with commas between them."""
    example = "whole numbers, as in 50,100" if kind is int else "names"
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",")]
        try:
            return tuple(kind(part) for part in parts)
        except ValueError:
            raise TypeError(f"a list of {example}") from None
    if not isinstance(value, list | tuple) or any(type(part) is not kind for part in value):
        raise TypeError(f"a list of {example}")
    return tuple(value)
