"""The server's configuration, from a file, the environment and flags."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator

from prefixtune.jobs.config import DATA_FOLDER_HELP, DATABASE_URL_HELP, DatabaseUrl
from prefixtune.utils.config import CommaList, Config, Layer, Table, option_group

ENVIRONMENT = "PREFIXTUNE_SERVE_"
"""Prefix of the environment variables. Not `PREFIXTUNE_` alone: beside a service called prefixtune, Kubernetes sets
`PREFIXTUNE_PORT` in every container."""
SERVER_LIBRARIES = ("fastapi", "fastapi_offline", "h11", "prometheus_client")
"""Of the extra `serve`: what the server imports when it starts."""

_ENGINE_OPTIONS = {
    **dict.fromkeys(("prefill_tokens", "kv_cache_mib"), "torch"),
    **dict.fromkeys(("gguf", "threads"), "llama.cpp"),
    **dict.fromkeys(("vllm_python", "vllm_args", "vllm_url", "vllm_folder"), "vllm"),
}
"""Options that only one engine has -> that one."""
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_Origin = Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.\-\[\]:]+$")]
_Number = Annotated[int, Field(ge=0, le=1_000_000_000)]
_Size = Annotated[int, Field(ge=1, le=1_000_000_000)]
_Seconds = Annotated[float, Field(ge=0.1)]

_model, _network, _engine = option_group("model"), option_group("network"), option_group("engine")
_limits, _training, _logs = option_group("limits"), option_group("training"), option_group("logs")


class KeyConfig(Table):
    """One API key: what its owner may do, and how often.

    Somebody may have written the key itself into the file, so no message repeats a value of `hash`.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    hash: str = Field(
        description="'sha256:' and the digest of the key, as `prefixtune serve --new-key` prints it",
        json_schema_extra={"pattern": f"^{_HASH.pattern}$"},
    )
    prefixes: tuple[str, ...] = Field(
        default=("*",),
        description="patterns of the models that it may use, as in acme-*; they match the bare backbone's name too",
    )
    requests_per_minute: int = Field(default=0, ge=0, description="0: no limit")
    concurrent: int = Field(default=0, ge=0, description="requests at once; 0: no limit")
    admin: bool = Field(
        default=False,
        description="may see, change and delete prefixes, files, jobs and results of all keys, and read the metrics",
    )
    metrics: bool = Field(default=False, description="may read the metrics")
    train: bool = Field(default=True, description="may upload files and train")
    max_files: _Number = Field(default=100, description="most uploaded files that it keeps")
    max_storage_mib: _Number = Field(default=1024, description="most space of all its files together, in MiB")
    max_jobs: _Number = Field(default=10, description="most jobs that wait, run or are paused")
    max_steps: _Size = Field(default=5000, description="most optimizer steps of a job")
    max_prefixes: _Number = Field(default=100, description="most results of its jobs that it keeps")

    @field_validator("hash", mode="before")
    @classmethod
    def _check_hash(cls, value: Any) -> Any:
        if not isinstance(value, str) or not _HASH.fullmatch(value):
            raise ValueError("is not 'sha256:' and 64 hexadecimal digits")
        return value


class ServeConfig(Config):
    """A server. Every field is a key of the file and, except `keys`, an environment variable and a flag.

    Raises:
        ConfigError: One or more values are not allowed; all faults are listed at once.
    """

    hint: ClassVar[str] = "`prefixtune serve --help` explains every option."

    engine: Literal["torch", "llama.cpp", "vllm", "none"] = _model(
        "torch",
        description="what runs the model: torch in this program, llama.cpp, vLLM, or none (files and jobs only)",
    )
    backbone: str = _model("smollm2-135m", description="embedded name, hub id, local folder or .gguf file")
    gguf: str = _model("", description="for llama.cpp: the weights as a .gguf file; empty: the embedded backbone's")
    threads: int = _model(0, ge=0, description="for llama.cpp: threads; 0: one per core; fewer beside other programs")
    vllm_python: str = _model("", description="for vLLM: the Python of its environment; empty: this one")
    vllm_args: str = _model("", description='for vLLM: more options, as in --vllm-args="--tensor-parallel-size 2"')
    vllm_url: str = _model("", description="for vLLM: a server that runs already, in place of a child process")
    vllm_folder: str = _model(
        "", description="with vllm_url: the folder that its connector has as `prefixes`, shared with this server"
    )
    backbone_id: str = _model("", description="the bare backbone's model name; empty: the last part of its name")
    prefixes: str = _model("prefixes", min_length=1, description="folder of prefix files, NAME.safetensors")
    chat_templates: CommaList[str] = _model(
        (), description="files with the chat templates that prefixes may run besides the backbone's own"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _model("auto", description="dtype of the frozen weights")
    device: str = _model("auto", description="cpu, cuda, cuda:0, mps or auto")
    raw_completions: bool = _model(
        False, description="/v1/completions uses prompts as they are, as lm-eval's generation tasks need it"
    )
    earlier_messages: Literal["refuse", "drop"] = _model(
        "refuse", description="messages before a chat's last one, where a prefix cannot read them: refuse, or drop"
    )
    quantize: Literal["", "int8", "int4"] = _model(
        "", description="quantize the frozen weights (torchao): int8 or int4"
    )

    host: str = _network("127.0.0.1", description="address to listen on; any but loopback needs keys")
    port: int = _network(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    cors_origins: CommaList[_Origin] = _network(
        (), description="origins whose pages may call it, as in https://a.example"
    )
    max_connections: _Size = _network(4096, description="connections at once; further ones get 503")
    playground: bool = _network(True, description="serve pages: to try things, at /; to train, at /train; /docs")

    # The engine's own limit, whose module would load torch.
    num_slots: int = _engine(32, ge=1, le=65_536, description="texts that are generated at once")
    max_length: _Number = _engine(0, description="most positions of a text, prefix included; 0: the backbone's")
    prefill_tokens: _Number = _engine(
        0,
        description="most prompt tokens of a step beside running texts; four times as many beside none; "
        "0: 256 on a CPU, 2048 on a GPU",
    )
    kv_cache_mib: _Number = _engine(
        0, description="memory for keys and values of running texts, in MiB; 0: half of what is free; GPU: 0.8 of it"
    )
    cache_mib: _Size = _engine(1024, description="memory for loaded prefixes, in MiB")

    max_queue: _Number = _limits(256, description="texts that may wait for a slot; beyond them, requests get 429")
    max_body_kib: _Size = _limits(1024, description="largest body of a request, in KiB")
    max_upload_mib: _Size = _limits(256, description="largest uploaded prefix, in MiB")
    on_too_long: Literal["", "cut", "error"] = _limits(
        "", description="a source that is too long for its prefix: cut it, or an error; empty: as in its training"
    )
    max_tokens: _Size = _limits(1024, description="most new tokens that a request may ask for")
    default_max_tokens: _Size = _limits(256, description="most new tokens without max_tokens, as far as they fit")
    max_texts: _Size = _limits(32, description="most texts of one request: its prompts times its n")
    max_joined_prefixes: Annotated[int, Field(ge=1, le=64)] = _limits(
        8, description="most prefixes that one request may join, as in manual+user-42; 1: none are joined"
    )
    deadline: _Seconds = _limits(300.0, description="seconds that a request may take, waiting included")
    drain_seconds: float = _limits(30.0, ge=0, description="seconds that running requests may take after SIGTERM")

    train_workers: Annotated[int, Field(ge=0, le=1)] = _training(
        1, description="processes for training that it starts; 0: none, and jobs are taken only with `database_url`"
    )
    data_folder: str = _training("", description=DATA_FOLDER_HELP)
    database_url: DatabaseUrl = _training("", description=DATABASE_URL_HELP)
    train_threads: _Number = _training(0, description="threads of the training process; 0: half of the cores")
    train_nice: Annotated[int, Field(ge=0, le=19)] = _training(
        10, description="how far the training process steps back where the processor is busy (nice)"
    )
    train_idle_seconds: _Seconds = _training(
        600.0, description="seconds without a job after which the training process ends"
    )
    max_file_mib: _Size = _training(512, description="largest file that is uploaded for training, in MiB")
    trackers: CommaList[Literal["wandb", "trackio", "tensorboard", "mlflow"]] = _training(
        (), description="trackers that a job may report to, with the accounts of this server's owner"
    )

    log_level: Literal["debug", "info", "warning", "error"] = _logs("info", description="lowest level of the log")

    keys: Mapping[str, KeyConfig] = Field(default={}, description="tables [keys.NAME], only in the file")

    @field_validator("keys", mode="before")
    @classmethod
    def _check_tables(cls, keys: Any) -> Any:
        tables = keys.values() if isinstance(keys, Mapping) else [keys]
        if not all(isinstance(table, Mapping | KeyConfig) for table in tables):
            # A key may stand here by mistake: the message does not repeat it.
            raise ValueError("must be tables, as in [keys.alice]")
        return keys

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """What is wrong with several values together. Wrong keys count as keys: there is no second message."""
        if bool(self.vllm_url) != bool(self.vllm_folder):
            yield ("vllm_url", "vllm_folder"), "vllm_url and vllm_folder belong together"
        if self.engine == "vllm" and self.quantize:
            yield ("engine", "quantize"), "quantize is of the engine torch; vLLM loads checkpoints that are quantized"
        for name, engine in _ENGINE_OPTIONS.items():
            if getattr(self, name) and self.engine not in (engine, "none"):
                yield (name, "engine"), f"{name} is of the engine {engine}, but {self.engine} runs"
        if len({key.hash for key in self.keys.values()}) < len(self.keys):
            yield ("keys",), "two keys have the same hash"
        if not self.keys and not is_loopback(self.host):
            yield (
                ("host", "keys", "engine"),
                f"host is {self.host!r} and no key is configured, so anybody could use the server: without keys "
                "only loopback (127.0.0.1) is allowed; `prefixtune serve --new-key` makes a key",
            )

    @property
    def takes_jobs(self) -> bool:
        """Whether there is somebody to train what is asked for."""
        return self.train_workers > 0 or bool(self.database_url)

    @property
    def model_id(self) -> str:
        """The bare backbone's model name; never a path.

        >>> ServeConfig(backbone="/models/tiny/").model_id, ServeConfig(backbone="openai-community/gpt2").model_id
        ('tiny', 'gpt2')
        """
        return self.backbone_id or Path(self.backbone).name.removesuffix(".gguf") or "backbone"

    @classmethod
    def sources(cls, path: str | Path | None, environment: Mapping[str, str]) -> list[Layer]:
        """A file, and variables `PREFIXTUNE_SERVE_...`, which win over it; flags win over both."""
        files = [Layer.from_file(path, cls.model_fields)] if path else []
        return [*files, Layer.from_environment(ENVIRONMENT, environment)]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address: `localhost`, or one that cannot be made to point elsewhere.

    >>> is_loopback("::1"), is_loopback("127.0.0.2"), is_loopback("127.0.0.1.evil.example")
    (True, True, False)
    """
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
