"""From a configuration to a run that is ready: claim, read, load, tokenize, start, build, and begin or resume."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from prefixtune.attention.forward import gradient_checkpointing
from prefixtune.attention.layout import passes_gradients
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.devices import choose_device, choose_dtype, is_quantized
from prefixtune.backbone.load import BackboneLike, as_backbone, load_backbone
from prefixtune.backbone.lora import has_adapter, import_peft
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data import ExampleLike
from prefixtune.data.encoding import TokenizedExample
from prefixtune.data.forms import FORMS, describe_data
from prefixtune.errors import ConfigError
from prefixtune.prefix.text_format import TextFormat
from prefixtune.training.beside import SELF, Beside, find_files, load_others, with_questions
from prefixtune.training.checkpoint import read_checkpoints
from prefixtune.training.config import TrainConfig
from prefixtune.training.data import TrainData, read_data, read_template, tokenize
from prefixtune.training.distributed import SINGLE_PROCESS, ProcessGroup, is_sharded, shard_model
from prefixtune.training.loop import TrainLoop
from prefixtune.training.run import Run
from prefixtune.training.run_folder import check_unused, has_state
from prefixtune.training.silence import general_examples
from prefixtune.training.starts.build import build_encoder
from prefixtune.training.starts.words import read_init_text
from prefixtune.training.trackers import check_installed
from prefixtune.training.tuning import tune
from prefixtune.utils.config import DTypeName
from prefixtune.utils.console import Console
from prefixtune.utils.files import claim_folder

Teach = Callable[[TrainConfig, Backbone, TrainData], TrainData]
"""Gives a run's tokenized data a teacher's labels; the backbone is the student's."""

_ConfigT = TypeVar("_ConfigT", bound=TrainConfig)


def prepare(
    config: TrainConfig,
    backbone: BackboneLike | None = None,
    examples: Sequence[ExampleLike] | None = None,
    dev_examples: Sequence[ExampleLike] | None = None,
    *,
    resume: bool = False,
    teach: Teach | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
    console: Console | None = None,
    shares_passes: bool = False,
    begin: bool = True,
) -> Run:
    """Make a run ready to train; leave its folder to others again by `with run:`, or if this fails.

        with prepare(config, backbone, examples) as run, stop_requests() as stop:
            result = run.train(stop)

    Nothing is written to the folder before the run begins.

    Args:
        config: The run.
        backbone: As callers have it; a method that trains weights changes it. None: `config.backbone` is loaded.
        examples: To train on; None: `config.train` is read.
        dev_examples: To choose the best prefix by; None: `config.dev` is read, if it is set.
        resume: Go on from the state in the folder; without one, the run is new.
        teach: Gives the tokenized data a teacher's labels (`TokenizedExample.soft_targets`).
        processes: Those that share the work.
        console: Says what is read and loaded; None: nothing does.
        shares_passes: Other runs are to share every pass of this one.
        begin: False: `Run.begin` is called later, when what stands beside the prefix is known.

    Raises:
        CheckpointError: The state in the folder, or a prefix to start from, is broken.
        ConfigError: A contradiction in the configuration, with the backbone or with the state; the folder holds a run.
        DataError: The data cannot be read or does not fit.
    """
    console = console or Console(quiet=True)
    if config.shard and (processes.size == 1 or not config.trains_prefix):
        raise ConfigError("shard splits the backbone of a prefix.", hint="start several processes with torchrun.")
    if config.beside == SELF and not shares_passes:
        raise ConfigError("beside is 'self', but this run trains alone.", hint="give files to --together.")
    with contextlib.ExitStack() as stack:
        folder = Path(config.output)
        # Nobody else may train in the folder meanwhile; refused before anything is read or loaded.
        if processes.is_main:
            stack.enter_context(claim_folder(folder))
            if not (resume and has_state(folder)):
                check_unused(folder)
        config, train, dev = read_data(config, examples, dev_examples)
        checkpoints = read_checkpoints(config) if resume else []
        check_named(config, begun=bool(checkpoints))
        if config.form and examples is None:
            console.info(describe_data(FORMS[config.form], train, config.train, train[0].fields))
        if config.hold_out and dev_examples is None and not config.dev:
            sources = "1 source is" if len(dev) == 1 else f"{len(dev)} sources are"
            console.info(f"{sources} held out of training to choose the best prefix by (hold_out)")
        config, loaded = backbone_of(config, backbone, console, processes)
        check_passes_gradients(loaded)
        others = load_others(config, loaded) if config.beside not in ("", SELF) else []
        stored_start = checkpoints[0].facts.initialization if checkpoints else None
        data = tokenize(config, loaded, train, dev, stored_start=stored_start, console=console)
        if shares_passes and (data.has_head or not loaded.layout.packable):
            what = "the run has a head" if data.has_head else f"{loaded.name!r} reads no packed rows"
            raise ConfigError(f"{what}, so that runs cannot share a pass.", hint="train it separately.")
        data = data if teach is None else teach(config, loaded, data)
        if config.keep_general and (config.max_steps or config.epochs):
            digest = f"{data.digest}+general {config.keep_general:g}"
            general = general_examples(loaded, data.text_format, data.prefix_length)
            if not general:
                what = "keep_general: no general request fits behind the prefix."
                raise ConfigError(what, hint="choose a shorter one, or set keep_general to 0.")
            data = dataclasses.replace(data, general=general, digest=digest)
        # What a teacher is asked is about the text that the run starts from.
        questions = data.train.examples if teach is not None else ()
        data = with_questions(data, others, loaded, config.seed)
        loop = _build_loop(config, data, stored_start, loaded, processes, questions)
        if others:
            loop.stand_beside(Beside.of_prefixes(others, loaded.rotation))
        stack.enter_context(gradient_checkpointing(loaded.model, config.gradient_checkpointing))
        run = Run(loop, checkpoints, stack)
        if begin:
            run.begin()
        run.until_closed = stack.pop_all()
        return run


def check_named(config: TrainConfig, *, begun: bool = False) -> None:
    """Refuse files, templates and trackers that the options name and that cannot be used, before a model is loaded.

    Args:
        config: The run.
        begun: It is resumed, and its start is not made again.

    Raises:
        CheckpointError: A prefix cannot be read.
        ConfigError: A tracker is not installed.
        DataError: A text or a template cannot be read, or lacks its placeholder.
    """
    if config.beside not in ("", SELF):
        for path in find_files(config.beside, config.output):
            load_prefix(path)
    if config.initialization == "prefix" and not begun:
        load_prefix(config.init_prefix)
    if config.initialization in ("words", "text") and not begun:
        read_init_text(config.init_text)
    read_template(config)
    TextFormat(config.prompt_format or TextFormat.prompt, config.target_format or TextFormat.target)
    check_installed(config.trackers)
    if config.method == "lora":
        import_peft()


# --- the backbone ----------------------------------------------------------------------------------------------------


def load_for(config: TrainConfig, processes: ProcessGroup = SINGLE_PROCESS) -> Backbone:
    """The backbone of a run, on the device of this process."""
    device = processes.device or config.device
    backbone = load_backbone(
        config.backbone,
        dtype=choose_dtype(config.dtype, choose_device(device)),
        # A split model moves layer by layer from here to the device that computes.
        device="cpu" if config.shard else device,
        quantize=config.quantize,
        attention=config.attention,
        adapter=config.adapter or None,
    )
    if config.shard:
        shard_model(backbone.model)
    return backbone


def backbone_of(
    config: _ConfigT, backbone: BackboneLike | None, console: Console, processes: ProcessGroup = SINGLE_PROCESS
) -> tuple[_ConfigT, Backbone]:
    """The backbone of a run, given or loaded, and the configuration of the run on it, which its folder then names.

    Raises:
        ConfigError: As `check_given`.
    """
    if backbone is None:
        console.info(f"loading {config.backbone} ...")
        return config, load_for(config, processes)
    given = as_backbone(backbone)
    check_given(config, given)
    known = given.dtype_name in get_args(DTypeName)
    return config.replace(backbone=given.name, dtype=given.dtype_name if known else config.dtype), given


def check_given(config: TrainConfig, backbone: Backbone) -> None:
    """Refuse options of loading that a loaded backbone does not follow, all at once, and one whose weights train.

    Raises:
        ConfigError: There are some; or its weights are not those that were loaded: an earlier run trained them.
    """
    if backbone.adapter_parameters:
        raise ConfigError(f"weights of {backbone.name!r} were trained by an earlier run.", hint="load it again.")
    device, model = backbone.device, backbone.model
    differs = {
        "dtype": config.dtype not in ("auto", backbone.dtype_name),
        "device": config.device not in ("auto", device.type, str(device)),
        "quantize": bool(config.quantize) and not is_quantized(model),
        "adapter": bool(config.adapter) and not has_adapter(model),
        "shard": config.shard and not is_sharded(model),
    }
    if faults := [f"{name} is {getattr(config, name)!r}" for name, is_so in differs.items() if is_so]:
        raise ConfigError(f"the backbone was loaded otherwise: {'; '.join(faults)}.", hint="leave these options out.")


def check_passes_gradients(backbone: Backbone) -> None:
    """Refuse to train on weights that give no gradient.

    Raises:
        ConfigError: They are of `quantize = "int4"` on a GPU.
    """
    if not passes_gradients(backbone.model):
        raise ConfigError("on a GPU no gradient passes through 4-bit weights.", hint="train with --quantize int8.")


# --- what trains -----------------------------------------------------------------------------------------------------


def _build_loop(
    config: TrainConfig,
    data: TrainData,
    stored_start: Mapping[str, Any] | None,
    backbone: Backbone,
    processes: ProcessGroup,
    questions: Sequence[TokenizedExample],
) -> TrainLoop:
    """A loop with what trains in it: an encoder, or the backbone's own weights."""
    if config.trains_prefix:
        encoder, start = build_encoder(
            config,
            backbone,
            head_labels=data.head_labels,
            examples=data.train.examples,
            questions=questions,
            plan=data.plan,
            stored_start=stored_start,
        )
        return TrainLoop(config, backbone, data, encoder, start.description, processes)
    backbone = tune(backbone, config.method, config.method_size, seed=config.seed)
    return TrainLoop(config, backbone, data, None, {"kind": "backbone"}, processes)
