"""The server's configuration: one frozen dataclass, read from TOML, then the environment, then flags, and checked."""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from prefixtune.errors import ConfigError, did_you_mean
from prefixtune.server.addresses import parse_network
from prefixtune.utils.options import check_names, fit_types, type_fault

__all__ = ["ENVIRONMENT", "KeyConfig", "ServeConfig"]


ENVIRONMENT = "PREFIXTUNE_SERVE_"
"""Prefix of the environment variables. Not `PREFIXTUNE_` alone: beside a service called prefixtune, Kubernetes sets
`PREFIXTUNE_PORT` in every container."""

_HINT = "`prefixtune serve --help` explains every option."
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")
_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def _option(default: Any, text: str, group: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "group": group})


@dataclass(frozen=True)
class KeyConfig:
    """One API key: what its owner may do, and how often.

    Attributes:
        hash: `sha256:` and the digest of the key, as `prefixtune serve --new-key` prints it.
        prefixes: Patterns of the models that it may use, as in `acme-*`; they match the bare backbone's name too.
        requests_per_minute: 0: no limit.
        concurrent: Requests at once; 0: no limit.
        admin: May list, upload and delete prefixes, and read the metrics.
        metrics: May read the metrics.
    """

    hash: str
    prefixes: tuple[str, ...] = ("*",)
    requests_per_minute: int = 0
    concurrent: int = 0
    admin: bool = False
    metrics: bool = False


@dataclass(frozen=True)
class ServeConfig:
    """A server. Every field is a key of the TOML file and, except `keys`, an environment variable and a flag.

    Raises:
        ConfigError: One or more values are not allowed; all faults are listed at once.
    """

    engine: Literal["embedded", "vllm"] = _option(
        "embedded", "what runs the model: this program, or vLLM with this program's plugin", "model"
    )
    backbone: str = _option("smollm2-135m", "embedded name, hub id, local folder or .gguf file", "model")
    backbone_id: str = _option("", "the bare backbone's model name; empty: the last part of its name", "model")
    prefixes: str = _option("prefixes", "folder of prefix files, NAME.safetensors", "model")
    reload_seconds: float = _option(
        0.0, "seconds between looks for new and replaced files; 0: only on POST /admin/reload", "model"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option("auto", "dtype of the frozen weights", "model")
    device: str = _option("auto", "cpu, cuda, cuda:0, mps or auto", "model")
    raw_completions: bool = _option(
        False,
        "/v1/completions uses prompts as they are, without a prefix's text format; lm-eval's generation tasks need it",
        "model",
    )
    earlier_messages: Literal["refuse", "drop"] = _option(
        "refuse",
        "messages of a chat before the last one, which a prefix cannot read: refuse, or drop them and say so",
        "model",
    )
    quantize: Literal["", "int8", "int4"] = _option("", "quantize the frozen weights (torchao): int8 or int4", "model")

    host: str = _option("127.0.0.1", "address to listen on; any other than loopback needs keys", "network")
    port: int = _option(8000, "port to listen on; 0: any free one", "network")
    cors_origins: tuple[str, ...] = _option(
        (), "origins whose pages may call the server, as in https://a.example,https://b.example; empty: none", "network"
    )
    max_connections: int = _option(
        4096,
        "connections at once; when all are taken, the longest idle one makes room for a new one",
        "network",
    )
    max_connections_per_address: int = _option(
        1024, "connections at once from one address, except from `proxies`; 0: no limit", "network"
    )
    proxies: tuple[str, ...] = _option(
        (),
        "addresses or networks of your own proxies, as in 127.0.0.1,10.0.0.0/8; X-Forwarded-For counts only from them",
        "network",
    )
    header_timeout: float = _option(15.0, "seconds that a client may take to send a request's header", "network")
    keep_alive: float = _option(75.0, "seconds that a connection may wait for its next request", "network")
    playground: bool = _option(True, "serve a page to try things on, at /", "network")

    num_slots: int = _option(32, "texts that are generated at once", "engine")
    max_length: int = _option(0, "most positions of a text, prefix included; 0: as many as the backbone has", "engine")
    prefill_tokens: int = _option(
        256,
        "most prompt tokens computed in a step beside running texts; four times as many if none is running",
        "engine",
    )
    cache_mib: int = _option(1024, "memory for loaded prefixes, in MiB", "engine")

    max_queue: int = _option(
        256,
        "texts that may wait for a slot; when full, a tenant who holds an equal share of the queue gets 429",
        "limits",
    )
    max_pending_mib: int = _option(
        64,
        "memory for the bodies of all requests, in MiB; when full, a tenant who holds an equal share of it gets 429",
        "limits",
    )
    max_body_kib: int = _option(1024, "largest body of a request, in KiB", "limits")
    max_upload_mib: int = _option(256, "largest uploaded prefix, in MiB", "limits")
    max_prompt_tokens: int = _option(0, "most tokens of a prompt; 0: as many as fit the model", "limits")
    on_too_long: Literal["", "cut", "error"] = _option(
        "",
        "a source that is too long for its prefix: cut it, or answer with an error; empty: as in its training",
        "limits",
    )
    max_tokens: int = _option(1024, "most new tokens that a request may ask for", "limits")
    default_max_tokens: int = _option(
        256, "most new tokens if a request has no max_tokens, as far as they fit", "limits"
    )
    max_texts: int = _option(32, "most texts of one request: its prompts times its n", "limits")
    deadline: float = _option(300.0, "seconds that a request may take from its header on, waiting included", "limits")
    client_timeout: float = _option(
        30.0, "seconds that a client may take to send a body, or to read a piece of a response", "limits"
    )
    drain_seconds: float = _option(30.0, "seconds that running requests may take after SIGTERM", "limits")

    log_level: Literal["debug", "info", "warning", "error"] = _option(
        "info", "lowest level of the JSON lines on stdout", "logs"
    )
    log_prompts: bool = _option(False, "write prompts and outputs to the log", "logs")
    metric_prefixes: int = _option(100, "most prefixes with metrics of their own; the others count as 'other'", "logs")

    keys: Mapping[str, KeyConfig] = dataclasses.field(
        default_factory=dict, metadata={"help": "tables [keys.NAME], only in the file", "group": ""}
    )

    def __new__(cls, *_: Any, **values: Any) -> ServeConfig:
        """Refuse unknown names, with the nearest known one."""
        check_names(cls, values, "ServeConfig has no such option", _HINT)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        # The other checks assume the right types.
        faults = list(fit_types(self).values()) or list(self._faults())
        if faults:
            raise ConfigError("; ".join(faults) + ".", hint=_HINT)

    def _faults(self) -> Iterator[str]:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                allowed = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                yield f"{name} is {value}, but must be {allowed}"
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                yield f"cors_origins has {origin!r}, but needs origins such as https://app.example.org"
        for proxy in self.proxies:
            try:
                parse_network(proxy)
            except ValueError:
                yield f"proxies has {proxy!r}, but needs addresses or networks such as 10.0.0.0/8"
        if self.default_max_tokens > self.max_tokens:
            yield f"default_max_tokens is {self.default_max_tokens}, which is more than max_tokens ({self.max_tokens})"
        if 1024 * self.max_pending_mib < self.max_body_kib:
            yield (
                f"max_pending_mib is {self.max_pending_mib}, which is less than one request may have "
                f"(max_body_kib, {self.max_body_kib})"
            )
        if not self.prefixes:
            yield "prefixes is empty, but must name a folder"
        if self.proxies and not self.keys and self.engine == "embedded":
            yield (
                "proxies are named and no key is configured, so anybody who reaches them could use the server; "
                "`prefixtune serve --new-key` makes a key"
            )
        # vLLM has its own key.
        if not self.keys and not self.is_loopback and self.engine == "embedded":
            yield (
                f"host is {self.host!r} and no key is configured, so anybody could use the server: without keys "
                "only loopback (127.0.0.1) is allowed; `prefixtune serve --new-key` makes a key"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address.

        >>> ServeConfig(host="::1").is_loopback
        True
        """
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def model_id(self) -> str:
        """The bare backbone's model name; never a path.

        >>> ServeConfig(backbone="/models/tiny/").model_id, ServeConfig(backbone="openai-community/gpt2").model_id
        ('tiny', 'gpt2')
        """
        return self.backbone_id or Path(self.backbone).name.removesuffix(".gguf") or "backbone"

    @classmethod
    def from_sources(
        cls,
        path: str | Path | None = None,
        environment: Mapping[str, str] | None = None,
        flags: Mapping[str, Any] | None = None,
    ) -> ServeConfig:
        """Read a TOML file, then variables `PREFIXTUNE_SERVE_...`, then flags; later ones win.

        Raises:
            ConfigError: The file is missing or not TOML, a name is unknown (with the nearest known one), or a value is
                not allowed; all faults at once.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        types = get_type_hints(cls)
        faults: list[str] = []
        values: dict[str, Any] = {}
        for name, value in _read_toml(path).items():
            if name not in fields:
                faults.append(f"{str(path)!r} has the unknown key {name!r} ({did_you_mean(name, fields)})")
            else:
                values[name] = tuple(value) if isinstance(value, list) else value
        known = {f"{ENVIRONMENT}{name.upper()}": name for name in fields if name != "keys"}
        for variable, text in (environment or {}).items():
            if variable in known:
                try:
                    values[known[variable]] = _parse(text, types[known[variable]])
                except ValueError as error:
                    faults.append(f"{variable} is {text!r}, but must be {error}")
            elif variable.startswith(ENVIRONMENT):
                faults.append(f"unknown variable {variable} ({did_you_mean(variable, known)})")
        for name, value in (flags or {}).items():
            values[name] = _parse(value, types[name]) if isinstance(value, str) else value
        tables = values.pop("keys", {})
        for name, value in list(values.items()):
            if fault := type_fault(name, value, types[name]):
                faults.append(fault)
                del values[name]
            elif types[name] is float:
                values[name] = float(value)
        values["keys"] = _read_keys(tables, faults)
        try:
            config = cls(**values)
        except ConfigError as error:
            faults.append(error.message.removesuffix("."))
        if faults:
            raise ConfigError("; ".join(faults) + ".", hint=_HINT)
        return config


_MAX_NUMBER = 1_000_000_000
_RANGES: dict[str, tuple[float, float]] = {
    "port": (0, 65535),
    **dict.fromkeys(("max_length", "max_prompt_tokens", "max_queue", "metric_prefixes"), (0, _MAX_NUMBER)),
    **dict.fromkeys(("max_connections", "num_slots", "prefill_tokens", "cache_mib", "max_body_kib"), (1, _MAX_NUMBER)),
    **dict.fromkeys(
        ("max_pending_mib", "max_upload_mib", "max_tokens", "default_max_tokens", "max_texts"), (1, _MAX_NUMBER)
    ),
    "max_connections_per_address": (0, _MAX_NUMBER),
    **dict.fromkeys(("deadline", "client_timeout", "header_timeout", "keep_alive"), (0.1, math.inf)),
    **dict.fromkeys(("drain_seconds", "reload_seconds"), (0.0, math.inf)),
}


def _parse(text: str, kind: Any) -> Any:
    """The text of a variable or a flag -> a value of the field's type.

    Raises:
        ValueError: It is not such a value; the message says what is needed.
    """
    if get_origin(kind) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind is bool:
        if text.strip().lower() not in _BOOLEANS:
            raise ValueError("true or false")
        return _BOOLEANS[text.strip().lower()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError("a whole number" if kind is int else "a number") from None
    return text


def _read_toml(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {str(path)!r}: {error}.", hint="check the path.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{str(path)!r} is not TOML: {error}.", hint="write lines such as port = 8000.") from error


def _read_keys(tables: Any, faults: list[str]) -> dict[str, KeyConfig]:
    """The tables [keys.NAME]; adds what is wrong to the faults."""
    known = get_type_hints(KeyConfig)
    keys: dict[str, KeyConfig] = {}
    if not isinstance(tables, Mapping):
        faults.append(f"keys is {tables!r}, but must be tables, as in [keys.alice]")
        return keys
    for name, table in tables.items():
        where = f"keys.{name}"
        if not isinstance(table, Mapping):
            faults.append(f"{where} is not a table")
            continue
        before = len(faults)
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in table.items()
        }
        for key, value in values.items():
            if key not in known:
                faults.append(f"{where} has the unknown key {key!r} ({did_you_mean(key, known)})")
            elif key == "hash":
                # Somebody may have written the key itself here: never repeat it.
                if not isinstance(value, str) or not _HASH.fullmatch(value):
                    faults.append(f"{where}.hash is not 'sha256:' and 64 hexadecimal digits")
            elif fault := type_fault(f"{where}.{key}", value, known[key]):
                faults.append(fault)
            elif known[key] is int and value < 0:
                faults.append(f"{where}.{key} is {value}, but must be at least 0")
        if "hash" not in values:
            faults.append(f"{where} has no hash")
        # A wrong key still counts as a key: otherwise a second message would say that there is none.
        keys[name] = KeyConfig(**values) if len(faults) == before else KeyConfig(f"wrong: {name}")
    hashes = [key.hash for key in keys.values()]
    if len(set(hashes)) < len(hashes):
        faults.append("two keys have the same hash")
    return keys
