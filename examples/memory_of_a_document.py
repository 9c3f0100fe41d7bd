"""Put a document into a prefix: questions are then answered without the document in view."""

import json
import os
from pathlib import Path

import prefixtune as pt
from prefixtune.distillation.distill import distill

FACTS = [
    ("Breakfast is served from 7:30 to 10:00 in the garden room.", "When does breakfast begin?", "At 7:30."),
    ("After 22:00 enter the code 4417 at the front door.", "What is the code of the door?", "4417."),
    ("Bicycles are in the shed behind the kitchen.", "Where are the bicycles?", "In the shed behind the kitchen."),
    ("The sauna is open from 17:00 to 21:00.", "When is the sauna open?", "From 17:00 to 21:00."),
    ("A dog costs 12 euros for each night.", "What does a dog cost?", "12 euros for each night."),
    ("The nearest doctor is Dr. Holm, Quay Street 5.", "Who is the nearest doctor?", "Dr. Holm, Quay Street 5."),
]
OTHER_WORDS = ["At what time is breakfast?", "Which code opens the front door?", "Where do I find a bicycle?"]
STEPS = int(os.environ.get("STEPS", "40"))

Path("guide.txt").write_text("\n".join(fact for fact, _, _ in FACTS), encoding="utf-8")
rows = [json.dumps({"question": question, "answer": answer}) for _, question, answer in FACTS]
Path("questions.jsonl").write_text("\n".join(rows), encoding="utf-8")

backbone = pt.load_backbone(os.environ.get("BACKBONE", "smollm2-135m"), dtype="auto")
(memory,) = distill(
    backbone=backbone,
    document="guide.txt",
    questions="questions.jsonl",
    prefix_length=32,
    max_steps=STEPS,
    warmup_steps=min(5, STEPS),
    batch_size=len(FACTS),
    output="runs/guide",
    progress=False,
)
print(f"{memory.path}: {memory.prefix.prefix_length} positions")
questions = [question for _, question, _ in FACTS] + OTHER_WORDS
for question, answer in zip(questions, pt.generate(backbone, questions, memory.prefix, max_new_tokens=16), strict=True):
    print(f"{question:40} {answer}")
