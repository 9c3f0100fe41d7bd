"""A frozen language model and its tokenizer, and what is known of them.

The model is frozen, in evaluation mode, with every dropout rate set to zero, so that nothing turns it on by accident.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from prefixtune.attention.forward import forward_with_prefixes, takes_logits_to_keep
from prefixtune.attention.layout import Layout, main_device
from prefixtune.attention.probe import probe
from prefixtune.attention.rotation import find_rotation
from prefixtune.backbone.head import OutputHead
from prefixtune.backbone.identity import fingerprint
from prefixtune.doctor.selfcheck import Seen, check_once
from prefixtune.errors import BackboneError
from prefixtune.prefix.geometry import BackboneKind, Geometry, describe
from prefixtune.prefix.rotation import Rotation, longrope_limit
from prefixtune.prefix.text_format import check_characters

_POSITION_LIMITS = ("max_position_embeddings", "max_encoder_position_embeddings", "max_decoder_position_embeddings")


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen model, its tokenizer, and what was read from them.

    Attributes:
        model: The transformers model, in evaluation mode, without gradients.
        tokenizer: Its tokenizer.
        name: What it was loaded by: an embedded name, a hub id or a path.
        layout: Its attention layers, found by running it.
        fingerprint: Of configuration and sampled weights; the same in every dtype. See `fingerprints_match`.
        compute_dtype: The dtype of its products, where some weights are kept in float32 to be trained; None: that of
            the weights.
        tokenizer_cache: Facts about the tokenizer that other modules computed and keep here.
        unused_weights: Names of the checkpoint's weights for which the model has no use, such as another task's head.
        known_rotation: How its keys turn, where the weights to find out are not there; None: it is found out.
        most_positions: What the engine that computes allows; None: as many as the model has.
    """

    model: Any
    tokenizer: Any
    name: str
    layout: Layout
    fingerprint: str
    compute_dtype: torch.dtype | None = None
    tokenizer_cache: dict[str, Any] = field(default_factory=dict, repr=False)
    unused_weights: tuple[str, ...] = field(default=(), repr=False)
    known_rotation: Rotation | None = field(default=None, repr=False)
    most_positions: int | None = field(default=None, repr=False)

    @property
    def geometry(self) -> Geometry:
        """Per site, every layer's KV heads and head sizes."""
        return self.layout.geometry

    @property
    def kind(self) -> BackboneKind:
        """`decoder` (GPT-2, LLaMA), `encoder-decoder` (BART, T5) or `encoder` (BERT)."""
        return self.layout.kind

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in: that of its weights, but for those that are trained."""
        return self.compute_dtype or self.model.dtype

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """While the block runs, products are computed in `dtype`, whatever the weights are kept in."""
        if self.compute_dtype in (None, torch.float32):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device = main_device(self.model)
        # A model without weights computes nothing; its prefixes are for an engine elsewhere.
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def hidden_size(self) -> int:
        """The model's width, d in the paper's MLP."""
        width = getattr(self.model.config.get_text_config(decoder=True), "hidden_size", None)
        return int(width or self.model.get_input_embeddings().weight.shape[1])

    @property
    def head_size(self) -> int:
        """The width of the last hidden states, which a head reads: d, but where the model projects them (OPT-350M)."""
        projected = getattr(self.model.config.get_text_config(decoder=True), "word_embed_proj_dim", None)
        return int(projected or self.hidden_size)

    @property
    def vocab_size(self) -> int:
        """How many tokens the output head gives scores."""
        head = self.model.get_output_embeddings()
        # A weight that is laid out otherwise may have further rows.
        return int(getattr(head, "out_features", 0) or head.weight.shape[0])

    @property
    def num_embeddings(self) -> int:
        """How many tokens it can read."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def max_positions(self) -> int | None:
        """How many positions can be used; None when the model's configuration does not say (T5: any number).

        Of an encoder-decoder: on either side.
        """
        config = self.model.config.get_text_config(decoder=True)
        known = [int(limit) for name in _POSITION_LIMITS if (limit := getattr(config, name, None)) is not None]
        if not known:
            return self.most_positions
        table = getattr(getattr(self.model, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        # RoBERTa counts its positions from the padding's id on.
        own = min(known) - (0 if padding is None else int(padding) + 1)
        return min(own, self.most_positions or own)

    @property
    def longrope_limit(self) -> int | None:
        """The model's original length, beyond which LongRoPE turns all keys otherwise; None: it has no LongRoPE."""
        return longrope_limit(self.model.config.get_text_config(decoder=True))

    def max_positions_with(self, prefix_length: int) -> int | None:
        """How many positions a prefix and a text may have together; None: any number.

        A prefix works up to the model's original length: its keys cannot be turned as LongRoPE turns those of a longer
        text.
        """
        limits = [self.max_positions, self.longrope_limit if self.prefix_positions(prefix_length) else None]
        return min((limit for limit in limits if limit is not None), default=None)

    def prefix_positions(self, prefix_length: int) -> int:
        """How many of the model's positions a prefix takes: P for a decoder-only model, none for the others."""
        return prefix_length if self.kind == "decoder" else 0

    @functools.cached_property
    def rotation(self) -> Rotation:
        """How each layer's keys turn with position, found by running a few tokens: to move and join prefixes.

        Raises:
            BackboneError: Keys depend on the text's length, or on position in a way that is no turn.
        """
        if self.known_rotation is not None:
            return self.known_rotation
        with self.autocast():
            return find_rotation(self.model, self.layout, self.max_positions)

    @functools.cached_property
    def counts_by_row(self) -> bool:
        """Whether experts take only so many tokens of a row (Switch Transformers), for which its texts compete."""
        return any(hasattr(module, "expert_capacity") for module in self.model.modules())

    @functools.cached_property
    def head(self) -> OutputHead:
        """What makes logits of the last hidden states; not of an encoder."""
        return OutputHead(self)

    @property
    def supports_logits_to_keep(self) -> bool:
        """Whether the model can compute logits at chosen positions alone."""
        return takes_logits_to_keep(self.model)

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
    def eos_id(self) -> int:
        """The id of `end`."""
        return int(self.tokenizer.eos_token_id)

    @property
    def more_end_ids(self) -> tuple[int, ...]:
        """The special tokens, besides `eos_id`, at which the model's own generation configuration ends a text."""
        given = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ids, known = [given] if isinstance(given, int) else given or (), self.tokenizer.added_tokens_decoder
        return tuple(one for one in ids if one != self.eos_id and one in known and known[one].special)

    @property
    def begins_texts(self) -> bool:
        """Whether the tokenizer puts its beginning-of-sequence token before every text (Gemma, Llama)."""
        ids: list[int] = self.tokenizer("", verbose=False)["input_ids"]
        return ids[:1] == [self.tokenizer.bos_token_id]

    @property
    def pad_id(self) -> int:
        """What padding is filled with; it is masked, so any id that the model has does."""
        pad = self.tokenizer.pad_token_id
        return self.eos_id if pad is None or pad >= self.num_embeddings else int(pad)

    @property
    def decoder_start_id(self) -> int:
        """What an encoder-decoder's decoder reads first.

        Where the configuration names none (mBART), it is the language token that the tokenizer puts after a target.
        """
        for config in (self.model.config, self.model.generation_config):
            if (given := getattr(config, "decoder_start_token_id", None)) is not None:
                return int(given)
        ids: list[int] = self.tokenizer(text_target="")["input_ids"]
        other = [token for token in ids if token != self.eos_id]
        return other[-1] if other else self.pad_id

    @property
    def forced_bos_id(self) -> int | None:
        """What an encoder-decoder's output starts with, whatever its scores (a language, in mBART); None: nothing."""
        forced = getattr(self.model.generation_config, "forced_bos_token_id", None)
        return None if forced is None or self.kind != "encoder-decoder" else int(forced)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode_sources(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of what a model reads; with the tokenizer's special tokens where an encoder reads it.

        Raises:
            RequestError: A text holds half a surrogate pair.
        """
        for number, text in enumerate(texts, start=1):
            check_characters(text, f"text {number}")
        return list(self.tokenizer(list(texts), add_special_tokens=self.kind != "decoder", verbose=False)["input_ids"])

    def encode_targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of what a model is to write, each closed by the end token."""
        if self.kind == "decoder":
            return [[*ids, self.eos_id] for ids in self.encode_sources(texts)]
        rows: list[list[int]] = self.tokenizer(text_target=list(texts), verbose=False)["input_ids"]
        # What a tokenizer adds after the end token (mBART: the language) is not learned.
        return [[*(row[: row.index(self.eos_id)] if self.eos_id in row else row), self.eos_id] for row in rows]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out, nothing cleaned up."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """`forward_with_prefixes` on this model: a call with prefixes in front."""
        with self.autocast():
            return forward_with_prefixes(self.model, self.layout, input_ids, attention_mask, **kwargs)

    def hidden_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """The last layer's output, (B, T, hidden size), with prefixes in front; arguments as for `forward`."""
        with self.autocast():
            return forward_with_prefixes(self.model.base_model, self.layout, input_ids, attention_mask, **kwargs)[0]

    @property
    def dtype_name(self) -> str:
        """`dtype` as files and messages name it: `float32`, say."""
        return str(self.dtype).removeprefix("torch.")

    def __repr__(self) -> str:
        return (
            f"Backbone({self.name!r}, {self.num_parameters:,} parameters, {describe(self.geometry)}, "
            f"{self.dtype_name} on {self.device})"
        )

    @property
    def adapter_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained in place of a prefix, by name (see `training.tuning`)."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        attention: str = "sdpa",
        samples: str = "",
        self_check: bool = True,
        files: str = "",
    ) -> Backbone:
        """Freeze a model that is already in memory and read it.

        Args:
            model: Of transformers.
            tokenizer: Its tokenizer.
            name: What to call it, in messages and in artifacts.
            attention: What computes the attention, behind the prefix: `sdpa`, `eager` or `flex`.
            samples: Of the weights before they were quantized (see `identity.sample`); empty: they were not.
            self_check: Compare the ways in which prefixes are used, if this type was not checked before.
            files: `selfcheck.weight_files` that were read: what was seen at an earlier load of them holds; empty: none.

        Raises:
            BackboneError: It cannot have a prefix, or fails the self-check; the message says why.
        """
        model.requires_grad_(False)
        model.eval()
        silence_dropout(model)
        # Decoding follows `GenerateConfig` alone, but for where a text begins and ends: a penalty or ban that the
        # model's files bring along would apply silently, and count the padding.
        from transformers import GenerationConfig

        stored = getattr(model, "generation_config", None)
        if stored is not None:
            # How an encoder-decoder's output begins belongs to the model; its generation configuration wins.
            model.generation_config = GenerationConfig(eos_token_id=getattr(stored, "eos_token_id", None))
            for key in ("decoder_start_token_id", "forced_bos_token_id"):
                token = getattr(stored, key, None)
                setattr(model.generation_config, key, getattr(model.config, key, None) if token is None else token)
        seen = Seen(model, attention, files)
        layout, known = seen.recall() or (probe(model, attention), "")
        if layout.kind != "encoder" and model.get_output_embeddings() is None:
            raise BackboneError(
                f"{type(model).__name__} has no output head: it generates no text.",
                hint="load it by transformers' class with a head (...ForCausalLM or ...ForConditionalGeneration).",
            )
        if self_check:
            check_once(model, layout, attention)
        if not known:
            known = fingerprint(model, layout.geometry, samples)
            seen.remember(layout, known)
        return cls(model, tokenizer, name, layout, known)


def silence_dropout(model: torch.nn.Module) -> None:
    """Set every dropout rate of a model to zero: modules, functional rates and layer drop.

    A frozen backbone never wants dropout; so a stray `.train()`, or the training mark that gradient checkpointing
    needs, cannot turn it on.
    """
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        # Some layers look their rate up when they are called. (One such rate scales the output in evaluation mode too.)
        _zero(config, "drop")
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero(module, "drop", "jitter_noise")


def _zero(owner: Any, *parts: str) -> None:
    """Set the rates of a module or configuration to zero whose names hold one of these."""
    for name, value in list(vars(owner).items()):
        if isinstance(value, float) and name != "moe_token_dropout" and any(part in name for part in parts):
            setattr(owner, name, 0.0)
