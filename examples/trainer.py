"""Train a prefix inside transformers' Trainer: its arguments, its schedules, its callbacks."""

import json
import os
from pathlib import Path

from transformers import Trainer, TrainingArguments

import prefixtune as pt
from prefixtune.interop.trainer import PrefixModel

DATA = Path(__file__).parent / "data"
STEPS = int(os.environ.get("STEPS", "24"))


def read(name: str) -> list[pt.Example]:
    """One example per line: a message, and the booking in it."""
    rows = [json.loads(line) for line in (DATA / name).open(encoding="utf-8")]
    return [pt.Example(row["message"], (row["booking"],)) for row in rows]


backbone = pt.load_backbone(os.environ.get("BACKBONE", "smollm2-135m"), dtype="auto")
# How the prefix starts is set here; everything else is the trainer's.
model = PrefixModel(backbone, pt.TrainConfig(prefix_length=16, init_text="name | number of people | day | time"))
arguments = TrainingArguments(
    "runs/trainer",
    max_steps=STEPS,
    learning_rate=1e-2,
    lr_scheduler_type="cosine",
    per_device_train_batch_size=8,
    logging_steps=max(1, STEPS // 4),
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    dataloader_pin_memory=False,
    seed=1,
)
# The collator reads examples of prefixtune, one row per target.
trainer = Trainer(model, arguments, train_dataset=read("bookings.jsonl"), data_collator=model.collator())
trainer.train()
path = model.save_pretrained("runs/trainer")
print(f"{path}: {path.stat().st_size:,} bytes")

bookings = pt.load(backbone, path)
for example in read("bookings_test.jsonl")[:4]:
    output = bookings.generate(example.source, max_new_tokens=24)
    print(f"\n{example.source}\n-> {output}")
