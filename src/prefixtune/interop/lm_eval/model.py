"""lm-eval's view of a backbone with a prefix: its own class for models of transformers, with a prefix in front.

Importing this module registers the class as `prefixtune`, so that `simple_evaluate(model="prefixtune", ...)` finds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from prefixtune.backbone.load import BackboneLike, as_backbone, load_backbone
from prefixtune.backbone.packaged import DEFAULT_BACKBONE
from prefixtune.backbone.prefixes import PrefixLike, load_prefix, trained_adapter
from prefixtune.data.chat import special_stops, stop_ids
from prefixtune.data.encoding import encode_pairs, encode_prompts, format_of
from prefixtune.data.examples import Example
from prefixtune.data.truncation import template_lengths
from prefixtune.errors import BackboneError, ConfigError, RequestError, short_repr
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from prefixtune.interop.lm_eval.likelihood import Continuation, score_continuations
from prefixtune.prefix.chat_format import render_chat
from prefixtune.prefix.header import backbone_origin
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import MODEL_TEMPLATE, read_text_format

_NOT_PASSED_ON = ("do_sample", "use_cache", "early_stopping", "temperature")


def check_writes(prefix: Prefix) -> None:
    """Refuse a prefix that was trained for a head: it writes no text.

    Raises:
        ConfigError: It is such a prefix.
    """
    if prefix.head is not None:
        what = "the prefix was trained with a head for labels, and lm-eval's tasks need one that writes text."
        raise ConfigError(what, hint="measure it with `prefixtune evaluate`.")


@register_model("prefixtune")
class PrefixLM(HFLM):  # type: ignore[misc]
    """A backbone with a prefix as one of lm-eval's models.

    Without a prefix it answers as lm-eval's `hf` does with the same model. Continuations of one context share its
    computation.

    Args:
        backbone: The frozen model: a `Backbone`, a name or path, or a (model, tokenizer) pair; None: the one that the
            prefix's header names.
        prefix: A `Prefix`, a path, or a repository of the hub; None: the bare model.
        prompt_format: `raw`: contexts are raw text behind the prefix, as `hf` reads them; `prefix`: a context is the
            source of the prefix's text format, and a continuation the target.
        batch_size: Requests that are computed together; `auto`: 16.
        max_batch_size: Most of them, whatever `batch_size` is.
        max_length: Positions of prefix and text together; None: as many as the backbone has.
        dtype: Of a backbone that is loaded by its name.
        device: Where that is loaded.
        allow_other_backbone: Accept a prefix that was trained for other weights of the same shapes.

    Raises:
        ConfigError: An option is wrong, or the prefix is for labels.
        BackboneError: The backbone is an encoder, or the prefix does not fit it.
        CheckpointError: The prefix cannot be read.
    """

    def __init__(
        self,
        backbone: BackboneLike | None = None,
        prefix: PrefixLike | None = None,
        *,
        prompt_format: str = "raw",
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        dtype: str = "auto",
        device: str = "auto",
        allow_other_backbone: bool = False,
    ) -> None:
        if prompt_format not in ("raw", "prefix"):
            raise ConfigError(f"prompt_format is {short_repr(prompt_format)}, but must be 'raw' or 'prefix'.")
        read = None if prefix is None else load_prefix(prefix)
        if backbone is None:
            backbone = (read is not None and backbone_origin(read.header).name) or DEFAULT_BACKBONE
        if isinstance(backbone, str | Path):
            adapter = None if read is None else trained_adapter([read])
            self.backbone = load_backbone(backbone, dtype=dtype, device=device, adapter=adapter)
        else:
            self.backbone = as_backbone(backbone)
        if self.backbone.kind == "encoder":
            what = f"{self.backbone.name!r} is an encoder, which reads text and writes none."
            raise BackboneError(what, hint="lm-eval's tasks need a model that writes.")
        self.prefix: Prefix | None = None
        if read is not None:
            check_writes(read)
            fitting = load_prefix(read, self.backbone, allow_other_backbone=allow_other_backbone)
            self.prefix = fitting.to(device=self.backbone.device)
        stored = None if self.prefix is None else read_text_format(self.prefix.header)
        self.chat_format = stored if stored is not None and stored.is_chat else None
        self.prompt_format = prompt_format
        is_raw = self.prefix is None or prompt_format == "raw"
        self.text_format = None if is_raw else format_of(self.backbone, self.prefix)
        self._ends = stop_ids(self.backbone, self.text_format or self.chat_format)
        size = 16 if str(batch_size).startswith("auto") else int(batch_size)
        super().__init__(
            self.backbone.model,
            backend="causal" if self.backbone.kind == "decoder" else "seq2seq",
            tokenizer=self.backbone.tokenizer,
            max_length=max_length,
            batch_size=size if max_batch_size is None else min(size, max_batch_size),
        )

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return self.backbone.eos_id

    @property
    def max_length(self) -> int:
        """Positions for text behind the prefix."""
        length = 0 if self.prefix is None else self.prefix.length()
        most, limit = int(super().max_length), self.backbone.max_positions_with(length)
        return min(most, limit or most) - self.backbone.prefix_positions(length)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval's files say of the model."""
        return {
            "model_num_parameters": self.backbone.num_parameters,
            "model_dtype": self.backbone.dtype_name,
            "prefix_length": None if self.prefix is None else self.prefix.length(),
            "prompt_format": self.prompt_format,
        }

    # --- log-likelihoods ---

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """How likely each continuation is after its context, and whether greedy decoding would write it.

        Raises:
            RequestError: A continuation has more tokens than there are positions.
        """
        if self.text_format is None:
            scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            return scored
        asked = []
        # The format has its own space before a target.
        examples = [Example(request.args[0], (request.args[1].strip(),)) for request in requests]
        encoded = encode_pairs(self.backbone, self.text_format, examples)
        for request, (prompt, target) in zip(requests, encoded, strict=True):
            kept = self._keep_right(request.args[0], prompt, self._room(target))
            asked.append((request.args, kept, list(target)))
        return self._loglikelihood_tokens(asked, disable_tqdm=disable_tqdm)

    def _room(self, tokens: Sequence[int]) -> int:
        """Positions for the context of a continuation; nothing is computed at its last token."""
        return self.max_length + (1 - len(tokens) if self.backend == "causal" else 0)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        asked = []
        for request in requests:
            context, tokens = request[1:]
            if len(tokens) > self.max_length:
                what = f"a continuation has {len(tokens):,} tokens, but {self.max_length:,} positions are there for it."
                raise RequestError(what, hint="choose a backbone with more positions, or a shorter prefix.")
            asked.append(Continuation(tuple(context[-self._room(tokens) :]), tuple(tokens), self.prefix))
        with tqdm(total=len(asked), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            results = score_continuations(
                self.backbone, asked, batch_size=self.batch_size, on_batch=lambda done: bar.update(done - bar.n)
            )
        for request, result in zip(requests, results, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], result)
        return results

    def _keep_right(self, source: str, prompt: Sequence[int], room: int) -> list[int]:
        """A prompt's last tokens, as many as there is room for; the format's text around the source stays.

        lm-eval's question is at the end, behind the solved examples; so a context is cut at its beginning.
        """
        assert self.text_format is not None
        before = 0 if len(prompt) <= room else template_lengths(self.backbone, self.text_format, source)[0]
        kept = max(room - before, 0)
        return [*prompt[:before], *prompt[max(before, len(prompt) - kept) :]]

    # --- texts ---

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context, up to one of its task's strings.

        Raises:
            ConfigError: A task decodes in a way that is not known here, or a value is not allowed.
        """
        texts: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        return texts if self.text_format is None else [self.text_format.extract_target(text) for text in texts]

    def tok_batch_encode(
        self, strings: Sequence[str], padding_side: str = "left", left_truncate_len: int | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Contexts as token ids, padded on the left, and their mask."""
        if self.text_format is None:
            encoded: tuple[Tensor, Tensor] = super().tok_batch_encode(
                list(strings), padding_side, left_truncate_len, **options
            )
            return encoded
        most = left_truncate_len or self.max_length
        prompts = encode_prompts(self.backbone, self.text_format, strings)
        kept = [self._keep_right(text, ids, most) for text, ids in zip(strings, prompts, strict=True)]
        longest = max(map(len, kept))
        ids = torch.tensor([[self.backbone.pad_id] * (longest - len(row)) + row for row in kept])
        return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in kept])

    def _model_generate(
        self,
        context: Int[Tensor, "B T"],
        max_length: int,
        stop: Sequence[str],
        *,
        attention_mask: Int[Tensor, "B T"],
        **decoding: Any,
    ) -> Int[Tensor, "B _T"]:
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(context, attention_mask, strict=True)]
        stops = tuple(text for text in stop if text)
        config = _decoding_config(decoding, stop=stops, max_new_tokens=max_length - context.shape[1])
        outputs = generate_ids(
            self.backbone,
            [ids or [self.prefix_token_id] for ids in prompts],
            [self.prefix] * len(prompts),
            config=config,
            ends=[(*self._ends, *special_stops(self.backbone, stops))] * len(prompts),
        )
        longest = max(map(len, outputs))
        padded = [[*ids, *[self.tokenizer.pad_token_id] * (longest - len(ids))] for ids in outputs]
        written = torch.tensor(padded, dtype=torch.long).reshape(len(outputs), longest)
        return torch.cat([context.cpu(), written], dim=1) if self.backend == "causal" else written

    # --- chat ---

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, by the template that the prefix was trained with, else by the model's own.

        Raises:
            RequestError: The template refuses the messages.
        """
        stored, messages = self.chat_format, list(chat_history)
        if stored is not None and stored.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": stored.system}, *messages]
        if stored is None or stored.chat_template == MODEL_TEMPLATE:
            return str(super().apply_chat_template(messages, add_generation_prompt))
        try:
            text = render_chat(self.tokenizer, stored, messages, add_generation_prompt=add_generation_prompt)
        except RequestError:
            # One that refuses a system message gets none, as in lm-eval.
            messages = [message for message in messages if message["role"] != "system"]
            stored = replace(stored, system="")
            text = render_chat(self.tokenizer, stored, messages, add_generation_prompt=add_generation_prompt)
        last = messages[-1]["content"].strip()
        return text if add_generation_prompt else text[: text.rindex(last) + len(last)] if last in text else text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the template that `apply_chat_template` fills in; None: none is asked for."""
        if not chat_template:
            return None
        if self.chat_format is not None and self.chat_format.chat_template != MODEL_TEMPLATE:
            return self.chat_format.chat_template
        return self.tokenizer.get_chat_template() if self.tokenizer.chat_template else None


def _decoding_config(given: Mapping[str, Any], *, stop: tuple[str, ...], max_new_tokens: int) -> GenerateConfig:
    """The decoding that a task asks for: greedy, unless it says `do_sample`.

    Raises:
        ConfigError: It asks for something that cannot be done here, or a value is not allowed.
    """
    values = {name: value for name, value in given.items() if value is not None and name not in _NOT_PASSED_ON}
    if given.get("do_sample"):
        values["temperature"] = float(given.get("temperature") or 1.0)
        # lm-eval seeds torch.
        values["seed"] = int(torch.randint(2**62, ()))
    return GenerateConfig(**values, stop=stop, max_new_tokens=max_new_tokens)
