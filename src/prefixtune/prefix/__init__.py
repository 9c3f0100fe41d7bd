"""The prefix as a value: its shapes, its trainable encoder, its file, and the text format in the file's header.

It imports torch and safetensors alone (the hub's client only to download), so that other engines can read prefixes. It
knows nothing of models, tokenizers and training.
"""
