"""What other programs get from a prefix, and what is read of theirs: PEFT's files, llama.cpp's states, ONNX graphs.

The prefix is made of exact numbers, so files are compared to the byte. Logits keep 1e-4: the models' random weights
differ in the last digit between processors.
"""

import hashlib
import json
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file

from prefixtune.backbone.backbone import Backbone
from prefixtune.interop.llama_cpp.export import export_llama_cpp
from prefixtune.interop.peft import export_peft, import_peft
from prefixtune.prefix.prefix import Prefix
from zoo import make_model, make_tokenizer

P = 5
PROMPTS = [[72, 14, 51, 60, 8, 32, 21], [10, 47], [58, 32, 65, 3, 11]]
TOLERANCE = 1e-4
GOLDEN = Path(__file__).with_name("interop.json")


def _backbone(name):
    tokenizer = make_tokenizer()
    return Backbone.from_model(make_model(name, tokenizer), tokenizer, f"tiny-{name}")


def _prefix(backbone):
    """Numbers that float16 holds too."""
    layers = []
    for number, shape in enumerate(backbone.geometry["decoder"]):
        size = (shape.num_kv_heads, P, shape.key_dim)
        steps = torch.arange(shape.num_kv_heads * P * shape.key_dim).reshape(size)
        key, value = ((steps * factor + number) % 33 - 16 for factor in (5, 7))
        layers.append((key / 16, value / 8))
    return Prefix({"decoder": tuple(layers)})


def _digest(data):
    return hashlib.sha256(data).hexdigest()


def _numbers(prefix):
    return _digest(b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in prefix.tensors()))


def _peft(folder):
    """Both ways, for a prefix and a cartridge; and the logits that PEFT itself computes from our file."""
    import peft

    backbone = _backbone("llama")
    prefix = _prefix(backbone)
    found = {"prefix": _numbers(prefix)}
    for kind, changes in {"PREFIX_TUNING": {}, "CARTRIDGE": {"num_frozen_tokens": 2}}.items():
        written = export_peft(prefix, folder / kind, peft_type=kind, **changes)
        rows = load_file(written / "adapter_model.safetensors")
        found[kind] = {
            "config": json.loads((written / "adapter_config.json").read_text()),
            "weights": _digest((written / "adapter_model.safetensors").read_bytes()),
            "shapes": {name: list(tensor.shape) for name, tensor in rows.items()},
            "read": _numbers(import_peft(written)),
            "header": {key: import_peft(written, backbone).header[key] for key in ("peft", "text_format")},
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(backbone.model, folder / "PREFIX_TUNING").eval()
        theirs.save_pretrained(folder / "theirs")
        with torch.no_grad():
            logits = theirs(input_ids=torch.tensor([PROMPTS[0]])).logits[0]
    found["theirs_read"] = _numbers(import_peft(folder / "theirs", _backbone("llama")))
    found["logits"] = [[round(x, 6) for x in row] for row in logits[:, :6].tolist()]
    return found


def _llama_cpp(folder):
    """States of a model whose keys are interleaved, and of one whose keys are not; in each version of the layout."""
    found = {}
    for name in ("llama", "qwen2", "gpt2"):
        backbone = _backbone(name)
        prefix = _prefix(backbone)
        for version in (2, 3, 4):
            facts = export_llama_cpp(prefix, backbone, folder / name, state_version=version)
            data = (folder / name / facts["file"]).read_bytes()
            found[f"{name}, version {version}"] = {"bytes": len(data), "sha256": _digest(data)}
        keys = ("placeholders", "prefix_length", "text_format", "end")
        found[name] = {key: facts[key] for key in keys}
        ask = json.loads((folder / name / "ask.json").read_text())
        found[name]["ask"] = ask
    return found


def _onnx(folder):
    """Logits and greedy tokens of exported graphs, whose first past is the prefix."""
    import numpy as np
    import onnxruntime

    from examples.to_onnx import generate
    from prefixtune.interop.onnx.export import export_onnx

    found = {}
    for name, layers in {"llama": "num_hidden_layers", "gpt2": "n_layer"}.items():
        tokenizer = make_tokenizer()
        backbone = Backbone.from_model(make_model(name, tokenizer, **{layers: 2}), tokenizer, f"tiny-{name}")
        facts = export_onnx(_prefix(backbone), backbone, folder / name)
        past = load_arrays(folder / name / "past.safetensors")
        session = onnxruntime.InferenceSession(folder / name / "model.onnx", providers=["CPUExecutionProvider"])
        ids = np.array([PROMPTS[0]])
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones((1, P + ids.shape[1]), dtype=np.int64),
            "position_ids": np.arange(P, P + ids.shape[1])[None],
        }
        logits = session.run(["logits"], {**feed, **past})[0][0]

        def run(feed, session=session):
            return session.run(None, feed)

        found[name] = {
            "inputs": [item.name for item in session.get_inputs()],
            "outputs": [item.name for item in session.get_outputs()],
            "past": {key: list(array.shape) for key, array in sorted(past.items())},
            "logits": [[round(x, 6) for x in row] for row in logits[:, :6].tolist()],
            "tokens": generate(run, facts, past, PROMPTS, max_new_tokens=12),
        }
    return found


def compute():
    """Today's results; those of ONNX need the packages of `make test-integrations`."""
    with tempfile.TemporaryDirectory() as folder:
        return {part.__name__[1:]: part(Path(folder, part.__name__)) for part in (_peft, _llama_cpp, _onnx)}


def _compare(found, stored):
    """Equal, and logits within the tolerance."""
    ours, theirs = torch.tensor(found.pop("logits")), torch.tensor(stored.pop("logits"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    assert found == stored


def test_peft(tmp_path):
    pytest.importorskip("peft")
    _compare(_peft(tmp_path), json.loads(GOLDEN.read_text())["peft"])


def test_llama_cpp(tmp_path):
    assert _llama_cpp(tmp_path) == json.loads(GOLDEN.read_text())["llama_cpp"]


def test_onnx(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    stored = json.loads(GOLDEN.read_text())["onnx"]
    for name, found in _onnx(tmp_path).items():
        _compare(found, stored[name])
