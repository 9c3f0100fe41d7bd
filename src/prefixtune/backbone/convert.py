"""Turn a packaged model's GGUF file into an ordinary folder of transformers, and compare it with what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefixtune.backbone.download import Pretrained
from prefixtune.backbone.quiet import quiet_transformers
from prefixtune.errors import BackboneError

__all__ = ["convert_gguf"]


# What the stored tokenizer must treat exactly as the converted one does.
SAMPLES = (
    "The Eagle is a coffee shop.",
    "  two  spaces,\ttabs\n\nand 12345 + 6.78%",
    "name : The Vaults | price : more than £ 30",
    "café naïve 日本語 🙂 don't",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "",
)


def convert_gguf(item: Pretrained, gguf: Path, target: Path) -> None:
    """De-quantize `gguf` and write model, tokenizer and generation settings to `target`; then read back and compare.

    Raises:
        BackboneError: The file cannot be written, or does not read back equal.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
        if item.split_digits:
            _split_digits(tokenizer)
        tokenizer.model_max_length = model.config.max_position_embeddings
        for leftover in ("is_local", "local_files_only", "gguf_file", "name_or_path"):
            tokenizer.init_kwargs.pop(leftover, None)
        try:
            _clean_copy(model, item.name).save_pretrained(target)
            tokenizer.save_pretrained(target)
        except SafetensorError as error:
            raise BackboneError(
                f"cannot write the weights of {item.name!r} to {str(target)!r}: {error}.",
                hint="free some space, or choose another folder with the environment variable PREFIXTUNE_HOME.",
            ) from error
        stored = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, local_files_only=True)
        difference = _difference(model.state_dict(), stored.state_dict()) or _tokenizer_difference(
            tokenizer, AutoTokenizer.from_pretrained(target, local_files_only=True)
        )
    if difference:
        raise BackboneError(
            f"{item.name!r} does not read back as it was written: {difference}.",
            hint="report this with the versions of torch, transformers and safetensors.",
        )


def _clean_copy(model: Any, name: str) -> Any:
    """Rebuild the model from a configuration without traces of GGUF: transformers refuses to save it otherwise."""
    import torch

    fields = model.config.to_dict()
    for leftover in ("quantization_config", "_model_name_or_path", "transformers_version"):
        fields.pop(leftover, None)
    # The initialization that is overwritten next must not move the caller's seed.
    with torch.random.fork_rng(devices=[]):
        clean = type(model)(type(model.config).from_dict(fields))
    clean.load_state_dict(model.state_dict(), strict=True)
    clean.tie_weights()
    clean.generation_config = model.generation_config
    clean.config.name_or_path = name
    return clean.eval()


def _split_digits(tokenizer: Any) -> None:
    """Put a rule before the others: every digit is a piece of its own."""
    backend = tokenizer.backend_tokenizer
    description = json.loads(backend.to_str())
    digits = {"type": "Digits", "individual_digits": True}
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, description["pre_tokenizer"]]}
    backend.pre_tokenizer = type(backend).from_str(json.dumps(description)).pre_tokenizer


def _difference(first: dict[str, Any], second: dict[str, Any]) -> str:
    import torch

    if first.keys() != second.keys():
        return f"tensors {sorted(first.keys() ^ second.keys())[:3]} are on one side only"
    return next((f"tensor {key!r} differs" for key in first if not torch.equal(first[key], second[key])), "")


def _tokenizer_difference(first: Any, second: Any) -> str:
    """Name what the two tokenizers do differently; empty when nothing was found."""
    facts = ("chat_template", "special_tokens_map", "bos_token_id", "eos_token_id", "pad_token_id", "model_max_length")
    for fact in facts:
        if getattr(first, fact) != getattr(second, fact):
            return f"the tokenizer's {fact} differs"
    if first.get_vocab() != second.get_vocab():
        return "the tokenizer's vocabulary differs"
    for text in SAMPLES:
        ids = first(text).input_ids
        if ids != second(text).input_ids:
            return f"the tokenizer encodes {text!r} differently"
        for skip in (False, True):
            if first.decode(ids, skip_special_tokens=skip) != second.decode(ids, skip_special_tokens=skip):
                return f"the tokenizer decodes {text!r} differently"
    return ""
