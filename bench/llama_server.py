"""llama.cpp's own server, for `bench.serve`: GGUF SLOTS LENGTH THREADS PORT. Needs xllamacpp alone."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    import xllamacpp

    gguf, slots, length, threads, port = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx = gguf, int(slots), int(slots) * int(length)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.port, params.verbosity = int(port), 0
    server = xllamacpp.Server(params)
    signal.pause()
