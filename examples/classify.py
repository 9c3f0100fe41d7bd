"""Sort messages into three labels: a prefix that classifies, with the probability of each label."""

import os

import prefixtune as pt
from prefixtune.inference.classify import classify

MESSAGES = {
    "booking": [
        "A table for four on Friday at eight, please.",
        "Could we come on Sunday at one? We are six.",
        "I'd like to reserve for two on Tuesday evening.",
        "Have you got room for ten of us on Saturday?",
        "Lunch for three on Monday, name Rossi.",
    ],
    "cancel": [
        "Sorry, we cannot come tonight.",
        "Please delete our table for Friday, my son is ill.",
        "We have to call off the dinner on Tuesday.",
        "I won't need the reservation any more.",
        "Our plans have changed, so we are not coming on Sunday.",
    ],
    "lost": [
        "I think I left my umbrella under the chair.",
        "Has somebody found a black wallet?",
        "My daughter forgot her teddy bear at your place.",
        "Did I leave my glasses on the table by the window?",
        "A grey scarf of mine must still be with you.",
    ],
}
TESTS = [
    "Is there a table for two left on Thursday at seven?",
    "We are too tired to come this evening, sorry.",
    "Have you seen a red glove near the door?",
    "Three of us would love to eat with you on Wednesday.",
]
STEPS = int(os.environ.get("STEPS", "40"))

backbone = pt.load_backbone(os.environ.get("BACKBONE", "smollm2-135m"), dtype="auto")
result = pt.train(
    backbone=backbone,
    task="classification",
    examples=[{"source": text, "target": label} for label, texts in MESSAGES.items() for text in texts],
    init_text="Is this message a booking, does it cancel one, or was something lost?",
    max_steps=STEPS,
    warmup_steps=min(5, STEPS),
    output="runs/classify",
    progress=False,
)
for text, prediction in zip(TESTS, classify(backbone, TESTS, result.prefix), strict=True):
    shares = ", ".join(f"{label} {share:.2f}" for label, share in sorted(prediction.probabilities.items()))
    print(f"{text}\n  {prediction.label}   ({shares})")
