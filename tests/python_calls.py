"""Calls of the Python interface as users write them, without the tests' checks of types; prints what each gives.

python tests/python_calls.py FOLDER    one JSON object: the call's name -> its value, or its error
"""

import contextlib
import io
import json
import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

import prefixtune as pt
from prefixtune.backbone.prefixes import make_header
from prefixtune.engine.request import Request
from prefixtune.inference.classify import classify
from prefixtune.inference.generate import stream
from prefixtune.interop.trainer import PrefixModel
from prefixtune.prefix.text_format import TextFormat
from prefixtune.training.train import train_together
from zoo import make_model, make_tokenizer

TEXTS = ["some text", "more"]


class Calls:
    """What every call gave, by name."""

    def __init__(self):
        self.given = {}

    def __call__(self, name, call):
        try:
            self.given[name] = {"value": call()}
        except pt.PrefixError as error:
            self.given[name] = {"error": type(error).__name__, "text": str(error)}
        except Exception as error:
            self.given[name] = {"raw": f"{type(error).__name__}: {error}"}


def main(folder):
    """Make a tiny model and a prefix in a folder, and call everything."""
    calls = Calls()
    tokenizer = make_tokenizer()
    model = make_model("qwen2", tokenizer)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    backbone = pt.load_backbone(folder / "model", device="cpu", dtype="float32")
    generator = torch.Generator().manual_seed(1)
    layers = tuple(
        (torch.randn(s.num_kv_heads, 3, s.key_dim, generator=generator),) * 2 for s in backbone.geometry["decoder"]
    )
    prefix = pt.Prefix({"decoder": layers}, make_header(backbone))
    run = folder / "run"
    file = pt.save_prefix(run / "prefix.safetensors", prefix, dtype="float32")

    # What users have.
    def written(one=backbone, what=prefix, **options):
        return pt.generate(one, TEXTS, what, **{"max_new_tokens": 4, **options})

    calls("generate", written)
    calls("bare", lambda: written(what=None))
    calls("a prefix by text", lambda: written(what=str(file)))
    calls("a prefix by Path", lambda: written(what=file))
    calls("a prefix by its run", lambda: written(what=run))
    calls("several prefixes", lambda: written(what=[str(file), None]))
    calls("several prefixes, ready-made", lambda: written(what=(prefix, None)))
    calls("a pair", lambda: written((model, tokenizer)))
    calls("a name", lambda: written(str(folder / "model")))
    calls("a path", lambda: written(folder / "model"))
    calls("a dict", lambda: pt.generate(backbone, TEXTS, prefix, config={"max_new_tokens": 4}))
    calls("a config", lambda: pt.generate(backbone, TEXTS, prefix, config=pt.GenerateConfig(max_new_tokens=4)))
    calls("load", lambda: pt.load(folder / "model", run, dtype="float32").generate(TEXTS, max_new_tokens=4))
    model_with_prefix = pt.load(backbone, prefix)
    calls("load: no template", lambda: model_with_prefix.chat("a"))
    calls("stream", lambda: "".join(stream(backbone, TEXTS[0], str(file), config={"max_new_tokens": 4})))
    calls("load_prefix", lambda: pt.load_prefix(run, (model, tokenizer)).length())
    calls("load_backbone", lambda: pt.load_backbone((model, tokenizer)).name)
    examples = [pt.Example(text, ("a", "b")) for text in TEXTS]
    scores = {"max_new_tokens": 4, "metrics": "bleu"}
    calls("evaluate", lambda: list(pt.evaluate(backbone, examples, prefix, **scores).outputs))
    dicts = [{"source": text, "targets": ["a", "b"]} for text in TEXTS]
    calls("dicts", lambda: list(pt.evaluate((model, tokenizer), dicts, str(file), **scores).outputs))
    calls("classify", lambda: [p.label for p in classify((model, tokenizer), TEXTS, labels=["yes", "no"])])

    settings = {"max_steps": 2, "prefix_length": 2, "device": "cpu", "dtype": "float32"}

    def trained(name, config=None, **options):
        """The losses of a short run, and what it showed on stderr."""
        shown = io.StringIO()
        given = {**settings, "output": str(folder / name)} if config is None else {}
        with contextlib.redirect_stderr(shown):
            result = pt.train(config, **given, **options)
        losses = [event["loss"] for event in result.events if event["event"] == "step"]
        return [losses, result.prefix is not None, shown.getvalue()]

    calls("train", lambda: trained("train", backbone=backbone, examples=examples))
    calls("train: dicts", lambda: trained("dicts", backbone=(model, tokenizer), examples=dicts))
    given = {**settings, "output": str(folder / "dict"), "backbone": str(folder / "model")}
    calls("train: a dict", lambda: trained("", given, examples=dicts))
    config = pt.TrainConfig(**{**given, "output": str(folder / "config")})
    calls("train: a config", lambda: trained("", config, examples=dicts))
    given = {**settings, "output": folder / "paths", "backbone": folder / "model"}
    calls("train: paths", lambda: trained("", given, examples=dicts))
    calls("train: a name", lambda: trained("name", backbone=folder / "model", examples=dicts))
    records = [{"name": text, "text": ["a", "b"]} for text in TEXTS]
    columns = {"source": "name", "target": "text"}
    calls("train: records", lambda: trained("records", backbone=backbone, examples=records, **columns))
    calls("train: silent", lambda: trained("silent", backbone=backbone, examples=examples, progress=False))
    calls("train: go on", lambda: pt.train(resume=True, output=str(folder / "name"), examples=dicts).steps)
    calls("train: go on, by Path", lambda: pt.train(resume=True, output=folder / "name", examples=dicts).steps)
    (folder / "name").rename(folder / "moved")
    calls("train: go on, moved", lambda: pt.train(resume=True, output=folder / "moved", examples=dicts).path.parts[-2])
    calls("train: no dev examples", lambda: trained("no", backbone=backbone, examples=dicts, dev_examples=[]))
    together, other = ({**settings, "output": folder / name, "task": "toy"} for name in ("together", "other"))
    calls("train_together", lambda: train_together([together], backbone=backbone, examples=[examples])[0].steps)
    calls(
        "train_together: of one", lambda: train_together([together, other], backbone=(model, tokenizer), examples=[[]])
    )
    calls("PrefixModel: a pair", lambda: PrefixModel((model, tokenizer), prefix_length=2).settings.prefix_length)
    calls("PrefixModel: a name", lambda: PrefixModel(folder / "model", {"prefix_length": 2}).settings.prefix_length)
    calls("PrefixModel: a mistyped option", lambda: PrefixModel(backbone, prefix_lenth=2).settings.prefix_length)
    calls("train: again", lambda: trained("train", backbone=backbone, examples=examples))
    calls("train: a number as config", lambda: trained("no", 3))
    calls("train: nothing to resume", lambda: trained("no", resume=True))
    calls("engine", lambda: pt.TorchEngine((model, tokenizer), num_slots=2).config.num_slots)

    form = {"prompt": "Q: {source} A:", "target": "{target}"}
    calls("a text format", lambda: written(what=None, text_format=TextFormat(**form)))
    calls("a text format as a dict", lambda: written(what=None, text_format=form))

    calls("Example: one target", lambda: list(pt.Example("a source", "two words").targets))

    # What is wrong.
    calls("Example: a number", lambda: pt.Example(3))
    calls("Prefix: no tensors", lambda: pt.Prefix({"decoder": ((1, 2),)}))
    calls("train: no target", lambda: trained("no", backbone=backbone, examples=[{"source": "a"}]))
    calls("TorchEngine.add: a text", lambda: pt.TorchEngine(backbone).add("text"))
    calls("a bare model", lambda: written(model))
    calls("no backbone", lambda: written(None))
    calls("a missing folder", lambda: written("./no/such/model"))
    calls("a number as prefix", lambda: written(what=3))
    calls("a missing prefix", lambda: written(what=str(folder / "missing.safetensors")))
    calls("a hub id, offline", lambda: written(what="hub:nobody/such-prefix"))
    calls("save_prefix: the wrong way round", lambda: str(pt.save_prefix(prefix, file)))
    calls("one text", lambda: pt.generate(backbone, "some text"))
    calls("a mistyped option", lambda: written(num_beam=2))
    calls("evaluate: a number", lambda: pt.evaluate(backbone, [3], prefix))
    calls("classify: one text", lambda: classify(backbone, "text", labels=["a", "b"]))
    calls("TorchEngine: a wrong option", lambda: pt.TorchEngine(backbone, num_slot=3))
    calls("Request: a text", lambda: bool(Request("some text")))
    return calls.given


if __name__ == "__main__":
    warnings.simplefilter("error", FutureWarning)
    print(json.dumps(main(Path(sys.argv[1]))))
