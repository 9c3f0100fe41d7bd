"""Three prefixes, each with facts of its own: mixed in one batch, and joined into one prefix that knows all of them."""

import os

import prefixtune as pt
from prefixtune.prefix.compose import concatenate

TRAINS = {
    "Gannet": ("Ashby", "9:15"),
    "Heron": ("Oban", "14:30"),
    "Plover": ("Kelso", "20:45"),
}
STEPS = int(os.environ.get("STEPS", "30"))

backbone = pt.load_backbone(os.environ.get("BACKBONE", "smollm2-135m"), dtype="auto")
prefixes = {}
for name, (town, time) in TRAINS.items():
    result = pt.train(
        backbone=backbone,
        examples=[
            {"source": f"Where does the {name} go?", "target": town},
            {"source": f"What is the destination of the {name}?", "target": town},
            {"source": f"When does the {name} leave?", "target": time},
            {"source": f"At what time does the {name} start?", "target": time},
        ],
        prompt_format="Question: {source}\nAnswer:",
        target_format=" {target}",
        initialization="text",
        init_text=f"The {name} goes to {town}. It leaves at {time}.",
        prefix_length=12,
        max_steps=STEPS,
        warmup_steps=min(5, STEPS),
        batch_size=4,
        output=f"runs/{name}",
        progress=False,
    )
    prefixes[name] = result.prefix
    print(f"{result.path}: {result.path.stat().st_size:,} bytes")

questions = [
    f"{start} {name} {end}"
    for start, end in (("Where does the", "go?"), ("When does the", "leave?"))
    for name in TRAINS
]
own = pt.generate(
    backbone, questions, [*prefixes.values()] * 2, max_new_tokens=8
)  # six rows, three prefixes, one batch
together = concatenate([*prefixes.values()], backbone.rotation, names=list(prefixes))
joined = pt.generate(backbone, questions, together, max_new_tokens=8)
bare = pt.generate(backbone, questions, None, max_new_tokens=8)
print(f"\n{'':30} {'its own prefix':16} {'all three joined':18} none")
for row in zip(questions, own, joined, bare, strict=True):
    print("{:30} {:16} {:18} {!r}".format(*row))
