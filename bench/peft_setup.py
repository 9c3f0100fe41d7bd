"""PEFT as a side of comparisons: its warnings, and the folder of the backbone for transformers."""

from __future__ import annotations

import warnings

from prefixtune.backbone.packaged import PRETRAINED, pretrained_folder
from prefixtune.errors import BackboneError


def silence_peft() -> None:
    """Ignore transformers' warnings of names that PEFT 0.21 uses, and show no progress of loading."""
    from transformers.utils import logging

    for name in ("past_key_values", "is_gradient_checkpointing"):
        warnings.filterwarnings("ignore", f"`{name}` is deprecated", FutureWarning)
    logging.disable_progress_bar()


def model_folder(backbone_name: str) -> str:
    """What transformers' `from_pretrained` takes for a backbone.

    Raises:
        BackboneError: The backbone is not prepared.
    """
    if backbone_name not in PRETRAINED:
        return backbone_name
    folder = pretrained_folder(backbone_name)
    if folder is None:
        raise BackboneError(f"{backbone_name!r} is not prepared on this machine yet.", hint="run `prefixtune prepare`.")
    return str(folder)
