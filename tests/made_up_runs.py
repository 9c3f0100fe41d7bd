"""Folders as the commands write them, with made-up figures."""

import json
import math
import random

PLACES = ("Aromi", "Bibimbap House", "Clowns", "Cotto", "Fitzbillies", "Green Man", "Loch Fyne", "Strada", "Wildwood")
KINDS = ("coffee shop", "pub", "restaurant")
AREAS = ("riverside", "city centre")
MACHINE = {"cpu": "2 cores", "memory_gib": 24, "gpu": None}
VERSIONS = {"prefixtune": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0"}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def training(folder, *, steps=200, final=1.3, seed=0, end=True):
    """A training run: `config.toml`, `events.jsonl`, `prefix.safetensors`."""
    chance = random.Random(f"training {seed}")
    events = [{"event": "start", "step": 0, "total_steps": steps, "num_trained": 1_234_432, "num_stored": 92_160}]
    best = math.inf
    for step in range(1, steps + 1):
        loss = final + 1.6 * math.exp(-5 * step / steps) + chance.gauss(0, 0.12)
        tokens = chance.randint(300, 500)
        events.append(
            {
                "event": "step",
                "step": step,
                "loss": 28 * loss,
                "loss_per_token": loss,
                "lr": 1e-3,
                "target_tokens": tokens,
                "seconds": 1.5,
            }
        )
        if step % (steps // 8 or 1) == 0:
            development = final + 0.04 + 1.2 * math.exp(-5 * step / steps) + 0.05 * (step / steps) ** 3
            best = min(best, development)
            events.append({"event": "evaluation", "step": step, "loss": development, "best_loss": best})
    write_lines(folder / "events.jsonl", [*events, {"event": "end", "step": steps}] if end else events)
    (folder / "config.toml").write_text(
        f'backbone = "smollm2-135m"\ntask = "e2e"\ntrain = "train.jsonl"\nprefix_length = 10\nseed = {seed}\n'
        "learning_rate = 0.001\n"
    )
    (folder / "prefix.safetensors").write_bytes(b"\0" * 371_000)
    return folder


def examples(count, skill, seed=0):
    """Outputs of a system; at skill 1 every one is a reference."""
    chance, luck = random.Random("examples"), random.Random(f"outputs {skill} {seed}")
    rows = []
    for number in range(1, count + 1):
        place, kind, area = chance.choice(PLACES), chance.choice(KINDS), chance.choice(AREAS)
        references = [f"{place} is a {kind} in the {area} area.", f"In the {area} there is a {kind} called {place}."]
        wrong = f"{place} is a {luck.choice(KINDS)}. It is in the {luck.choice(AREAS)}, near {luck.choice(PLACES)}."
        rows.append(
            {
                "number": number,
                "source": f"name : {place} | Type : {kind} | area : {area}",
                "references": references,
                "output": luck.choice(references) if luck.random() < skill else wrong,
                "groups": {"type": kind, "seen": "seen" if area == "riverside" else "unseen"},
            }
        )
    return rows


def measure(score, width=0.0, *, higher=True, name="made up"):
    return {
        "score": score,
        "implementation": name,
        "higher_is_better": higher,
        "interval": [score - width, score + width] if width else None,
    }


def evaluation(folder, score=60.0, *, title="prefix", method="prefix", count=60, seed=0, width=1.9, **changes):
    """An evaluation: `evaluation.json` and `outputs.jsonl`."""

    def scores(score):
        score = max(score, width)
        return {
            "bleu": measure(score, width, name="sacrebleu 2.6.0 (lower-case, 13a)"),
            "meteor": measure(0.2 + score / 260, width / 300, name="meteor 1.5"),
            "ter": measure(0.95 - score / 120, width / 120, higher=False, name="tercom"),
        }

    values = {
        "kind": "evaluation",
        "title": title,
        "task": "e2e",
        "data": "test.jsonl.gz",
        "split": "test",
        "num_examples": count,
        "method": method,
        "backbone": "smollm2-135m",
        "prefix": f"{title}.safetensors",
        "scores": scores(score),
        "groups": {
            "type": {
                kind: {"num_examples": 20, "scores": scores(score + 4 - 5 * number)}
                for number, kind in enumerate(KINDS)
            },
            "seen": {
                "seen": {"num_examples": 32, "scores": scores(score + 3)},
                "unseen": {"num_examples": 28, "scores": scores(score - 9)},
            },
        },
        "settings": {"decoding": {"num_beams": 5, "min_new_tokens": 5, "max_new_tokens": 100}, "batch_size": 16},
        "seconds": 184.2,
        "machine": MACHINE,
        "versions": VERSIONS,
        **changes,
    }
    write(folder / "evaluation.json", values)
    write_lines(folder / "outputs.jsonl", examples(count, min(max(score / 80, 0), 1), seed))
    return folder


SCORES = {"prefix": 62.4, "fine-tuning": 63.9, "adapter": 61.7, "lora": 62.2, "zero-shot": 6.1}


def five_runs(folder):
    """Five runs that were trained and evaluated on the same data."""
    return [
        evaluation(
            training(folder / name, final=2.2 - score / 75, steps=160), score, title=name, method=name, seed=seed
        )
        for seed, (name, score) in enumerate(SCORES.items())
    ]
