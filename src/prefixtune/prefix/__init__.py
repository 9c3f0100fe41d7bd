"""The value: its shapes, its trainable encoder, its file and the text format in its header.

Needs torch and safetensors alone.
"""
