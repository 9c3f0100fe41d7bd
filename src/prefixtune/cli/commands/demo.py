"""`prefixtune demo`: the main job on a small set, before and after."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune.cli.common import DEFAULT_BACKBONE, AddCommand, add_json_and_quiet, print_json, run_training
from prefixtune.errors import ConfigError
from prefixtune.training.config import TrainConfig
from prefixtune.utils.console import Console

if TYPE_CHECKING:
    from prefixtune.prefix.prefix import Prefix

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    """`prefixtune demo`: the main job on a small set, before and after."""
    from prefixtune.backbone.load import load_backbone
    from prefixtune.backbone.packaged import prepare as prepare_backbone
    from prefixtune.data.toy.table_to_text import make_toy
    from prefixtune.evaluation.evaluate import evaluate
    from prefixtune.inference.config import GenerateConfig
    from prefixtune.report import loss_plot
    from prefixtune.utils.files import write_text
    from prefixtune.utils.locks import claim_folder

    if options.steps < 1:
        raise ConfigError(f"--steps is {options.steps}, but must be at least 1.", hint="100 is a good number.")
    console = Console(quiet=options.quiet)
    folder = Path(options.output)
    _earlier_files(folder)
    # A demo that runs there keeps its files.
    with claim_folder(folder):
        for path in _earlier_files(folder):
            path.unlink()
    prepare_backbone(DEFAULT_BACKBONE, report=console.info)
    backbone = load_backbone(DEFAULT_BACKBONE, dtype="auto")
    console.info(f"{backbone!r}")
    examples, held_out = make_toy()
    # A notice takes about 30 tokens; the bare model would ramble on.
    decoding = GenerateConfig(max_new_tokens=48, batch_size=20)

    def measured(title: str, prefix: Prefix | None) -> Any:
        with console.progress(title, len(held_out)) as bar:
            return evaluate(backbone, held_out, prefix, config=decoding, on_batch=bar.update)

    before = measured("held-out tables, before", None)
    config = TrainConfig(
        task="toy",
        output=str(folder),
        max_steps=options.steps,
        batch_size=8,
        learning_rate=2e-3,
        warmup_steps=10,
        eval_every=0,
        init_text="Announce the night train:",
    )
    result = run_training(console, config, backbone=backbone, examples=examples)
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
        print_json(figures)
    else:
        show_demo(console, figures)
    return 0


def _earlier_files(folder: Path) -> list[Path]:
    """The files of an earlier demo.

    Raises:
        ConfigError: The path holds anything that no demo wrote.
    """
    if not folder.exists():
        return []
    known = {"config.toml", "events.jsonl", "prefix.safetensors", "state.safetensors", "loss.png", "demo.json"}
    # What a killed one left is hidden.
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    found = {name for name in names if not name.startswith(".")}
    config = folder / "config.toml"
    if found - known or (config.exists() and 'task = "toy"' not in config.read_text(encoding="utf-8")):
        raise ConfigError(f"{str(folder)!r} holds something else than a demo.", hint="choose another --output.")
    return [folder / name for name in sorted(found)]


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
            ["BLEU (sacrebleu, 13a)", f"{figures['bleu_before']:.2f}", f"{figures['bleu_after']:.2f}"],
            ["word for word right", f"{figures['exact_before']} of {count}", f"{figures['exact_after']} of {count}"],
        ],
        result=True,
    )
    share = figures["stored_parameters"] / figures["backbone_parameters"]
    print(f"parameters: {figures['backbone_parameters']:,} frozen, {figures['trained_parameters']:,} trained,", end=" ")
    print(f"{figures['stored_parameters']:,} stored ({share:.2%} of the backbone)")
    print(f"the prefix: {figures['file']} ({figures['file_bytes']:,} bytes); the loss: {figures['loss_plot']}")


def register(command: AddCommand) -> None:
    """Add the command and its options to the command line."""
    parser = command(
        "demo",
        run,
        "train a prefix on a small set of night-train notices and show before and after",
        "Takes a few minutes on two cores, and downloads the default backbone (93 MB) once.",
    )
    parser.add_argument("--output", default="runs/demo", help="folder of the run (default: runs/demo); replaced")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: 100)")
    add_json_and_quiet(parser, "the figures")
