"""A study of the toy set on a tiny model, small enough to be done in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefixtune.report import read_results
from zoo import make_model, make_tokenizer


def store_model(path: Path) -> Path:
    """A LLaMA of one layer as a folder, with room for a few solved examples."""
    tokenizer = make_tokenizer()
    make_model("llama", tokenizer, num_hidden_layers=1, max_position_embeddings=1024).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_config(path: Path, model: Path) -> Path:
    """The study's configuration as a file."""
    path.write_text(
        f'backbone = "{model}"\ndtype = "float32"\ntask = "toy"\n'
        'train = "train"\ndev = "held_out"\ntest = "held_out"\n'
        "sizes = [8]\nlengths = [3]\ndev_limit = 4\ntest_limit = 3\ntries = 2\ndecode_batch = 1\n"
        "[train_settings]\nbatch_size = 4\nmax_steps = 4\neval_every = 2\nsave_every = 1\nwarmup_steps = 0\n"
    )
    return path


def cells(events: list[dict[str, Any]], status: str) -> list[str]:
    """The cells that events report in a status."""
    return [event["cell"] for event in events if event["event"] == "cell" and event["status"] == status]


def scores_of(folder: Path) -> dict[str, Any]:
    """Each cell's scores and texts; all must be done."""
    scores = {}
    for cell in read_results(folder).cells:
        assert cell.status == "done"
        assert cell.run is not None
        assert cell.run.evaluation is not None
        scores[cell.id] = cell.run.evaluation.scores, [o.output for o in cell.run.evaluation.outputs]
    return scores
