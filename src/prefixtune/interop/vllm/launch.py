"""The command line that starts vLLM's server with prefixes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["vllm_arguments"]


def vllm_arguments(
    *,
    model: str,
    prefixes: Path,
    model_id: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str = "auto",
    max_length: int = 0,
    num_slots: int = 0,
    cache_mib: int = 1024,
    chat_template: Path | None = None,
    connector_options: Mapping[str, Any] | None = None,
    training_socket: str = "",
    more: Sequence[str] = (),
) -> list[str]:
    """The arguments of the command `python`, for a vLLM server with prefixes.

    Args:
        model: Folder or hub id of the model.
        prefixes: The folder of prefixes.
        model_id: The bare model's name in the API.
        host: Address to listen on.
        port: Port to listen on.
        dtype: Of the weights; `auto`: vLLM's choice.
        max_length: Most positions of a sequence, the prefix included; 0: the model's.
        num_slots: Most sequences in a running batch; 0: vLLM's choice.
        cache_mib: Memory for a worker's loaded prefixes.
        chat_template: A file from `write_template`; None: chats cannot use prefixes.
        connector_options: More options of the connector, where set: `raw_completions`, `earlier_messages`,
            `on_too_long`, `max_joined_prefixes`.
        training_socket: File of the training server's socket; empty: there is none.
        more: Further options of vLLM's own, put last.
    """
    options_of_connector = {"prefixes": str(prefixes), "cache_mib": cache_mib, **(connector_options or {})}
    if training_socket:
        options_of_connector["training_socket"] = training_socket
    transfer_config = {
        "kv_connector": "PrefixConnector",
        "kv_connector_module_path": "prefixtune.interop.vllm.connector",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": options_of_connector,
    }
    options = {
        "--model": model,
        "--served-model-name": model_id,
        "--host": host,
        "--port": str(port),
        "--dtype": dtype,
        "--middleware": "prefixtune.interop.vllm.middleware.PrefixMiddleware",
        "--kv-transfer-config": json.dumps(transfer_config),
        "--max-model-len": str(max_length or ""),
        "--max-num-seqs": str(num_slots or ""),
        "--chat-template": str(chat_template or ""),
    }
    flags = [part for option, value in options.items() if value for part in (option, value)]
    return ["-m", "vllm.entrypoints.openai.api_server", *flags, *more]
