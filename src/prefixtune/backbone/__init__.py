"""A frozen model and its tokenizer: load it, check it, quantize it, give it a LoRA adapter, compute its loss."""
