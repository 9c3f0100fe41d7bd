"""Serve two prefixes over one model, and ask both with OpenAI's client: requests share one running batch.

Needs `prefixtune[serve]` and `openai`.
"""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import openai

import prefixtune as pt

STEPS = int(os.environ.get("STEPS", "20"))
NAME = os.environ.get("BACKBONE", "smollm2-135m")
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo", "Japan": "Tokyo", "Egypt": "Cairo"}
WORDS = {"cold": "hot", "big": "small", "early": "late", "open": "closed", "dry": "wet", "old": "new"}

backbone = pt.load_backbone(NAME, dtype="auto")
os.makedirs("prefixes", exist_ok=True)
for name, words, pairs in (("capitals", "The capital of", CAPITALS), ("opposites", "The opposite of", WORDS)):
    examples = [{"source": source, "target": target} for source, target in pairs.items()]
    # The text around a source is stored with the prefix: clients send the source alone.
    options = {"prompt_format": f"{words} {{source}} is", "target_format": " {target}", "init_text": words}
    options |= {"max_steps": STEPS, "warmup_steps": min(5, STEPS), "batch_size": 6, "learning_rate": 5e-3}
    result = pt.train(backbone=backbone, examples=examples, output=f"runs/{name}", progress=False, **options)
    pt.save_prefix(f"prefixes/{name}.safetensors", result.prefix)

with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
arguments = ["--backbone", NAME, "--prefixes", "prefixes", "--port", str(port)]
server = subprocess.Popen([sys.executable, "-m", "prefixtune", "serve", *arguments], stdout=subprocess.DEVNULL)
try:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=60)
    print("models:", ", ".join(model.id for model in client.models.list()))

    def ask(model: str, prompt: str) -> str:
        """What a prefix answers."""
        done = client.completions.create(model=model, prompt=prompt, max_tokens=6, temperature=0)
        return f"{model:10} {prompt:10} -> {done.choices[0].text}"

    asked = [("capitals", "Greece"), ("opposites", "young"), ("capitals", "Kenya"), ("opposites", "full")]
    with ThreadPoolExecutor() as pool:
        print("\n".join(pool.map(lambda pair: ask(*pair), asked)))
    print("streamed: ", end="")
    for part in client.completions.create(
        model="capitals", prompt="Portugal", max_tokens=6, temperature=0, stream=True
    ):
        print(part.choices[0].text, end="|")
    print()
finally:
    server.terminate()
    server.wait(timeout=60)
