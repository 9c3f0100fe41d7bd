"""Turn a packaged model's GGUF file into an ordinary folder of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefixtune.backbone.download import Pretrained
from prefixtune.backbone.quiet import quiet_transformers
from prefixtune.errors import BackboneError

__all__ = ["convert_gguf"]


def convert_gguf(item: Pretrained, gguf: Path, target: Path) -> None:
    """De-quantize `gguf` and write model, tokenizer and generation settings to `target`.

    Raises:
        BackboneError: The file cannot be written.
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
