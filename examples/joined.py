"""Three prefixes, each with facts of its own: mixed in one batch, and joined into one prefix that knows most of it."""

import os

import prefixtune as pt
from prefixtune.prefix.compose import concatenate
from prefixtune.training.train import train_together

TRAINS = {"Gannet": ("Ashby", "9:15"), "Heron": ("Oban", "14:30"), "Plover": ("Kelso", "20:45")}
WORDINGS = (
    ("Where does the {} go?", "What is the destination of the {}?"),
    ("When does the {} leave?", "At what time does the {} start?"),
)
STEPS = int(os.environ.get("STEPS", "40"))

backbone = pt.load_backbone(os.environ.get("BACKBONE", "smollm2-135m"), dtype="auto")
configs, examples = [], []
for name, facts in TRAINS.items():
    examples.append(
        [
            pt.Example(wording.format(name), (fact,))
            for wordings, fact in zip(WORDINGS, facts, strict=True)
            for wording in wordings
        ]
    )
    configs.append(
        pt.TrainConfig(
            prompt_format="Question: {source}\nAnswer:",
            target_format=" {target}",
            initialization="text",
            init_text=f"The {name} goes to {facts[0]}. It leaves at {facts[1]}.",
            prefix_length=12,
            beside="self",  # samples see the others beside it: it learns to be joined
            max_steps=STEPS,
            warmup_steps=min(5, STEPS),
            batch_size=4,
            output=f"runs/{name}",
        )
    )
prefixes = [result.prefix for result in train_together(configs, backbone=backbone, examples=examples)]

questions = [wordings[0].format(name) for wordings in WORDINGS for name in TRAINS]
own = pt.generate(backbone, questions, prefixes * 2, max_new_tokens=8)  # six rows, three prefixes, one batch
together = concatenate(prefixes, backbone.rotation, names=list(TRAINS))
joined = pt.generate(backbone, questions, together, max_new_tokens=8)
bare = pt.generate(backbone, questions, None, text_format=prefixes[0].header["text_format"], max_new_tokens=8)
print(f"{'':30} {'its own prefix':16} {'all three joined':18} none")
for row in zip(questions, own, joined, bare, strict=True):
    print("{:30} {:16} {:18} {!r}".format(*row))
