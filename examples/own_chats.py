"""Teach a model a manner from 28 conversations, read as other programs write them: `messages` with roles."""

import json
import os
from pathlib import Path

import prefixtune as pt
from prefixtune.training.presets import preset

DATA = Path(__file__).parent / "data"
STEPS = int(os.environ.get("STEPS", "16"))

backbone = pt.load_backbone(os.environ.get("BACKBONE", "smollm2-135m"), dtype="auto")
config = pt.TrainConfig(train=str(DATA / "chats.jsonl"), output="runs/own_chats", **preset("quick", "records"))
config = config.replace(max_steps=STEPS, warmup_steps=min(4, STEPS), batch_size=8)
result = pt.train(config, backbone=backbone, progress=False)
print(f"{result.path}: trained on the assistant's turns, through the model's own chat template")

question = "Do you have gluten-free bread?"
for name, model in (("bare model", pt.load(backbone)), ("with the prefix", pt.load(backbone, result.path))):
    print(f"\n{name}: {model.chat(question, max_new_tokens=40)}")

print("\nconversations that it was not trained on:")
for line in (DATA / "chats_test.jsonl").open(encoding="utf-8"):
    messages = json.loads(line)["messages"]
    for turn in range(1, len(messages), 2):
        said, wanted = model.chat(messages[:turn], max_new_tokens=40), messages[turn]["content"]
        print(f"  {messages[turn - 1]['content']}\n    {said}{'' if said == wanted else f'   (wanted: {wanted})'}")
