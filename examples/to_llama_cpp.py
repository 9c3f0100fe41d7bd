"""Write a prefix as a state that llama.cpp's server restores into a slot, and say how it is used there."""

import os
from pathlib import Path

import prefixtune as pt
from prefixtune.interop.llama_cpp.export import export_llama_cpp

STEPS = int(os.environ.get("STEPS", "20"))
PAIRS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo", "Japan": "Tokyo", "Egypt": "Cairo"}

backbone = pt.load_backbone(os.environ.get("BACKBONE", "smollm2-135m"), dtype="auto")
result = pt.train(
    backbone=backbone,
    examples=[{"source": country, "target": capital} for country, capital in PAIRS.items()],
    max_steps=STEPS,
    warmup_steps=min(5, STEPS),
    batch_size=6,
    prompt_format="The capital of {source} is",
    target_format=" {target}",
    init_text="The capital of",
    learning_rate=5e-3,
    output="runs/to_llama_cpp",
    progress=False,
)
print("here:", pt.generate(backbone, ["Greece", "Kenya"], result.prefix, max_new_tokens=6))

report = export_llama_cpp(result.prefix, backbone, "exported", name="capitals")
for path in sorted(Path("exported").iterdir()):
    print(f"{path.stat().st_size:10,}  {path}")
stand_in = report["placeholders"]
print(f"In a request, {len(stand_in)} placeholder tokens stand for the prefix: {stand_in[:4]} ...")
