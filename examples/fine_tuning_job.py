"""Serve a model, and let OpenAI's client train it: upload examples, ask for a job, follow it, ask the new model.

Needs `prefixtune[serve]` and `openai`.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import openai

STEPS = int(os.environ.get("STEPS", "20"))
NAME = os.environ.get("BACKBONE", "smollm2-135m")
ORDERS = {
    "Two bagels and a tea, please.": "2 x bagel; 1 x tea",
    "I'd like one muffin and three coffees.": "1 x muffin; 3 x coffee",
    "Could we have a scone and two juices?": "1 x scone; 2 x juice",
    "Four teas and four muffins to go.": "4 x tea; 4 x muffin",
    "One coffee, and also two scones.": "1 x coffee; 2 x scone",
    "We take three juices and a bagel.": "3 x juice; 1 x bagel",
    "Hi, two coffees and two muffins please.": "2 x coffee; 2 x muffin",
    "Can I get a tea and three bagels?": "1 x tea; 3 x bagel",
}
with open("orders.jsonl", "w") as file:
    for text, line in ORDERS.items():
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": line}]
        print(json.dumps({"messages": messages}), file=file)

os.makedirs("prefixes", exist_ok=True)
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
arguments = ["--backbone", NAME, "--prefixes", "prefixes", "--port", str(port)]
server = subprocess.Popen([sys.executable, "-m", "prefixtune", "serve", *arguments], stdout=subprocess.DEVNULL)
try:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=60)
    model = next(iter(client.models.list())).id
    uploaded = client.files.create(file=Path("orders.jsonl"), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=model, training_file=uploaded.id, extra_body={"prefixtune": {"name": "till", "max_steps": STEPS}}
    )
    print(job.model, job.status)
    while job.status in ("queued", "running"):
        time.sleep(0.5)
        job = client.fine_tuning.jobs.retrieve(job.id)
    for event in reversed(list(client.fine_tuning.jobs.list_events(job.id))):
        if event.type == "message" or event.data["step"] in (1, STEPS // 2, STEPS):
            print(" ", event.message)
    print(job.status, job.fine_tuned_model, job.trained_tokens, "tokens")
    for asked in ("Three scones and one tea, please.", "I'd like two juices and a muffin."):
        for name in (model, job.fine_tuned_model):
            messages = [{"role": "user", "content": asked}]
            done = client.chat.completions.create(model=name, messages=messages, max_tokens=16, temperature=0)
            print(f"{name:12} {asked} -> {done.choices[0].message.content.strip()!r}")
finally:
    server.terminate()
    server.wait(timeout=60)
