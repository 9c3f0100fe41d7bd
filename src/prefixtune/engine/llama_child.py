"""llama.cpp's server as a child process of the engine, which ends with it.

Run by its file, so that it does not load what the engine's package imports. The options are a line of JSON on stdin. It
prints the server's address once the model is loaded.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

__all__ = ["serve"]


_SPARE = 8
"""Positions beyond those of the slots."""


def serve(options: dict[str, Any]) -> None:
    """Serve until stdin is closed.

    Args:
        options: `gguf`, `num_slots`, `length` (positions of a slot), `states` (the folder of saved states), `threads`,
            `token` (without it, requests are refused).
    """
    import xllamacpp

    # Whoever interrupts the parent lets it end its texts.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    params = xllamacpp.CommonParams()
    params.model.path = options["gguf"]
    params.n_parallel = options["num_slots"]
    # It ends a text shortly before the cells do.
    params.n_ctx = options["num_slots"] * options["length"] + _SPARE
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
    # Errors only.
    params.port, params.verbosity = 0, 1
    params.api_keys, params.ui, params.cors_origins = [options["token"]], False, ""
    params.slot_save_path = options["states"].rstrip("/") + "/"
    params.endpoint_slots = True
    # Without flash attention, values are stored transposed.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    # A saved state is of one stream, and only a unified cache has one.
    params.kv_unified = True
    # Otherwise a restored prefix is cleared again as soon as another slot begins.
    params.cache_idle_slots, params.cache_ram_mib = False, 0
    # Texts are never cut, and come token by token.
    params.ctx_shift, params.warmup = False, True
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(json.loads(sys.stdin.readline()))
