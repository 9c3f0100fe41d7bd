"""What can be wrong with a run whatever its data is: mostly checked before a backbone loads, which takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from prefixtune.attention.registry import ATTENTIONS
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import check_loadable
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.backbone.quantization import is_quantized
from prefixtune.data import TASKS
from prefixtune.errors import ConfigError
from prefixtune.prefix.text_format import TextFormat
from prefixtune.training.baselines import was_trained
from prefixtune.training.beside import SELF, read_others
from prefixtune.training.chat import read_template
from prefixtune.training.config import TrainConfig
from prefixtune.training.distributed import ProcessGroup, is_sharded
from prefixtune.training.starts.start import check_lengths, lengths_from
from prefixtune.training.starts.text import check_init_text
from prefixtune.training.trackers import check_installed

__all__ = [
    "check_generates",
    "check_given",
    "check_gradient_checkpointing",
    "check_hidden_positions",
    "check_no_labels",
    "check_together",
    "early_checks",
    "no_head",
    "no_solved_examples",
]


def early_checks(
    config: TrainConfig,
    processes: ProcessGroup,
    *,
    has_dev: bool,
    loads_backbone: bool,
    together: bool = False,
    has_start: bool = False,
) -> Iterator[Callable[[], object]]:
    """The checks of a configuration on this machine that need no backbone."""
    if loads_backbone:
        yield lambda: check_loadable(
            config.backbone,
            dtype=config.dtype,
            device=config.device,
            quantize=config.quantize,
            adapter=config.adapter or None,
            train_adapter=config.train_adapter,
            # Of the method LoRA, which puts its own adapter on the model later, that PEFT is there.
            adapter_rank=config.adapter_rank or int(config.method == "lora"),
        )
    yield lambda: TextFormat(config.prompt_format or "{source}", config.target_format or "{target}")
    if config.chat_template:
        yield lambda: read_template(config)
    begins = config.trains_prefix and not has_start
    if config.initialization in ("words", "text", "examples") and begins:
        yield lambda: check_init_text(config)
    if config.initialization == "prefix" and begins:
        yield lambda: _check_start(config)
    yield lambda: check_installed(config.trackers)
    if config.beside and config.beside != SELF:
        yield lambda: read_others(config)
    yield lambda: _check_combination(config, processes, has_dev, together)


def _check_start(config: TrainConfig) -> None:
    """Read the prefix that a run starts from, as far as that needs no backbone."""
    prefix = load_prefix(config.init_prefix)
    # Without sites, the run trains all of the backbone's, and the prefix may lack one of them.
    wanted = config.site_lengths or dict.fromkeys(prefix.sites, config.prefix_length)
    check_lengths(prefix.lengths, lengths_from(wanted, prefix.lengths))


def no_solved_examples() -> ConfigError:
    """The error of a head that is to start from examples."""
    return ConfigError(
        "initialization is 'examples', but a head learns labels, which are no text that an example could end with.",
        hint="use classifier = 'words', or start from words.",
    )


def no_head(config: TrainConfig) -> ConfigError:
    """The error of a method that cannot train a head."""
    return ConfigError(
        f"method {config.method!r} trains no head.", hint="use classifier = 'words', or method = 'prefix'."
    )


def _check_combination(config: TrainConfig, processes: ProcessGroup, has_dev: bool, together: bool) -> None:
    """Refuse options that contradict each other, the data or the machine."""
    if config.shard and (processes.size == 1 or not config.trains_prefix):
        raise ConfigError(
            "shard splits a frozen backbone among several processes.",
            hint="start them with torchrun or accelerate launch, and train a prefix.",
        )
    if config.patience and not has_dev:
        raise ConfigError(
            f"patience is {config.patience}, but patience needs a development file to evaluate on.",
            hint="set dev (--dev FILE), or patience to 0.",
        )
    tags = config.task in TASKS and TASKS[config.task].kind == "tagging"
    if (config.classifier == "head" or tags) and config.method != "prefix":
        raise no_head(config)
    if config.initialization == "examples" and config.trains_prefix and config.classifier == "head":
        raise no_solved_examples()
    if config.beside == SELF and not together:
        raise ConfigError(
            "beside is 'self', the other runs that train together, but this run trains alone.",
            hint="give several files to --together, or name a folder of prefixes.",
        )


def check_no_labels(config: TrainConfig) -> None:
    """Refuse options of classification where texts are generated.

    Raises:
        ConfigError: There are some.
    """
    for name in ("classifier", "label_words"):
        if getattr(config, name) != config.default(name):
            raise ConfigError(
                f"{name} is {getattr(config, name)!r}, but task {config.task!r} has no labels: it generates.",
                hint="use --task classification (task) for data with labels, or leave it out.",
            )


def check_generates(config: TrainConfig, backbone: Backbone) -> None:
    """Refuse to generate with a backbone that cannot.

    Raises:
        ConfigError: It is an encoder.
    """
    if backbone.kind == "encoder":
        raise ConfigError(
            f"{backbone.name!r} is an encoder, which reads text and writes none, but task {config.task!r} generates.",
            hint="use --task classification or tagging, or choose a model that generates.",
        )


def check_together(configs: Sequence[TrainConfig]) -> None:
    """Refuse runs that cannot share a backbone; all faults at once.

    Raises:
        ConfigError: They cannot.
    """
    faults = [] if configs else ["there is no run"]
    for name in ("backbone", "dtype", "device", "quantize", "attention", "gradient_checkpointing", "shard"):
        values = sorted({str(getattr(config, name)) for config in configs})
        if len(values) > 1:
            faults.append(f"{name} is {' and '.join(map(repr, values))}, but all runs share one backbone")
    folders = [Path(config.output).resolve() for config in configs]
    shared = sorted({str(config.output) for config in configs if folders.count(Path(config.output).resolve()) > 1})
    if shared:
        faults.append(f"several runs would write to {', '.join(map(repr, shared))}")
    if len(configs) == 1 and configs[0].beside == SELF:
        faults.append("beside is 'self', but there is no other run")
    for config in configs:
        adapts = config.adapter or config.adapter_rank or config.train_adapter
        if not config.trains_prefix or adapts:
            what = "an adapter" if config.trains_prefix else f"method {config.method!r}"
            faults.append(f"the run in {config.output!r} has {what}, but only prefixes share a backbone")
    if faults:
        raise ConfigError(
            "; ".join(faults) + ".", hint="give each run an output of its own, and train separately what differs."
        )


def check_given(config: TrainConfig, backbone: Backbone) -> None:
    """Refuse options of loading that a loaded backbone does not follow, all faults at once, and one that is not frozen.

    Raises:
        ConfigError: There are some; or its weights are not those that were loaded: an earlier run trained them.
    """
    device, model = backbone.device, backbone.model
    if was_trained(backbone) or (backbone.adapter_parameters and backbone.adapter is None):
        raise ConfigError(
            f"the backbone {backbone.name!r} is not as it was loaded: an earlier run trained weights of it.",
            hint="load it again, for each such run.",
        )
    # Some models compute attention by `eager` alone.
    attentions = {name for name, key in ATTENTIONS.items() if key == model.config._attn_implementation}
    attentions |= set() if getattr(model, "_supports_sdpa", True) else set(ATTENTIONS)
    faults = []
    if config.dtype not in ("auto", backbone.dtype_name):
        faults.append(f"dtype is {config.dtype!r}, but it computes in {backbone.dtype_name}")
    if config.device not in ("auto", device.type, str(device)):
        faults.append(f"device is {config.device!r}, but it is on {str(device)!r}")
    if config.attention not in (TrainConfig.default("attention"), *attentions):
        faults.append(f"attention is {config.attention!r}, but it was loaded with another")
    if config.quantize and not is_quantized(model):
        faults.append(f"quantize is {config.quantize!r}, but its weights are not quantized")
    if config.adapter and backbone.adapter is None:
        faults.append(f"adapter is {config.adapter!r}, but it holds no adapter")
    for name in ("train_adapter", "adapter_rank"):
        if getattr(config, name) and not backbone.adapter_parameters:
            faults.append(f"{name} is {getattr(config, name)!r}, but it holds no adapter to train")
    if config.shard and not is_sharded(model):
        faults.append("shard is True, but its weights are not split")
    if faults:
        raise ConfigError(
            f"the backbone {backbone.name!r} is used as it is: {'; '.join(faults)}.",
            hint="leave these options out, or give them to load_backbone.",
        )


def check_gradient_checkpointing(backbone: Backbone) -> None:
    """Refuse it for a backbone whose layers, when they are recomputed, would lose the prefix.

    Raises:
        ConfigError: The backbone forwards no argument of its call to its attention.
    """
    if not backbone.layout.forwards_kwargs:
        raise ConfigError(
            f"{backbone.name!r} forwards no argument to its attention: recomputed layers would lose the prefix.",
            hint="train without gradient checkpointing.",
        )


def check_hidden_positions(config: TrainConfig, backbone: Backbone) -> None:
    """Refuse to hide positions of a prefix that has none where they can be hidden.

    Raises:
        ConfigError: The prefix is at an encoder-decoder's decoder alone.
    """
    if config.prefix_dropout and backbone.kind == "encoder-decoder" and set(config.site_lengths) == {"decoder"}:
        raise ConfigError(
            "prefix_dropout hides positions at the sites encoder and cross of an encoder-decoder, but sites is "
            f"{config.sites!r}.",
            hint="train one of these sites, too, or set prefix_dropout to 0.",
        )
