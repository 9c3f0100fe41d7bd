"""The training loop: yields events; `train` shows them, unless told not to.

The same loop trains a prefix and the methods that it is compared with: same data, same order, same loss, same schedule.

One optimizer step: the reparameterization runs once, packed rows go through the frozen backbone with the prefix in
front, logits are computed where there is a label, and AdamW moves the prefix's parameters. Everything is a function of
the configuration and the step's number, so a resumed run goes on as if nothing had happened.

Knows nothing of what the examples mean.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import signal
import threading
import time
from array import array
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixtune import __version__, attach
from prefixtune.artifact import check_storable, describe_tensors
from prefixtune.backbone import (
    Backbone,
    BackboneLike,
    as_backbone,
    check_loadable,
    load_backbone,
)
from prefixtune.batching import (
    Batch,
    Encoded,
    Encoding,
    collate,
    default_format,
    encode_examples,
    join,
    plan_epoch,
    training_format,
)
from prefixtune.checkpoint import (
    load_prefix,
    load_state,
    load_weights,
    make_header,
    save_prefix,
    save_state,
    save_weights,
)
from prefixtune.config import TrainConfig, as_config, stored_config
from prefixtune.console import Console
from prefixtune.errors import BackboneError, CheckpointError, ConfigError, DataError, TrainingError, check_all
from prefixtune.files import appending, claim_folder, write_text
from prefixtune.fingerprints import fingerprints_match
from prefixtune.initialize import from_prefix, from_words, word_ids
from prefixtune.labelling import Labels, check_choice, choose_labels, encode_labelled, sample_hidden, worded
from prefixtune.loss import batch_loss
from prefixtune.parallel import ALONE, World, joined, shard
from prefixtune.prefix import Prefix
from prefixtune.progress import show_training
from prefixtune.reparam import PrefixModule, PromptModule, fit
from prefixtune.tasks import TASKS, Example, ExampleLike, as_examples, limit_targets, read_task
from prefixtune.text_format import TextFormat, read_text_format
from prefixtune.tuning import Tuning, load_tuned_weights, settle, tune, tuned_weights

__all__ = [
    "Event",
    "TrainResult",
    "batch_loss",
    "build_module",
    "evaluation_loss",
    "load_tuned",
    "train",
    "train_together",
]

Event = dict[str, Any]
"""What happened: `event` is start, resume, extend, step, evaluation, save or end; the rest are figures."""

PREFIX_FILE, STATE_FILE, EVENTS_FILE, CONFIG_FILE = (
    "prefix.safetensors",
    "state.safetensors",
    "events.jsonl",
    "config.toml",
)
WEIGHTS_FILE = "weights.safetensors"
"""The artifact of the methods that train the model's own weights."""
ADAPTER_FOLDER = "adapter"


_LENGTHS = ("max_steps", "epochs", "patience")
"""How long a run goes on: a resumed run may be given more of it, and its schedule is then that of the new length."""
_MAY_CHANGE = ("output", "save_every", "device", "dtype", "shard", *_LENGTHS)
"""What a resumed run may be told otherwise; the dtype in force is compared by itself."""


_STATE_FACTS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("step", "best_step", "misses"), (int,)),
    **dict.fromkeys(("fingerprint", "dtype", "data"), (str,)),
    "best_loss": (float, int, type(None)),
    "config": (dict,),
}
"""What a state tells of its run."""


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves.

    Attributes:
        prefix: The best prefix (on the development file, where there is one), baked; None: the method trains weights.
        path: The artifact, of the prefix or the weights.
        steps: Optimizer steps taken.
        best_loss: Lowest development loss, per token; NaN without a development file.
        num_trained: Parameters that the optimizer moved.
        events: Everything that was logged.
    """

    prefix: Prefix | None
    path: Path
    steps: int
    best_loss: float
    num_trained: int
    events: tuple[Event, ...]


def build_module(
    config: TrainConfig, backbone: Backbone, *, num_labels: int = 0
) -> tuple[PrefixModule | PromptModule, dict[str, Any]]:
    """The trainable prefix of a run, at its start, and what to record of the initialization.

    Args:
        config: The run.
        backbone: The frozen model.
        num_labels: Labels of a head to train with it; 0: no head.
    """
    torch.manual_seed(config.seed)
    lengths = choose_sites(config, backbone)
    if config.method != "prefix" and (backbone.kind != "decoder" or not backbone.layout.packable or num_labels):
        raise ConfigError(
            f"method {config.method!r} is for decoder-only models that read packed rows, and has no head; "
            f"{backbone.name!r} is of kind {backbone.kind!r}.",
            hint="use method = 'prefix'.",
        )
    if config.method == "prompt":
        return _build_prompt(config, backbone)
    start: Prefix | None = None
    facts: dict[str, Any] = {"kind": config.initialization}
    if config.initialization == "words":
        start = from_words(backbone, config.init_text, lengths)
        facts["text"] = config.init_text
    elif config.initialization == "prefix":
        start = from_prefix(backbone, load_prefix(config.init_prefix, backbone), lengths)
        facts["file"] = Path(config.init_prefix).name
    module = PrefixModule(
        config.reparameterization,
        {site: backbone.geometry[site] for site in lengths},
        lengths,
        embedding_size=backbone.hidden_size,
        bottleneck_size=config.bottleneck_size,
        start=start,
        head=(num_labels, backbone.hidden_size) if num_labels else None,
    )
    if config.reparameterization == "mlp" and start is not None:
        facts["relative_fit_error"] = fit(module, start)
    return module.to(backbone.device), facts


def _build_prompt(config: TrainConfig, backbone: Backbone) -> tuple[PromptModule, dict[str, Any]]:
    """A prompt at the input layer, from words' embeddings or at random, and what to record of the initialization."""
    if config.initialization == "prefix":
        raise _no_start()
    table = backbone.model.get_input_embeddings()
    facts: dict[str, Any] = {"kind": config.initialization}
    if config.initialization == "words":
        start = table(word_ids(backbone, config.init_text, config.prefix_length)[0]).detach().float()
        facts["text"] = config.init_text
    else:
        start = torch.randn(config.prefix_length, table.weight.shape[1]) * float(table.weight.float().std())
    module = PromptModule(
        config.reparameterization,
        start.cpu(),
        lambda prompt: attach.activations(
            backbone.model, backbone.layout, inputs_embeds=prompt[None].to(backbone.device, backbone.dtype)
        ),
        embedding_size=backbone.hidden_size,
        bottleneck_size=config.bottleneck_size,
    )
    return module.to(backbone.device), facts


def choose_sites(config: TrainConfig, backbone: Backbone) -> dict[str, int]:
    """Where the prefix of a run stands, and how long it is at each site.

    Raises:
        ConfigError: The backbone has no such site, or a prefix takes all of its positions.
    """
    lengths = config.site_lengths or dict.fromkeys(backbone.geometry, config.prefix_length)
    missing = [site for site in lengths if site not in backbone.geometry]
    if missing:
        notes = "".join(f" ({note})" for note in backbone.layout.notes)
        raise ConfigError(
            f"{backbone.name!r} is of kind {backbone.kind!r} and has no site {', '.join(missing)}{notes}.",
            hint=f"choose of {', '.join(backbone.geometry)}.",
        )
    return lengths


@torch.no_grad()
def evaluation_loss(
    backbone: Backbone,
    prefix: Prefix | None,
    examples: Sequence[Encoded],
    batch_size: int = 64,
    world: World = ALONE,
) -> float:
    """Mean loss per target token, in nats, over all targets of `examples`, shared among processes."""
    total, count = 0.0, 0.0
    for hands in plan_epoch(examples, batch_size=batch_size, targets_per_source=batch_size, seed=None):
        batch, is_own = _share(world, backbone, hands)
        losses = batch_loss(backbone, prefix, batch)
        if is_own:
            total += float(losses.sum())
            count += len(batch.labels)
    total, targets = world.sum(total, count)
    return total / targets


def _share(world: World, backbone: Backbone, hands: Sequence[Encoded]) -> tuple[Batch, bool]:
    """This process's part of a batch, and whether it is any.

    Where there is none, it computes something of others', which counts for nothing: with a split backbone all processes
    must go through it.
    """
    own = world.share(hands)
    return collate(backbone, own or hands[:1]), bool(own)


def train(
    config: TrainConfig | Mapping[str, Any] | None = None,
    *,
    backbone: BackboneLike | None = None,
    examples: Sequence[ExampleLike] | None = None,
    dev_examples: Sequence[ExampleLike] | None = None,
    resume: bool = False,
    progress: bool = True,
    on_event: Callable[[Event], None] | None = None,
    world: World | None = None,
    **options: Any,
) -> TrainResult:
    """Train a prefix and store it in `config.output`.

    A folder that holds a run already is refused, unless that is resumed.

    Args:
        config: The run: a `TrainConfig`, or a dict of its fields.
        backbone: A `Backbone` or a (model, tokenizer) pair, which a method that trains weights changes; a name or path
            stands for `config.backbone`; None: `config.backbone` is loaded.
        examples: `Example`s, or dicts: such as `{"source": "...", "target": "..."}`, or records where `config.source`
            is given; None: `config.train` is read.
        dev_examples: Likewise; None: `config.dev` is read, if given.
        resume: Go on from the state in `config.output`, with losses equal to those of an uninterrupted run. With more
            `max_steps` (or `epochs`, `patience`) than before, the run is extended: from here on, the learning rate is
            that of a run planned with the new number of steps. Without `config`, the run's own is taken, with the
            options over it.
        progress: Show on stderr how the run goes.
        on_event: Called with every event, as it happens; in the first process alone.
        world: The processes that share the work; None: those that this one was started with, by `torchrun` or
            `accelerate launch`. All of them must see the output folder. The losses are those of one process with the
            same batch size; a run may be resumed with another number of processes.
        **options: Fields of `TrainConfig`, in place of `config`.

    Raises:
        CheckpointError: There is no run to resume.
        ConfigError: A contradiction in the configuration, or with the state to resume; an argument of a wrong type; or
            the folder holds a run already.
        DataError: The data cannot be read or does not fit.
        TrainingError: The loss is not finite; the last good state is kept.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the state is saved.
    """
    config = _chosen(config, options, resume=resume)
    if isinstance(backbone, str | os.PathLike):
        config, backbone = config.replace(backbone=os.fspath(backbone)), None
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(joined(config.device)) if world is None else world
        console = Console(quiet=not (progress and world.leads))
        show = stack.enter_context(show_training(console))
        _claim([config], world, stack)
        # Before the backbone loads.
        states = [_read_state(config)] if resume else []
        data = _read_data(config, examples, dev_examples, world, resume=resume, loads=backbone is None)
        if backbone is None:
            console.info(f"loading {config.backbone} ...")
        loaded = _load(config, world) if backbone is None else as_backbone(backbone)
        run = _make_run(config, loaded, data, world)
        # Not kept: it may be as large as the model.
        events: list[Event] = run.resume(*states.pop()) if states else []
        stopping = stack.enter_context(_stop_requests())
        stack.enter_context(attach.checkpointing(run.backbone.model, config.gradient_checkpointing))
        for event in run.events(stopping, fresh=not resume):
            events.append(event)
            show(event)
            if on_event is not None and world.leads:
                on_event(event)
        return _result(run, events)


def _chosen(config: TrainConfig | Mapping[str, Any] | None, options: Mapping[str, Any], *, resume: bool) -> TrainConfig:
    """The run that is meant; one that is resumed without a configuration has its own, with the options over it."""
    if resume and config is None:
        return TrainConfig.from_toml(stored_config(options.get("output", TrainConfig.output)), **options)
    return as_config(TrainConfig, config, options)


def train_together(
    configs: Sequence[TrainConfig],
    *,
    backbone: Backbone | None = None,
    examples: Sequence[Sequence[Example] | None] | None = None,
    dev_examples: Sequence[Sequence[Example] | None] | None = None,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
    world: World | None = None,
) -> list[TrainResult]:
    """Train several prefixes at once: the same as one after the other, but every pass over the backbone serves all.

    Each run has its own data, length, start, rate and seed, and its own folder, as if it were trained alone; its
    gradients are those that it has alone, but for rounding. A run whose steps are taken, or whose loss is not finite,
    leaves the others to go on.

    Args:
        configs: The runs. They share the backbone and its dtype.
        backbone: Already loaded; None: the one that they all name is loaded.
        examples: Per run, already read; None: its `train` is read.
        dev_examples: Per run, already read; None: its `dev` is read, if given.
        resume: Go on from the states in the folders; what is done stays as it is.
        on_event: Called with every event, with the run's folder added as `run`.
        world: As in `train`.

    Raises:
        ConfigError: The runs cannot share a pass, or one of them is wrong.
        DataError: The data cannot be read or does not fit.
        TrainingError: A loss was not finite; the other runs have ended well.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the states are saved.
    """
    _check_together(configs)
    given = examples or [None] * len(configs), dev_examples or [None] * len(configs)
    events: list[list[Event]] = []
    failed: list[TrainingError] = []
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(joined(configs[0].device)) if world is None else world
        _claim(configs, world, stack)
        # A run that was stopped before its first save begins anew.
        begun = [resume and (Path(config.output) / STATE_FILE).exists() for config in configs]
        # Before the backbone loads.
        states = [_read_state(config) for config, old in zip(configs, begun, strict=True) if old]
        data = [
            _read_data(config, some, dev, world, resume=resume, loads=backbone is None)
            for config, some, dev in zip(configs, *given, strict=True)
        ]
        backbone = backbone or _load(configs[0], world)
        if not backbone.layout.packable:
            raise ConfigError(
                f"{backbone.name!r} takes no packed rows, so that its runs cannot share a pass.",
                hint="train them one after the other.",
            )
        runs = [_make_run(config, backbone, each, world) for config, each in zip(configs, data, strict=True)]
        if any(run.labels is not None and run.labels.by == "head" for run in runs):
            raise ConfigError("a head is trained alone.", hint="use classifier = 'words', or train it by itself.")
        events = [run.resume(*states.pop(0)) if old else [] for run, old in zip(runs, begun, strict=True)]

        def tell(number: int, event: Event) -> None:
            events[number].append(event)
            if on_event is not None and world.leads:
                on_event({**event, "run": str(runs[number].folder)})

        stopping = stack.enter_context(_stop_requests())
        stack.enter_context(attach.checkpointing(backbone.model, configs[0].gradient_checkpointing))
        going = {
            number: stack.enter_context(contextlib.closing(run.steps(stopping, fresh=not begun[number])))
            for number, run in enumerate(runs)
        }
        while going:
            pendings: list[_Pending] = []
            for number, steps in list(going.items()):
                try:
                    pending = _until_pending(steps, functools.partial(tell, number))
                except TrainingError as error:
                    failed.append(error)
                    pending = None
                if pending is None:
                    del going[number]
                else:
                    pendings.append(pending)
            if pendings:
                _compute(backbone, pendings)
        if stopping.is_set():
            raise KeyboardInterrupt("the states are saved")
        if failed:
            raise failed[0]
        return [_result(run, found) for run, found in zip(runs, events, strict=True)]


def _until_pending(steps: Iterator[Event | _Pending], tell: Callable[[Event], None]) -> _Pending | None:
    """Let a run go on to where something is to be computed for it; None: it has ended."""
    for told in steps:
        if isinstance(told, _Pending):
            return told
        tell(told)
    return None


def _claim(configs: Sequence[TrainConfig], world: World, stack: contextlib.ExitStack) -> None:
    """Let nobody else train in the runs' folders meanwhile; said before anything is read or loaded.

    Raises:
        PrefixError: Another process does, or a folder cannot be written.
    """
    for config in configs if world.leads else ():
        stack.enter_context(claim_folder(Path(config.output)))


def _with_targets(examples: list[Example], what: str) -> list[Example]:
    """The examples, of which some must have a target."""
    if not examples:
        raise DataError(f"the {what} data has no example.", hint="check the file and `limit`.")
    if not any(example.targets for example in examples):
        raise DataError(
            f"the {what} data has {len(examples):,} examples, and none has a target to learn.",
            hint="name the column or template of the targets (--target), or give another file.",
        )
    return examples


def _read_data(
    config: TrainConfig,
    examples: Sequence[ExampleLike] | None,
    dev_examples: Sequence[ExampleLike] | None,
    world: World,
    *,
    resume: bool,
    loads: bool,
) -> tuple[list[Example], list[Example]]:
    """Read what is not given, and check all that can be without a backbone, which takes long to load.

    Returns:
        The examples to train on and those to choose by, as far as they are used.
    """
    folder = Path(config.output)
    if not resume and world.leads and any((folder / name).exists() for name in (STATE_FILE, PREFIX_FILE, WEIGHTS_FILE)):
        raise ConfigError(
            f"{str(folder)!r} already holds a run.",
            hint="go on with --resume (resume=True), choose another --output (output), or delete it.",
        )
    chosen: list[Example] = []
    dev: list[Example] = []
    kind = TASKS[config.task].kind if config.task in TASKS else "generation"

    def check_labels() -> None:
        # What could not be read is reported by itself.
        if kind != "generation" and chosen and (dev or not config.dev):
            check_choice(kind, chosen, dev, by=config.classifier, words=config.words_by_label)

    check_all(
        [
            lambda: chosen.extend(
                limit_targets(_with_targets(_training_data(config, examples), "training"), config.limit)
            ),
            lambda: dev.extend(limit_targets(_development_data(config, dev_examples), config.dev_limit)),
            check_labels,
            *_early_checks(config, world, has_dev=bool(dev_examples or config.dev), loads=loads),
        ]
    )
    return chosen, dev


def _training_data(config: TrainConfig, examples: Sequence[ExampleLike] | None) -> list[Example]:
    if examples is not None:
        return as_examples(examples, config.source or None, config.target or None)
    parts = TASKS[config.task].parts if config.task in TASKS else ()
    if not config.train and config.task in TASKS and not parts:
        raise ConfigError("no training file is given.", hint="set train (--train FILE).")
    return _read(config, config.train or (*parts, "")[0], "train")


def _development_data(config: TrainConfig, examples: Sequence[ExampleLike] | None) -> list[Example]:
    if examples is not None:
        dev = as_examples(examples, config.source or None, config.target or None, "development example")
    else:
        dev = _read(config, config.dev, "dev") if config.dev else []
    return _with_targets(dev, "development") if dev else []


def _early_checks(config: TrainConfig, world: World, *, has_dev: bool, loads: bool) -> Iterator[Callable[[], object]]:
    """What can be wrong with a configuration on this machine, whatever the data is and before a backbone loads."""
    if loads:
        yield lambda: check_loadable(
            config.backbone,
            dtype=config.dtype,
            device=config.device,
            quantize=config.quantize,
            adapter=config.adapter or None,
            adapter_rank=config.adapter_rank,
        )
    yield lambda: TextFormat(config.prompt_format or "{source}", config.target_format or "{target}")
    if config.initialization == "prefix" and config.trains_prefix:
        yield lambda: _check_start(config)
    yield lambda: _check_combination(config, world, has_dev)


def _check_start(config: TrainConfig) -> None:
    """The prefix that a run starts from."""
    if config.method == "prompt":
        raise _no_start()
    load_prefix(config.init_prefix)


def _no_start() -> ConfigError:
    return ConfigError("a prompt cannot start from a prefix.", hint="use initialization = 'words' or 'random'.")


def _no_head(config: TrainConfig) -> ConfigError:
    return ConfigError(
        f"method {config.method!r} trains no head.", hint="use classifier = 'words', or method = 'prefix'."
    )


def _check_combination(config: TrainConfig, world: World, has_dev: bool) -> None:
    """Options that do not go together."""
    if config.shard and (world.size == 1 or not config.trains_prefix or config.train_adapter):
        raise ConfigError(
            "shard splits a frozen backbone among several processes.",
            hint="start them with torchrun or accelerate launch, and train a prefix.",
        )
    if config.patience and not has_dev:
        raise ConfigError(
            "patience needs a development file to lose it on.", hint="set dev (--dev FILE), or patience to 0."
        )
    if config.classifier == "head" and not config.trains_prefix:
        raise _no_head(config)


def _make_run(
    config: TrainConfig, backbone: Backbone, data: tuple[Sequence[Example], Sequence[Example]], world: World
) -> _Run:
    """A run on a backbone that can carry it."""
    if not config.trains_prefix:
        backbone = tune(backbone, Tuning(config.method, config.method_size), seed=config.seed)
    if config.gradient_checkpointing and not backbone.layout.carries:
        raise ConfigError(
            f"{backbone.name!r} hands no argument down to its attention: recomputed layers would lose the prefix.",
            hint="train without gradient_checkpointing.",
        )
    return _Run(config, backbone, *data, world)


def _load(config: TrainConfig, world: World) -> Backbone:
    """The backbone of a run, where this process computes."""
    backbone = load_backbone(
        config.backbone,
        dtype=config.dtype,
        # Layer by layer, what is split moves from here to where it is computed.
        device="cpu" if config.shard else world.device or config.device,
        quantize=config.quantize,
        adapter=config.adapter or None,
        train_adapter=config.train_adapter,
        adapter_rank=config.adapter_rank,
    )
    if config.shard:
        shard(backbone.model)
    return backbone


def _result(run: _Run, events: Sequence[Event]) -> TrainResult:
    """What a run leaves."""
    path = run.folder / (PREFIX_FILE if run.config.trains_prefix else WEIGHTS_FILE)
    # The first process has written it.
    run.world.wait()
    return TrainResult(
        load_prefix(path) if run.config.trains_prefix else None,
        path,
        run.step,
        run.best_loss,
        sum(parameter.numel() for parameter in run.trained),
        tuple(events),
    )


def _check_together(configs: Sequence[TrainConfig]) -> None:
    """Refuse runs that cannot share a pass; all faults at once."""
    faults = [] if configs else ["there is no run"]
    for name in ("backbone", "dtype", "device", "quantize", "gradient_checkpointing"):
        values = sorted({str(getattr(config, name)) for config in configs})
        if len(values) > 1:
            faults.append(f"{name} is {' and '.join(map(repr, values))}, but all runs share one backbone")
    folders = [Path(config.output).resolve() for config in configs]
    twice = sorted({str(config.output) for config in configs if folders.count(Path(config.output).resolve()) > 1})
    if twice:
        faults.append(f"several runs would write to {', '.join(map(repr, twice))}")
    for config in configs:
        if config.method not in ("prefix", "prompt") or config.adapter or config.train_adapter:
            what = f"method {config.method!r}" if config.method not in ("prefix", "prompt") else "an adapter"
            faults.append(f"the run in {config.output!r} has {what}, but only prefixes and prompts share a backbone")
    if faults:
        raise ConfigError("; ".join(faults) + ".", hint="give each its own output, and train what differs by itself.")


def _read(config: TrainConfig, path: str, split: str) -> list[Example]:
    """The examples of a file, or of a folder's split."""
    return read_task(config.task, path, source=config.source or None, target=config.target or None, split=split)


def load_tuned(path: str | Path, **options: Any) -> tuple[Backbone, TextFormat]:
    """The backbone with the weights that another method than a prefix trained, and the text format of its training.

    Args:
        path: `weights.safetensors` of a run.
        **options: For `load_backbone`, such as `dtype`; `name_or_path` in place of the backbone that the header names.

    Raises:
        CheckpointError: The file is no such weights.
        BackboneError: The weights are another backbone's.
    """
    tensors, header = load_weights(path)
    origin = header["backbone"]
    backbone = load_backbone(options.pop("name_or_path", None) or origin["name"], **options)
    if not fingerprints_match(str(origin["fingerprint"]), backbone.fingerprint):
        raise BackboneError(
            f"{str(path)!r} was trained from {origin['name']!r} with other weights than {backbone.name!r}.",
            hint="load the backbone that its header names.",
        )
    backbone = tune(backbone, Tuning(header["method"], header["method_size"]))
    load_tuned_weights(backbone, tensors)
    return settle(backbone), read_text_format(header) or default_format(backbone)


def _labels(
    config: TrainConfig, backbone: Backbone, examples: Sequence[Example], dev_examples: Sequence[Example]
) -> Labels | None:
    """What a run learns to tell apart; None: it learns to generate.

    Raises:
        ConfigError: The backbone cannot do what the task is.
    """
    kind = TASKS[config.task].kind if config.task in TASKS else "generation"
    if kind != "generation":
        return choose_labels(kind, backbone, examples, dev_examples, by=config.classifier, words=config.words_by_label)
    if backbone.kind == "encoder":
        raise ConfigError(
            f"{backbone.name!r} is an encoder, which reads text and writes none, but task {config.task!r} generates.",
            hint="use --task classification or tagging, or choose a model that generates.",
        )
    return None


@dataclass(eq=False)
class _Pending:
    """An optimizer step whose losses are to be computed.

    Attributes:
        began: When, in seconds.
        batches: Of the step, one after the other.
        weights: Each label's weight in the loss, per batch.
        live: The prefix, as the module makes it; None: the model's own weights train.
        leaf: The same numbers, at which the gradients gather.
        sentences: Targets of the step.
        tokens: Labels of the step.
        loss: The step's, once it is computed.
    """

    began: float
    batches: Sequence[Batch]
    weights: Sequence[Tensor]
    live: Prefix | None
    leaf: Prefix | None
    sentences: int
    tokens: int
    loss: float = 0.0


def _compute(backbone: Backbone, pendings: Sequence[_Pending]) -> None:
    """Losses and gradients of the steps of one or several runs, each batch together with those of the others."""
    for number in range(max(len(pending.batches) for pending in pendings)):
        those = [pending for pending in pendings if number < len(pending.batches)]
        batches = [pending.batches[number] for pending in those]
        if len(those) == 1:
            losses = batch_loss(backbone, those[0].leaf, batches[0])
        else:
            losses = batch_loss(backbone, [pending.leaf for pending in those], join(batches))
        weights = [pending.weights[number].to(losses.device) for pending in those]
        weighted = losses * torch.cat(weights)
        weighted.sum().backward()
        for pending, part in zip(those, weighted.detach().split([len(each) for each in weights]), strict=True):
            pending.loss += float(part.sum())


class _Run:
    """The mutable state of one run: module, optimizer, and where it stands."""

    def __init__(
        self,
        config: TrainConfig,
        backbone: Backbone,
        examples: Sequence[Example],
        dev_examples: Sequence[Example],
        world: World = ALONE,
    ) -> None:
        self.config, self.backbone, self.folder, self.world = config, backbone, Path(config.output), world
        self.labels = _labels(config, backbone, examples, dev_examples)
        by_head = self.labels is not None and self.labels.by == "head"
        self.format = training_format(config, backbone, for_head=by_head)
        self.data = self._encode(examples)
        self.dev = self._encode(dev_examples) if dev_examples else None
        self.format = dataclasses.replace(
            self.format,
            longest_target=self.data.longest_target,
            longest_prompt=max(data.longest_prompt for data in (self.data, self.dev) if data is not None),
        )
        self.data_digest = _digest(self.data, self.dev)
        num_labels = len(self.labels.names) if by_head and self.labels is not None else 0
        self.module: PrefixModule | PromptModule | None = None
        self.initialization: dict[str, Any] = {"kind": "backbone"}
        if config.trains_prefix:
            self.module, self.initialization = build_module(config, backbone, num_labels=num_labels)
            if self.module.head is not None:
                self.module.head.standardize(sample_hidden(backbone, self.module.bake(), self.data.examples))
        elif num_labels:
            raise _no_head(config)
        # The model's own weights that train: a LoRA adapter's, or what another method trains; empty otherwise.
        self.adapter = backbone.adapter_parameters
        self.trained = [*(() if self.module is None else self.module.parameters()), *self.adapter.values()]
        self.optimizer = torch.optim.AdamW(self.trained, lr=config.peak_learning_rate, weight_decay=config.weight_decay)
        self.steps_per_epoch = math.ceil(sum(1 for _ in self._plan(epoch=0)) / config.gradient_accumulation)
        self.total_steps = self._planned(config.max_steps, config.epochs)
        self.extended_from: int | None = None
        self.step, self.best_loss, self.best_step, self.misses = 0, math.nan, 0, 0
        start = self.bake()
        # Not after the work.
        check_storable({**self._header(backbone, start), **({} if start is None else describe_tensors(start))})

    def _planned(self, max_steps: int, epochs: float) -> int:
        """The steps that a configuration plans."""
        return max_steps or max(1, round(epochs * self.steps_per_epoch))

    def _encode(self, examples: Sequence[Example]) -> Encoding:
        room: dict[str, Any] = {
            "prefix_length": (
                choose_sites(self.config, self.backbone).get("decoder", 0) if self.config.trains_prefix else 0
            ),
            "max_length": self.config.max_length,
            "on_too_long": self.config.on_too_long,
        }
        if self.labels is None:
            return encode_examples(self.backbone, examples, self.format, **room)
        if self.labels.by == "head":
            return encode_labelled(self.backbone, examples, self.labels, self.format, **room)
        return encode_examples(self.backbone, worded(examples, self.labels), self.format, **room)

    def bake(self) -> Prefix | None:
        """The prefix as it is now; None: the method has none."""
        if self.module is None:
            return None
        made = self.module.bake()
        return Prefix(made.layers, self._placement, made.head)

    @property
    def _placement(self) -> dict[str, Any]:
        return {"placement": "infix"} if self.config.method == "infix" else {}

    # The order of the data is a function of the seed and the step: nothing has to be stored to find one's place.

    def _plan(self, epoch: int) -> Iterator[list[Encoded]]:
        return plan_epoch(
            self.data.examples,
            batch_size=self.config.batch_size,
            targets_per_source=self.config.targets_per_source,
            seed=self.config.seed,
            epoch=epoch,
        )

    def _batches(self) -> Iterator[list[tuple[Batch, bool]]]:
        """This process's part of the batches of every optimizer step still to come, and whether it is any."""
        step = 0
        for epoch in range(self.total_steps):
            chosen: list[list[Encoded]] = []
            plan = list(self._plan(epoch))
            for number, hands in enumerate(plan):
                chosen.append(hands)
                if len(chosen) == self.config.gradient_accumulation or number == len(plan) - 1:
                    step += 1
                    if step > self.step:
                        yield [_share(self.world, self.backbone, hands) for hands in chosen]
                    if step == self.total_steps:
                        return
                    chosen = []

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero; `step` counts from 1."""
        warmup = min(self.config.warmup_steps, self.total_steps // 2)
        if step <= warmup:
            return self.config.peak_learning_rate * step / warmup
        return self.config.peak_learning_rate * (self.total_steps - step + 1) / (self.total_steps - warmup)

    def events(self, stopping: threading.Event, *, fresh: bool) -> Iterator[Event]:
        """Run to the end, saving on the way."""
        with contextlib.closing(self.steps(stopping, fresh=fresh)) as steps:
            for told in steps:
                if isinstance(told, _Pending):
                    _compute(self.backbone, [told])
                else:
                    yield told
        if stopping.is_set():
            raise KeyboardInterrupt("the state is saved")

    def steps(self, stopping: threading.Event, *, fresh: bool) -> Generator[Event | _Pending]:
        """Everything that happens, and before each optimizer step what is to be computed for it, by whoever asks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if fresh and self.world.leads:
            write_text(self.folder / CONFIG_FILE, self.config.to_toml())
            write_text(self.folder / EVENTS_FILE, "")
            # From the very start on, a kill can be resumed from.
            self.save()
        with appending(self.folder / EVENTS_FILE) as log:
            for told in self._steps(stopping, fresh):
                if self.world.leads and not isinstance(told, _Pending):
                    log(json.dumps(told))
                yield told

    def _steps(self, stopping: threading.Event, fresh: bool) -> Iterator[Event | _Pending]:
        yield self._start_event() if fresh else {"event": "resume", "step": self.step, "total_steps": self.total_steps}
        if self.extended_from is not None:
            extended = {"step": self.step, "total_steps": self.total_steps, "planned": self.extended_from}
            yield {"event": "extend", **extended}
        every = self.config.eval_every
        for batches in () if self.ended else self._batches():
            pending = self._begin(batches)
            yield pending
            # One signal to one process stops all, after the same step.
            pending.loss, asked = self.world.sum(pending.loss, float(stopping.is_set()))
            if asked:
                stopping.set()
            yield self._optimize(pending)
            if self.step == self.total_steps or (every and self.step % every == 0):
                yield self._evaluate()
            leaving = self.ended or stopping.is_set()
            if leaving or self.step % self.config.save_every == 0:
                self.save()
                yield {"event": "save", "step": self.step}
            if leaving:
                break
        if self.ended:
            yield {"event": "end", "step": self.step, "best_loss": _number(self.best_loss), "best_step": self.best_step}

    @property
    def ended(self) -> bool:
        """Whether all steps are taken, or the patience is."""
        return self.step >= self.total_steps or 0 < self.config.patience <= self.misses

    def _start_event(self) -> Event:
        return {
            "event": "start",
            "total_steps": self.total_steps,
            "num_sources": len(self.data.examples),
            "num_targets": self.data.num_targets,
            "num_cut": self.data.num_cut,
            "num_trained": sum(parameter.numel() for parameter in self.trained),
            "num_stored": sum(tensor.numel() for tensor in self._stored()),
            "initialization": self.initialization,
            "backbone": self.backbone.name,
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "device": str(self.backbone.device),
        }

    def _stored(self) -> list[Tensor]:
        """What the artifact holds."""
        prefix = self.bake()
        return list(self.adapter.values()) if prefix is None else prefix.stored_tensors()

    def _begin(self, shares: Sequence[tuple[Batch, bool]]) -> _Pending:
        """Prepare an optimizer step."""
        began = time.perf_counter()
        own = [batch for batch, is_own in shares if is_own]
        counts = sum(batch.num_sentences for batch in own), sum(len(batch.labels) for batch in own)
        sentences, tokens = map(int, self.world.sum(*map(float, counts)))
        self.optimizer.zero_grad(set_to_none=True)
        # The reparameterization runs once: rows' gradients gather at the prefix, then flow back through it together.
        live: Prefix | None = None if self.module is None else self.module()
        leaf = None if live is None else Prefix(live.leaves().layers, self._placement, live.head)
        weights = [
            batch.weights(self.config.loss_reduction, sentences, tokens) * float(is_own) for batch, is_own in shares
        ]
        return _Pending(began, [batch for batch, _ in shares], weights, live, leaf, sentences, tokens)

    def _optimize(self, pending: _Pending) -> Event:
        """Take the optimizer step whose losses are computed.

        Raises:
            TrainingError: Loss or gradient is not finite; nothing was moved.
        """
        live, leaf, loss = pending.live, pending.leaf, pending.loss
        # What other processes add: at the prefix, not at its reparameterization, which each runs by itself.
        head = None if self.module is None else self.module.head
        met = [*(() if leaf is None else leaf.tensors()), *self.adapter.values()]
        self.world.sum_gradients([*met, *(() if head is None else head.parameters())])
        if live is not None and leaf is not None:
            torch.autograd.backward(live.tensors(), [tensor.grad for tensor in leaf.tensors()])
        limit = self.config.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, limit))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"the loss is {loss} and the gradient's norm {norm} at step {self.step + 1}; the state of the last "
                f"good save is kept in {str(self.folder)!r}.",
                hint="start anew in another --output with a lower learning rate "
                f"(now {self.config.peak_learning_rate:g}), or with --dtype float32.",
            )
        rate = self.learning_rate(self.step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        by_token = pending.sentences / pending.tokens if self.config.loss_reduction == "sentence" else 1.0
        return {
            "event": "step",
            "step": self.step,
            "loss": loss,
            "loss_per_token": loss * by_token,
            "lr": rate,
            "grad_norm": norm,
            "target_tokens": pending.tokens,
            "seconds": round(time.perf_counter() - pending.began, 4),
        }

    def _evaluate(self) -> Event:
        """Development loss; the best prefix so far becomes the artifact. Without a development file: the latest."""
        prefix = self.bake()
        event: Event = {"event": "evaluation", "step": self.step}
        better = True
        if self.dev is not None:
            loss = evaluation_loss(self.backbone, prefix, self.dev.examples, self.config.batch_size, self.world)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the development loss is {loss} at step {self.step}; the best prefix so far is kept.",
                    hint="look for a broken development example, or use --dtype float32.",
                )
            better = math.isnan(self.best_loss) or loss < self.best_loss
            event["loss"] = loss
            self.best_loss = loss if better else self.best_loss
            self.misses = 0 if better else self.misses + 1
        if better:
            self.best_step = self.step
            self._save_artifact(prefix)
        return {**event, "best_loss": _number(self.best_loss), "best_step": self.best_step}

    def _save_artifact(self, prefix: Prefix | None) -> None:
        if not self.world.leads:
            return
        config, backbone = self.config, self.backbone
        if self.adapter and prefix is not None:
            backbone = backbone.save_adapter(self.folder / ADAPTER_FOLDER)
        header = self._header(backbone, prefix)
        dtype = torch.float32 if config.save_dtype == "float32" else torch.bfloat16
        if prefix is None:
            size = Tuning(config.method, config.method_size).size
            weights = {name: tensor.to(dtype) for name, tensor in tuned_weights(self.backbone).items()}
            save_weights(self.folder / WEIGHTS_FILE, weights, {**header, "method_size": size})
            return
        save_prefix(self.folder / PREFIX_FILE, Prefix(prefix.layers, header, prefix.head), dtype=dtype)

    def _header(self, backbone: Backbone, prefix: Prefix | None) -> dict[str, Any]:
        """What the artifact says of this run."""
        config = self.config
        return make_header(
            backbone,
            task=config.task,
            method=config.method,
            **self._placement,
            text_format=self.format.to_dict(),
            **({} if self.labels is None else {"labels": self.labels.to_dict()}),
            initialization=self.initialization,
            training={
                "steps": self.step,
                "total_steps": self.total_steps,
                "dev_loss": _number(self.best_loss),
                "num_targets": self.data.num_targets,
                "backbone_dtype": str(self.backbone.dtype).removeprefix("torch."),
                **{
                    name: getattr(config, name)
                    for name in ("reparameterization", "bottleneck_size", "batch_size", "loss_reduction", "seed")
                },
                "learning_rate": config.peak_learning_rate,
            },
            **(
                {"adapter": ADAPTER_FOLDER if self.adapter else config.adapter}
                if config.adapter or (self.adapter and prefix is not None)
                else {}
            ),
            license=config.license,
            made_with={"prefixtune": __version__, "torch": torch.__version__, "python": platform.python_version()},
        )

    def save(self) -> None:
        """Write the resumable state."""
        if not self.world.leads:
            return
        tensors = {} if self.module is None else {f"module.{n}": t for n, t in self.module.state_dict().items()}
        tensors |= {f"adapter.{name}": parameter for name, parameter in self.adapter.items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{number}.{key}": torch.as_tensor(value) for key, value in values.items()})
        save_state(
            self.folder / STATE_FILE,
            tensors,
            {
                "step": self.step,
                "best_loss": _number(self.best_loss),
                "best_step": self.best_step,
                "misses": self.misses,
                "fingerprint": self.backbone.fingerprint,
                "dtype": str(self.backbone.dtype).removeprefix("torch."),
                "data": self.data_digest,
                "config": self.config.to_dict(),
            },
        )

    def resume(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> list[Event]:
        """Go on from a state, and cut the log back to it; returns the events up to it.

        Args:
            tensors: As `_read_state` gives them.
            facts: Likewise.

        Raises:
            CheckpointError: The state does not fit the run, or the log is damaged.
            ConfigError: The state belongs to another backbone or other data.
        """
        if not fingerprints_match(facts["fingerprint"], self.backbone.fingerprint):
            raise ConfigError(
                f"the run in {str(self.folder)!r} was started on another backbone.", hint="load that one."
            )
        dtype = str(self.backbone.dtype).removeprefix("torch.")
        if facts["dtype"] != dtype:
            raise ConfigError(
                f"the run in {str(self.folder)!r} was started in {facts['dtype']}, but the backbone is in {dtype}.",
                hint=f"resume with --dtype {facts['dtype']}.",
            )
        if facts["data"] != self.data_digest:
            raise ConfigError(
                f"the run in {str(self.folder)!r} was started on other data.",
                hint="give it the same files, or start anew in another --output.",
            )
        try:
            self._load(tensors)
        except (RuntimeError, LookupError, ValueError) as error:
            raise CheckpointError(
                f"the state in {str(self.folder)!r} does not fit the run: {str(error).splitlines()[0]}",
                hint="start anew in another --output.",
            ) from error
        self.step, self.misses, self.best_step = facts["step"], facts["misses"], facts["best_step"]
        self.best_loss = math.nan if facts["best_loss"] is None else facts["best_loss"]
        relengthened = self._extend(facts["config"])
        kept = _events_until(self.folder / EVENTS_FILE, self.step)
        # All have read it before the first process changes anything.
        self.world.wait()
        if self.world.leads:
            write_text(self.folder / EVENTS_FILE, "".join(json.dumps(event) + "\n" for event in kept))
            if relengthened:
                # What is resumed without options goes on as far as this run.
                write_text(self.folder / CONFIG_FILE, self.config.to_toml())
        return kept

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the parameters and the optimizer's moments from a state."""
        if self.module is not None:
            self.module.load_state_dict(
                {name.removeprefix("module."): t for name, t in tensors.items() if name.startswith("module.")}
            )
        with torch.no_grad():
            for name, parameter in self.adapter.items():
                parameter.copy_(tensors[f"adapter.{name}"])
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".", 2)
                slots.setdefault(int(number), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})

    def _extend(self, stored: Mapping[str, Any]) -> bool:
        """Whether the run is to end otherwise than was planned, and that it can.

        Raises:
            ConfigError: All of the steps asked for are taken, or the patience is.
        """
        config = self.config
        if all(stored[name] == getattr(config, name) for name in _LENGTHS):
            return False
        planned = self._planned(stored["max_steps"], stored["epochs"])
        if self.total_steps != planned and self.total_steps <= self.step:
            raise ConfigError(
                f"{self.total_steps} steps are asked for, but the run in {str(self.folder)!r} has taken {self.step}.",
                hint=f"give more, as in --max-steps {2 * self.step}.",
            )
        if self.total_steps > planned and 0 < config.patience <= self.misses:
            raise ConfigError(
                f"the run in {str(self.folder)!r} stopped at step {self.step}, as {self.misses} evaluations brought no "
                "better loss; more steps alone do not make it go on.",
                hint=f"give more patience, too, as in --patience {2 * self.misses}, or 0 for any number.",
            )
        self.extended_from = None if planned == self.total_steps else planned
        return True


def _read_state(config: TrainConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of the run that a configuration goes on with.

    Raises:
        CheckpointError: There is no state, or it is broken.
        ConfigError: It belongs to another configuration.
    """
    path = Path(config.output) / STATE_FILE
    if not path.exists():
        raise CheckpointError(f"there is no run to resume in {str(path.parent)!r}.", hint="start it without --resume.")
    tensors, facts = load_state(path)
    faults = [name for name, kinds in _STATE_FACTS.items() if not isinstance(facts.get(name), kinds)]
    if faults:
        raise CheckpointError(
            f"{str(path)!r} lacks or spoils {', '.join(faults)}.", hint="start anew in another --output."
        )
    # What an older version did not know was as it is by default.
    stored, now = {**TrainConfig().to_dict(), **facts["config"]}, config.to_dict()
    changed = [k for k in now if stored.get(k) != now[k] and k not in _MAY_CHANGE]
    if changed:
        listed = ", ".join(f"{key} was {stored.get(key)!r}, is {now[key]!r}" for key in changed)
        raise ConfigError(
            f"the run in {str(path.parent)!r} was started otherwise: {listed}.",
            hint="resume with the same options, or start anew in another --output.",
        )
    if config.max_steps and stored["epochs"] != config.epochs:
        raise ConfigError(
            f"epochs is {config.epochs:g}, but the run in {str(path.parent)!r} is set by max_steps = "
            f"{config.max_steps}, which overrides it.",
            hint="give --max-steps N (max_steps=N) alone, or --max-steps 0, too.",
        )
    if 0 < config.max_steps < facts["step"]:
        raise ConfigError(
            f"max_steps is {config.max_steps}, but the run in {str(path.parent)!r} has taken {facts['step']} steps.",
            hint=f"give more, as in --max-steps {2 * facts['step']}.",
        )
    return tensors, {**facts, "config": stored}


def _digest(*data: Encoding | None) -> str:
    """Tells encoded data apart."""
    total = hashlib.sha256()
    for encoding in data:
        for example in encoding.examples if encoding is not None else ():
            for ids in (example.prompt, *example.targets, ()):
                total.update(array("q", (len(ids), *ids)).tobytes())
        total.update(b"|")
    return total.hexdigest()


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def _events_until(path: Path, step: int) -> list[Event]:
    """The log's events up to a step; a last line that was cut off by a kill is left out.

    Raises:
        CheckpointError: Another line is damaged.
    """
    events: list[Event] = []
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}.", hint="check its permissions.") from error
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
            # An unknown step would stay, too.
            kind, reached = event["event"], int(event.get("step", 0))
        except (ArithmeticError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if number == len(lines):
                break
            raise CheckpointError(
                f"line {number} of {str(path)!r} is no event of a training: {line[:40]!r}.",
                hint="delete the file: the run goes on from its state, and its log begins anew.",
            ) from error
        # An extension at this very step was stopped before it was saved, and is done anew.
        undone = kind in ("end", "resume") or (kind == "extend" and reached == step)
        if reached <= step and not undone:
            events.append(event)
    return events


@contextlib.contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """While the block runs, the first Ctrl-C or SIGTERM asks to stop after the step; a second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def on_signal(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
