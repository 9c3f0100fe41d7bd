"""A frozen model and its tokenizer: load it, check it, quantize it, add a LoRA adapter, compute its loss.

It knows nothing of data files, training loops and generation.
"""
