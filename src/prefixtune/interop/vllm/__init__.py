"""Prefixes in vLLM: a KV connector, which vLLM finds by its name.

A request's prompt begins with P placeholder tokens. The connector tells vLLM's scheduler that their keys and values
come from outside, and writes those of the prefix into the request's blocks before the first forward pass.

    connector      in vLLM's scheduler and workers
    prefix_cache   the keys and values that a worker has loaded
    model          the shapes of the model that vLLM runs, and whether it can carry prefixes
    child          `vllm serve` as a child process of `prefixtune serve`

All of it runs in vLLM's environment, which pins its own libraries: apart from those it needs only jaxtyping. It imports
nothing of this project but `prefix`, `utils` and `errors`.
"""

from __future__ import annotations

import contextlib

__all__ = ["register"]


def register() -> None:
    """Make the connector known as `PrefixConnector`; vLLM calls it in all of its processes."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    # It was registered already, in a process that was forked.
    with contextlib.suppress(ValueError):
        KVConnectorFactory.register_connector("PrefixConnector", "prefixtune.interop.vllm.connector", "PrefixConnector")
