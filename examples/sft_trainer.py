"""Train a prefix on chats inside TRL's SFTTrainer, which fills in the model's chat template.

Needs `trl` and `datasets`.
"""

import json
import os
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import prefixtune as pt
from prefixtune.interop.trainer import PrefixModel

CHATS = Path(__file__).parent / "data" / "chats.jsonl"
STEPS = int(os.environ.get("STEPS", "10"))

backbone = pt.load_backbone(os.environ.get("BACKBONE", "smollm2-135m"), dtype="auto")
# Stored with the prefix: it reads conversations through the model's own template, as TRL trains it.
config = pt.TrainConfig(chat_template="model", prefix_length=16, init_text="You answer for a small bakery, briefly.")
model = PrefixModel(backbone, config)

chats = [json.loads(line)["messages"] for line in CHATS.open(encoding="utf-8")]
# As prompt and completion, so that the loss is on the last answer: for assistant_only_loss, which is for columns
# `messages`, a template needs {% generation %} marks.
rows = Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats])
arguments = SFTConfig(
    "runs/sft_trainer",
    max_steps=STEPS,
    learning_rate=1e-2,
    per_device_train_batch_size=8,
    max_length=256,
    bf16=False,  # TRL sets it by default; the backbone has its dtype already
    gradient_checkpointing=False,
    logging_steps=max(1, STEPS // 4),
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    dataloader_pin_memory=False,
    seed=1,
)
SFTTrainer(model, arguments, train_dataset=rows, processing_class=backbone.tokenizer).train()
path = model.save_pretrained("runs/sft_trainer")
print(f"{path}: {path.stat().st_size:,} bytes")

question = "Do you have anything without eggs?"
for name, answers in (("bare model", pt.load(backbone)), ("with the prefix", pt.load(backbone, path))):
    print(f"\n{name}: {answers.chat(question, max_new_tokens=40)}")
