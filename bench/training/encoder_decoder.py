"""Part `seq2seq`: a training step on an encoder-decoder of BART-base's size, against PEFT's and adapters'.

The backbone has random weights, which cost the same time as trained ones, and all sides read it from one folder. Its
dropout rates are zero: at BART's 0.1 PEFT and adapters would train with dropout, which takes time and is wrong for a
frozen backbone.

The sides do not all do the same:

- prefixtune: prefixes in the encoder, the decoder and the cross-attention, an MLP each; packed rows.
- adapters: the same prefixes and MLPs; one padded row per pair. It computes the same as prefixtune, which is
  checked; under `sdpa`, its default, only with a mask for the decoder that hides something. transformers' collator
  makes none, so here it gets one, and the table shows the difference without it.
- PEFT: a prefix in the decoder's self-attention only, one MLP (a third of the parameters); layers i and i + L/2 share
  a prefix, and the decoder's positions start at P. It does less work in a step than the others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.data import Batch, Data
from bench.peft_setup import model_folder, silence_peft
from bench.results import DifferenceError, Figure, Log, PeerError, Results
from bench.training.adapters_peer import AdaptersPeer
from bench.training.decoder import MEMORY_STEPS, measure_memory, prepare_batches, steps_of
from bench.training.interleave import Goal, Step, interleave, setting_figures
from bench.training.sides import (
    TOLERANCE,
    OurSide,
    PeftSide,
    distance,
    make_side,
    num_target_tokens,
    require_same_backbone,
)
from bench.training.steps import BOTTLENECK_SIZE, clone_weights, gradients, set_weights
from prefixtune.data.batching import pad

SHAPE = {"d_model": 768, "layers": 6, "attention_heads": 12, "ffn_dim": 3072}
QUICK_SHAPE = {"d_model": 96, "layers": 2, "attention_heads": 3, "ffn_dim": 192}
VOCABULARY = 50265
"""BART's; the last id is the padding."""

OURS = ("ours-fp32", "ours-bf16")
ATTENTIONS = {"adapters-eager": "eager", "adapters-sdpa": "sdpa"}
NAMES = {
    "peft-fp32": "PEFT fp32 (decoder prefix only)",
    "adapters-eager": "adapters fp32, eager",
    "adapters-sdpa": "adapters fp32, sdpa",
    "ours-fp32": "prefixtune fp32",
    "ours-bf16": "prefixtune bf16",
}

AGAINST = {
    "padded": "its own padded rows",
    "adapters-eager": "adapters (eager)",
    "adapters-sdpa": "adapters (sdpa)",
    "adapters-sdpa-unmasked": "adapters (sdpa, no decoder mask)",
}
"""Names of what prefixtune's packed step is compared with."""

RATIOS: list[Goal] = [(ours, other, None) for ours in OURS for other in ("peft-fp32", *ATTENTIONS)]


def run(
    data: Data,
    *,
    backbone_name: str,
    settings: list[tuple[int, int]],
    repeats: int,
    prefix_length: int,
    seed: int,
    quick: bool,
    adapters_python: Path | None,
    log: Log,
) -> Results:
    """Measure every setting (pairs per step, most targets of one source) with the tokenizer of `backbone_name`."""
    with tempfile.TemporaryDirectory(prefix="prefixtune-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        shape = make_backbone(folder, backbone_name, QUICK_SHAPE if quick else SHAPE, seed)
        batches_of = prepare_batches(data, str(folder), settings, repeats, prefix_length, seed)
        missing: dict[str, str] = {}
        # Memory first: this process is small now, and leaves the machine's memory to its children.
        memory = {
            setting: measure_all_memory(
                batches[: MEMORY_STEPS + 1], folder, prefix_length, adapters_python, missing, log
            )
            for setting, batches in batches_of.items()
        }
        sides = {variant: make_side(variant, prefix_length, str(folder)) for variant in ("peft-fp32", *OURS)}
        require_same_backbone(sides["peft-fp32"], sides["ours-fp32"])
        peers: dict[str, AdaptersPeer] = {}
        for variant, attention in ATTENTIONS.items():
            if variant not in missing:
                peers[variant] = AdaptersPeer(adapters_python, attention, folder, prefix_length)
                stack.callback(peers[variant].close)
        starts = {library: clone_weights(sides[f"{library}-fp32"]) for library in ("peft", "ours")}
        results: list[dict[str, Any]] = []
        figures: list[Figure] = []
        for setting, batches in batches_of.items():
            for variant, side in sides.items():
                set_weights(side, starts[variant.split("-")[0]])
            for peer in peers.values():
                peer.start(batches, starts["ours"])
            result = measure_setting(sides, peers, setting, batches, log)
            results.append({**result, "memory": memory[setting], "not_measured": missing})
            figures += report(results[-1])
        facts = {
            "backbone": {**shape, "weights": "random"},
            "prefix_length": prefix_length,
            **describe_sides(sides, peers),
            "not_measured": missing,
        }
    return {**facts, "settings": results}, figures


def measure_setting(
    sides: Mapping[str, PeftSide | OurSide],
    peers: Mapping[str, AdaptersPeer],
    setting: tuple[int, int],
    batches: list[Batch],
    log: Log,
) -> dict[str, Any]:
    """Differences between the sides, and their times.

    Raises:
        DifferenceError: See `check`.
    """
    batch_size, targets_per_source = setting
    log(f"encoder-decoder step: {batch_size} pairs, up to {targets_per_source} targets of a source")
    return {
        "batch_size": batch_size,
        "targets_per_source": targets_per_source,
        **check(sides, peers, batches[0]),
        **measure_time(sides, peers, batches, log),
    }


def describe_sides(sides: Mapping[str, PeftSide | OurSide], peers: Mapping[str, AdaptersPeer]) -> dict[str, Any]:
    """What the sides train and how they attend, for the results file."""
    trained = {variant: sum(weight.numel() for weight in side.weights()) for variant, side in sides.items()}
    return {
        "bottleneck_size": BOTTLENECK_SIZE,
        "trained_parameters": trained | {name: peer.facts["trained_parameters"] for name, peer in peers.items()},
        "peft_attention": sides["peft-fp32"].model.config._attn_implementation,
        "adapters": {variant: peer.facts for variant, peer in peers.items()},
    }


def make_backbone(folder: Path, tokenizer_name: str, shape: Mapping[str, int], seed: int) -> dict[str, int]:
    """Write a BART with random weights and another model's tokenizer; returns its sizes.

    Raises:
        BackboneError: There is no such tokenizer.
    """
    from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration

    silence_peft()
    tokenizer = AutoTokenizer.from_pretrained(model_folder(tokenizer_name))
    vocabulary = max(VOCABULARY, len(tokenizer) + 1)
    halves = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in shape.items()}
    config = BartConfig(
        vocab_size=vocabulary,
        d_model=shape["d_model"],
        **{name: value for name, value in halves.items() if not name.endswith("d_model")},
        pad_token_id=vocabulary - 1,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=None,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    torch.manual_seed(seed)
    model = BartForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"vocab_size": vocabulary, **shape, "parameters": sum(weight.numel() for weight in model.parameters())}


def measure_all_memory(
    batches: list[Batch],
    folder: Path,
    prefix_length: int,
    adapters_python: Path | None,
    missing: dict[str, str],
    log: Log,
) -> dict[str, dict[str, float]]:
    """Every side's peak memory, in a process of its own; a side that cannot run goes to `missing`, with the reason."""
    memory = {}
    for variant in NAMES:
        if variant not in ATTENTIONS:
            memory[variant] = measure_memory(variant, batches, str(folder), prefix_length, log)
        elif variant not in missing:
            try:
                with closing(AdaptersPeer(adapters_python, ATTENTIONS[variant], folder, prefix_length)) as peer:
                    memory[variant] = peer.memory(batches)
            except PeerError as error:
                missing[variant] = str(error)
                log(f"{NAMES[variant]} is not measured: {error}")
            else:
                log(f"memory of {NAMES[variant]}: peak {memory[variant]['peak_mib']:,.0f} MiB")
    return memory


def check(sides: Mapping[str, PeftSide | OurSide], peers: Mapping[str, AdaptersPeer], batch: Batch) -> dict[str, Any]:
    """Check that the packed step computes the same as padded rows and as adapters; returns losses and differences.

    Differences are relative: that of the loss, and the largest of the gradients of a site's parameters.

    Raises:
        DifferenceError: They differ by more than rounding.
    """
    ours = sides["ours-fp32"]
    assert isinstance(ours, OurSide)
    sites = list(ours.module.sites)
    losses = {}
    with torch.no_grad():
        for variant, side in sides.items():
            losses[variant] = float(side.loss(batch))
    packed = gradients(ours, batch)
    rows = pad(batch, pad_id=ours.backbone.pad_id, decoder_start_id=ours.backbone.decoder_start_id)
    differences = {"padded": compare(packed, loss_and_gradients(ours, ours.loss_of(rows)), sites)}
    for variant, peer in peers.items():
        losses[variant], peer_gradients = peer.gradients(0)
        differences[variant] = compare(packed, (losses[variant], peer_gradients), sites)
    uneven = len({len(target) for group in batch for target in group.targets}) > 1
    for name, measured in differences.items():
        wrong = {what: difference for what, difference in measured.items() if not difference <= TOLERANCE}
        # If the decoder has no padding, no mask corrects sdpa.
        if wrong and (uneven or name != "adapters-sdpa"):
            listed = ", ".join(f"{what} by {difference:.2e}" for what, difference in wrong.items())
            raise DifferenceError(
                f"prefixtune and {AGAINST[name]} differ in float32 (allowed {TOLERANCE:g}): {listed}."
            )
    if "adapters-sdpa" in peers:
        differences["adapters-sdpa-unmasked"] = compare(
            packed, peers["adapters-sdpa"].gradients(0, mask_decoder=False), sites
        )
    return {"first_losses": losses, "differences_from_prefixtune": differences}


def loss_and_gradients(side: OurSide, loss: Tensor) -> tuple[float, list[Tensor]]:
    """A loss and its gradients."""
    side.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    found = [weight.grad for weight in side.weights() if weight.grad is not None]
    side.optimizer.zero_grad(set_to_none=True)
    return float(loss.detach()), found


def compare(
    one: tuple[float, Sequence[Tensor]], other: tuple[float, Sequence[Tensor]], sites: Sequence[str]
) -> dict[str, float]:
    """Relative differences of loss and gradients, by site."""
    distances = [distance(a, b) for a, b in zip(one[1], other[1], strict=True)]
    count = len(distances) // len(sites)
    by_site = {f"{site}_gradient": max(distances[i * count : (i + 1) * count]) for i, site in enumerate(sites)}
    return {"loss": abs(one[0] - other[0]) / abs(one[0]), **by_site}


def measure_time(
    sides: Mapping[str, PeftSide | OurSide],
    peers: Mapping[str, AdaptersPeer],
    batches: list[Batch],
    log: Log,
) -> dict[str, Any]:
    """Run the same steps on all sides in turn, also on those in other processes."""
    steps: dict[str, Step] = {**steps_of(sides, batches), **{variant: peer.step for variant, peer in peers.items()}}
    return {
        "positions": {
            "padded": [sides["peft-fp32"].positions(batch) for batch in batches[1:]],
            "packed": [sides["ours-fp32"].positions(batch) for batch in batches[1:]],
        },
        **interleave(
            {variant: steps[variant] for variant in NAMES if variant in steps},
            [num_target_tokens(batch) for batch in batches],
            RATIOS,
            log,
        ),
    }


def report(result: dict[str, Any]) -> list[Figure]:
    """A setting's lines of the table."""
    title = f"{result['batch_size']} pairs, <= {result['targets_per_source']} per source"
    figures = [
        Figure("seq2seq", f"{title}: prefixtune and {AGAINST[other]}, largest difference", max(differences.values()))
        for other, differences in result["differences_from_prefixtune"].items()
    ]
    for variant, loss in result["first_losses"].items():
        figures.append(Figure("seq2seq", f"{title}: {NAMES[variant]}, first loss", loss, "nats/token"))
    for kind, positions in result["positions"].items():
        figures.append(Figure("seq2seq", f"{title}: {kind}, positions per step", median(positions)))
    return figures + setting_figures("seq2seq", title, result, NAMES, RATIOS, RATIOS)
