"""Measure what quantized weights cost a prefix: E2E's BLEU with the engine llama.cpp, against the engine torch.

    python -m bench.quantized --prefix runs/e2e/prefix.safetensors
    python -m bench.quantized --prefix FILE --limit 8 --quick      # only to see that it works

The embedded backbone's GGUF file is written again in each of the types. All sides decode greedily.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import data
from bench.results import Figure, Log, Results, make_parser, run_benchmark
from prefixtune.backbone.convert import read_gguf
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.packaged import packaged_gguf
from prefixtune.backbone.shapes import load_shapes
from prefixtune.data import TASKS, read_task
from prefixtune.engine.llama_cpp import LlamaCppEngine
from prefixtune.errors import BackboneError
from prefixtune.evaluation.evaluate import evaluate

SLOTS = 8


def write_gguf(source: Path, target: Path, kind: str) -> Path:
    """Write a GGUF file with the same fields, and its matrices in another type: F16, Q8_0, Q4_0, ..."""
    import gguf

    reader = read_gguf(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    wanted = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        own = wanted if numbers.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(numbers, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def measure(options: argparse.Namespace, log: Log) -> Results:
    """The scores of all sides on the same examples."""
    source = packaged_gguf(options.backbone)
    if source is None:
        raise BackboneError(f"{options.backbone!r} has no GGUF file here.", hint="run `prefixtune prepare --force`.")
    examples = read_task("e2e", options.data, needs_targets=True)[: options.limit or None]
    decoding = {**TASKS["e2e"].decoding, "num_beams": 1, "min_new_tokens": 0, "batch_size": SLOTS}
    rows: dict[str, dict[str, Any]] = {}
    outputs: dict[str, list[str]] = {}

    def score(name: str, backbone: Any, engine: LlamaCppEngine | None) -> None:
        began = time.perf_counter()
        found = evaluate(
            backbone, examples, options.prefix, config=decoding, engine=engine, protocol="e2e", metrics=["bleu"]
        )
        outputs[name] = list(found.outputs)
        same = sum(map(str.__eq__, outputs[name], outputs["torch"])) / len(examples)
        rows[name] = {"bleu": found.scores["bleu"].score, "same_texts": same, "seconds": time.perf_counter() - began}
        log(f"{name}: {rows[name]}")

    score("torch", load_backbone(options.backbone, dtype="float32"), None)
    shapes = load_shapes(options.backbone)
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.types:
            file = write_gguf(source, Path(folder) / f"{kind}.gguf", kind)
            with LlamaCppEngine(shapes, str(file), num_slots=SLOTS, max_length=512) as engine:
                score(f"llama.cpp {kind}", shapes, engine)
            file.unlink()
    figures = [
        Figure("quantized", f"{name}, {what}", row[key], unit)
        for name, row in rows.items()
        for what, key, unit in (("BLEU", "bleu", ""), ("same texts", "same_texts", ""), ("time", "seconds", "s"))
    ]
    return {"examples": len(examples), "sides": rows}, figures


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the figures."""
    parser = make_parser(__doc__, "quantized", repeats=1)
    parser.add_argument("--prefix", required=True, help="trained on E2E")
    parser.add_argument("--data", default=str(data.E2E.with_name("test.jsonl.gz")), help="default: beside the checkout")
    parser.add_argument("--limit", type=int, default=0, help="only the first examples; 0: all")
    parser.add_argument("--types", nargs="+", default=["F16", "Q8_0", "Q4_0"], help="default: F16 Q8_0 Q4_0")
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
