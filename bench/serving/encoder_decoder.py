"""Measure serving with encoder-decoders: `bench.serving.serve` with random models of 35 million parameters.

    python -m bench.serving.encoder_decoder              # ten minutes on two cores
    python -m bench.serving.encoder_decoder --quick      # only to see that it works

A BART and a T5, whose random weights cost the same time as trained ones, with prefixes at the encoder, the decoder and
the cross-attention. The sides are the engine with 32 prefixes, with one and with none, and transformers' batched
`generate` with one prefix; with `--before SRC` also the engine of another checkout's `src`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.results import FOLDER, Figure, Log, Results, run_benchmark
from bench.serving import serve
from prefixtune.backbone.load import DEFAULT_BACKBONE, load_backbone

SEED = 0
SHAPES: dict[str, dict[str, Any]] = {
    "bart": {
        "d_model": 320,
        **{f"{side}_layers": 6 for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": 5 for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": 1280 for side in ("encoder", "decoder")},
    },
    "t5": {"d_model": 320, "num_layers": 6, "num_heads": 5, "d_kv": 64, "d_ff": 1280},
}
QUICK_SHAPES: dict[str, dict[str, Any]] = {
    "bart": {**SHAPES["bart"], "encoder_layers": 1, "decoder_layers": 1},
    "t5": {**SHAPES["t5"], "num_layers": 1},
}


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, help="timed rounds; a further one warms up (default 5; quick: 2)")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to see that it works; no figure counts")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="default: both")
    parser.add_argument("--before", type=Path, help="`src` of another version: its engine is measured, too")
    parser.add_argument("--json", type=Path, default=FOLDER / "encoder_decoder.json", help="where the figures go")
    options = parser.parse_args()
    options.repeats = options.repeats or (2 if options.quick else 5)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1 is needed")
    # What the other benchmark has as options of its own.
    options.without_peft, options.vllm_python, options.backbone = True, None, " and ".join(options.models)
    return options


def main() -> int:
    """Measure, print, and write the figures."""
    options = parse()
    return run_benchmark(options, lambda console: measure(options, console.info))


def measure(options: argparse.Namespace, log: Log) -> Results:
    """One model after the other."""
    values: dict[str, Any] = {}
    figures: list[Figure] = []
    for name in options.models:
        with tempfile.TemporaryDirectory(prefix="prefixtune-bench-") as folder:
            write_model(name, Path(folder), quick=options.quick)
            log(name)
            measured = argparse.Namespace(**{**vars(options), "backbone": folder})
            values[name], more = serve.measure(measured, log)
        # Goals are for the default backbone.
        figures += [
            replace(figure, part=name, at_least=None, at_most=None) for figure in more if figure.value is not None
        ]
    return values, figures


def write_model(name: str, folder: Path, *, quick: bool) -> None:
    """A random model with the default backbone's tokenizer."""
    import transformers

    tokenizer = load_backbone(DEFAULT_BACKBONE).tokenizer
    end = tokenizer.eos_token_id
    special = {"pad_token_id": end, "eos_token_id": end, "bos_token_id": end, "decoder_start_token_id": end}
    shape = (QUICK_SHAPES if quick else SHAPES)[name]
    config = transformers.AutoConfig.for_model(name, vocab_size=len(tokenizer), **special, **shape)
    config.forced_eos_token_id = None
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
        with torch.no_grad():
            # So that the likeliest token is clear, and another one at each position.
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
