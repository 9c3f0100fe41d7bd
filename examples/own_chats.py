"""Teach a model a manner from sixteen conversations, read as other programs write them: `messages` with roles."""

import os
from pathlib import Path

import prefixtune as pt
from prefixtune.training.presets import preset

DATA = Path(__file__).parent / "data"
STEPS = int(os.environ.get("STEPS", "24"))

backbone = pt.load_backbone(os.environ.get("BACKBONE", "smollm2-135m"), dtype="auto")
config = pt.TrainConfig(train=str(DATA / "chats.jsonl"), output="runs/own_chats", **preset("quick", "records"))
result = pt.train(config.replace(max_steps=STEPS, warmup_steps=min(4, STEPS)), backbone=backbone, progress=False)
print(f"{result.path}: trained on the assistant's turns, through the model's own chat template")

question = "Do you have gluten-free bread?"
for name, model in (("bare model", pt.load(backbone)), ("with the prefix", pt.load(backbone, result.path))):
    print(f"\n{name}: {model.chat(question, max_new_tokens=40)}")

messages = [{"role": "user", "content": question}]
model = pt.load(backbone, result.path)
for text in ("My cake was too sweet.", "On Friday, please."):
    messages += [{"role": "assistant", "content": model.chat(messages, max_new_tokens=40)}]
    messages += [{"role": "user", "content": text}]
messages += [{"role": "assistant", "content": model.chat(messages, max_new_tokens=40)}]
print("\na conversation:")
for message in messages:
    print(f"  {message['role']}: {message['content']}")
