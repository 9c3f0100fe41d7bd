"""What the plugin knows of the model that vLLM runs, and the folder of prefixes beside it.

Everything is read from vLLM's own configuration, so that the server, the scheduler and the workers agree without a word
between them. Knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from prefixtune.errors import CheckpointError, ConfigError, PrefixError, RequestError
from prefixtune.prefix.artifact import Outline, read_outline, reasons_against
from prefixtune.prefix.fingerprint import fingerprints_match, sample_weights
from prefixtune.prefix.folder import Signature, check_name, check_place, list_names, path_of, signature_of
from prefixtune.prefix.geometry import Geometry, LayerShape
from prefixtune.prefix.text_format import TextFormat, read_text_format

__all__ = [
    "PARAMETER",
    "SECRET_VARIABLE",
    "Asked",
    "Known",
    "PrefixFolder",
    "Settings",
    "geometry_of",
    "heads_of_rank",
    "version_of",
    "weights_of",
]


SECRET_VARIABLE = "PREFIXTUNE_VLLM_SECRET"
"""The environment variable of a secret that processes share."""

PARAMETER = "prefixtune"
"""Under which key of `kv_transfer_params` a request names its prefix."""

Version = tuple[int, int]
"""Time of change in nanoseconds, and size in bytes. No inode: it may differ between machines."""

_OPTIONS = (
    *("prefixes", "cache_mib", "secret", "allow_other_backbone", "max_body_mib"),
    *("raw_completions", "earlier_messages", "on_too_long"),
)
_CHOICES = {"earlier_messages": ("refuse", "drop"), "on_too_long": ("", "cut", "error")}


@dataclass(frozen=True)
class Settings:
    """What `kv_connector_extra_config` says.

    Attributes:
        folder: Of the prefixes.
        secret: What proves that a request's prefix was named by the server itself.
        cache_bytes: Most that a worker's loaded prefixes may take.
        allow_other_backbone: Accept prefixes of a sister model whose shapes fit.
        max_body_bytes: Longest request that is read.
        raw_completions: A completion's prompt goes to a prefix as it is, without its text format.
        earlier_messages: `refuse` a chat with several messages for a prefix that reads one text, or `drop` all but the
            last.
        on_too_long: `cut` a source that is too long, or refuse it (`error`); empty: as in the prefix's training.
    """

    folder: Path
    secret: bytes
    cache_bytes: int = 2**30
    allow_other_backbone: bool = False
    max_body_bytes: int = 2**24
    raw_completions: bool = False
    earlier_messages: str = "refuse"
    on_too_long: str = ""

    @classmethod
    def from_vllm(cls, config: Any) -> Settings:
        """Read vLLM's `VllmConfig`.

        Raises:
            ConfigError: An option is unknown, missing or wrong, or vLLM is told to compute again what cannot be loaded.
        """
        transfer, parallel = config.kv_transfer_config, config.parallel_config
        extra: Mapping[str, Any] = transfer.kv_connector_extra_config
        faults = [f"unknown option {key!r} (known: {', '.join(_OPTIONS)})" for key in extra if key not in _OPTIONS]
        folder = extra.get("prefixes")
        if not isinstance(folder, str) or not Path(folder).is_dir():
            faults.append(f"prefixes is {folder!r}, but must be an existing folder")
        numbers = {key: extra.get(key, usual) for key, usual in (("cache_mib", 1024), ("max_body_mib", 16))}
        for key, value in numbers.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                faults.append(f"{key} is {value!r}, but must be a whole number of MiB")
        other, raw = (extra.get(key, False) for key in ("allow_other_backbone", "raw_completions"))
        for key, value in (("allow_other_backbone", other), ("raw_completions", raw)):
            if not isinstance(value, bool):
                faults.append(f"{key} is {value!r}, but must be true or false")
        chosen = {key: extra.get(key, getattr(cls, key)) for key in _CHOICES}
        for key, allowed in _CHOICES.items():
            if chosen[key] not in allowed:
                faults.append(f"{key} is {chosen[key]!r}, but must be one of {', '.join(filter(None, allowed))}")
        if transfer.kv_load_failure_policy != "fail":
            # Placeholders would run as ordinary tokens.
            faults.append("kv_load_failure_policy must be 'fail', or a prefix that cannot be loaded would go unnoticed")
        secret = extra.get("secret") or os.environ.get(SECRET_VARIABLE) or ""
        if not secret and (parallel.data_parallel_size > 1 or getattr(parallel, "_api_process_count", 1) > 1):
            # Each would have one of its own, and prefixes would be left out.
            faults.append(f"several servers or engines need one secret: set it here, or {SECRET_VARIABLE} for all")
        if faults:
            raise ConfigError(f"kv_transfer_config: {'; '.join(faults)}.", hint="see docs/serving.md.")
        # vLLM draws an id for every start.
        secret = str(secret or transfer.engine_id)
        cache, body = numbers["cache_mib"] * 2**20, numbers["max_body_mib"] * 2**20
        return cls(Path(str(folder)).absolute(), secret.encode(), cache, other, body, raw, **chosen)


@dataclass(frozen=True)
class Asked:
    """The prefix that a request is to have.

    Attributes:
        name: Of the prefix.
        version: Of the file that it was when the request came.
        length: P.
        is_proven: Whether the server itself has said so; if not, the request must fail.
    """

    name: str
    version: Version
    length: int
    is_proven: bool = True

    def parameters(self, secret: bytes) -> dict[str, Any]:
        """As `kv_transfer_params`, signed."""
        facts = [self.name, list(self.version), self.length]
        return {PARAMETER: {"prefix": facts, "proof": _sign(secret, "load", facts)}}

    def salt(self, secret: bytes, given: str | None) -> str:
        """Of the cache of blocks: no other prefix, version or request of somebody else's making shares it.

        Args:
            secret: The server's.
            given: The client's own salt.
        """
        return _sign(secret, "salt", [self.name, list(self.version), given])

    @classmethod
    def from_parameters(cls, parameters: object, secret: bytes) -> Asked | None:
        """The reverse of `parameters`; None where no prefix is asked for.

        What a client wrote there by itself, or a server with another secret, is not proven. Raises nothing, whatever
        it is: it runs in vLLM's scheduler.
        """
        if not isinstance(parameters, Mapping) or PARAMETER not in parameters:
            return None
        told = parameters[PARAMETER]
        facts, proof = (told.get("prefix"), told.get("proof")) if isinstance(told, Mapping) else (None, None)
        try:
            expected = _sign(secret, "load", facts)
            if hmac.compare_digest(str(proof).encode("utf-8", "replace"), expected.encode()):
                name, (changed, size), length = facts  # type: ignore[misc]  # Signed by ourselves.
                return cls(name, (changed, size), length)
        except (TypeError, ValueError, RecursionError):
            pass
        return cls("", (0, 0), 1, is_proven=False)


def version_of(path: Path) -> Version | None:
    """Which version of a file is there; None: it is gone. The same on every machine that shares the folder."""
    signature = signature_of(path)
    return None if signature is None else signature[:2]


def _sign(secret: bytes, purpose: str, facts: object) -> str:
    text = json.dumps([purpose, facts], sort_keys=True)
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def geometry_of(model_config: Any) -> Geometry:
    """The shapes of the model that vLLM's `ModelConfig` describes.

    Raises:
        ConfigError: It is one that this plugin cannot put a prefix in front of; the message says why.
    """
    reasons = []
    if model_config.is_encoder_decoder:
        reasons.append("it is an encoder-decoder")
    if model_config.use_mla:
        reasons.append("its attention is latent (MLA), without keys and values of its own")
    if model_config.is_hybrid or model_config.is_attention_free:
        reasons.append("not all of its layers are attention")
    if model_config.is_multimodal_model:
        reasons.append("it reads more than text, and its positions follow from that")
    if reasons:
        raise ConfigError(
            f"vLLM cannot serve prefixes with {model_config.model!r}: {'; '.join(reasons)}.",
            hint="serve it with `prefixtune serve --engine embedded`.",
        )
    size = model_config.get_head_size()
    shape = LayerShape(model_config.get_total_num_kv_heads(), size, size)
    return {"decoder": (shape,) * model_config.get_total_num_hidden_layers()}


def heads_of_rank(num_kv_heads: int, ranks: int, rank: int) -> slice:
    """Which KV heads a tensor-parallel rank holds: a share of them, or one of them where there are more ranks.

    >>> [heads_of_rank(8, 4, rank) for rank in (0, 3)], heads_of_rank(2, 4, 3)
    ([slice(0, 2, None), slice(6, 8, None)], slice(1, 2, None))

    Raises:
        ConfigError: They cannot be shared out evenly.
    """
    if num_kv_heads % ranks and ranks % num_kv_heads:
        raise ConfigError(
            f"{num_kv_heads} KV heads cannot be shared out over {ranks} devices.",
            hint="choose a tensor-parallel size that divides their number, or is a multiple of it.",
        )
    count = max(num_kv_heads // ranks, 1)
    first = rank * num_kv_heads // ranks
    return slice(first, first + count)


def weights_of(folder: Path) -> str | None:
    """Samples of a checkpoint's weights, as fingerprints have them.

    A fingerprint samples a loaded model's parameters, and a file may name and cut its tensors otherwise. So weights are
    sampled only where transformers 5 wrote them as it loads them: no quantized ones, and no experts.

    Returns:
        The samples; None where weights on disk cannot be compared with a fingerprint.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not str(config.get("transformers_version", "")).startswith("5."):
            return None
        if "quantization_config" in config or any("experts" in key for key in config):
            return None
        index = folder / "model.safetensors.index.json"
        shards = {"model.safetensors"}
        if index.exists():
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        places: dict[str, Path] = {}
        sizes: list[tuple[str, int]] = []
        for shard in sorted(shards):
            with safe_open(folder / shard, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118
                    shape = handle.get_slice(name).get_shape()
                    if not shape or (config.get("tie_word_embeddings") and name == "lm_head.weight"):
                        continue
                    places[name] = folder / shard
                    sizes.append((name, math.prod(shape)))
        return sample_weights(sizes, lambda name, place: _one_weight(places[name], name, place)) if sizes else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None


def _one_weight(shard: Path, name: str, place: int) -> Tensor:
    with safe_open(shard, framework="pt") as handle:
        part = handle.get_slice(name)
        row = math.prod(part.get_shape()[1:])
        values: Tensor = part[place // row : place // row + 1]
        return values.reshape(-1)[place % row]


@dataclass(frozen=True)
class Known:
    """A prefix that can be served.

    Attributes:
        asked: What a request for it names.
        description: For people.
        created: When its file was changed, in seconds since 1970.
        text_format: That it was trained with; None: its file stores none.
    """

    asked: Asked
    description: str
    created: int
    text_format: TextFormat | None = None


class PrefixFolder:
    """Prefixes by name, as they are in a folder now. May be used from any thread.

    Headers alone are read, and checked against the model; a file that was changed is looked at again.

    Args:
        settings: Where it is, and what is accepted.
        geometry: The model's.
        name: The model's, for messages.
        weights: Samples of the model's, as `weights_of` gives them; None: they are not compared.
    """

    def __init__(self, settings: Settings, geometry: Geometry, name: str, weights: str | None = None) -> None:
        self.settings, self.geometry, self.name = settings, geometry, name
        self.weights = None if settings.allow_other_backbone else weights
        self._seen: dict[str, tuple[Signature, Known | str]] = {}
        self._lock = threading.Lock()

    def find(self, name: object) -> Known | None:
        """The prefix of that name; None: there is none.

        Raises:
            CheckpointError: Its file is not served; the message says why.
        """
        try:
            check_name(name)
        except RequestError:
            return None
        return self._look(str(name))

    def all(self) -> dict[str, Known]:
        """Every prefix that can be served, by name; reads all headers that are new."""
        try:
            names = sorted(list_names(self.settings.folder))
        except OSError:
            return {}
        found = {}
        for name in names:
            try:
                known = self.find(name)
            except CheckpointError:
                continue
            if known is not None:
                found[name] = known
        with self._lock:
            for name in self._seen.keys() - set(names):
                del self._seen[name]
        return found

    def _look(self, name: str) -> Known | None:
        path = path_of(self.settings.folder, name)
        signature = signature_of(path)
        if signature is None:
            with self._lock:
                self._seen.pop(name, None)
            return None
        with self._lock:
            seen = self._seen.get(name)
        if seen is None or seen[0] != signature:
            try:
                seen = signature, self._read(name, path, signature)
            except OSError as error:
                # May be of the moment only: looked at again the next time.
                raise CheckpointError(f"the prefix {name!r} cannot be read now.", hint="try again.") from error
            with self._lock:
                self._seen[name] = seen
        if isinstance(seen[1], str):
            raise CheckpointError(f"the prefix {name!r} is not served: {seen[1]}", hint="replace its file.")
        return seen[1]

    def _read(self, name: str, path: Path, signature: Signature) -> Known | str:
        try:
            check_place(self.settings.folder, name)
            outline = read_outline(path)
        except PrefixError as error:
            return error.message
        reasons = reasons_against(outline, self.geometry, self.name)
        if not reasons and not self._same_weights(outline):
            reasons.append(f"it was trained for other weights than those of {self.name!r}")
        needed = outline.num_elements * 4
        if needed > self.settings.cache_bytes:
            reasons.append(f"it takes {needed:,} bytes, but all together may take {self.settings.cache_bytes:,}")
        if reasons:
            return f"{'; '.join(reasons)}."
        length = next(iter(outline.shapes.values()))[1]
        about = str(outline.header.get("description") or outline.header.get("task") or "")
        return Known(Asked(name, signature[:2], length), about, signature[0] // 10**9, read_text_format(outline.header))

    def _same_weights(self, outline: Outline) -> bool:
        origin = outline.header.get("backbone")
        told = str(origin.get("fingerprint", "")) if isinstance(origin, dict) else ""
        if self.weights is None or not told:
            return True
        # What else a fingerprint tells are shapes, which were compared.
        return fingerprints_match(told, f"{told.partition(':')[0]}:{self.weights}")
