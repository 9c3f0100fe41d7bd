"""Teach a small model a task with 24 examples, and see what it does with messages that it has not seen."""

import json
import os
from pathlib import Path

import prefixtune as pt
from prefixtune.training.presets import preset

DATA = Path(__file__).parent / "data"
STEPS = int(os.environ.get("STEPS", "24"))

backbone = pt.load_backbone(os.environ.get("BACKBONE", "smollm2-135m"), dtype="auto")
config = pt.TrainConfig(
    train=str(DATA / "bookings.jsonl"), source="message", target="booking", output="runs/first_prefix"
)
config = config.replace(**preset("quick", "records")).replace(max_steps=STEPS, warmup_steps=min(4, STEPS))
result = pt.train(config, backbone=backbone, progress=False)
print(f"{result.path}: {result.prefix.num_parameters:,} numbers, {result.path.stat().st_size:,} bytes")

tests = [json.loads(line) for line in (DATA / "bookings_test.jsonl").open(encoding="utf-8")]
outputs = pt.generate(backbone, [row["message"] for row in tests], result.prefix, max_new_tokens=24)
for row, output in zip(tests, outputs, strict=True):
    print(f"\n{row['message']}\n-> {output}{'' if output == row['booking'] else '   (wanted: ' + row['booking'] + ')'}")
