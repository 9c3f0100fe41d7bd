"""Prefixes in vLLM: a KV connector and a middleware for its server, both loaded by vLLM's own options.

A request's prompt begins with P placeholder tokens. The connector tells vLLM's scheduler that their keys and values
come from outside, and writes those of the prefix into the request's blocks before the first forward pass. The
middleware makes every prefix in a folder a model name, and `a+b` the name of two that are joined; it adds the
placeholders, and removes them from the response.

    connector      in vLLM's scheduler and workers
    worker_cache   the keys and values that a worker has loaded
    middleware     in vLLM's HTTP server
    state          what the middleware knows of the running server
    requests       a request for a prefix -> a request for the backbone
    prompts        the prompts in it: text format, placeholders
    responses      the backbone's response -> a response of the prefix
    training       requests about training, for a server beside vLLM
    http           request bodies, responses and errors, as ASGI sends them
    folder         the prefixes in a folder
    joining        several prefixes as one
    reference      how a request names its prefix, signed
    model          the shapes of the model that vLLM runs, and whether it can carry prefixes
    settings       the connector's options
    launch         the command that starts vLLM
    chat_template  the chat template that has room for placeholders

All of it runs in vLLM's environment, which pins its own libraries: apart from those it needs only jaxtyping. It imports
nothing of this project but `prefix`, `utils` and `errors`.
"""
