"""The benchmarks run with a tiny model, `make gpu`'s on a CPU, whose page says what there is, and what there is not."""

import json

from bench import gpu, serve, train
from bench.models import save_model
from forked_command import forking_python
from tools.gpu_page import page

PARTS = {"load", "train", "decode", "prompt"}


def test_training(tmp_path, monkeypatch):
    # Slow, as PEFT is imported; in this process, and with little data.
    monkeypatch.setattr(train, "isolated", lambda work, *arguments: work(*arguments))
    monkeypatch.setattr(train, "QUICK_SETTINGS", [(2, 1)])
    monkeypatch.setattr(train, "MEMORY_STEPS", 2)
    monkeypatch.setattr("bench.data.E2E", tmp_path / "none")
    options = ["--quick", "--repeats", "1", "--backbone", "tiny", "--json", str(tmp_path / "out.json")]
    assert train.main(options) == 0
    rows = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["summary"]
    assert len(rows) >= 4
    assert all(row["value"] is not None for row in rows)


def test_serving(tmp_path, monkeypatch):
    """A real server's texts over HTTP are those of the engine in this process."""
    monkeypatch.setattr("bench.data.E2E", tmp_path / "none")
    monkeypatch.setattr("sys.executable", forking_python())
    folder, file = save_model("tiny", tmp_path / "model"), tmp_path / "out.json"
    options = ["--quick", "--backbone", str(folder), "--dtype", "float32", "--json", str(file)]
    assert serve.main(options) == 0
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["tokens_per_second"].keys() == {"torch", "torch-one", "torch-none", "process", "transformers"}
    assert all(len(ratios) == 1 for ratios in results["speed_ratios"].values())
    assert results["same_texts"] == {"torch and process": 1.0, "torch-one and transformers": 1.0}


def test_every_part_on_a_cpu(tmp_path, monkeypatch):
    # In this process: each new one would load torch again.
    monkeypatch.setattr(gpu, "isolated", lambda work, *arguments: work(*arguments))
    monkeypatch.setenv("PREFIXTUNE_SELF_CHECK", "0")
    file = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--tiny", "--repeats", "1", "--json", str(file)]) == 0
    results = json.loads(file.read_text(encoding="utf-8"))
    measured = [row for row in results["summary"] if row["value"] is not None]
    assert {row["part"] for row in measured} == PARTS
    assert all(row["value"] > 0 for row in measured)
    ours = [row for row in measured if row["part"] == "train" and row["what"].endswith("prefixtune")]
    assert len(ours) == 1
    missing = {row["what"]: row["not_measured"] for row in results["summary"] if row["value"] is None}
    assert all(missing.values())
    assert page(results) == page(None)
    assert page({**results, "device": "cuda"}) == page(None)
    shown = page({**results, "device": "cuda", "quick": False})
    assert all(row["what"] in shown for row in results["summary"])


def test_without_a_gpu_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main(["--json", str(tmp_path / "gpu.json")]) == 1
    assert not list(tmp_path.iterdir())
