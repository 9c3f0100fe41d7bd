"""Prefixes in vLLM: a KV connector and a middleware of its server, loaded by vLLM's own options.

A request's prompt begins with P placeholder tokens; the connector tells the scheduler that their keys and values are
computed elsewhere, and writes the prefix's own into the request's blocks before the first forward pass. The middleware
makes model names out of a folder's prefixes, puts the placeholders in, and takes them out of what is told.

    connector   in vLLM's scheduler and workers
    middleware  in vLLM's HTTP server
    served      what both know of the model, and the folder of prefixes
    start       the command line

Runs in vLLM's environment, which pins libraries of its own: besides them it needs jaxtyping alone.
"""
