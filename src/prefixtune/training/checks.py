"""What can be wrong with a run whatever its data is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefixtune.attention.layout import passes_gradients
from prefixtune.attention.registry import ATTENTIONS
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.devices import is_quantized
from prefixtune.errors import ConfigError
from prefixtune.training.beside import SELF
from prefixtune.training.config import TrainConfig
from prefixtune.training.distributed import ProcessGroup, is_sharded
from prefixtune.training.trackers import check_installed

__all__ = [
    "check_generates",
    "check_given",
    "check_hidden_positions",
    "check_no_labels",
    "check_options",
    "check_passes_gradients",
    "check_together",
    "no_head",
    "no_solved_examples",
]


def check_options(config: TrainConfig, processes: ProcessGroup, *, together: bool) -> None:
    """Refuse options that do not go with this machine, these processes or other runs, before anything is read.

    Raises:
        ConfigError: One does not.
    """
    check_installed(config.trackers)
    if config.shard and (processes.size == 1 or not config.trains_prefix):
        raise ConfigError(
            "shard splits a frozen backbone among several processes.",
            hint="start them with torchrun or accelerate launch, and train a prefix.",
        )
    if config.beside == SELF and not together:
        raise ConfigError(
            "beside is 'self', the other runs that train together, but this run trains alone.",
            hint="give several files to --together, or name a folder of prefixes.",
        )


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
    """Refuse options of loading that a loaded backbone does not follow, all at once, and one that is not frozen.

    Raises:
        ConfigError: There are some; or its weights are not those that were loaded: an earlier run trained them.
    """
    device = backbone.device
    if backbone.adapter_parameters and backbone.adapter is None:
        raise ConfigError(
            f"the backbone {backbone.name!r} is not as it was loaded: an earlier run trained weights of it.",
            hint="load it again, for each such run.",
        )
    trains, model = bool(backbone.adapter_parameters), backbone.model
    # Some models compute attention by `eager` alone, whatever is asked for.
    attends_so = not getattr(model, "_supports_sdpa", True) or ATTENTIONS[config.attention] == (
        model.config._attn_implementation
    )
    differs = {
        "dtype": config.dtype not in ("auto", backbone.dtype_name),
        "device": config.device not in ("auto", device.type, str(device)),
        "attention": config.attention != TrainConfig.default("attention") and not attends_so,
        "quantize": bool(config.quantize) and not is_quantized(model),
        "adapter": bool(config.adapter) and backbone.adapter is None,
        "train_adapter": config.train_adapter and not trains,
        "adapter_rank": config.adapter_rank > 0 and not trains,
        "shard": config.shard and not is_sharded(model),
    }
    if faults := [f"{name} is {getattr(config, name)!r}" for name, is_so in differs.items() if is_so]:
        raise ConfigError(
            f"the backbone {backbone.name!r} is used as it was loaded, which was otherwise: {'; '.join(faults)}.",
            hint="leave these options out, or give them to load_backbone.",
        )


def check_passes_gradients(backbone: Backbone) -> None:
    """Refuse to train on weights that give no gradient.

    Raises:
        ConfigError: They are of `quantize = "int4"` on a GPU.
    """
    if not passes_gradients(backbone.model):
        raise ConfigError(
            f"quantize is 'int4', but on a GPU no gradient passes through the 4-bit weights of {backbone.name!r}.",
            hint="train with quantize = 'int8' (--quantize int8); the prefix also goes with int4 weights afterwards.",
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
