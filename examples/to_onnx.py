"""Write a backbone as an ONNX graph with a prefix as its first past, and generate by numpy and ONNX Runtime alone.

It needs `pip install '.[export]'`. The machine that runs the graph needs onnxruntime, safetensors and tokenizers.
"""

import json
import os

import numpy as np


def generate(run, facts, past, prompts, max_new_tokens=40):
    """Each prompt's greedy continuation; `run` takes the graph's inputs by name, and returns its outputs in order."""
    rows, longest = len(prompts), max(map(len, prompts))
    ids = np.array([[facts["pad_id"]] * (longest - len(prompt)) + prompt for prompt in prompts])
    real = np.array([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    names = [f"past_key_values.{layer}.{part}" for layer in range(facts["num_layers"]) for part in ("key", "value")]
    past = {name: np.repeat(past[name], rows, axis=0) for name in names}
    length = past[names[0]].shape[2]
    mask = np.pad(real, ((0, 0), (length, 0)), constant_values=1)
    positions = length + np.maximum(real.cumsum(axis=1) - 1, 0)
    outputs, ended = [[] for _ in prompts], [False] * rows
    while not all(ended) and max_new_tokens:
        logits, *present = run({"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past})
        past, max_new_tokens = dict(zip(names, present, strict=True)), max_new_tokens - 1
        ids = logits[:, -1].argmax(axis=-1)[:, None]
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        positions = positions[:, -1:] + 1
        for row, token in enumerate(ids[:, 0].tolist()):
            ended[row] |= token in facts["end_ids"]
            outputs[row] += [] if ended[row] else [token]
    return outputs


if __name__ == "__main__":
    import prefixtune as pt
    from prefixtune.interop.onnx.export import export_onnx

    steps = int(os.environ.get("STEPS", "20"))
    capitals = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo", "Japan": "Tokyo"}
    rows = [{"source": country, "target": capital} for country, capital in capitals.items()]
    shape = {"prompt_format": "The capital of {source} is", "target_format": " {target}"}
    backbone = pt.load_backbone(os.environ.get("BACKBONE", "smollm2-135m"), dtype="float32")
    trained = pt.train(
        backbone=backbone, examples=rows, max_steps=steps, warmup_steps=2, output="runs/to_onnx", **shape
    )
    export_onnx(trained.prefix, backbone, "exported-onnx")

    import onnxruntime
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    with open("exported-onnx/export.json", encoding="utf-8") as file:
        facts = json.load(file)
    session = onnxruntime.InferenceSession("exported-onnx/model.onnx")
    tokenizer, past = Tokenizer.from_file("exported-onnx/tokenizer.json"), load_file("exported-onnx/past.safetensors")
    texts = [facts["text_format"]["prompt"].replace("{source}", country) for country in ("Greece", "Kenya")]
    prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    outputs = generate(lambda feed: session.run(None, feed), facts, past, prompts)
    print("from the graph:", [tokenizer.decode(ids) for ids in outputs])
