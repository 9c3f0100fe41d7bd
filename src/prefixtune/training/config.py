"""The configuration of a training run: options of `prefixtune train`, keys of files, and Python arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, cast

from pydantic import field_validator, model_validator

from prefixtune.errors import did_you_mean, short_repr
from prefixtune.prefix.geometry import SITES, Site
from prefixtune.utils.config import CommaList, Config, DTypeName, option_group

__all__ = ["DEFAULT_SIZES", "MOST_LENGTHS", "FormName", "TrainConfig", "default_learning_rate"]


FormName = Literal[
    "messages",
    "conversations",
    "prompt",
    "instruction",
    "question",
    "source",
    "document",
    "label",
    "tags",
    "text",
]
"""The forms of data: the names of `data.forms.FORMS`, whose import takes longer."""


MOST_LENGTHS = 64
"""Lengths of a nested prefix that are measured after a run, at most."""

MOST_SIZE = 65_536
"""Largest width of a bottleneck or an adapter, and largest rank of LoRA."""

DEFAULT_SIZES = {"full": 0, "adapter": 64, "lora": 8}
"""Method -> the default width of the bottleneck, or rank."""

_OF_FROZEN = ("adapter", "adapter_rank", "train_adapter", "quantize")
_UNSPLIT = ("train_adapter", "adapter_rank", "quantize")
_OF_PREFIXES = ("nested", "prefix_dropout", "beside", "init_examples", "init_prefix", "sites")
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

    backbone: str = _backbone("smollm2-135m", description="embedded name, hub id, local folder or .gguf file")
    dtype: DTypeName = _backbone("auto", description="dtype of the frozen weights; the prefix always trains in float32")
    device: str = _backbone("auto", description="cpu, cuda, cuda:0, mps or auto")
    quantize: Literal["", "int8", "int4"] = _backbone(
        "", description="quantize the frozen weights (torchao): int8 or int4"
    )
    attention: Literal["sdpa", "flex", "eager"] = _backbone(
        "sdpa",
        description="what computes attention: sdpa (torch's fused functions; for packed rows on a GPU its "
        "flex_attention), flex (flex_attention for packed rows on a CPU, too), eager (matrix products)",
    )
    adapter: str = _backbone("", description="folder of a LoRA adapter (PEFT) to load into the backbone first")
    train_adapter: bool = _backbone(False, description="train the loaded adapter together with the prefix")
    adapter_rank: int = _backbone(0, ge=0, description="train a new LoRA adapter of this rank with the prefix; 0: none")

    method: Literal["prefix", "full", "adapter", "lora"] = _method(
        "prefix",
        description="what is trained: prefix; or, to compare with it: full (all weights), adapter (bottlenecks), lora",
    )
    method_size: int = _method(
        0,
        ge=0,
        le=MOST_SIZE,
        description="adapter: width of the bottleneck (64); lora: rank (8); 0: the number in brackets",
    )

    task: str = _data(
        "records",
        description="how to read the files: records (your own, recognized by their columns or named by source and "
        "target), e2e, webnlg, dart, summarization, scitldr, classification, tagging, toy, toy_labels, toy_tags, "
        "toy_copy and more (`prefixtune data --tasks`)",
    )
    form: Literal["", FormName] = _data(
        "",
        description="for your own files without source: what their columns are, where several readings fit; empty: "
        "recognized",
    )
    train: str = _data(
        "", description="training file, a folder that holds a training set, hub:NAME, or - for standard input"
    )
    dev: str = _data(
        "", description="development file (or the folder again), to evaluate on, stop early and keep the best prefix"
    )
    source: str = _data(
        "", description="column or template of the source, such as '{name} is {food}', for your own files"
    )
    target: str = _data(
        "", description="column or template of the target, for your own files; a list holds several targets"
    )
    classifier: Literal["auto", "head", "words"] = _data(
        "auto",
        description="classification by a trained head or by the model's own words; auto: words, with an encoder a head",
    )
    label_words: str = _data(
        "", description="classification by words: LABEL=WORD,...; a label without a word is its own word"
    )
    limit: int = _data(0, ge=0, description="use only the first N training targets; 0: all")
    dev_limit: int = _data(0, ge=0, description="use only the first N development targets; 0: all")
    hold_out: float = _data(
        0.0,
        ge=0,
        lt=1,
        description="without a development file: keep this share of the training sources, at least one, out of "
        "training, as development examples",
    )
    prompt_format: str = _data(
        "", description="text before the target; empty: ' {source} {separator}', or '{source}' for an encoder"
    )
    target_format: str = _data(
        "", description="text of the target, before the end token; empty: ' {target} ', or '{target}' with an encoder"
    )
    chat_template: str = _data(
        "",
        description="what writes conversations, prompts and completions: a file with a Jinja template; model: the "
        "model's own; none; empty: the model's own for data with messages, if it has one",
    )
    system: str = _data("", description="system message of a conversation that has none; needs a chat template")
    max_length: int = _data(
        0,
        ge=0,
        description="most positions of source and target together (encoder-decoder: of each); 0: the backbone's, and "
        "512 for texts alone, which are learned in windows",
    )
    on_too_long: Literal["cut", "error"] = _data(
        "cut", description="a source that is too long: cut it (counted), or stop with an error"
    )

    prefix_length: int = _prefix(
        10,
        ge=0,
        description="P, the number of virtual tokens; 0: as long as the text, the examples or the prefix to start from "
        "(the default for examples and a prefix)",
    )
    sites: str = _prefix(
        "",
        description="sites of the prefix: encoder, decoder, cross, with own lengths as in encoder=20,cross=5; empty: "
        "all",
    )
    reparameterization: Literal["none", "mlp", "scaled"] = _prefix(
        "scaled",
        description="scaled: the start plus one trained number for each stored one, in steps of the start's size; "
        "none: the prefix itself trains; mlp: the paper's MLP",
    )
    bottleneck_size: int = _prefix(512, ge=1, le=MOST_SIZE, description="hidden width of the MLP")
    initialization: Literal["words", "text", "examples", "random", "prefix"] = _prefix(
        "words",
        description="start from the keys and values of: words, repeated or cut to P; a whole text; solved training "
        "examples; nothing (random); another prefix",
    )
    init_text: str = _prefix(
        "Describe the following data in one sentence:",
        description="words or a text to start from, or @FILE that holds them (UTF-8, at most 1 MiB)",
    )
    compaction: Literal["cut", "stride", "match"] = _prefix(
        "match",
        description="a text longer than P: cut: its first P tokens; stride: P positions of the whole, evenly; match: "
        "P positions that give the attention's output of the whole (Attention Matching)",
    )
    init_examples: int = _prefix(
        0,
        ge=0,
        description="solved training examples to start from, whose length is P; where prefix_length is given and they "
        "take more, each keeps an equal share of the positions; 0: as many as fit prefix_length, and P is what they "
        "take; without either: 4",
        json_schema_extra={"group": "prefix", "aliases": ["examples"]},
    )
    prefix_dropout: float = _prefix(
        0.0,
        ge=0,
        lt=1,
        description="in a step, a source and its targets do not see this share of the prefix's positions, drawn at "
        "random; the first always stays",
    )
    init_prefix: str = _prefix("", description="prefix to start from: a file, the folder of a run, or hub:OWNER/NAME")
    beside: str = _prefix(
        "",
        description="to be joined later: other prefixes stand beside this one at random while it trains: a file, a "
        "folder of files or runs, hub:OWNER/NAME, or self (the runs of --together)",
    )
    beside_rate: float = _prefix(0.5, gt=0, le=1, description="share of the steps in which others stand beside")
    beside_most: int = _prefix(3, ge=1, le=100, description="most others that stand beside in a step")
    nested: bool = _prefix(
        False,
        description="train random lengths in every step, so that the first p positions are a good prefix for all p",
    )

    learning_rate: float = _training(
        0.0,
        ge=0,
        description="peak rate; 0: 2e-2 for scaled, 5e-3 for none, 5e-4 for mlp, half of it with beside; full 1e-4, "
        "adapter and lora 1e-3",
    )
    weight_decay: float = _training(
        0.0, ge=0, description="decoupled weight decay: a step takes this share, times the rate"
    )
    warmup_steps: int = _training(20, ge=0, description="steps of linear warm-up; a linear decay to 0 follows")
    epochs: float = _training(
        5.0, gt=0, le=1_000_000, description="passes over the training targets; max_steps overrides it"
    )
    max_steps: int = _training(0, ge=0, description="optimizer steps; 0: those of the epochs")
    batch_size: int = _training(16, ge=1, description="targets per forward pass")
    targets_per_source: int = _training(
        4, ge=1, description="most targets of one source in a batch; they share the source's computation"
    )
    gradient_accumulation: int = _training(1, ge=1, description="forward passes per optimizer step")
    max_grad_norm: float = _training(1.0, ge=0, description="clip the gradient's norm to this; 0: do not clip")
    loss_reduction: Literal["sentence", "token"] = _training(
        "sentence", description="sentence: sum over a target, mean over targets (the paper); token: mean over tokens"
    )
    gradient_checkpointing: bool = _training(False, description="recompute layers in the backward pass, to save memory")
    shard: bool = _training(
        False,
        description="with several processes: split the backbone's weights among them (FSDP), if it is larger than a "
        "device",
    )
    seed: int = _training(0, ge=0, description="seed of the start and of the order of the data")

    output: str = _output("runs/prefix", description="folder of the run")
    eval_every: int = _output(
        100, ge=0, description="evaluate on the development file every N steps; 0: only at the end"
    )
    patience: int = _output(0, ge=0, description="stop after N evaluations without a better loss; 0: never")
    save_every: int = _output(100, ge=1, description="save the resumable state every N steps")
    save_dtype: Literal["float32", "bfloat16"] = _output("float32", description="dtype of the stored prefix")
    report_to: CommaList[TrackerName] = _output(
        (),
        description="trackers to report to: trackio, wandb, tensorboard, mlflow, several, or all (these four); offline "
        "in the run's folder, unless their own variables say otherwise",
        json_schema_extra={"group": "output", "many": [1, None]},
    )
    project: str = _output("", description="the trackers' project; empty: prefixtune")
    run_name: str = _output("", description="the run's name in the trackers; empty: that of its folder")
    license: str = _output("", description="license note for the header of the prefix")

    @model_validator(mode="before")
    @classmethod
    def _imply(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A prefix or a number of examples implies a start from it, and such a start has a length of its own."""
        implied: dict[str, Any] = {}
        if values.get("init_prefix"):
            implied["initialization"] = "prefix"
        elif values.get("init_examples"):
            implied["initialization"] = "examples"
        if values.get("initialization", implied.get("initialization")) == "examples":
            implied["prefix_length"] = 0
            if "prefix_length" not in values and "=" not in str(values.get("sites", "")):
                implied["init_examples"] = _INIT_EXAMPLES
        elif values.get("init_prefix") and values.get("initialization", "prefix") == "prefix":
            implied["prefix_length"] = 0
        return {**implied, **values}

    @field_validator("sites")
    @classmethod
    def _check_sites(cls, text: str) -> str:
        seen: set[str] = set()
        for part in text.split(",") if text.strip() else ():
            site, equals, length = (piece.strip() for piece in part.partition("="))
            if site not in SITES:
                raise ValueError(f"names {short_repr(site)} ({did_you_mean(site, SITES).removesuffix('.')})")
            if equals and not (length.isascii() and length.isdigit() and len(length) < 10 and int(length) >= 1):
                raise ValueError(
                    f"gives {site} the length {short_repr(length)}, but it must be a whole number of at least 1"
                )
            if site in seen:
                raise ValueError(f"names {site!r} twice")
            seen.add(site)
        return text

    @field_validator("label_words")
    @classmethod
    def _check_label_words(cls, text: str) -> str:
        _parse_label_words(text)
        return text

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """What only a prefix can have, what a start needs, and what writes a text."""
        method, start = f"method is {self.method!r}", f"initialization is {self.initialization!r}"
        for names, partner in ((_OF_FROZEN, "method"), (_OF_PREFIXES, "method"), (_UNSPLIT, "shard")):
            for name in names if (self.shard if partner == "shard" else not self.trains_prefix) else ():
                if self._is_given(name):
                    yield (name, partner), f"{name} is given, which does not go with {partner} {self._shown(partner)}"
        has_length = self.initialization in ("text", "examples", "prefix")
        count = self.init_examples or self.prefix_length or any(self.site_lengths.values())
        formats = [name for name in ("prompt_format", "target_format") if getattr(self, name)]
        has_template = self.chat_template not in ("", "none")
        faults: tuple[tuple[bool, str, tuple[str, ...]], ...] = (
            (self.classifier == "head", "classifier is 'head', but label_words are for words", ("label_words",)),
            (not DEFAULT_SIZES.get(self.method), f"{method}, which has no method_size", ("method_size",)),
            (self.initialization != "prefix", f"{start}, which reads no init_prefix", ("init_prefix",)),
            (self.initialization != "examples", f"{start}, which takes no init_examples", ("init_examples",)),
            (self.chat_template == "none", "system needs a chat template, but chat_template is 'none'", ("system",)),
            (not self.eval_every, "patience needs evaluations, but eval_every is 0: there is one", ("patience",)),
            (has_template, "chat_template writes all of the text, without formats", tuple(formats)),
        )
        yield from ((names, text) for applies, text, names in faults if applies and any(map(self._is_given, names)))
        if self.initialization in ("words", "text") and not self.init_text.strip():
            yield ("initialization", "init_text"), f"{start}, but init_text is empty"
        if self.initialization == "prefix" and not self.init_prefix:
            yield ("initialization", "init_prefix"), f"{start}, but init_prefix names no file"
        if self.prefix_length == 0 and not has_length:
            yield ("prefix_length",), f"prefix_length is 0, but must be at least 1: {start}, which has no length"
        if self.initialization == "examples" and not count:
            yield ("init_examples", "prefix_length"), f"{start}, but both init_examples and prefix_length are 0"
        if "none" in self.report_to and len(self.report_to) > 1:
            yield ("report_to",), "report_to names 'none' and others"

    def _is_given(self, name: str) -> bool:
        """Whether a field has another value than its default."""
        return bool(getattr(self, name) != self.default(name))

    def _shown(self, name: str) -> str:
        return repr(getattr(self, name))

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
        if "all" in self.report_to:
            return _TRACKERS
        return tuple(name for name in _TRACKERS if name in self.report_to)

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


def _parse_label_words(text: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for part in text.split(",") if text.strip() else ():
        label, equals, word = (piece.strip() for piece in part.partition("="))
        if not (label and equals and word):
            raise ValueError(f"has {short_repr(part.strip())}, but LABEL=WORD is needed")
        pairs[label] = word
    return pairs


def default_learning_rate(trained: str) -> float:
    """The default peak learning rate of a reparameterization, or of another method.

    >>> default_learning_rate("scaled")
    0.02
    """
    rates = {"scaled": 2e-2, "none": 5e-3, "mlp": 5e-4}
    return {**rates, "full": 1e-4, "adapter": 1e-3, "lora": 1e-3}[trained]
