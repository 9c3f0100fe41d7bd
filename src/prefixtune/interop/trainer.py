"""A prefix inside transformers' `Trainer` and TRL's `SFTTrainer`: the model that they are given, and a collator.

    model = PrefixModel(backbone, TrainConfig(prefix_length=10))
    arguments = TrainingArguments("runs/trainer", learning_rate=1e-3)
    Trainer(model, arguments, train_dataset=examples, data_collator=model.collator()).train()
    model.save_pretrained("runs/trainer")

To a trainer it is a module whose parameters, state and modes are those of the prefix. The backbone is held beside them:
no optimizer, checkpoint or `.train()` reaches it. Only `.to(device)` moves both.

The loss is the mean over the target tokens of an optimizer step, as these trainers count them (`loss_reduction =
"token"`); a row stands for one target. Knows nothing of steps, schedules and checkpoints: these are the trainer's.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from prefixtune import __version__
from prefixtune.attention.forward import gradient_checkpointing
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.loss import token_losses
from prefixtune.backbone.prefixes import make_header
from prefixtune.data import Example
from prefixtune.data.encoding import encode_examples
from prefixtune.errors import ConfigError, DataError
from prefixtune.prefix.artifact import save_prefix
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat, TruncationPolicy
from prefixtune.training.config import TrainConfig
from prefixtune.training.data import training_format
from prefixtune.training.folder import PREFIX_FILE
from prefixtune.training.initialize import build_encoder

__all__ = ["Collator", "PrefixModel"]


IGNORED = -100
"""The label of a position without a loss."""


class PrefixModel(nn.Module):
    """A frozen model with a trainable prefix in front, as transformers' trainers take a model.

    Args:
        backbone: Decoder-only or encoder-decoder; frozen.
        config: How the prefix starts and what is trained: `prefix_length`, `sites`, `reparameterization`,
            `bottleneck_size`, `initialization` and what belongs to it, `prompt_format`, `target_format`, `max_length`,
            `on_too_long`, `seed`; `task`, `source` and `license` go into the artifact. The rest is the trainer's.

    Raises:
        ConfigError: The method is not a prefix, or the backbone is an encoder or trains weights of its own.
    """

    accepts_loss_kwargs = True
    """Tells `Trainer` to hand on how many labels an optimizer step has."""
    _keys_to_ignore_on_save: None = None

    def __init__(self, backbone: Backbone, config: TrainConfig | None = None) -> None:
        super().__init__()
        config = config or TrainConfig()
        if config.method != "prefix":
            raise ConfigError(f"method is {config.method!r}, but only a prefix is trained here.", hint="use `train`.")
        if backbone.kind == "encoder":
            raise ConfigError(
                f"{backbone.name!r} is an encoder, which writes no text.",
                hint="train labels with `prefixtune train --task classification` or tagging.",
            )
        if backbone.adapter_parameters:
            raise ConfigError(
                f"{backbone.name!r} has weights that are to be trained, but only the prefix is trained here.",
                hint="load it without train_adapter and adapter_rank, or use `train`.",
            )
        self.backbone, self.settings = backbone, config
        self.trained, self.initialization = build_encoder(config, backbone)
        # Trainers write settings of their own into these.
        self.config = copy.deepcopy(backbone.model.config)
        self.generation_config = copy.deepcopy(getattr(backbone.model, "generation_config", None))
        self.text_format = training_format(config, backbone)
        if backbone.kind == "decoder":
            # A row's first label is never predicted: tells `Trainer` not to count it.
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
            decoder_input_ids: Encoder-decoder: what the decoder reads; None: the labels, moved on by one.
            decoder_attention_mask: Encoder-decoder: 1 where that is real; None: padding is on the right.
            num_items_in_batch: Labels of the whole optimizer step; None: those of this batch.
            use_cache: Nothing is kept, whatever it says.
            **others: Refused.

        Returns:
            transformers' `CausalLMOutput`: logits, and the loss where there are labels.

        Raises:
            ConfigError: An argument that a prefix does not go with.
            DataError: The texts and the prefix are longer than the backbone's positions.
        """
        from transformers.modeling_outputs import CausalLMOutput

        apart = self.backbone.kind == "encoder-decoder"
        if apart and decoder_input_ids is None and labels is not None:
            decoder_input_ids = self._shifted(labels)
        decoder = {"decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask}
        logits = self._run(self.backbone.forward, input_ids, attention_mask, decoder, others).logits
        if labels is None:
            return CausalLMOutput(logits=logits)
        loss = _mean_loss(logits, labels, num_items_in_batch, shift=not apart)
        return CausalLMOutput(loss=loss, logits=logits)

    def base_model(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Shaped[Tensor, "B T"] | None = None,
        use_cache: bool = False,
        **others: Any,
    ) -> Any:
        """The last hidden states, with the prefix in front: TRL makes the loss from them and the output embeddings."""
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(
            last_hidden_state=self._run(self.backbone.hidden_states, input_ids, attention_mask, {}, others)
        )

    def _run(
        self,
        call: Callable[..., Any],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        decoder: Mapping[str, Tensor | None],
        others: Mapping[str, Any],
    ) -> Any:
        strange = [name for name, value in others.items() if value is not None]
        if strange:
            raise ConfigError(
                f"{', '.join(strange)} came with a batch, which a prefix does not go with.",
                hint="rows are padded here: no packing, no padding_free; a prefix tells the positions itself.",
            )
        if getattr(self, "_is_replica", False):
            raise ConfigError(
                "DataParallel copies modules, and a prefix finds its layers by the modules themselves.",
                hint="start with torchrun or accelerate, or show one GPU (CUDA_VISIBLE_DEVICES=0).",
            )
        self._check_positions(input_ids, decoder.get("decoder_input_ids"))
        # Under a trainer's autocast the prefix is still made in float32.
        with torch.autocast(input_ids.device.type, enabled=False):
            prefix = self.trained()
        with gradient_checkpointing(self.backbone.model, self._checkpointing and torch.is_grad_enabled()):
            return call(input_ids, attention_mask, prefixes=prefix, **decoder)

    def _check_positions(self, *rows: Tensor | None) -> None:
        limit, taken = self.backbone.max_positions, self.backbone.prefix_positions(self.prefix_length)
        longest = max(ids.shape[1] for ids in rows if ids is not None)
        if limit is not None and longest + taken > limit:
            raise DataError(
                f"a batch has rows of {longest} tokens, but {self.backbone.name!r} has {limit} positions, of which the "
                f"prefix takes {taken}.",
                hint=f"cut the texts to {limit - taken} tokens (max_length), or use `model.collator()`.",
            )

    def _shifted(self, labels: Int[Tensor, "B Td"]) -> Int[Tensor, "B Td"]:
        """What a decoder reads to write the labels."""
        start = torch.full_like(labels[:, :1], self.backbone.decoder_start_id)
        moved = torch.cat([start, labels[:, :-1]], dim=1)
        return moved.masked_fill(moved == IGNORED, self.backbone.pad_id)

    @property
    def prefix_length(self) -> int:
        """P, as it counts for the decoder's positions."""
        lengths = self.settings.site_lengths or {"decoder": self.settings.prefix_length}
        return lengths.get("decoder", 0)

    def collator(self) -> Collator:
        """What lays examples into batches for this model."""
        return Collator(
            self.backbone, self.text_format, self.prefix_length, self.settings.max_length, self.settings.on_too_long
        )

    # --- what is kept ------------------------------------------------------------------------------------------------

    def prefix(self) -> Prefix:
        """The prefix as it is now, baked, in float32 on the CPU, with a header."""
        made, config, backbone = self.trained.bake(), self.settings, self.backbone
        header = make_header(
            backbone,
            task=config.task,
            method=config.method,
            text_format=self.text_format.to_dict(),
            initialization=self.initialization,
            training={
                "backbone_dtype": str(backbone.dtype).removeprefix("torch."),
                "loss_reduction": "token",
                **{name: getattr(config, name) for name in ("reparameterization", "bottleneck_size", "seed")},
            },
            license=config.license,
            made_with={"prefixtune": __version__, "torch": torch.__version__, "python": platform.python_version()},
        )
        return Prefix(made.layers, header)

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """Store the artifact, `prefix.safetensors`, in a folder; returns its path.

        Raises:
            CheckpointError: The prefix holds NaN or infinity.
            PrefixError: The file cannot be written.
        """
        dtype = torch.float32 if self.settings.save_dtype == "float32" else torch.bfloat16
        return save_prefix(Path(save_directory) / PREFIX_FILE, self.prefix(), dtype=dtype)

    # --- what trainers ask of a model --------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrefixModel:
        """Also move the backbone, where Accelerate did not spread it."""
        if not hasattr(self.backbone.model, "hf_device_map"):
            self.backbone.model._apply(fn, recurse)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def get_output_embeddings(self) -> nn.Module:
        """The layer from hidden states to logits; frozen."""
        layer: nn.Module = self.backbone.model.get_output_embeddings()
        return layer

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute layers in the backward pass.

        Raises:
            ConfigError: The backbone would lose the prefix, or another way of doing it is asked for.
        """
        if not self.backbone.layout.forwards_kwargs:
            raise ConfigError(
                f"{self.backbone.name!r} hands no argument down to its attention: recomputed layers would lose the "
                "prefix.",
                hint="train without gradient checkpointing.",
            )
        if (activation_checkpointing_kwargs or {}).get("use_reentrant") or every_n_layers != 1 or offload:
            raise ConfigError(
                "layers are recomputed all, without reentrance and offloading.",
                hint="leave the settings of gradient checkpointing out, or set use_reentrant to False.",
            )
        self._checkpointing = True

    def activation_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._checkpointing = False

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """The same under its name before transformers 5.24."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        """The same under its name before transformers 5.24."""
        self.activation_checkpointing_disable()

    def add_model_tags(self, tags: Sequence[str] | str) -> None:
        """Tags of a model card, which an artifact does not have."""


def _mean_loss(
    logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"], count: Tensor | float | int | None, *, shift: bool
) -> Float[Tensor, ""]:
    """The labels' summed cross-entropy, divided by the optimizer step's labels, or by their own number."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    learned = labels != IGNORED
    losses = token_losses(logits[learned], labels[learned])
    return losses.sum() / (max(1, len(losses)) if count is None else count)


@dataclass(frozen=True, eq=False)
class Collator:
    """Lays examples into padded rows, one for each target, with labels at the targets alone.

    It takes `Example`s, rows with `source` and `target` (a text, or several), or rows that are token ids already, with
    `input_ids` and `labels`. Sources that do not fit are cut, as in `train`.

    Attributes:
        backbone: Whose tokenizer and positions count.
        text_format: The text around source and target.
        prefix_length: P, which takes positions of a decoder-only model.
        max_length: Positions of source and target together (of each, for an encoder-decoder); 0: what there is.
        on_too_long: `cut` the source, or raise an `error`.
    """

    backbone: Backbone
    text_format: TextFormat
    prefix_length: int
    max_length: int = 0
    on_too_long: TruncationPolicy = "cut"

    def __call__(self, features: Sequence[Example | Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch: `input_ids`, `attention_mask` and `labels`.

        Raises:
            DataError: A row has none of the known columns, or does not fit.
        """
        rows: list[tuple[list[int], list[int]]] = []
        for feature in features:
            if isinstance(feature, Mapping) and {"input_ids", "labels"} <= feature.keys():
                rows.append(([*map(int, feature["input_ids"])], [*map(int, feature["labels"])]))
            else:
                rows.extend(self._encode(_to_example(feature)))
        ids, labels = ([torch.tensor(row[part]) for row in rows] for part in (0, 1))
        pad = self.backbone.pad_id
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }

    def _encode(self, example: Example) -> list[tuple[list[int], list[int]]]:
        """One row's ids and labels for each target."""
        (encoded,) = encode_examples(
            self.backbone,
            [example],
            self.text_format,
            prefix_length=self.prefix_length,
            max_length=self.max_length,
            on_too_long=self.on_too_long,
        ).examples
        prompt = list(encoded.prompt)
        if not prompt:
            raise DataError(
                "an empty prompt cannot predict a target's first token.", hint="use a prompt format with a separator."
            )
        if self.backbone.kind == "encoder-decoder":
            return [(prompt, list(target)) for target in encoded.targets]
        return [([*prompt, *target], [IGNORED] * len(prompt) + list(target)) for target in encoded.targets]


def _to_example(feature: Example | Mapping[str, Any]) -> Example:
    if isinstance(feature, Example):
        return feature
    target = feature.get("target")
    targets = (target,) if isinstance(target, str) else tuple(target or ())
    if not isinstance(feature.get("source"), str) or not all(isinstance(text, str) for text in targets):
        raise DataError(
            f"a row of the data set has the columns {', '.join(map(repr, feature)) or 'that the trainer left: none'}; "
            "source and target are needed, or input_ids and labels.",
            hint="name the columns so, and set remove_unused_columns=False in the trainer's arguments.",
        )
    return Example(feature["source"], targets)
