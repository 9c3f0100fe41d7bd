"""The configuration of a study: its grid, its data and what all runs share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from prefixtune.data import TASKS
from prefixtune.errors import ConfigError, did_you_mean
from prefixtune.studies.kinds import (
    METHODS,
    PREFIX_METHODS,
    SIZED,
    STUDIES,
    UNTRAINED,
    Start,
    StudyKind,
    StudyName,
    base_method,
    method_size,
)
from prefixtune.studies.variants import check_method, check_variants, grid_faults, variant_lengths, variant_settings
from prefixtune.training.config import DEFAULT_SIZES, TrainConfig, default_learning_rate
from prefixtune.utils.config import CommaList, Config, DTypeName, Layer, option_group

__all__ = ["StudyConfig", "backbone_name", "planned_steps", "training_defaults"]


_LISTS = ("methods", "sizes", "lengths", "starts")
_REPEATS = ("subsets", "seeds", "repetitions")
_LENGTH_KEYS = frozenset(("max_steps", "epochs"))
_TRACKER_KEYS = ("report_to", "project", "run_name", "report_examples")
_RESERVED_KEYS = (
    *("task", "train", "dev", "backbone", "dtype", "device", "output", "method", "prefix_length", "limit"),
    *("learning_rate", "seed", "dev_limit", "initialization", "init_text"),
    *("quantize", "attention", "adapter", "train_adapter", "adapter_rank"),
    *_TRACKER_KEYS,
)
"""Keys of `TrainConfig` that a study sets itself for every run, or cannot use, as all runs share one backbone."""

MOST_RUNS = 100_000
"""Most runs of a study."""

_T = TypeVar("_T")


def _check_method(method: str, info: Any) -> str:
    # `info` is pydantic's ValidationInfo, with the fields above this one.
    return check_method(method, info.data.get("variants", {}))


def _check_size(size: str) -> str:
    if not (size.isascii() and size.isdigit()):
        raise ValueError(f"is {size!r}, but must be a number of training targets")
    return str(int(size))


def _check_rates(rates: tuple[float, ...]) -> tuple[float, ...]:
    if not rates or len(set(rates)) < len(rates):
        raise ValueError(f"is {list(rates)!r}, but must be a list of positive numbers, none twice")
    return rates


_Variants = Annotated[Mapping[str, Mapping[str, Any]], AfterValidator(check_variants)]
_MethodName = Annotated[str, AfterValidator(_check_method)]
_Size = Annotated[str, BeforeValidator(str), AfterValidator(_check_size)]
_Rates = Annotated[tuple[Annotated[float, Field(gt=0)], ...], AfterValidator(_check_rates)]
_Count = Annotated[int, Field(ge=1)]
_Limit = Annotated[int, Field(ge=0)]

_model, _data, _grid, _runs = map(option_group, ("model", "data", "grid", "runs"))


def _own(group: str, default: Any, description: str) -> Any:
    """A field whose default depends on the study."""
    shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
    field = option_group(group, show_default=f"the study's own, else {shown}")
    return field(default, description=description)


class StudyConfig(Config):
    """A study. Every field is a key of the file; all but the tables are also options of `prefixtune study`.

    Raises:
        ConfigError: One or more values are not allowed; all faults are listed at once.
    """

    hint: ClassVar[str] = "`prefixtune study --help` explains every option."

    name: StudyName = Field("methods", description="; ".join(f"{name}: {k.description}" for name, k in STUDIES.items()))

    backbone: str = _model("smollm2-135m", description="embedded name, hub id or local folder")
    backbones: CommaList[str] = _model((), description="several, in place of backbone: all runs on each")
    dtype: DTypeName = _model("auto", description="dtype of the frozen weights")
    device: str = _model("auto", description="cpu, cuda, cuda:0, mps or auto")

    task: str = _own("data", "e2e", "how to read the data")
    data: str = _data("", description="a folder with all three splits; or name them one by one:")
    train: str = _data("", description="training file")
    dev: str = _data("", description="development file: its loss chooses the learning rate and the best step")
    test: str = _data("", description="test file, which is scored")
    output: str = _data("", description="folder of the study; empty: runs/NAME")

    variants: _Variants = Field(
        default={}, description="name -> a method with prefix_length, initialization and training settings of its own"
    )
    methods: CommaList[_MethodName] = _own(
        "grid", ("prefix",), f"of {', '.join(METHODS)}; with a size as in adapter:8; or names of the table variants"
    )
    once: CommaList[_MethodName] = _grid(
        (), description="those of the methods that are run once, on the first sample, to save time"
    )
    sizes: CommaList[_Limit] = _own("grid", (0,), "numbers of training targets; 0: all")
    lengths: CommaList[_Count] = _own("grid", (10,), "prefix lengths")
    starts: CommaList[Start] = _own(
        "grid", ("task",), "how the prefix starts; examples: as many as fit its length; prompt: from prompt_text"
    )
    subsets: _Count = _own("grid", 1, "how many samples of the training set, where it is not used whole")
    seeds: _Count = _own("grid", 1, "how many seeds for each")
    repetitions: _Limit = _grid(
        0, description="in place of subsets and seeds: so many samples, each with a seed of its own; 0: those"
    )
    sample: Literal["sources", "pairs"] = _own(
        "grid", "sources", "draw pairs one by one, or sources with all of their targets"
    )
    task_words: str = _own(
        "grid",
        "Describe the following data in one sentence:",
        "words of the start 'task'; also the instruction of zero-shot and few-shot",
    )
    unrelated_words: str = _grid("elephant quarrel tin whistle overcoat", description="words of the start 'unrelated'")
    prompt_text: str = _grid(
        "Each field of the following data has a name and a value. Write one or two fluent sentences that say all of "
        "it, and nothing else.",
        description="text of the start 'prompt', with at least as many tokens as the prefix",
    )
    shots: _Count = _grid(3, description="solved examples that few-shot shows")

    tries: int = _runs(
        3,
        ge=1,
        le=21,
        description="learning rates tried for each method, by factors of 3 around its default; the same number for all",
    )
    try_steps: _Limit = _runs(
        0,
        description="optimizer steps of a try, with a schedule of its own; the chosen rate then trains again; 0: a "
        "whole run",
    )
    test_limit: _Limit = _runs(0, description="score a fixed random sample of N sources; 0: the whole test set")
    num_beams: _Limit = _runs(0, description="beams; 0: the task's default")
    decode_batch: _Count = _runs(32, description="texts decoded together")
    dev_limit: _Limit = _runs(400, description="development targets, a fixed random sample; 0: all")
    dev_share: Annotated[float, Field(ge=0)] = _own(
        "runs", 0.0, "development targets as a share of the training targets, in place of dev_limit; 0: use dev_limit"
    )
    patience: _Limit = _own("runs", 0, "stop a run after N evaluations without a better development loss; 0: never")
    budget: float = _runs(
        0.0, ge=0, description="minutes after which no run is started; what is left is reported; 0: no limit"
    )
    keep_weights: bool = _runs(
        False, description="keep the weights of methods other than a prefix after they are scored"
    )

    train_settings: Mapping[str, Any] = Field(
        default={}, description="values of `prefixtune train` for every run; [train_settings.full] for one method"
    )
    learning_rates: Mapping[_MethodName, _Rates] = Field(
        default={}, description="method -> list of rates to try, the same number for each"
    )
    steps_by_size: Mapping[_Size, _Count] = Field(default={}, description="training targets -> optimizer steps")

    @field_validator("task")
    @classmethod
    def _check_task(cls, task: str) -> str:
        if task not in TASKS:
            raise ValueError(f"{task!r} is unknown ({did_you_mean(task, TASKS).removesuffix('.')})")
        if TASKS[task].kind != "generation":
            raise ValueError(f"{task!r} is for {TASKS[task].kind}; studies are for tasks that generate")
        return task

    @field_validator(*_LISTS)
    @classmethod
    def _check_list(cls, values: tuple[_T, ...]) -> tuple[_T, ...]:
        if not values or len(set(values)) < len(values):
            raise ValueError(f"is {list(values)!r}, but must have at least one value, and none twice")
        return values

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """What is wrong with the training settings, for any method, and with the numbers of tries."""
        trained = self._trained_methods
        tables: list[tuple[str, dict[str, Any], dict[str, Any]]] = [("train_settings", self._shared_settings(), {})]
        for name in trained:
            method = self.base_method(name)
            tables.append((f"train_settings.{method}", self._method_settings(name), {"method": method}))
        faults = list(dict.fromkeys(fault for table in tables for fault in _setting_faults(*table)))
        if any("=" in str(table.get("sites", "")) for _, table, _ in tables):
            faults.append("train_settings.sites gives lengths, but lengths are those of the study")
        for key, value in self.train_settings.items():
            if key in METHODS and not isinstance(value, Mapping):
                faults.append(f"train_settings.{key} is {value!r}, but must be a table")
        yield from ((("train_settings",), fault) for fault in faults)
        variant_faults = list(self._variant_faults())
        yield from ((("variants",), fault) for fault in variant_faults)
        if not (faults or variant_faults) and len({len(self.rates(method)) for method in trained}) > 1:
            yield (
                ("learning_rates", "methods", "tries", "variants"),
                "learning_rates gives methods different numbers of tries, but a comparison needs the same for each",
            )
        if not self.prompt_text.strip() and any("prompt" in self.starts_of(name) for name in self._with_prefix):
            yield ("starts", "prompt_text", "variants"), "a start is 'prompt', but prompt_text is empty"
        if unknown := sorted(set(self.once) - set(self.methods)):
            yield ("once", "methods"), f"once has {unknown[0]!r}, which is not among methods"
        yield from self._equal_runs()
        if (count := self._num_runs()) > MOST_RUNS:
            yield (
                ("methods", "sizes", "lengths", "starts", "backbones", "subsets", "seeds", "repetitions", "variants"),
                f"the study has {count:,} runs, but at most {MOST_RUNS:,} are allowed",
            )

    def _equal_runs(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Methods that are the same one, and runs of different ones that would have the same name."""
        names = [backbone_name(backbone) for backbone in self.backbones]
        if len(set(names)) < len(names):
            yield ("backbones",), f"backbones is {list(self.backbones)!r}, but two of them would be called the same"
            return
        sized: dict[tuple[str, str], str] = {}
        for name in self.methods:
            base = self.base_method(name)
            if name in self.variants or base not in SIZED:
                continue
            size = self.settings_of(name).get("method_size") or DEFAULT_SIZES[base]
            first = sized.setdefault((base, str(size)), name)
            if first != name:
                yield ("methods", "train_settings"), f"methods has {first!r} and {name!r}, which are the same"
        runs: dict[str, tuple[str, str]] = {}
        for backbone in names or [""]:
            for method in self.methods:
                first_run = runs.setdefault(f"{backbone}-{method.replace(':', '')}", (backbone, method))
                if first_run != (backbone, method):
                    yield (
                        ("backbones", "methods", "variants"),
                        f"{first_run[1]!r} on {first_run[0]!r} and {method!r} on {backbone!r} would be called the "
                        "same; give a method another name as a variant",
                    )

    def _num_runs(self) -> int:
        """How many runs the grid has, without a list of them; a training set that is used whole counts as samples."""
        repeats = self.repetitions or self.subsets * self.seeds
        count = 0
        for name in self.methods:
            if name in UNTRAINED:
                count += 1
                continue
            starts = self.base_method(name) in PREFIX_METHODS
            points = len(self.lengths_of(name)) * len(self.starts_of(name)) if starts else 1
            count += points * len(self.sizes) * (1 if name in self.once else repeats)
        return count * max(1, len(self.backbones))

    def _variant_faults(self) -> Iterator[str]:
        for name, values in self.variants.items():
            faults = list(grid_faults(name, values))
            yield from faults
            placed: dict[str, Any] = {"method": self.base_method(name)}
            if placed["method"] in PREFIX_METHODS and not faults:
                placed["prefix_length"] = self.lengths_of(name)[0]
                placed |= {"initialization": "examples"} if "examples" in self.starts_of(name) else {}
            yield from _setting_faults(f"variants.{name}", variant_settings(values), {} if faults else placed)

    def method_of(self, name: str) -> str:
        """The method behind a name among `methods`: of a variant, the method that it varies, with its size."""
        return str(self.variants[name]["method"]) if name in self.variants else name

    def base_method(self, name: str) -> str:
        """The method behind a name among `methods`, without its size."""
        return base_method(self.method_of(name))

    def lengths_of(self, name: str) -> tuple[int, ...]:
        """The prefix lengths of a method that has a prefix: a variant's own, or those of the study."""
        return variant_lengths(self.variants.get(name, {})) or self.lengths

    def starts_of(self, name: str) -> tuple[Start, ...]:
        """The starts of a method that has a prefix: a variant's own, or those of the study."""
        start = self.variants.get(name, {}).get("initialization")
        return self.starts if start is None else (start,)

    @property
    def repeats(self) -> list[tuple[int, int]]:
        """Sample and seed of every repetition, in the order in which they are run.

        >>> StudyConfig(subsets=2, seeds=2).repeats, StudyConfig(repetitions=3).repeats
        ([(0, 0), (1, 0), (0, 1), (1, 1)], [(0, 0), (1, 1), (2, 2)])
        """
        if self.repetitions:
            return [(number, number) for number in range(self.repetitions)]
        return [(subset, seed) for seed in range(self.seeds) for subset in range(self.subsets)]

    def settings_of(self, method: str) -> dict[str, Any]:
        """Values of `TrainConfig` for a method's runs; `adapter:8` has those of `adapter`, and its size.

        Passes over the data that a narrower table gives take the place of a wider one's steps.

        >>> study = StudyConfig(train_settings={"max_steps": 60, "full": {"epochs": 3}})
        >>> study.settings_of("full"), study.settings_of("prefix")
        ({'epochs': 3}, {'max_steps': 60})
        """
        found: dict[str, Any] = {}
        own = variant_settings(self.variants.get(method, {}))
        for table in (self._shared_settings(), self._method_settings(method), own):
            if "epochs" in table:
                found.pop("max_steps", None)
            found |= table
        return found

    def steps_of(self, method: str, num_targets: int) -> int:
        """The optimizer steps of a method's runs by the size of their samples; 0: its settings have its length.

        A variant's own length wins over `steps_by_size`, and a method's own over that of the study by default.

        >>> study = StudyConfig(name="low-data", train_settings={"full": {"epochs": 3}})
        >>> study.steps_of("full", 50), study.steps_of("prefix", 50)
        (0, 200)
        """
        own = set(self.variants.get(method, {}))
        if self.steps_by_size == self.kind.defaults.get("steps_by_size"):
            own |= set(self._method_settings(method))
        return 0 if _LENGTH_KEYS & own else self.steps_by_size.get(str(num_targets), 0)

    def _shared_settings(self) -> dict[str, Any]:
        return {key: value for key, value in self.train_settings.items() if key not in METHODS}

    def _method_settings(self, name: str) -> dict[str, Any]:
        method = self.method_of(name)
        own = self.train_settings.get(base_method(method), {})
        size = method_size(method)
        sized = {} if size is None else {"method_size": size}
        return {**(own if isinstance(own, Mapping) else {}), **sized}

    def _effective_settings(self, method: str) -> dict[str, Any]:
        """The settings of a method's runs as far as they have an effect, with the reparameterization by default."""
        settings = {**training_defaults(), **self.settings_of(method)}
        if self.base_method(method) not in PREFIX_METHODS:
            del settings["reparameterization"]
        return settings

    def rates(self, method: str) -> tuple[float, ...]:
        """The learning rates that are tried for a method.

        >>> [f"{rate:.1e}" for rate in StudyConfig(tries=3).rates("full")]
        ['3.3e-05', '1.0e-04', '3.0e-04']
        """
        sized, base = self.method_of(method), self.base_method(method)
        for name in (method, sized, base):
            if name in self.learning_rates:
                return self.learning_rates[name]
        settings = self._effective_settings(method)
        optimizer = settings.get("optimizer", TrainConfig.default("optimizer"))
        middle = default_learning_rate(settings.get("reparameterization", base), optimizer)
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
        if key == "sizes" and not self.keeps_shots(before):
            return False
        if key in _LISTS:
            return set(before[key]) <= set(getattr(self, key))
        if key == "backbones":
            return bool(before[key]) and set(before[key]) <= set(self.backbones)
        if key in _REPEATS:
            other = self.read(before)
            return other is not None and set(other.repeats) <= set(self.repeats)
        if key == "once":
            return not set(self.once) & set(before["methods"]) - set(before[key])
        if key == "variants":
            return all(self.variants.get(name) == values for name, values in before[key].items())
        if key in ("tries", "learning_rates"):
            return self._has_rates_of(before)
        if key == "train_settings":
            return self._has_settings_of(before)
        if key == "steps_by_size":
            # Only for sizes that are new.
            return all(before[key].get(str(size)) == self.steps_by_size.get(str(size)) for size in before["sizes"])
        return False

    def keeps_shots(self, before: Mapping[str, Any]) -> bool:
        """Whether few-shot, if an earlier study has it, still shows examples of the same sample: the smallest."""
        return "few-shot" not in before["methods"] or _smallest(before["sizes"]) == self.smallest_size

    def _has_rates_of(self, before: Mapping[str, Any]) -> bool:
        """Whether every rate of an earlier study is tried, whether it is written down or comes from its tries."""
        other = self.read(before)
        return other is not None and all(
            set(other.rates(method)) <= set(self.rates(method)) for method in other._trained_methods
        )

    def _has_settings_of(self, before: Mapping[str, Any]) -> bool:
        """Whether every method of an earlier study trains as it did."""
        other = self.read(before)
        return other is not None and all(
            other._effective_settings(method) == self._effective_settings(method) for method in other._trained_methods
        )

    def read(self, before: Mapping[str, Any]) -> StudyConfig | None:
        """An earlier study of this name, from its values; None: they are none that a study can have."""
        # Steps are compared elsewhere; an older version allowed keys that are none of the sizes.
        keys = type(self).model_fields.keys() - {"steps_by_size"}
        # A list of which nothing is done is empty.
        known = {key: value for key, value in before.items() if key in keys and not (key in _LISTS and not value)}
        try:
            return StudyConfig(**{**known, "name": self.name})
        except ConfigError:
            return None

    @property
    def _trained_methods(self) -> list[str]:
        return [method for method in self.methods if method not in UNTRAINED]

    @property
    def _with_prefix(self) -> list[str]:
        return [name for name in self.methods if self.base_method(name) in PREFIX_METHODS]

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON schema of its files, with that of training inside."""
        schema = super().json_schema()
        keys = TrainConfig.json_schema()["properties"]
        settings = {key: value for key, value in keys.items() if key not in _RESERVED_KEYS}
        schema["$defs"] = {"MethodSettings": {"type": "object", "properties": settings, "additionalProperties": False}}
        methods = {method: {"$ref": "#/$defs/MethodSettings"} for method in METHODS}
        table = {"properties": {**settings, **methods}, "additionalProperties": False}
        schema["properties"]["train_settings"] |= table
        own: dict[str, Any] = {"method": {"type": "string"}, "prefix_length": {"type": ["integer", "array"]}}
        own["initialization"] = {"enum": list(get_args(Start))}
        variant = {"type": "object", "properties": {**settings, **own}, "additionalProperties": False}
        schema["properties"]["variants"]["additionalProperties"] = {**variant, "required": ["method"]}
        return schema

    @property
    def smallest_size(self) -> int:
        """The smallest of the sizes, of whose sample few-shot shows examples; 0: the whole set.

        >>> StudyConfig(sizes=(100, 0, 50)).smallest_size, StudyConfig(sizes=(0,)).smallest_size
        (50, 0)
        """
        return _smallest(self.sizes)

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return Path(self.output or f"runs/{self.name}")

    @property
    def kind(self) -> StudyKind:
        """The study of the paper that it is."""
        return STUDIES[self.name]


def backbone_name(backbone: str) -> str:
    """What a study of several backbones calls one, in its runs' names.

    >>> backbone_name("openai-community/GPT2_medium")
    'gpt2-medium'
    """
    return re.sub("[^a-z0-9]+", "-", backbone.rstrip("/").rpartition("/")[2].lower()).strip("-") or "backbone"


def _smallest(sizes: Iterable[int]) -> int:
    return min((size for size in sizes if size), default=0)


def planned_steps(values: Mapping[str, Any], num_targets: int) -> int:
    """The optimizer steps of a run on so many targets, by the settings that it has beside training's defaults.

    >>> planned_steps({"epochs": 3.0, "batch_size": 10}, 95), planned_steps({"max_steps": 40}, 95)
    (30, 40)
    """
    complete = TrainConfig().to_dict() | dict(values)
    batch_size = complete["batch_size"] * complete["gradient_accumulation"]
    return int(complete["max_steps"]) or math.ceil(complete["epochs"] * math.ceil(num_targets / batch_size))


def training_defaults() -> dict[str, Any]:
    """The defaults of training that a study's figures depend on and its settings may leave open."""
    return {"reparameterization": TrainConfig.default("reparameterization")}


def _setting_faults(name: str, settings: Mapping[str, Any], placed: Mapping[str, Any] = {}) -> Iterator[str]:
    """What is wrong with a table of training settings, together with those that the grid gives the run."""
    for key in sorted(settings.keys() & set(_RESERVED_KEYS)):
        of_trackers = "but runs of a study move and are tidied up: they report to `prefixtune report` alone"
        yield f"{name} has {key!r}, {of_trackers if key in _TRACKER_KEYS else 'which the study sets itself'}"
    values = {key: value for key, value in settings.items() if key not in _RESERVED_KEYS}
    allowed = TrainConfig.model_fields.keys() - set(_RESERVED_KEYS)
    values, allowed = {**values, **placed}, allowed | placed.keys()
    layer = Layer(values, name=lambda field: f"{name}.{field}")
    try:
        TrainConfig.from_layers(layer)
    except ConfigError as error:
        yield error.message.removesuffix(".")
