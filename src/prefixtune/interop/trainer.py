"""The model that transformers' `Trainer` and TRL's `SFTTrainer` take to train a prefix.

    model = PrefixModel(backbone, TrainConfig(prefix_length=10))
    arguments = TrainingArguments("runs/trainer", learning_rate=2e-2)
    Trainer(model, arguments, train_dataset=examples, data_collator=model.collator()).train()
    model.save_pretrained("runs/trainer")

To a trainer it is a module whose parameters, state and modes are those of the prefix. The backbone is no submodule: no
optimizer, checkpoint or `.train()` reaches it. Only `.to(device)` moves both.

The loss is the mean over the target tokens of an optimizer step, as these trainers count them (`loss_reduction =
"token"`); a row is one target.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from prefixtune import __version__
from prefixtune.attention.forward import gradient_checkpointing
from prefixtune.backbone.head import head_pass
from prefixtune.backbone.load import BackboneLike, as_backbone
from prefixtune.backbone.loss import cross_entropy
from prefixtune.backbone.prefixes import make_header
from prefixtune.errors import ConfigError, DataError
from prefixtune.interop.collator import IGNORED, Collator
from prefixtune.prefix.prefix import Prefix, save_prefix
from prefixtune.training.artifact import reparameterization_facts
from prefixtune.training.config import TrainConfig
from prefixtune.training.data import training_format
from prefixtune.training.prepare import check_given, check_passes_gradients
from prefixtune.training.run_folder import PREFIX_FILE
from prefixtune.training.starts.build import build_encoder, resolve_site_lengths

_OF_TRAIN = ("method", "nested", "prefix_dropout", "beside", "classifier", "label_words")
"""Fields of `TrainConfig` that its own loop follows, and no other."""


class PrefixModel(nn.Module):
    """A frozen model with a trainable prefix in front, as transformers' trainers take a model.

    Args:
        backbone: Decoder-only or encoder-decoder; frozen. A `Backbone`, a name or path, or transformers' (model,
            tokenizer).
        config: How the prefix starts and what is trained: `prefix_length`, `sites`, `reparameterization`,
            `bottleneck_size`, `initialization` and its options, `prompt_format`, `target_format`, `max_length`,
            `on_too_long`, `seed`; `task`, `source` and `license` go into the artifact. The trainer sets everything
            else. What only `train` does is refused, and so are options of loading that the backbone does not follow.
            A `TrainConfig`, or a dict of its fields.
        **options: Fields of `TrainConfig`, in place of `config`.

    Raises:
        ConfigError: The method is not a prefix, the backbone is an encoder or trains weights of its own, or the
            configuration asks for more than a trainer does.
    """

    accepts_loss_kwargs = True
    """Has `Trainer` pass the number of labels in an optimizer step."""
    _keys_to_ignore_on_save: None = None

    def __init__(
        self, backbone: BackboneLike, config: TrainConfig | Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        super().__init__()
        config, backbone = TrainConfig.from_arguments(config, options), as_backbone(backbone)
        if backbone.kind == "encoder":
            hint = "train labels with `prefixtune train --task classification` or tagging."
            raise ConfigError(f"{backbone.name!r} is an encoder, which writes no text.", hint=hint)
        if backbone.adapter_parameters:
            what = f"{backbone.name!r} has weights that are to be trained, but only the prefix is trained here."
            raise ConfigError(what, hint="load it again.")
        given = [
            f"{name} is {value!r}" for name in _OF_TRAIN if (value := getattr(config, name)) != config.default(name)
        ]
        if given:
            raise ConfigError(f"{', '.join(given)}, which is not done here.", hint="use `train`.")
        check_given(config, backbone)
        check_passes_gradients(backbone)
        self.backbone, self.settings = backbone, config
        self.trained, start = build_encoder(config, backbone)
        self.initialization = start.description
        self._site_lengths = resolve_site_lengths(config, backbone)
        # Trainers write their own settings into these.
        self.config = copy.deepcopy(backbone.model.config)
        self.generation_config = copy.deepcopy(getattr(backbone.model, "generation_config", None))
        self.text_format = training_format(config, backbone)
        if backbone.kind == "decoder":
            # Has `Trainer` not count a row's first label, which is never predicted.
            self.loss_type = "ForCausalLM"
        self._checkpointing = False

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Shaped[Tensor, "B T"] | None = None,
        labels: Int[Tensor, "B Td"] | None = None,
        decoder_input_ids: Int[Tensor, "B Td"] | None = None,
        decoder_attention_mask: Shaped[Tensor, "B Td"] | None = None,
        num_items_in_batch: Tensor | float | int | None = None,
        use_cache: bool = False,
        **others: Any,
    ) -> Any:
        """Run the backbone with the prefix in front.

        Args:
            input_ids: Padded texts; of an encoder-decoder, the sources.
            attention_mask: 1 where a token is real.
            labels: The tokens themselves where they are learned, -100 elsewhere; of an encoder-decoder, the targets.
            decoder_input_ids: Encoder-decoder: what the decoder reads; None: the labels, shifted by one.
            decoder_attention_mask: Encoder-decoder: 1 where that is real; None: padding is on the right.
            num_items_in_batch: Labels of the whole optimizer step; None: those of this batch.
            use_cache: Ignored; nothing is cached.
            **others: Refused.

        Returns:
            transformers' `CausalLMOutput`: the loss where there are labels; and logits, but in training with labels,
            where nobody reads them.

        Raises:
            ConfigError: An argument cannot be used with a prefix, or is missing.
            DataError: The texts and the prefix are longer than the backbone's positions.
        """
        from transformers.modeling_outputs import CausalLMOutput

        is_encoder_decoder = self.backbone.kind == "encoder-decoder"
        if is_encoder_decoder and decoder_input_ids is None:
            decoder_input_ids = self._shift_right(labels)
        decoder = {"decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask}
        head = self.backbone.head
        hidden = self._run_backbone(head.inputs, input_ids, attention_mask, decoder, others)
        logits = None if self.training and labels is not None else head(hidden)
        if labels is None:
            self._check_smoothing()
            return CausalLMOutput(logits=logits)
        if not is_encoder_decoder:
            hidden, labels = hidden[:, :-1], labels[:, 1:]
        is_learned = labels != IGNORED
        losses, *_ = head_pass(head, hidden[is_learned], cross_entropy(labels[is_learned]))
        count = max(1, len(losses)) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=losses.sum() / count, logits=logits)

    def base_model(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Shaped[Tensor, "B T"] | None = None,
        use_cache: bool = False,
        **others: Any,
    ) -> Any:
        """The last hidden states: TRL computes its loss from them and the output embeddings."""
        from transformers.modeling_outputs import BaseModelOutput

        hidden = self._run_backbone(self.backbone.hidden_states, input_ids, attention_mask, {}, others)
        return BaseModelOutput(last_hidden_state=hidden)

    def _run_backbone(
        self,
        method: Callable[..., Any],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        decoder: Mapping[str, Tensor | None],
        others: Mapping[str, Any],
    ) -> Any:
        """Call a method of the backbone with the prefix in front."""
        unsupported = [name for name, value in others.items() if value is not None]
        if unsupported:
            what = f"{', '.join(unsupported)} came with a batch, and cannot be used with a prefix."
            raise ConfigError(what, hint="rows must be padded: no packing; positions are computed here.")
        if getattr(self, "_is_replica", False):
            what = "DataParallel copies modules, but a prefix finds its layers by the modules themselves."
            raise ConfigError(what, hint="start with torchrun or accelerate, or show one GPU (CUDA_VISIBLE_DEVICES=0).")
        self._check_positions(input_ids, decoder.get("decoder_input_ids"))
        backbone = self.backbone
        # The prefix is computed in float32 even under a trainer's autocast.
        with torch.autocast(input_ids.device.type, enabled=False):
            prefix = self.trained()
        with gradient_checkpointing(backbone.model, self._checkpointing and torch.is_grad_enabled()):
            return method(input_ids, attention_mask, prefixes=prefix, **decoder)

    def _check_positions(self, *rows: Tensor | None) -> None:
        limit = self.backbone.max_positions_with(self.prefix_length)
        room = None if limit is None else limit - self.backbone.prefix_positions(self.prefix_length)
        longest = max(ids.shape[1] for ids in rows if ids is not None)
        if room is not None and longest > room:
            what = f"a batch has rows of {longest} tokens, but beside the prefix there is room for {room}."
            raise DataError(what, hint="cut the texts to that (max_length), or use `model.collator()`.")

    def _check_smoothing(self) -> None:
        """Refuse a training step whose labels a trainer would compare with the logits of the same tokens."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        known = self.backbone.kind != "decoder" or self._get_name() in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        if self.training and not known:
            what = "a batch came without labels: a trainer that smooths them would not shift them for this model."
            raise ConfigError(what, hint="set label_smoothing_factor to 0.")

    def _shift_right(self, labels: Int[Tensor, "B Td"] | None) -> Int[Tensor, "B Td"]:
        """What a decoder reads to predict the labels."""
        if labels is None:
            what = "a batch has neither labels nor decoder_input_ids, but the decoder must read something."
            raise ConfigError(what, hint="set label_smoothing_factor to 0, or add decoder_input_ids.")
        start = torch.full_like(labels[:, :1], self.backbone.decoder_start_id)
        shifted = torch.cat([start, labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == IGNORED, self.backbone.pad_id)

    @property
    def prefix_length(self) -> int:
        """P, of the decoder's own site."""
        return self._site_lengths.get("decoder", 0)

    def collator(self) -> Collator:
        """The collator that makes batches for this model."""
        return Collator(
            self.backbone, self.text_format, self.prefix_length, self.settings.max_length, self.settings.on_too_long
        )

    # --- the artifact ------------------------------------------------------------------------------------------------

    def prefix(self) -> Prefix:
        """The prefix as it is now, baked, in float32 on the CPU, with a header."""
        config, backbone = self.settings, self.backbone
        header = make_header(
            backbone,
            task=config.task,
            method=config.method,
            text_format=self.text_format.to_dict(),
            initialization=self.initialization,
            training={
                "backbone_dtype": backbone.dtype_name,
                "loss_reduction": "token",
                **reparameterization_facts(config),
                "seed": config.seed,
            },
            license=config.license,
            made_with={"prefixtune": __version__, "torch": torch.__version__, "python": platform.python_version()},
        )
        return Prefix(self.trained.bake().layers, header)

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """Store the artifact, `prefix.safetensors`, in a folder; returns its path.

        Raises:
            CheckpointError: The prefix holds NaN or infinity.
            PrefixError: The file cannot be written.
        """
        return save_prefix(Path(save_directory) / PREFIX_FILE, self.prefix(), dtype=self.settings.save_dtype)

    # --- what trainers need of a model -------------------------------------------------------------------------------

    def _get_name(self) -> str:
        """The backbone's class: by its name `Trainer` knows whether to shift the labels that it smooths."""
        return str(self.backbone.model._get_name())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrefixModel:
        """Also move the backbone, unless Accelerate has distributed it over devices."""
        if not hasattr(self.backbone.model, "hf_device_map"):
            self.backbone.model._apply(fn, recurse)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def get_output_embeddings(self) -> nn.Module:
        """The layer from hidden states to logits; frozen."""
        layer: nn.Module = self.backbone.model.get_output_embeddings()
        return layer

    def activation_checkpointing_enable(self, *arguments: Any, **options: Any) -> None:
        """Recompute every layer in the backward pass, without reentrance or offloading, whatever the options say."""
        self._checkpointing = True

    def activation_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._checkpointing = False

    # Their names before transformers 5.24.
    gradient_checkpointing_enable = activation_checkpointing_enable
    gradient_checkpointing_disable = activation_checkpointing_disable

    def add_model_tags(self, tags: Sequence[str] | str) -> None:
        """Ignored: an artifact has no model card."""
