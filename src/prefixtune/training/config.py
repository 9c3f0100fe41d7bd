"""The configuration of a training run: options of `prefixtune train`, keys of files, and Python arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import ValidationInfo, field_validator, model_validator

from prefixtune.errors import CheckpointError, did_you_mean, short_repr
from prefixtune.prefix.geometry import SITES, Site
from prefixtune.training.run_folder import CONFIG_FILE
from prefixtune.utils.config import CommaList, Config, DTypeName, option_group
from prefixtune.utils.folders import expand_home

FormName = Literal[
    "messages", "conversations", "prompt", "instruction", "question", "source", "document", "label", "tags", "text"
]
"""The forms of data: the names of `data.forms.FORMS`, whose import takes longer."""


MOST_LENGTHS = 64
"""Lengths of a nested prefix that are measured after a run, at most."""

MOST_SIZE = 65_536
"""Largest width of a bottleneck or an adapter, and largest rank of LoRA."""

DEFAULT_SIZES = {"full": 0, "adapter": 64, "lora": 8}
"""Method -> the default width of the bottleneck, or rank."""

_OF_PREFIXES = (
    *("adapter", "quantize", "nested", "prefix_dropout", "beside", "init_examples", "init_prefix", "sites"),
    "keep_general",
)
TrackerName = Literal["trackio", "wandb", "tensorboard", "mlflow", "all", "none"]
_TRACKERS = ("trackio", "wandb", "tensorboard", "mlflow")
_INIT_EXAMPLES = 4
"""Examples to start from, where neither their number nor a length is given."""
_backbone, _method, _data = option_group("backbone"), option_group("method"), option_group("data")
_prefix, _training, _output = option_group("prefix"), option_group("training"), option_group("output")


class TrainConfig(Config):
    """A training run.

    Raises:
        ConfigError: One or more values are not allowed; all faults are listed at once.
    """

    hint: ClassVar[str] = "`prefixtune train --help` explains every option."
    file_name: ClassVar[str] = CONFIG_FILE
    """What it is stored as in the folder of a run."""

    backbone: str = _backbone("smollm2-135m", description="embedded name, hub id, local folder or .gguf file")
    dtype: DTypeName = _backbone("auto", description="dtype of the frozen weights; the prefix always trains in float32")
    device: str = _backbone("auto", description="cpu, cuda, cuda:0, mps or auto")
    quantize: Literal["", "int8", "int4"] = _backbone("", description="quantize the frozen weights (torchao)")
    attention: Literal["sdpa", "flex", "eager"] = _backbone(
        "sdpa", description="sdpa (torch's fused functions), flex (flex_attention for packed rows) or eager"
    )
    adapter: str = _backbone("", description="folder of a LoRA adapter (PEFT) to load into the backbone first")

    method: Literal["prefix", "full", "adapter", "lora"] = _method(
        "prefix", description="prefix; or, to compare: full (all weights), adapter (bottlenecks), lora"
    )
    method_size: int = _method(0, ge=0, le=MOST_SIZE, description="adapter: width (0: 64); lora: rank (0: 8)")

    task: str = _data("records", description="records (your own), e2e, toy and more (`prefixtune data --tasks`)")
    form: Literal["", FormName] = _data("", description="what your columns are; empty: recognized by the first row")
    train: str = _data("", description="training file, folder with a training set, hub:NAME, or - (standard input)")
    dev: str = _data("", description="development file or folder, to stop early and keep the best prefix by")
    source: str = _data("", description="column or template of the source, such as '{name} is {food}'")
    target: str = _data("", description="column or template of the target; a list holds several targets")
    classifier: Literal["auto", "head", "words"] = _data(
        "auto", description="classify by a trained head, or by the model's own words; auto: words, of an encoder a head"
    )
    label_words: str = _data("", description="classify by words: LABEL=WORD,...; others are their own word")
    limit: int = _data(0, ge=0, description="use only the first N training targets, or conversations; 0: all")
    dev_limit: int = _data(0, ge=0, description="use only the first N development targets, or conversations; 0: all")
    hold_out: float = _data(0.0, ge=0, lt=1, description="without dev: share of the training sources to develop on")
    prompt_format: str = _data("", description="text before the target; empty: ' {source} {separator}' or '{source}'")
    target_format: str = _data("", description="text of the target; empty: ' {target} ', with an encoder '{target}'")
    chat_template: str = _data(
        "", description="of conversations: file with a Jinja template, model, or none; empty: the model's, for messages"
    )
    system: str = _data("", description="system message of conversations that have none; needs a chat template")
    max_length: int = _data(0, ge=0, description="most positions of an example; 0: the backbone's, for texts alone 512")
    on_too_long: Literal["cut", "error"] = _data("cut", description="a source that is too long: cut it, or stop")

    prefix_length: int = _prefix(10, ge=0, description="P, the number of virtual tokens; 0: that of the start")
    sites: str = _prefix("", description="sites, with lengths of their own as in encoder=20,cross=5; empty: all")
    reparameterization: Literal["none", "mlp", "scaled"] = _prefix(
        "scaled", description="scaled: steps of the start's size; none: the prefix itself; mlp: the paper's MLP"
    )
    bottleneck_size: int = _prefix(512, ge=1, le=MOST_SIZE, description="hidden width of the MLP")
    initialization: Literal["words", "text", "examples", "random", "prefix"] = _prefix(
        "words", description="start from words, repeated or cut to P; a whole text; solved examples; random; a prefix"
    )
    init_text: str = _prefix(
        "Describe the following data in one sentence:", description="words or text to start from, or @FILE"
    )
    compaction: Literal["cut", "stride", "match"] = _prefix(
        "match", description="a longer text: cut: first P tokens; stride: P of all, evenly; match: Attention Matching"
    )
    init_examples: int = _prefix(
        0,
        ge=0,
        description="solved examples to start from (0: as many as fit P; without P: 4, whole)",
        json_schema_extra={"group": "prefix", "aliases": ["examples"]},
    )
    prefix_dropout: float = _prefix(0.0, ge=0, lt=1, description="share of the prefix that an example does not see")
    init_prefix: str = _prefix("", description="prefix to start from: a file, the folder of a run, or hub:OWNER/NAME")
    beside: str = _prefix(
        "",
        description="to be joined later: prefixes that stand beside this one in most of the samples: a file, a folder, "
        "hub:OWNER/NAME, or self (those that train together, and learn from each other's samples to be silent)",
    )
    beside_most: int = _prefix(20, ge=1, le=63, description="most others that stand beside at once")
    nested: bool = _prefix(False, description="train random lengths, so that the first p positions are a good prefix")

    learning_rate: float = _training(
        0.0, ge=0, description="peak; 0: 2e-2 (scaled), 5e-3 (none), 5e-4 (mlp), 1e-4 (full), 1e-3 (adapter, lora)"
    )
    weight_decay: float = _training(0.0, ge=0, description="decoupled weight decay")
    warmup_steps: int = _training(20, ge=0, description="steps of linear warm-up; a linear decay to 0 follows")
    epochs: float = _training(
        5.0, ge=0, le=1_000_000, description="passes over the training targets; 0: the start alone, without training"
    )
    max_steps: int = _training(0, ge=0, description="optimizer steps; 0: those of the epochs")
    batch_size: int = _training(16, ge=1, description="targets per forward pass")
    targets_per_source: int = _training(4, ge=1, description="most targets of one source in a batch")
    gradient_accumulation: int = _training(1, ge=1, description="forward passes per optimizer step")
    max_grad_norm: float = _training(1.0, ge=0, description="clip the gradient's norm to this; 0: do not clip")
    keep_general: float = _training(
        0.0,
        ge=0,
        le=1,
        description="share of general requests that is added to the targets, taught by the bare model: to stay silent "
        "off the topic, such as 0.05",
    )
    loss_reduction: Literal["sentence", "token"] = _training(
        "sentence", description="sentence: sum over a target, mean over targets (the paper); token: mean over tokens"
    )
    gradient_checkpointing: bool = _training(False, description="recompute layers in the backward pass, to save memory")
    shard: bool = _training(False, description="split the backbone's weights among several processes (FSDP)")
    seed: int = _training(0, ge=0, description="seed of the start and of the order of the data")

    output: str = _output("runs/prefix", min_length=1, description="folder of the run")
    eval_every: int = _output(100, ge=0, description="evaluate on the development data every N steps; 0: at the end")
    patience: int = _output(0, ge=0, description="stop after N evaluations without a better loss; 0: never")
    save_every: int = _output(100, ge=1, description="save the resumable state every N steps")
    save_dtype: Literal["float32", "bfloat16"] = _output("float32", description="dtype of the stored prefix")
    report_to: CommaList[TrackerName] = _output(
        (),
        description="trackers, offline unless their own variables say otherwise; several, or all",
        json_schema_extra={"group": "output", "many": [1, None]},
    )
    project: str = _output("", description="the trackers' project; empty: prefixtune")
    run_name: str = _output("", description="the run's name in the trackers; empty: that of its folder")
    license: str = _output("", description="license note for the header of the prefix")

    @classmethod
    def stored(cls, output: str | Path) -> Path:
        """The configuration that the run in a folder was started with.

        Raises:
            CheckpointError: The folder holds no run.
        """
        path = expand_home(output) / cls.file_name
        if not path.exists():
            raise CheckpointError(
                f"there is no run to resume in {str(path.parent)!r}.",
                hint="name its folder with --output (output), or start it without --resume (resume).",
            )
        return path

    @classmethod
    def of_call(cls, config: object, options: Mapping[str, Any], *, resume: bool) -> Self:
        """What a function was called with; where it resumes without a configuration, the stored one with the options.

        Raises:
            CheckpointError: There is no run to resume.
            ConfigError: As for `from_arguments`.
        """
        if resume and config is None:
            path = cls.stored(options.get("output", cls.default("output")))
            # Where the folder is now: it may have been moved.
            return cls.from_file(path, **{**options, "output": str(path.parent)})
        made = cls.from_arguments(config, options)
        if resume:
            cls.stored(made.output)
        return made

    @model_validator(mode="before")
    @classmethod
    def _imply(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A prefix or a number of examples implies a start from it, and such a start has a length of its own."""
        # A command line gives its numbers as texts.
        given = next((kind for kind in ("prefix", "examples") if str(values.get(f"init_{kind}") or 0) != "0"), None)
        implied: dict[str, Any] = {"initialization": given} if given else {}
        start = values.get("initialization", given)
        if start == "examples" or (start == "prefix" and given == "prefix"):
            implied["prefix_length"] = 0
        if start == "examples" and "prefix_length" not in values and "=" not in str(values.get("sites", "")):
            implied["init_examples"] = _INIT_EXAMPLES
        return {**implied, **values}

    @field_validator("sites", "label_words")
    @classmethod
    def _check_parts(cls, text: str, info: ValidationInfo) -> str:
        (_parse_sites if info.field_name == "sites" else _parse_label_words)(text)
        return text

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """What only a prefix can have, what a start needs, and what writes a text."""
        start = f"initialization is {self.initialization!r}"
        method, is_plain = f"method {self.method!r}", self.chat_template in ("", "none")
        needs: list[tuple[str, bool, str]] = [
            *((name, self.trains_prefix, method) for name in _OF_PREFIXES),
            ("method_size", bool(DEFAULT_SIZES.get(self.method)), method),
            ("init_prefix", self.initialization == "prefix", start),
            ("init_examples", self.initialization == "examples", start),
            ("compaction", self.initialization == "text", start),
            ("beside_most", bool(self.beside), "nothing stands beside"),
            ("label_words", self.classifier != "head", "classifier is 'head'"),
            ("system", self.chat_template != "none", "chat_template is 'none'"),
            ("patience", self.eval_every > 0, "eval_every is 0, so there is one evaluation"),
            *((name, is_plain, "chat_template writes all of the text") for name in ("prompt_format", "target_format")),
        ]
        for name, is_used, reason in needs:
            if not is_used and getattr(self, name) != self.default(name):
                yield (name,), f"{name} is given, but not used: {reason}"
        if self.shard and self.quantize:
            yield ("shard", "quantize"), "shard does not go with quantize"
        if self.initialization in ("words", "text") and not self.init_text.strip():
            yield ("initialization", "init_text"), f"{start}, but init_text is empty"
        if self.initialization == "prefix" and not self.init_prefix:
            yield ("initialization", "init_prefix"), f"{start}, but init_prefix names no file"
        if self.prefix_length == 0 and self.initialization not in ("text", "examples", "prefix"):
            yield ("prefix_length",), f"prefix_length is 0, but must be at least 1: {start}, which has no length"
        if self.initialization == "examples" and not (self.init_examples or self.longest):
            yield ("init_examples", "prefix_length"), f"{start}, but both init_examples and prefix_length are 0"

    @property
    def site_lengths(self) -> dict[Site, int]:
        """The prefix length of each named site; empty: all sites of the backbone, with `prefix_length`.

        >>> TrainConfig(sites="encoder=20, cross", prefix_length=5).site_lengths
        {'encoder': 20, 'cross': 5}
        """
        return {site: length or self.prefix_length for site, length in _parse_sites(self.sites).items()}

    @property
    def longest(self) -> int:
        """The largest prefix length that the run gives a site; 0: its start has a length of its own."""
        return max(self.site_lengths.values(), default=self.prefix_length)

    @property
    def words_by_label(self) -> dict[str, str]:
        """The word of each label that `label_words` names.

        >>> TrainConfig(label_words="pos=great, neg=bad").words_by_label
        {'pos': 'great', 'neg': 'bad'}
        """
        return _parse_label_words(self.label_words)

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers that the run reports to, each once.

        >>> TrainConfig(report_to="wandb,all").trackers
        ('trackio', 'wandb', 'tensorboard', 'mlflow')
        """
        return tuple(name for name in _TRACKERS if {name, "all"} & set(self.report_to))

    @property
    def trains_prefix(self) -> bool:
        """Whether the method trains a prefix and leaves the backbone frozen."""
        return self.method == "prefix"

    @property
    def peak_learning_rate(self) -> float:
        """The configured learning rate, or the default of what trains; half of it beside others.

        What stands beside changes from step to step: at the full rate such a prefix never settles.
        """
        if self.learning_rate:
            return self.learning_rate
        usual = default_learning_rate(self.reparameterization if self.trains_prefix else self.method)
        return usual / 2 if self.beside else usual


def _parse_sites(text: str) -> dict[Site, int]:
    """The length of each site; 0: none is given."""
    lengths: dict[Site, int] = {}
    for part in filter(str.strip, text.split(",")):
        site, equals, length = (piece.strip() for piece in part.partition("="))
        if site not in SITES:
            raise ValueError(f"names {short_repr(site)} ({did_you_mean(site, SITES).removesuffix('.')})")
        if equals and not re.fullmatch("[1-9][0-9]{0,8}", length):
            raise ValueError(f"gives {site} the length {short_repr(length)}, which is no whole number from 1 on")
        if site in lengths:
            raise ValueError(f"names {site!r} twice")
        lengths[site] = int(length) if equals else 0
    return lengths


def _parse_label_words(text: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for part in filter(str.strip, text.split(",")):
        label, equals, word = (piece.strip() for piece in part.partition("="))
        if not (label and equals and word):
            raise ValueError(f"has {short_repr(part.strip())}, but LABEL=WORD is needed")
        if label in pairs:
            raise ValueError(f"names {short_repr(label)} twice")
        pairs[label] = word
    return pairs


def default_learning_rate(trained: str) -> float:
    """The default peak learning rate of a reparameterization, or of another method.

    >>> default_learning_rate("scaled")
    0.02
    """
    rates = {"scaled": 2e-2, "none": 5e-3, "mlp": 5e-4}
    return {**rates, "full": 1e-4, "adapter": 1e-3, "lora": 1e-3}[trained]
