"""A backbone without its weights: its configuration and tokenizer, enough to turn texts into token ids in a second."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from prefixtune.attention.layout import Layout
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.checkpoint import auto_class, find_checkpoint, read_tokenizer
from prefixtune.backbone.load import check_end_token
from prefixtune.backbone.lora import base_model_name, is_adapter
from prefixtune.errors import BackboneError
from prefixtune.prefix.geometry import BackboneKind

__all__ = ["load_tokenizer", "without_limits"]


def load_tokenizer(name: str, *, limited: bool = True) -> Backbone:
    """Load the configuration and the tokenizer of a backbone, not its weights.

    What it returns encodes and decodes, and knows its kind and its positions. It computes nothing.

    Args:
        name: As for `load_backbone`.
        limited: It has as many positions as the model; otherwise any number, so that nothing is truncated.

    Raises:
        BackboneError: There is no such model, or its tokenizer has no end token.
        CheckpointError: It is an adapter whose configuration cannot be read.
    """
    base = base_model_name(Path(name)) if is_adapter(Path(name)) else name
    source, options = find_checkpoint(base)
    if "gguf_file" in options:
        raise BackboneError(
            f"{name!r} is a GGUF file, whose tokenizer is not read without its weights.",
            hint="give the model's folder or hub id.",
        )
    config, tokenizer = read_tokenizer(name, source, options)
    made = auto_class(config).__name__
    kind: BackboneKind = "encoder-decoder" if "Seq2Seq" in made else "encoder" if made == "AutoModel" else "decoder"
    model = SimpleNamespace(config=config, generation_config=SimpleNamespace())
    backbone = check_end_token(Backbone(model, tokenizer, name, Layout({}, {}, kind), ""))
    return backbone if limited else without_limits(backbone)


def without_limits(backbone: Backbone) -> Backbone:
    """A backbone's tokenizer, with any number of positions; it computes nothing."""
    nothing = SimpleNamespace()
    config = SimpleNamespace(get_text_config=lambda decoder: nothing)
    model = SimpleNamespace(config=config, generation_config=SimpleNamespace())
    return Backbone(model, backbone.tokenizer, backbone.name, Layout({}, {}, backbone.kind), "")
