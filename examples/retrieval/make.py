"""Train small memories of made-up documents, one of each: memories/NAME.txt and memories/NAME.safetensors."""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from pathlib import Path

import prefixtune

COLOURS = ("amber", "black", "blue", "crimson", "golden", "green", "ivory", "scarlet", "silver", "white")
BIRDS = ("curlew", "falcon", "gannet", "heron", "kestrel", "lapwing", "osprey", "plover", "raven", "swift")
TOWNS = ("Ashby", "Corby", "Dunmore", "Exeter", "Hexham", "Kelso", "Ludlow", "Oban", "Ripon", "Selby", "Whitby")
DOCUMENT = "The {name} goes to {town}. It leaves at {time} from platform {platform}."
QUESTIONS = (
    ("town", "Where does the {name} go?", "What is the {name}'s destination?", "Which town does the {name} reach?"),
    ("time", "When does the {name} leave?", "When does the {name} start?", "At what time must I be on the {name}?"),
    ("platform", "From where does the {name} leave?", "Where does the {name} wait?", "Which platform has the {name}?"),
)
"""Two wordings of each question to train on, and a third, which no memory was trained on."""


def make_facts(count: int) -> dict[str, dict[str, str]]:
    """Made-up trains, the same at every call: the name of a memory -> what its document says."""
    rng, facts = random.Random(0), {}
    for colour, bird in [(colour, bird) for bird in BIRDS for colour in COLOURS][:count]:
        time = f"{rng.randrange(5, 23)}:{rng.choice(('00', '15', '30', '45'))}"
        there = {"town": rng.choice(TOWNS), "time": time, "platform": rng.choice("ABCDEFGH")}
        facts[f"{colour}-{bird}"] = {"name": f"{colour} {bird}".title(), **there}
    return facts


def main() -> None:
    """Make those that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memories", type=Path, default=Path("memories"), help="folder of the memories")
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--count", type=int, default=100, help="how many, at most 100")
    parser.add_argument("--prefix-length", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    backbone = prefixtune.load_backbone(args.backbone)
    args.memories.mkdir(parents=True, exist_ok=True)
    for name, facts in make_facts(args.count).items():
        path, document = args.memories / f"{name}.safetensors", DOCUMENT.format(**facts)
        if path.exists():
            continue
        examples = [
            {"source": wording.format(**facts), "target": facts[key]}
            for key, *wordings in QUESTIONS
            for wording in wordings[:2]
        ]
        with tempfile.TemporaryDirectory(dir=args.memories) as folder:
            prefixtune.train(
                backbone=backbone,
                examples=examples,
                prompt_format="Question: {source}\nAnswer:",
                target_format=" {target}",
                initialization="text",
                init_text=document,
                prefix_length=args.prefix_length,
                max_steps=args.steps,
                batch_size=len(examples),
                output=f"{folder}/run",
                progress=False,
            )
            path.with_suffix(".txt").write_text(document, encoding="utf-8")
            shutil.move(f"{folder}/run/prefix.safetensors", path)
        print(f"made {path}", flush=True)


if __name__ == "__main__":
    main()
