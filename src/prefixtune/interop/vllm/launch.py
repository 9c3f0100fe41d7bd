"""The command line that starts vLLM's server with prefixes, and the chat template that it needs.

Knows nothing of how it is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixtune.interop.vllm.middleware import PROMPT_VARIABLE, TEMPLATE_VARIABLE
from prefixtune.utils.files import write_text

__all__ = ["TEMPLATE_VERSION", "Start", "write_template"]


TEMPLATE_VERSION = 2
"""Of what is put around a model's chat template."""


@dataclass(frozen=True)
class Start:
    """A server to be started.

    Attributes:
        model: Folder or hub id.
        prefixes: Folder of the prefixes.
        model_id: The bare model's name in the interface.
        host: Address to listen on.
        port: Port to listen on.
        dtype: Of the weights; `auto`: vLLM's choice.
        max_length: Most positions of a text, the prefix included; 0: the model's.
        num_slots: Texts that are written at once; 0: vLLM's choice.
        cache_mib: Memory for a worker's loaded prefixes.
        template: File of a chat template with a place for the placeholders; None: no chats for prefixes.
        texts: What becomes of texts for prefixes: `raw_completions`, `earlier_messages`, `on_too_long`, where given.
        more: Options of vLLM's own, put last.
    """

    model: str
    prefixes: Path
    model_id: str
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = "auto"
    max_length: int = 0
    num_slots: int = 0
    cache_mib: int = 1024
    template: Path | None = None
    more: Sequence[str] = ()
    texts: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        """After `python`."""
        transfer = {
            "kv_connector": "PrefixConnector",
            "kv_connector_module_path": "prefixtune.interop.vllm.connector",
            "kv_role": "kv_consumer",
            "kv_connector_extra_config": {"prefixes": str(self.prefixes), "cache_mib": self.cache_mib, **self.texts},
        }
        options = {
            "--model": self.model,
            "--served-model-name": self.model_id,
            "--host": self.host,
            "--port": str(self.port),
            "--dtype": self.dtype,
            "--middleware": "prefixtune.interop.vllm.middleware.PrefixMiddleware",
            "--kv-transfer-config": json.dumps(transfer),
            "--max-model-len": str(self.max_length or ""),
            "--max-num-seqs": str(self.num_slots or ""),
            "--chat-template": str(self.template or ""),
        }
        given = [part for option, value in options.items() if value for part in (option, value)]
        return ["-m", "vllm.entrypoints.openai.api_server", *given, *self.more]


def write_template(path: Path, template: str) -> None:
    """A model's chat template, with a place for placeholders in front of it, and for a text in place of the messages.

    Args:
        path: Where to.
        template: The model's own; empty: it has none, and takes chats of prefixes alone.

    Raises:
        PrefixError: The file cannot be written.
    """
    own = template or "{{ raise_exception('this model has no chat template') }}"
    front = "{{ " + TEMPLATE_VARIABLE + " | default('') }}"
    text = "{% if " + PROMPT_VARIABLE + " is defined %}{{ " + PROMPT_VARIABLE + " }}{% else %}"
    write_text(path, front + text + own + "{% endif %}")
