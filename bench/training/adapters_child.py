"""The library `adapters` as a side of the comparison, run in an environment of its own.

`adapters_peer` starts it with that environment's Python. It reads one JSON command a line from stdin and writes one
JSON answer a line to stdout; the first line is the job.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.training.steps import (
    BOTTLENECK_SIZE,
    gradients,
    make_optimizer,
    measure_peak,
    pad_pairs,
    set_weights,
    timed_step,
)

NAME = "prefix"
LOCATIONS = ("encoder_prefix", "self_prefix", "cross_prefix")
"""In the order of prefixtune's sites: encoder, decoder, cross."""


class AdaptersSide:
    """Prefix-tuning as the library's users run it: prefixes at all three sites, one right-padded row per pair.

    Under `sdpa` the decoder's attention is correct only if a mask hides something, so the decoder gets a mask.
    """

    def __init__(self, folder: str, attention: str, prefix_length: int) -> None:
        import adapters
        from transformers import BartForConditionalGeneration

        self.mask_decoder = attention == "sdpa"
        torch.manual_seed(0)
        self.model = BartForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        )
        adapters.init(self.model)
        config = adapters.PrefixTuningConfig(flat=False, prefix_length=prefix_length, bottleneck_size=BOTTLENECK_SIZE)
        self.model.add_adapter(NAME, config=config)
        self.model.train_adapter(NAME)
        self.model.train()
        self.prefixes = self.model.base_model.prefix_tuning.prefix_tunings[NAME]
        trained = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        if trained != {id(weight) for weight in self.weights()}:
            raise RuntimeError(f"adapters trains other parameters than those of {', '.join(LOCATIONS)}")
        self.optimizer = make_optimizer(self.weights())

    def loss(self, batch: list[tuple[list[int], list[list[int]]]]) -> Tensor:
        """Mean loss over target tokens, as the model computes it from `labels`."""
        config = self.model.config
        pairs = [(source, target) for source, targets in batch for target in targets]
        inputs = pad_pairs(
            pairs,
            pad_id=config.pad_token_id,
            decoder_start_id=config.decoder_start_token_id,
            mask_decoder=self.mask_decoder,
        )
        loss: Tensor = self.model(**inputs).loss
        return loss

    def backward(self, batch: list[tuple[list[int], list[list[int]]]]) -> float:
        """See `Trained`."""
        loss = self.loss(batch)
        loss.backward()
        return float(loss.detach())

    def weights(self) -> list[nn.Parameter]:
        """Per site: embedding, first layer's weight and bias, last layer's weight and bias."""
        weights = []
        for location in LOCATIONS:
            site = self.prefixes[location]
            first, _, last = site.control_trans
            weights += [site.wte.weight, first.weight, first.bias, last.weight, last.bias]
        return weights


class Child:
    """A side with the batches sent to it; its methods are the commands."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        self.side = AdaptersSide(job["folder"], job["attention"], job["prefix_length"])
        self.batches: list[Any] = []

    def facts(self) -> dict[str, Any]:
        """Versions, parameters and attention of this side."""
        return {
            "versions": {name: importlib.metadata.version(name) for name in ("adapters", "transformers", "torch")},
            "trained_parameters": sum(weight.numel() for weight in self.side.weights()),
            "attention": self.side.model.config._attn_implementation,
        }

    def start(self, batches: list[Any], weights: str) -> dict[str, Any]:
        """Start again with other batches, and with the parameters in a file, named by their indices."""
        self.batches = batches
        stored = load_file(weights)
        set_weights(self.side, [stored[str(index)] for index in range(len(stored))])
        return {}

    def gradients(self, batch: int, output: str, mask_decoder: bool | None) -> dict[str, Any]:
        """A batch's loss; its gradients go to a file. `mask_decoder` applies to this call only."""
        usual = self.side.mask_decoder
        self.side.mask_decoder = usual if mask_decoder is None else mask_decoder
        loss, found = gradients(self.side, self.batches[batch])
        self.side.mask_decoder = usual
        save_file({str(index): gradient for index, gradient in enumerate(found)}, output)
        return {"loss": loss}

    def step(self, batch: int) -> dict[str, Any]:
        """One optimizer step on a batch."""
        seconds, loss = timed_step(self.side, self.batches[batch])
        return {"seconds": seconds, "loss": loss}

    def memory(self, batches: list[Any]) -> dict[str, Any]:
        """Peak memory over a step on each batch; for a new process only."""
        return measure_peak(self.side, batches)


def main() -> None:
    """Answer commands until stdin ends."""
    # What a library prints must not mix with the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    child = Child(json.loads(sys.stdin.readline()))
    answer(child.facts())
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "start": child.start,
        "gradients": child.gradients,
        "step": child.step,
        "memory": child.memory,
    }
    for line in sys.stdin:
        command = json.loads(line)
        answer(commands[command.pop("command")](**command))


if __name__ == "__main__":
    main()
