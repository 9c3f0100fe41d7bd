"""A memory by closed form, and after some training: seconds, divergence, loss and exact answers by compression.

python -m research.memories.steps FOLDER --documents four-1 four-2

FOLDER has a folder per document, with document.txt, train.jsonl and test.jsonl. What is measured already is kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.loss import head_inputs
from prefixtune.data.batching import collate
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.distill import distill
from prefixtune.distillation.inputs import Question
from prefixtune.distillation.wording import choose_wording, count_endings, encode_questions, in_view, without_end
from prefixtune.prefix.prefix import Prefix

RESULTS = Path(__file__).with_name("steps.json")
_BATCH = 40
"""Questions in a pass."""


class Asked:
    """A document's test questions, and what the model with the document in view says of their answers.

    Args:
        backbone: The model.
        config: A distillation of the document.
        document: Its text.
    """

    def __init__(self, backbone: Backbone, config: DistillConfig, document: str) -> None:
        rows = [json.loads(line) for line in Path(config.test).read_text().splitlines()]
        questions = [Question(row["question"], row["answer"]) for row in rows]
        wording = choose_wording(config, backbone, None)
        examples = encode_questions(backbone, questions, wording, config.prefix_length)
        ends = count_endings(backbone, questions, wording)
        self.backbone = backbone
        # Without the tokens that end an answer, which a text in view does not make likely.
        self.examples = [without_end(example, count) for example, count in zip(examples, ends, strict=True)]
        self.whole = self._log_probs(in_view(backbone, wording, document))

    @torch.no_grad()
    def _log_probs(self, prefix: Prefix | None) -> torch.Tensor:
        parts = (self.examples[first : first + _BATCH] for first in range(0, len(self.examples), _BATCH))
        logits = [
            self.backbone.head(head_inputs(self.backbone, prefix, collate(self.backbone, some))[0]) for some in parts
        ]
        return torch.cat(logits).float().log_softmax(-1)

    def read(self, prefix: Prefix | None) -> dict[str, float]:
        """KL from the document in view and loss, in nats per token, and greedy answers that are right."""
        found, labels = self._log_probs(prefix), torch.tensor([id for one in self.examples for id in one.targets[0]])
        right = (found.argmax(-1) == labels).split([len(one.targets[0]) for one in self.examples])
        return {
            "kl": round(float((self.whole.exp() * (self.whole - found)).sum(1).mean()), 4),
            "loss": round(float(-found.gather(1, labels[:, None]).mean()), 4),
            "exact": sum(bool(one.all()) for one in right),
        }


def measure(
    backbone: Backbone, folder: Path, compression: float, steps: int, options: dict[str, Any]
) -> dict[str, Any]:
    """One memory of a document."""
    document = (folder / "document.txt").read_text().strip()
    tokens = len(backbone.encode(document))
    with tempfile.TemporaryDirectory() as output:
        config = DistillConfig(
            document=str(folder / "document.txt"),
            questions=str(folder / "train.jsonl"),
            prefix_length=round(tokens / compression),
            max_steps=steps,
            output=f"{output}/run",
            **options,
        )
        started, worked = time.monotonic(), time.process_time()
        (result,) = distill(config, backbone=backbone, progress=False)
        seconds = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - worked}
    asked = Asked(backbone, config.replace(test=str(folder / "test.jsonl")), document)
    return {
        "tokens": tokens,
        "positions": config.prefix_length,
        **{name: round(value - result.report["seconds"]["report"], 1) for name, value in seconds.items()},
        "questions": len(asked.examples),
        "general": result.report.get("general"),
        **{name: asked.read(one) for name, one in (("bare", None), ("memory", result.prefix))},
    }


def table(cells: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The cells as Markdown: means over documents, and sums of exact answers."""
    yield "| compression | steps | seconds | of the CPU | KL | loss | exact answers |"
    yield "|---|---|---|---|---|---|---|"
    groups: dict[tuple[float, int], list[dict[str, Any]]] = {}
    for name, cell in cells.items():
        groups.setdefault((float(name.split("/")[1]), int(name.split("/")[2])), []).append(cell)
    for (compression, steps), own in sorted(groups.items()):
        seconds, cpu = (statistics.fmean(cell[key] for cell in own) for key in ("seconds", "cpu_seconds"))
        kl, loss = (statistics.fmean(cell["memory"][key] for cell in own) for key in ("kl", "loss"))
        exact, asked = sum(cell["memory"]["exact"] for cell in own), sum(cell["questions"] for cell in own)
        yield f"| {compression:g} | {steps} | {seconds:.0f} | {cpu:.0f} | {kl:.3f} | {loss:.3f} | {exact} of {asked} |"


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", nargs="+", default=["four-1", "four-2"])
    parser.add_argument("--compressions", nargs="+", type=float, default=[4, 8, 16, 32])
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 50, 150])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--keep-general", type=float, default=0.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    cells = json.loads(options.results.read_text()) if options.results.exists() else {}
    backbone = load_backbone("smollm2-135m", dtype=options.dtype)
    more = {"dtype": options.dtype, "keep_general": options.keep_general}
    for steps in options.steps:
        for document in options.documents:
            for compression in options.compressions:
                name = f"{document}/{compression:g}/{steps}"
                if name not in cells:
                    cells[name] = measure(backbone, options.folder / document, compression, steps, more)
                    options.results.write_text(json.dumps(cells, indent=1) + "\n")
                    print(name, cells[name], flush=True)
    print("\n".join(table(cells)))


if __name__ == "__main__":
    main()
