"""Load the backbone, and the prefix or trained weights that the options name, after checking all that can be wrong."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune.errors import ConfigError, short_repr
from prefixtune.utils.console import Console

if TYPE_CHECKING:
    from prefixtune.backbone.backbone import Backbone
    from prefixtune.cli.decoding import EngineOptions
    from prefixtune.engine.base import Engine
    from prefixtune.engine.remote import RemoteEngine
    from prefixtune.prefix.prefix import Prefix
    from prefixtune.prefix.rotation import Rotation
    from prefixtune.prefix.text_format import TextFormat

__all__ = [
    "DEFAULT_BACKBONE",
    "Artifact",
    "columns_as_trained",
    "find_artifact",
    "load",
    "load_artifact",
    "load_with_prefixes",
    "prefix_files",
    "read_prefix",
    "short_name",
    "split_joined",
    "started_engine",
]

DEFAULT_BACKBONE = "smollm2-135m"
_MOST_JOINED = 64
"""Prefixes that one --prefix joins, at most."""
_MOST_PLUSES = 64
"""Signs + in the name of one file or folder that are looked for."""


@dataclass(frozen=True)
class Artifact:
    """The result of a training that a command uses; empty for the bare model.

    Attributes:
        prefix: The file of a prefix, or several with a + between them, which are joined.
        weights: The file of the trained weights of another method.
        header: The header of that file.
    """

    prefix: str | None = None
    weights: Path | None = None
    header: Mapping[str, Any] = field(default_factory=dict)


def load(console: Console, name: str, options: Any, adapter: str | None = None, *, self_check: bool = True) -> Backbone:
    """Load a backbone with the `dtype`, `device` and `quantize` of the options, and report it.

    For an engine that has the weights in a file of its own, without them.
    """
    from prefixtune.backbone.load import load_backbone
    from prefixtune.backbone.shapes import load_shapes

    if getattr(options, "engine", "torch") != "torch":
        if adapter:
            raise ConfigError(f"--engine {options.engine} has no adapters.", hint="use --engine torch.")
        return load_shapes(name)
    with_adapter = f" with the adapter {adapter}" if adapter else ""
    console.info(f"loading {name}{with_adapter} ...")
    backbone = load_backbone(
        name,
        dtype=options.dtype,
        device=options.device,
        quantize=options.quantize,
        adapter=adapter,
        self_check=self_check,
    )
    console.info(f"{backbone!r}")
    return backbone


@contextlib.contextmanager
def started_engine(
    console: Console, options: EngineOptions, backbone: Backbone, num_slots: int
) -> Iterator[Engine | None]:
    """The engine of the options, while the block runs; None: torch's, which every call starts for itself.

    Args:
        console: Says what computes.
        options: The options of the command.
        backbone: By `load`.
        num_slots: Texts at once.

    Raises:
        PrefixError: It cannot start.
    """
    if options.engine == "torch":
        yield None
        return
    import torch

    from prefixtune.backbone.checkpoint import checkpoint_folder
    from prefixtune.engine.llama_cpp import LlamaCppEngine
    from prefixtune.engine.vllm import VllmConfig, VllmEngine

    console.info(f"starting {options.engine} ...")
    engine: RemoteEngine
    if options.engine == "llama.cpp":
        engine = LlamaCppEngine(backbone, options.gguf, num_slots=num_slots, threads=options.threads)
    else:
        model, python = str(checkpoint_folder(backbone.name)), options.vllm_python or sys.executable
        # Compiling takes minutes on a processor, and gains little there.
        eager = () if torch.cuda.is_available() else ("--enforce-eager",)
        config = VllmConfig(model, num_slots=num_slots, dtype=options.dtype, python=python, arguments=eager)
        engine = VllmEngine(backbone, config)
    with engine:
        console.info(engine.name)
        yield engine


def split_joined(text: str) -> list[str]:
    """The prefixes that a text of --prefix names: one, or several with a + between them, which are joined.

    A + in the name of a file or folder that exists is part of that name.

    >>> split_joined("manual.safetensors+runs/style"), split_joined("hub:me/poems")
    (['manual.safetensors', 'runs/style'], ['hub:me/poems'])

    Raises:
        ConfigError: A name is empty.
    """
    pieces = text.split("+")
    names: list[str] = []
    while pieces and len(names) <= _MOST_JOINED:
        lengths = range(min(len(pieces), _MOST_PLUSES + 1), 1, -1)
        length = next((n for n in lengths if os.path.lexists("+".join(pieces[:n]))), 1)
        names.append("+".join(pieces[:length]))
        pieces = pieces[length:]
    if "" in names or len(names) > _MOST_JOINED:
        raise ConfigError(
            f"--prefix is {short_repr(text)}, which names no file, or too many.",
            hint=f"as in a+b, with one + between names, of which {_MOST_JOINED} at most.",
        )
    return names


def short_name(text: str) -> str:
    """What a text of --prefix is called: the name of a file, or that of a run's folder.

    >>> short_name("runs/e2e/prefix.safetensors"), short_name("runs/e2e"), short_name("hub:me/poems")
    ('e2e', 'e2e', 'poems')
    >>> short_name("a/manual.safetensors+runs/style")
    'manual+style'
    """
    from prefixtune.prefix.hub import HUB

    paths = [Path(os.path.abspath(name.removeprefix(HUB))) for name in split_joined(text)]
    return "+".join(path.parent.name if path.stem == "prefix" else path.stem for path in paths)


def prefix_files(text: str) -> list[str]:
    """The files that a text of --prefix names.

    Raises:
        PrefixError: A name is empty, or one of them is missing.
    """
    from prefixtune.prefix.hub import prefix_file

    return [str(prefix_file(name)) for name in split_joined(text)]


def read_prefix(text: str) -> Prefix:
    """The prefix that a text of --prefix names, to check it before a model is loaded.

    Where no header of joined ones says how keys turn, they are not turned, and only the model's positions are unknown.

    Raises:
        PrefixError: A file is missing or wrong, or they cannot be joined.
    """
    # A file that is missing is named before torch is imported.
    files = prefix_files(text)

    from prefixtune.backbone.prefixes import load_prefix

    return _join([load_prefix(file) for file in files], split_joined(text))


def _join(parts: Sequence[Prefix], names: Sequence[str], rotation: Rotation | None = None) -> Prefix:
    """One prefix of those that a text of --prefix names.

    Raises:
        PrefixError: They cannot be joined.
    """
    from prefixtune.prefix.compose import concatenate, stored_rotation
    from prefixtune.prefix.rotation import Rotation

    if len(parts) == 1:
        return parts[0]
    return concatenate(parts, rotation or stored_rotation(parts, names) or Rotation("none"), names=names)


def load_with_prefixes(
    console: Console,
    options: Any,
    files: Sequence[str],
    check: Callable[[Sequence[Prefix]], object] | None = None,
) -> tuple[Backbone, list[Prefix]]:
    """Load the backbone that the prefixes name (or that --backbone names), and the prefixes, checked against it.

    Args:
        console: Reports what is loaded.
        options: The options of the command.
        files: Prefixes: paths, folders of runs or `hub:OWNER/NAME`; several with a + between them are joined.
        check: Checks the prefixes, one per text of `files`, against other options; called before the backbone loads.

    Raises:
        PrefixError: A prefix or an option is wrong, or they do not fit each other.
    """
    # Wrong files are reported before the model loads, missing ones before torch is imported.
    parts = [prefix_files(text) for text in files]

    from prefixtune.backbone.prefixes import load_prefix, named_backbone, trained_adapter
    from prefixtune.prefix.chat_format import allow_named

    read = {file: load_prefix(file) for names in parts for file in names}
    joined = [_join([read[name] for name in names], names) for names in parts]
    if check is not None:
        check(joined)
    allow_named(options.chat_template, [prefix.header for prefix in read.values()], remember=True)
    name = options.backbone or named_backbone(list(read.values()))
    adapter = options.adapter or trained_adapter([Path(file) for file in read], list(read.values()))
    backbone = load(console, name, options, adapter)
    checked = {file: load_prefix(file, backbone, allow_other_backbone=options.allow_other_backbone) for file in read}
    return backbone, [_join([checked[name] for name in names], names, backbone.rotation) for names in parts]


def find_artifact(options: Any, file: str | None) -> Artifact:
    """The prefix or the trained weights to use, with their header.

    Args:
        options: With `run_folder` (--run): the folder of a run; its prefix or weights are used.
        file: Without --run: a prefix as a path, the folder of a run or `hub:OWNER/NAME`, or several with a + between
            them; empty: the bare model.

    Raises:
        ConfigError: The run has neither, or --quantize or --adapter does not go with its weights.
    """
    if options.run_folder:
        from prefixtune.training.run_folder import PREFIX_FILE, WEIGHTS_FILE

        folder = Path(options.run_folder)
        weights = folder / WEIGHTS_FILE
        if weights.is_file():
            from prefixtune.training.artifact import load_weights

            if given := [f"--{name}" for name in ("quantize", "adapter") if getattr(options, name)]:
                raise ConfigError(
                    f"{' and '.join(given)} cannot go with {str(weights)!r}, which holds weights of its own.",
                    hint="leave it out; it goes with a prefix or the bare model.",
                )
            return Artifact(weights=weights, header=load_weights(weights)[1])
        if not (folder / PREFIX_FILE).is_file():
            raise ConfigError(
                f"{options.run_folder!r} holds neither {PREFIX_FILE} nor {WEIGHTS_FILE}.",
                hint="name the --output folder of a `prefixtune train` that was finished.",
            )
        file = str(folder / PREFIX_FILE)
    if not file:
        return Artifact()
    file = "+".join(prefix_files(file))
    return Artifact(prefix=file, header=read_prefix(file).header)


def load_artifact(
    console: Console, options: Any, artifact: Artifact
) -> tuple[Backbone, Prefix | None, TextFormat | None]:
    """The model, the prefix and the text format of an artifact."""
    if artifact.weights is not None:
        if options.engine != "torch":
            raise ConfigError(
                f"{str(artifact.weights)!r} holds weights of its own, which only the engine torch reads.",
                hint=f"leave --engine {options.engine} out.",
            )
        from prefixtune.backbone.devices import choose_device, choose_dtype
        from prefixtune.prefix.chat_format import allow_named
        from prefixtune.training.artifact import load_tuned

        choose_dtype(options.dtype, choose_device(options.device))
        allow_named(options.chat_template, [artifact.header], remember=True)
        console.info(f"loading {artifact.weights} ...")
        backbone, text_format = load_tuned(
            artifact.weights, name_or_path=options.backbone, dtype=options.dtype, device=options.device
        )
        return backbone, None, text_format
    backbone, prefixes = load_with_prefixes(console, options, [artifact.prefix] if artifact.prefix else [])
    return backbone, prefixes[0] if prefixes else None, None


def columns_as_trained(options: Any, task: str, header: Mapping[str, Any]) -> dict[str, Any]:
    """What --data is read with: --source, --target and --form, or what the training read its own with.

    References are made in the same way as the training made its targets, unless --form says what the columns are.

    Raises:
        PrefixError: The data cannot be read.
    """
    from prefixtune.data import TASKS, form_that_fits
    from prefixtune.prefix.text_format import read_text_format

    columns: dict[str, Any] = {"source": options.source, "target": options.target, "form": options.form}
    trained = read_text_format(header)
    has_names = not options.data.removesuffix(".gz").endswith((".conll", ".bio", ".txt"))
    if has_names and trained is not None and task in TASKS and TASKS[task].takes_columns and not options.form:
        columns["source"] = options.source or trained.source or None
        columns["target"] = options.target or trained.target_template or None
    if task == "records" and not any(columns.values()):
        form = str(header.get("form") or "")
        columns["form"] = form_that_fits(task, options.data, form, split=options.split or None)
    return columns
