"""Part `seq2seq`: a training step on an encoder-decoder of BART-base's size, against PEFT's and adapters'.

The backbone has random weights, which take as long as trained ones, and all sides read it from one folder. Its dropout
rates are zero: at BART's 0.1 PEFT and adapters would train with dropout on, which takes time and is not wanted in a
frozen backbone.

What the sides do is not the same in all:

- prefixtune: prefixes in the encoder, the decoder and the cross-attention, an MLP each; packed rows.
- adapters: the same prefixes and MLPs; one padded row per pair. It computes what prefixtune does, which is checked;
  under `sdpa`, its default, only with a mask for the decoder that hides something. transformers' collator gives none,
  so here it gets one, and the table says how far off it is without.
- PEFT: a prefix in the decoder's self-attention alone, one MLP (a third of the parameters); layers i and i + L/2 share
  a prefix, and the decoder's positions begin at P. It does less than the others in a step.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any

import torch
from adapters_peer import AdaptersPeer, PeerError
from data import Data, deal, encode
from results import Line
from sides import TOLERANCE, DifferenceError, OurSide, PeftSide, distance, make_side, num_target_tokens, same_backbone
from steps import BOTTLENECK_SIZE, copy_of_weights, gradients, set_weights
from torch import Tensor
from train_part import MEMORY_STEPS, in_turn, measure_memory
from turns import Goal, Say, Step, take_turns, tell

from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.packaged import PRETRAINED, pretrained_folder
from prefixtune.data.batching import pad
from prefixtune.data.encoding import TokenizedExample
from prefixtune.errors import BackboneError

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
"""What prefixtune's packed step is compared with."""

RATIOS: list[Goal] = [(ours, theirs, None) for ours in OURS for theirs in ("peft-fp32", *ATTENTIONS)]


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
    say: Say,
) -> tuple[dict[str, Any], list[Line]]:
    """Measure every setting (pairs per step, most targets of one source); the backbone named gives its tokenizer."""
    with tempfile.TemporaryDirectory(prefix="prefixtune-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        shape = make_backbone(folder, backbone_name, QUICK_SHAPE if quick else SHAPE, seed)
        backbone = load_backbone(folder, dtype="float32", device="cpu")
        num_parameters = backbone.num_parameters
        encoded = encode(backbone, data, prefix_length)
        # One batch more, to warm up on.
        dealt = {
            (size, most): deal(encoded, batch_size=size, targets_per_source=most, number=repeats + 1, seed=seed)
            for size, most in settings
        }
        del backbone, encoded
        gc.collect()
        missing: dict[str, str] = {}
        # Memory first: this process is small now, and leaves the machine's memory to its children.
        memory = {
            setting: measure_all_memory(
                batches[: MEMORY_STEPS + 1], folder, prefix_length, adapters_python, missing, say
            )
            for setting, batches in dealt.items()
        }
        sides = {variant: make_side(variant, prefix_length, str(folder)) for variant in ("peft-fp32", *OURS)}
        same_backbone(sides["peft-fp32"], sides["ours-fp32"])
        peers: dict[str, AdaptersPeer] = {}
        for variant, attention in ATTENTIONS.items():
            if variant not in missing:
                peers[variant] = AdaptersPeer(adapters_python, attention, folder, prefix_length)
                stack.callback(peers[variant].close)
        starts = {library: copy_of_weights(sides[f"{library}-fp32"]) for library in ("peft", "ours")}
        found: list[dict[str, Any]] = []
        lines: list[Line] = []
        for (batch_size, targets_per_source), batches in dealt.items():
            say(f"encoder-decoder step: {batch_size} pairs, up to {targets_per_source} targets of a source")
            for variant, side in sides.items():
                set_weights(side, starts[variant.split("-")[0]])
            for peer in peers.values():
                peer.take(batches, starts["ours"])
            result = {
                "batch_size": batch_size,
                "targets_per_source": targets_per_source,
                **check(sides, peers, batches[0]),
                **measure_time(sides, peers, batches, say),
                "memory": memory[batch_size, targets_per_source],
                "not_measured": missing,
            }
            found.append(result)
            lines += report(result)
        facts = {
            "backbone": {**shape, "parameters": num_parameters, "weights": "random"},
            "prefix_length": prefix_length,
            "bottleneck_size": BOTTLENECK_SIZE,
            "trained_parameters": {variant: sum(w.numel() for w in side.weights()) for variant, side in sides.items()}
            | {variant: peer.facts["trained_parameters"] for variant, peer in peers.items()},
            "peft_attention": sides["peft-fp32"].model.config._attn_implementation,
            "adapters": {variant: peer.facts for variant, peer in peers.items()},
            "not_measured": missing,
        }
    return {**facts, "settings": found}, lines


def make_backbone(folder: Path, tokenizer_name: str, shape: Mapping[str, int], seed: int) -> dict[str, int]:
    """Write a BART with random weights and another model's tokenizer; returns its shape.

    Raises:
        BackboneError: There is no such tokenizer.
    """
    from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = pretrained_folder(tokenizer_name) if tokenizer_name in PRETRAINED else tokenizer_name
    if source is None:
        raise BackboneError(
            f"{tokenizer_name!r} is not prepared on this machine yet.", hint="run `prefixtune prepare`."
        )
    tokenizer = AutoTokenizer.from_pretrained(source)
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
    BartForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"vocab_size": vocabulary, **shape}


def measure_all_memory(
    batches: list[list[TokenizedExample]],
    folder: Path,
    prefix_length: int,
    adapters_python: Path | None,
    missing: dict[str, str],
    say: Say,
) -> dict[str, dict[str, float]]:
    """Every side's peak memory, in a process of its own; a side that cannot run goes to `missing`, with the reason."""
    found = {}
    for variant in NAMES:
        if variant not in ATTENTIONS:
            found[variant] = measure_memory(variant, batches, str(folder), prefix_length, say)
        elif variant not in missing:
            try:
                with closing(AdaptersPeer(adapters_python, ATTENTIONS[variant], folder, prefix_length)) as peer:
                    found[variant] = peer.memory(batches)
            except PeerError as error:
                missing[variant] = str(error)
                say(f"{NAMES[variant]} is not measured: {error}")
            else:
                say(f"memory of {NAMES[variant]}: peak {found[variant]['peak_mib']:,.0f} MiB")
    return found


def check(
    sides: Mapping[str, PeftSide | OurSide], peers: Mapping[str, AdaptersPeer], batch: list[TokenizedExample]
) -> dict[str, Any]:
    """Each side's first loss; and that the packed step computes what padded rows do, and what adapters does.

    Differences are relative: of the loss, and the largest of the gradients of a site's parameters.

    Raises:
        DifferenceError: Packed and padded rows here, or this project and adapters, differ by more than rounding.
    """
    ours = sides["ours-fp32"]
    assert isinstance(ours, OurSide)
    sites = list(ours.module.sites)
    losses = {}
    with torch.no_grad():
        for variant, side in sides.items():
            losses[variant] = float(side.loss(batch))
    packed = both(ours, ours.loss(batch))
    rows = pad(batch, pad_id=ours.backbone.pad_id, decoder_start_id=ours.backbone.decoder_start_id)
    differences = {"padded": compare(packed, both(ours, ours.loss_of(rows)), sites)}
    for variant, peer in peers.items():
        theirs = peer.gradients(0)
        losses[variant] = theirs[0]
        differences[variant] = compare(packed, theirs, sites)
    uneven = len({len(target) for hand in batch for target in hand.targets}) > 1
    for name, found in differences.items():
        wrong = {what: difference for what, difference in found.items() if not difference <= TOLERANCE}
        # Without padding in the decoder, no mask makes sdpa right.
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


def both(side: OurSide, loss: Tensor) -> tuple[float, list[Tensor]]:
    """A loss and its gradients."""
    return float(loss.detach()), gradients(side, loss)


def compare(
    one: tuple[float, Sequence[Tensor]], other: tuple[float, Sequence[Tensor]], sites: Sequence[str]
) -> dict[str, float]:
    """Relative differences of loss and gradients, by site."""
    each = [distance(a, b) for a, b in zip(one[1], other[1], strict=True)]
    count = len(each) // len(sites)
    gradients_apart = {f"{site}_gradient": max(each[n * count : (n + 1) * count]) for n, site in enumerate(sites)}
    return {"loss": abs(one[0] - other[0]) / abs(one[0]), **gradients_apart}


def measure_time(
    sides: Mapping[str, PeftSide | OurSide],
    peers: Mapping[str, AdaptersPeer],
    batches: list[list[TokenizedExample]],
    say: Say,
) -> dict[str, Any]:
    """Let all sides take the same steps in turn; those in other processes too."""
    steps: dict[str, Step] = {**in_turn(sides, batches), **{variant: peer.step for variant, peer in peers.items()}}
    return {
        "positions": {
            "padded": [sides["peft-fp32"].positions(batch) for batch in batches[1:]],
            "packed": [sides["ours-fp32"].positions(batch) for batch in batches[1:]],
        },
        **take_turns(
            {variant: steps[variant] for variant in NAMES if variant in steps},
            [num_target_tokens(batch) for batch in batches],
            RATIOS,
            say,
        ),
    }


def report(result: dict[str, Any]) -> list[Line]:
    """A setting's lines of the table."""
    title = f"{result['batch_size']} pairs, <= {result['targets_per_source']} per source"
    lines = [
        Line("seq2seq", f"{title}: prefixtune and {AGAINST[other]}, largest difference", max(differences.values()))
        for other, differences in result["differences_from_prefixtune"].items()
    ]
    for variant, loss in result["first_losses"].items():
        lines.append(Line("seq2seq", f"{title}: {NAMES[variant]}, first loss", loss, "nats/token"))
    for kind, positions in result["positions"].items():
        lines.append(Line("seq2seq", f"{title}: {kind}, positions per step", median(positions)))
    return lines + tell("seq2seq", title, result, NAMES, RATIOS, RATIOS)
