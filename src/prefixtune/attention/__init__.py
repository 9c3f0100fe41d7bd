"""Put prefixes in front of a frozen model's attention: the only package that touches transformers' attention internals.

It knows nothing of tokenizers, files and training. A model stays untouched: no class is replaced, no forward pass is
copied, nothing is stored on a module; two prefixes can be used at once.
"""
