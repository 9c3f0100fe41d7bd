"""The configuration of a run: one frozen dataclass, read from TOML and from flags, and checked as a whole.

The help text of an option is kept with its field; the command line and the documentation take it from there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from prefixtune.errors import ConfigError, did_you_mean
from prefixtune.prefix.geometry import SITES, Site
from prefixtune.utils.options import check_names, fit_types

__all__ = ["TrainConfig", "default_learning_rate"]


_PREFIX_METHODS = ("prefix", "prompt", "infix")
_AT_LEAST_ONE = (
    *("prefix_length", "bottleneck_size", "batch_size", "targets_per_source", "gradient_accumulation", "save_every"),
)
_NOT_NEGATIVE = (
    *("limit", "dev_limit", "max_length", "warmup_steps", "max_steps", "eval_every", "patience"),
    *("weight_decay", "max_grad_norm", "learning_rate", "seed", "adapter_rank", "method_size"),
)


_HINT = "`prefixtune train --help` explains every option."
_OTHER_NAMES = {
    "lr": "it is called learning_rate here.",
    "model": "it is called backbone here.",
    "model_name_or_path": "it is called backbone here.",
    "num_train_epochs": "it is called epochs here.",
    "num_virtual_tokens": "it is called prefix_length here.",
    "output_dir": "it is called output here.",
    "per_device_train_batch_size": "it is called batch_size here.",
    "train_batch_size": "it is called batch_size here.",
    "gradient_accumulation_steps": "it is called gradient_accumulation here.",
    "eval_steps": "it is called eval_every here.",
    "save_steps": "it is called save_every here.",
    "max_seq_length": "it is called max_length here.",
    "warmup_ratio": "warmup_steps counts optimizer steps.",
    "train_dataset": "give examples=[...] (dicts or Example), or train=FILE.",
    "eval_dataset": "give dev_examples=[...] (dicts or Example), or dev=FILE.",
}
"""Option names of transformers and PEFT, and what to write here instead."""


def _option(default: Any, text: str, group: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "group": group})


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Every field is a key of the TOML file and a flag of `prefixtune train`.

    Raises:
        ConfigError: One or more values are not allowed; all faults are listed at once.
    """

    backbone: str = _option("smollm2-135m", "embedded name, hub id, local folder or .gguf file", "backbone")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "dtype of the frozen weights; the prefix always trains in float32", "backbone"
    )
    device: str = _option("auto", "cpu, cuda, cuda:0, mps or auto", "backbone")
    quantize: Literal["", "int8", "int4"] = _option(
        "", "quantize the frozen weights (torchao): int8 or int4", "backbone"
    )
    adapter: str = _option("", "folder of a LoRA adapter (PEFT) to load into the backbone first", "backbone")
    train_adapter: bool = _option(False, "train the loaded adapter together with the prefix", "backbone")
    adapter_rank: int = _option(0, "train a new LoRA adapter of this rank with the prefix; 0: none", "backbone")

    method: Literal["prefix", "prompt", "infix", "full", "top", "adapter", "lora"] = _option(
        "prefix",
        "what is trained: prefix; or, to compare with it: prompt (embeddings at the input only), infix (between source "
        "and target), full (all weights), top (the top layers), adapter (bottlenecks), lora",
        "method",
    )
    method_size: int = _option(
        0, "top: layers (2); adapter: width of the bottleneck (64); lora: rank (8); 0: the number in brackets", "method"
    )

    task: str = _option(
        "records",
        "how to read the files: e2e, webnlg, dart, summarization, xsum, scitldr, records (your own), classification, "
        "tagging, toy, toy_labels, toy_tags",
        "data",
    )
    train: str = _option("", "training file, or a folder that holds a training set", "data")
    dev: str = _option(
        "", "development file (or the folder again), to evaluate on, stop early and keep the best prefix", "data"
    )
    source: str = _option(
        "", "column or template of the source, such as '{name} is {food}', for your own files", "data"
    )
    target: str = _option(
        "", "column or template of the target, for your own files; a list holds several targets", "data"
    )
    classifier: Literal["auto", "head", "words"] = _option(
        "auto",
        "classification by a trained head or by the model's own words; auto: words, with an encoder a head",
        "data",
    )
    label_words: str = _option(
        "", "classification by words: LABEL=WORD,...; a label without a word is its own word", "data"
    )
    limit: int = _option(0, "use only the first N training targets; 0: all", "data")
    dev_limit: int = _option(0, "use only the first N development targets; 0: all", "data")
    prompt_format: str = _option(
        "", "text before the target; empty: ' {source} {separator}', or '{source}' for an encoder", "data"
    )
    target_format: str = _option(
        "", "text of the target, before the end token; empty: ' {target} ', or '{target}' with an encoder", "data"
    )
    max_length: int = _option(
        0, "most positions of source and target together (encoder-decoder: of each); 0: the backbone's", "data"
    )
    on_too_long: Literal["cut", "error"] = _option(
        "cut", "a source that is too long: cut it (counted), or stop with an error", "data"
    )

    prefix_length: int = _option(10, "P, the number of virtual tokens", "prefix")
    sites: str = _option(
        "",
        "sites of the prefix: encoder, decoder, cross, with own lengths as in encoder=20,cross=5; empty: all",
        "prefix",
    )
    reparameterization: Literal["none", "mlp", "residual"] = _option(
        "residual",
        "none: the prefix itself trains; mlp: the paper's MLP; residual: the start plus an MLP that begins at zero",
        "prefix",
    )
    bottleneck_size: int = _option(512, "hidden width of the MLP", "prefix")
    initialization: Literal["words", "random", "prefix"] = _option(
        "words", "start from the activations of real words, at random, or from another prefix", "prefix"
    )
    init_text: str = _option(
        "Describe the following data in one sentence:", "words to start from; repeated or cut to P tokens", "prefix"
    )
    init_prefix: str = _option("", "prefix to start from: a file, the folder of a run, or hub:OWNER/NAME", "prefix")

    learning_rate: float = _option(
        0.0,
        "peak rate; 0: 5e-3 for none, 1e-3 for residual, 5e-4 for mlp; full 1e-4, top 3e-4, adapter and lora 1e-3",
        "training",
    )
    weight_decay: float = _option(0.0, "weight decay of AdamW", "training")
    warmup_steps: int = _option(20, "steps of linear warm-up; a linear decay to 0 follows", "training")
    epochs: float = _option(5.0, "passes over the training targets; max_steps overrides it", "training")
    max_steps: int = _option(0, "optimizer steps; 0: those of the epochs", "training")
    batch_size: int = _option(16, "targets per forward pass", "training")
    targets_per_source: int = _option(
        4, "most targets of one source in a batch; they share the source's computation", "training"
    )
    gradient_accumulation: int = _option(1, "forward passes per optimizer step", "training")
    max_grad_norm: float = _option(1.0, "clip the gradient's norm to this; 0: do not clip", "training")
    loss_reduction: Literal["sentence", "token"] = _option(
        "sentence", "sentence: sum over a target, mean over targets (the paper); token: mean over tokens", "training"
    )
    gradient_checkpointing: bool = _option(False, "recompute layers in the backward pass, to save memory", "training")
    shard: bool = _option(
        False,
        "with several processes: split the backbone's weights among them (FSDP), if it is larger than a device",
        "training",
    )
    seed: int = _option(0, "seed of the start and of the order of the data", "training")

    output: str = _option("runs/prefix", "folder of the run", "output")
    eval_every: int = _option(100, "evaluate on the development file every N steps; 0: only at the end", "output")
    patience: int = _option(0, "stop after N evaluations without a better loss; 0: never", "output")
    save_every: int = _option(100, "save the resumable state every N steps", "output")
    save_dtype: Literal["float32", "bfloat16"] = _option("float32", "dtype of the stored prefix", "output")
    license: str = _option("", "license note for the header of the prefix", "output")

    def __new__(cls, *_: Any, **values: Any) -> TrainConfig:
        """Refuse unknown names, as `from_mapping` does."""
        check_names(cls, values, "TrainConfig has no such option", _HINT, _OTHER_NAMES)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        faults = fit_types(self)
        for name, fault in self._wrong_values(skip=set(faults)):
            faults.setdefault(name, fault)
        if faults:
            raise ConfigError("; ".join(faults.values()) + ".", hint=_HINT)

    def _wrong_values(self, skip: set[str]) -> Iterator[tuple[str, str]]:
        """Names and faults of values out of range; those of a wrong type, in `skip`, are left out."""
        least = dict.fromkeys(_AT_LEAST_ONE, 1) | dict.fromkeys(_NOT_NEGATIVE, 0)
        for name in sorted(set(least) - skip):
            value = getattr(self, name)
            if not math.isfinite(value) or value < least[name]:
                yield name, f"{name} is {value}, but must be at least {least[name]}"
        if "epochs" not in skip and not (math.isfinite(self.epochs) and self.epochs > 0):
            yield "epochs", f"epochs is {self.epochs}, but must be above 0"
        if "label_words" not in skip:
            try:
                self.words_by_label  # noqa: B018
            except ValueError as error:
                yield "label_words", str(error)
        if "method" not in skip and self.method not in _PREFIX_METHODS:
            for name, default in (("adapter_rank", 0), ("train_adapter", False), ("quantize", "")):
                if name not in skip and getattr(self, name) != default:
                    yield name, f"{name} is {getattr(self, name)!r}, which does not go with method {self.method!r}"
        if "sites" not in skip and (fault := _site_fault(self.sites)):
            yield "sites", fault
        if skip & {"initialization", "init_text", "init_prefix"}:
            return
        if self.initialization == "words" and not self.init_text.strip():
            yield "init_text", "initialization is 'words', but init_text is empty"
        if self.initialization == "prefix" and not self.init_prefix:
            yield "init_prefix", "initialization is 'prefix', but init_prefix names no file"

    @property
    def site_lengths(self) -> dict[Site, int]:
        """The prefix length of each named site; empty: all sites of the backbone, with `prefix_length`.

        >>> TrainConfig(sites="encoder=20, cross", prefix_length=5).site_lengths
        {'encoder': 20, 'cross': 5}
        """
        pairs = [part.partition("=") for part in self.sites.split(",") if part.strip()]
        return {
            cast(Site, site.strip()): int(length) if equals else self.prefix_length for site, equals, length in pairs
        }

    @property
    def words_by_label(self) -> dict[str, str]:
        """The word of each label that `label_words` names.

        >>> TrainConfig(label_words="pos=great, neg=bad").words_by_label
        {'pos': 'great', 'neg': 'bad'}
        """
        pairs: dict[str, str] = {}
        for part in self.label_words.split(",") if self.label_words.strip() else ():
            label, equals, word = (piece.strip() for piece in part.partition("="))
            if not (label and equals and word):
                raise ValueError(f"label_words has {part.strip()!r}, but LABEL=WORD is needed")
            pairs[label] = word
        return pairs

    @property
    def trains_prefix(self) -> bool:
        """Whether the method trains a prefix and leaves the backbone frozen."""
        return self.method in _PREFIX_METHODS

    @property
    def peak_learning_rate(self) -> float:
        """The configured learning rate, or the default of the method or reparameterization."""
        return self.learning_rate or default_learning_rate(
            self.reparameterization if self.trains_prefix else self.method
        )

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some values changed.

        Raises:
            ConfigError: An unknown key, or a value that is not allowed.
        """
        return self.from_mapping({**dataclasses.asdict(self), **changes})

    def to_dict(self) -> dict[str, Any]:
        """All values, by name."""
        return dataclasses.asdict(self)

    def to_toml(self) -> str:
        """A TOML document that `from_toml` reads back."""
        lines = []
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, str):
                # Strings are written as in JSON, except that TOML escapes DEL.
                text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            else:
                text = str(value).lower() if isinstance(value, bool) else str(value)
            lines.append(f"{name} = {text}")
        return "\n".join(lines) + "\n"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str = "configuration") -> TrainConfig:
        """A configuration from keys and values.

        Raises:
            ConfigError: Unknown keys (with the nearest known one), or values that are not allowed.
        """
        check_names(cls, values, f"{where} has unknown keys", _HINT, _OTHER_NAMES)
        return cls(**values)

    @classmethod
    def from_toml(cls, path: str | Path, *, beneath: Mapping[str, Any] | None = None, **overrides: Any) -> TrainConfig:
        """Read a TOML file: `overrides` replace its values, and its values replace those of `beneath`.

        Raises:
            ConfigError: The file is missing or no TOML, or a key or value in it is wrong.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read the configuration {str(path)!r}: {error}.", hint="check the path."
            ) from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{str(path)!r} is no TOML: {error}.", hint="write lines such as prefix_length = 10."
            ) from error
        return cls.from_mapping({**(beneath or {}), **values, **overrides}, where=repr(str(path)))


def _site_fault(text: str) -> str:
    """What is wrong with the value of `sites`; empty: nothing."""
    seen: set[str] = set()
    for part in text.split(",") if text.strip() else ():
        site, equals, length = (piece.strip() for piece in part.partition("="))
        if site not in SITES:
            return f"sites names {site!r} ({did_you_mean(site, SITES)})"
        if equals and not (length.isascii() and length.isdigit() and int(length) >= 1):
            return f"sites gives {site} the length {length!r}, but it must be a whole number of at least 1"
        if site in seen:
            return f"sites names {site!r} twice"
        seen.add(site)
    return ""


def default_learning_rate(trained: str) -> float:
    """The default peak learning rate of a reparameterization, or of another method."""
    rates = {"none": 5e-3, "residual": 1e-3, "mlp": 5e-4}
    return {**rates, "full": 1e-4, "top": 3e-4, "adapter": 1e-3, "lora": 1e-3}[trained]
