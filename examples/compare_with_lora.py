"""The same 24 examples and as many steps: a prefix, and LoRA at two learning rates, scored on messages not seen.

Eight messages and one seed: a way to compare, not a result.

Needs `prefixtune[lora]`.
"""

import json
import os
import time
from pathlib import Path

import prefixtune as pt
from prefixtune.training.artifact import load_tuned
from prefixtune.training.presets import preset

DATA = Path(__file__).parent / "data"
STEPS = int(os.environ.get("STEPS", "24"))
NAME = os.environ.get("BACKBONE", "smollm2-135m")

tests = [json.loads(line) for line in (DATA / "bookings_test.jsonl").open(encoding="utf-8")]
messages = [row["message"] for row in tests]
common = {
    "backbone": NAME,
    "dtype": "auto",
    "train": str(DATA / "bookings.jsonl"),
    "source": "message",
    "target": "booking",
    "max_steps": STEPS,
    "warmup_steps": min(4, STEPS),
    "hold_out": 0.1,
    "eval_every": 4,
    "save_dtype": "bfloat16",
}
runs = {
    "prefix, P = 64": {**preset("quick", "records"), **common},
    "LoRA, rate 3e-3": {**common, "method": "lora", "learning_rate": 3e-3},
    "LoRA, rate 8e-3": {**common, "method": "lora", "learning_rate": 8e-3},
}
print(f"{'':16} {'parameters':>10} {'bytes':>10} {'seconds':>8}   right")
for index, (name, options) in enumerate(runs.items()):
    started = time.monotonic()
    result = pt.train({**options, "output": f"runs/compare-{index}"}, progress=False)
    seconds = time.monotonic() - started
    if result.prefix is not None:
        outputs = pt.generate(NAME, messages, result.prefix, max_new_tokens=24)
    else:
        tuned, text_format = load_tuned(result.path, dtype="auto")
        outputs = pt.generate(tuned, messages, text_format=text_format, max_new_tokens=24)
    right = sum(output == row["booking"] for output, row in zip(outputs, tests, strict=True))
    size = result.path.stat().st_size
    print(f"{name:16} {result.num_trained:10,} {size:10,} {seconds:8.0f}   {right} of {len(tests)}")
