"""Train a prefix, or a method to compare it with: read -> tokenize -> build the encoder -> loop -> artifact.

`train.train` goes this way for one run, `train.train_together` for several that share every pass over the backbone.
"""
