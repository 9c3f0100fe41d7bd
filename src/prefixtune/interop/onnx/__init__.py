"""A trained prefix for other runtimes: `llama_cpp` (a sequence-state file) and `onnx` (a graph with explicit past).

What no runtime can tell from the files, such as that a prefix was not put in front, is checked by what is written
beside them. Knows nothing of training; vLLM and this project's own server need no export.
"""
