"""Decode with a compiled step and without, on a tiny windowed model, and say whether the tokens are the same.

A program of its own: the shape checks that the tests install would be compiled too.
"""

from __future__ import annotations

import sys

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from prefixtune.prefix.prefix import Prefix
from zoo import make_model, make_tokenizer

tokenizer = make_tokenizer()
backbone = Backbone.from_model(make_model("mistral", tokenizer, num_hidden_layers=2), tokenizer, "tiny-mistral")
torch.manual_seed(0)
prefixes = [
    Prefix(
        {
            "decoder": tuple(
                (torch.randn(s.num_kv_heads, length, s.key_dim), torch.randn(s.num_kv_heads, length, s.value_dim))
                for s in backbone.geometry["decoder"]
            )
        }
    )
    for length in (4, 6)
]
prompts = [[5, 6, 7, 8, 9, 10], [20, 21, 22]]
plain = generate_ids(backbone, prompts, prefixes, config=GenerateConfig(max_new_tokens=10))
torch._dynamo.utils.counters.clear()
config = GenerateConfig(max_new_tokens=10, cache="static", compile=True)
compiled = generate_ids(backbone, prompts, prefixes, config=config)
captured = torch._dynamo.utils.counters["stats"]["calls_captured"]
print(plain, compiled, captured)
sys.exit(0 if plain == compiled and captured > 0 else 1)
