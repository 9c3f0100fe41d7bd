"""Answer general requests with the bare model: the first 60 are trained on, the others are for reports.

    python -m research.memories.general REQUESTS.txt src/prefixtune/prefix/general.json

The requests were written by hand, one a line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from prefixtune.backbone.load import load_backbone
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids

_ANSWERED, _LENGTH = 60, 32


def main() -> None:
    """Answer them greedily, by the model's own chat template."""
    backbone = load_backbone("smollm2-135m", dtype="float32")
    requests = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    asked = [f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n" for request in requests[:_ANSWERED]]
    config = GenerateConfig(max_new_tokens=_LENGTH, batch_size=_ANSWERED)
    ids = generate_ids(backbone, [backbone.encode(text) for text in asked], [None] * len(asked), config=config)
    answers = [backbone.decode(list(one)).strip() for one in ids]
    made = {"train": list(zip(requests, answers, strict=False)), "test": requests[_ANSWERED:]}
    Path(sys.argv[2]).write_text(json.dumps(made, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
