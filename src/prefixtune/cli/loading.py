"""What the options name: prefixes or trained weights, read and checked first; then the backbone and the engine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune.errors import ConfigError, short_repr

if TYPE_CHECKING:
    from prefixtune.backbone.backbone import Backbone
    from prefixtune.cli.decoding import BackboneOptions, EngineOptions
    from prefixtune.cli.options import ReadingOptions
    from prefixtune.data.registry import Reading
    from prefixtune.engine.base import Engine
    from prefixtune.prefix.prefix import Prefix
    from prefixtune.prefix.rotation import Rotation
    from prefixtune.prefix.text_format import TextFormat

DEFAULT_BACKBONE = "smollm2-135m"
_MOST_PLUSES = 64
"""Signs + in one text of --prefix, at most."""


@dataclass(frozen=True)
class Trained:
    """What trainings have made for a command, read and not yet on a backbone; empty for the bare model.

    Attributes:
        files: The files of prefixes that each text of --prefix names.
        read: File -> prefix.
        prefixes: One for each text: those of its files joined, to be checked against other options.
        weights: The file of the trained weights of another method.
        headers: Those of `prefixes` or `weights`; of the bare model an empty one.
    """

    files: Sequence[Sequence[str]] = ()
    read: Mapping[str, Prefix] = field(default_factory=dict)
    prefixes: Sequence[Prefix] = ()
    weights: Path | None = None
    headers: Sequence[Mapping[str, Any]] = ({},)


def read_trained(options: BackboneOptions, texts: Sequence[str], run: str | None = None) -> Trained:
    """Read what the texts of --prefix name, or the prefix or weights of a run.

    Args:
        options: Of the command.
        texts: Each a path, the folder of a run or `hub:OWNER/NAME`, or several with a + between them, to be joined.
        run: The folder of a run (--run), instead.

    Raises:
        PrefixError: A file is missing or wrong, prefixes cannot be joined, or an option does not go with weights.
    """
    if run:
        from prefixtune.training.run_folder import PREFIX_FILE, WEIGHTS_FILE

        if (weights := Path(run, WEIGHTS_FILE)).is_file():
            from prefixtune.training.artifact import load_weights

            if given := [options.flag(name) for name in ("quantize", "adapter", "engine") if options.has(name)]:
                raise ConfigError(
                    f"{' and '.join(given)} cannot go with {str(weights)!r}, which holds weights of its own.",
                    hint="leave it out; it goes with a prefix or the bare model.",
                )
            return Trained(weights=weights, headers=[load_weights(weights)[1]])
        if not Path(run, PREFIX_FILE).is_file():
            raise ConfigError(
                f"{run!r} holds neither {PREFIX_FILE} nor {WEIGHTS_FILE}.",
                hint="name the --output folder of a `prefixtune train` that was finished.",
            )
        texts = [run]
    if not texts:
        return Trained()

    from prefixtune.prefix.hub import prefix_file

    # A file that is missing is named before torch is imported.
    files = [[str(prefix_file(name)) for name in split_joined(text)] for text in texts]

    from prefixtune.backbone.prefixes import load_prefix

    read = {file: load_prefix(file) for names in files for file in names}
    prefixes = _joined(files, read)
    return Trained(files, read, prefixes, headers=[prefix.header for prefix in prefixes])


def _joined(
    files: Sequence[Sequence[str]], read: Mapping[str, Prefix], rotation: Rotation | None = None
) -> list[Prefix]:
    """One prefix for each text of --prefix.

    Before a model is loaded, those whose headers do not say how keys turn are joined as they are, to be checked.

    Raises:
        PrefixError: They cannot be joined.
    """
    from prefixtune.prefix.compose import concatenate, stored_rotation
    from prefixtune.prefix.rotation import Rotation

    def join(names: Sequence[str]) -> Prefix:
        parts = [read[name] for name in names]
        if len(parts) == 1:
            return parts[0]
        return concatenate(parts, rotation or stored_rotation(parts) or Rotation("none"), names=names)

    return [join(names) for names in files]


def load(options: Any, name: str, adapter: str | None = None, *, self_check: bool = True) -> Backbone:
    """Load a backbone with the `dtype`, `device` and `quantize` of the options, and report it.

    For an engine that has the weights in a file of its own, without them.
    """
    from prefixtune.backbone.load import load_backbone
    from prefixtune.backbone.shapes import load_shapes

    if getattr(options, "engine", "torch") != "torch":
        if adapter:
            raise ConfigError(f"--engine {options.engine} has no adapters.", hint="use --engine torch.")
        return load_shapes(name)
    options.console.info(f"loading {name}{f' with the adapter {adapter}' if adapter else ''} ...")
    settings = {key: getattr(options, key) for key in ("dtype", "device", "quantize")}
    backbone = load_backbone(name, adapter=adapter, self_check=self_check, **settings)
    options.console.info(f"{backbone!r}")
    return backbone


def load_trained(options: Any, trained: Trained) -> tuple[Backbone, list[Prefix], TextFormat | None]:
    """Load the backbone that --backbone or the headers name; what was trained is checked against it.

    Returns:
        The backbone, or the model with the trained weights; the prefixes; the text format that goes with weights.

    Raises:
        PrefixError: They do not fit each other.
    """
    from prefixtune.backbone.prefixes import load_prefix, named_backbone, trained_adapter
    from prefixtune.prefix.chat_format import allow_named

    read = list(trained.read.values())
    headers = trained.headers if trained.weights else [prefix.header for prefix in read]
    allow_named(options.chat_template, headers, remember=True)
    if trained.weights is not None:
        from prefixtune.training.artifact import load_tuned

        options.console.info(f"loading {trained.weights} ...")
        settings = {"name_or_path": options.backbone, "dtype": options.dtype, "device": options.device}
        backbone, text_format = load_tuned(trained.weights, **settings)
        return backbone, [], text_format
    adapter = options.adapter or trained_adapter(read)
    backbone = load(options, options.backbone or named_backbone(read), adapter)
    other = options.allow_other_backbone
    checked = {file: load_prefix(file, backbone, allow_other_backbone=other) for file in trained.read}
    # Some backbones have keys that cannot be moved: their prefixes are used alone.
    rotation = backbone.rotation if any(len(files) > 1 for files in trained.files) else None
    return backbone, _joined(trained.files, checked, rotation), None


@contextlib.contextmanager
def started_engine(
    options: EngineOptions, backbone: Backbone, num_texts: int, batch_size: int = 0
) -> Iterator[Engine | None]:
    """The engine of the options, while the block runs; None: torch's, which every call starts for itself.

    Args:
        options: Of the command.
        backbone: By `load`.
        num_texts: That are asked for.
        batch_size: Of them at once; 0: as many as suit the engine.

    Raises:
        PrefixError: It cannot start.
    """
    if options.engine == "torch":
        yield None
        return
    import torch

    from prefixtune.engine.start import start_engine
    from prefixtune.inference.config import texts_at_once

    options.console.info(f"starting {options.engine} ...")
    # Compiling takes minutes on a processor, and gains little there.
    on_gpu = options.engine == "vllm" and torch.cuda.is_available()
    eager = () if on_gpu else ("--enforce-eager",)
    num_slots = max(1, min(texts_at_once(batch_size, in_gpu_engine=on_gpu), num_texts))
    given: dict[str, Any] = {name: getattr(options, name) for name in ("gguf", "threads", "dtype")}
    given |= {"num_slots": num_slots, "python": options.vllm_python, "arguments": eager}
    with start_engine(options.engine, backbone, **given) as engine:
        options.console.info(engine.name)
        yield engine


def split_joined(text: str) -> list[str]:
    """The prefixes that a text of --prefix names: one, or several with a + between them, which are joined.

    A + in the name of a file or folder that exists is part of that name.

    >>> split_joined("manual.safetensors+runs/style"), split_joined("hub:me/poems")
    (['manual.safetensors', 'runs/style'], ['hub:me/poems'])

    Raises:
        ConfigError: A name is empty.
    """
    pieces, names = text.split("+"), list[str]()
    while pieces and len(pieces) <= _MOST_PLUSES:
        length = next((n for n in range(len(pieces), 1, -1) if os.path.lexists("+".join(pieces[:n]))), 1)
        names.append("+".join(pieces[:length]))
        pieces = pieces[length:]
    if pieces or "" in names:
        raise ConfigError(
            f"--prefix is {short_repr(text)}, which names no file, or too many.",
            hint=f"as in a+b, with one + between names, and fewer than {_MOST_PLUSES}.",
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


def read_as_trained(
    options: ReadingOptions, header: Mapping[str, Any], path: str, split: str | None, *, needs_targets: bool = False
) -> Reading:
    """Read examples as --task, --source, --target and --form say, or as the training read its own.

    References are made in the same way as the training made its targets, unless --form says what the columns are.

    Raises:
        PrefixError: They cannot be read, or --split is given for a file.
    """
    from prefixtune.data import TASKS, read_data
    from prefixtune.prefix.text_format import read_text_format

    if options.split and path == options.data and Path(path).is_file():
        raise ConfigError(f"--split is for folders and sets, but {path!r} is a file.", hint="leave it out.")
    task = options.task or str(header.get("task") or "records")
    source, target, trained = options.source, options.target, read_text_format(header)
    if trained is not None and task in TASKS and TASKS[task].form is not None and not options.form:
        source, target = source or trained.source or None, target or trained.target_template or None
    how = {"form": options.form, "prefer": str(header.get("form") or "")}
    return read_data(task, path, source=source, target=target, split=split, needs_targets=needs_targets, **how)
