"""Start llama.cpp or vLLM, for a command or for a server."""

from __future__ import annotations

from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.checkpoint import checkpoint_folder
from prefixtune.engine.remote import RemoteEngine


def start_engine(
    kind: str, backbone: Backbone, *, num_slots: int, max_length: int = 0, gguf: str = "", threads: int = 0, **vllm: Any
) -> RemoteEngine:
    """Start an engine of another program.

    Args:
        kind: `llama.cpp` or `vllm`.
        backbone: By `load_shapes`.
        num_slots: Texts that run at once.
        max_length: Most positions of a text, prefix included; 0: the engine's default.
        gguf: For llama.cpp: the weights; empty: the file of an embedded backbone.
        threads: For llama.cpp; 0: one per core.
        **vllm: For vLLM: further fields of `VllmConfig`.

    Raises:
        PrefixError: It cannot start.
    """
    if kind == "llama.cpp":
        from prefixtune.engine.llama_cpp import LlamaCppEngine

        return LlamaCppEngine(backbone, gguf, num_slots=num_slots, max_length=max_length, threads=threads)
    from prefixtune.engine.vllm import VllmConfig, VllmEngine

    model = str(checkpoint_folder(backbone.name))
    return VllmEngine(backbone, VllmConfig(model, num_slots=num_slots, max_length=max_length, **vllm))
