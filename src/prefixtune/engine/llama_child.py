"""llama.cpp's server as a child process of the engine, which ends with it.

Run by its file, so that it does not load what the engine's package imports. Its arguments: the model's file, the number
of slots, the positions of each, the folder of saved states, the number of threads, and the socket to listen on.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys

_SPARE = 8
"""Positions beyond those of the slots."""


def serve(gguf: str, num_slots: int, length: int, states: str, threads: int, socket: str) -> None:
    """Serve until stdin is closed."""
    import xllamacpp

    # Whoever interrupts the parent lets it end its texts.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel = gguf, num_slots
    # It ends a text shortly before the cells do.
    params.n_ctx = num_slots * length + _SPARE
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    # Errors only.
    params.verbosity = 1
    params.hostnames, params.ui, params.cors_origins = [socket], False, ""
    params.slot_save_path = states.rstrip("/") + "/"
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
    sys.stdin.read()
    # A parent that was killed leaves it.
    shutil.rmtree(os.path.dirname(socket), ignore_errors=True)
    del server


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]), sys.argv[6])
