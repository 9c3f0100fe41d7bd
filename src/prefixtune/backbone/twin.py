"""A copy of a backbone that shares all weights, to change modules of without changing the model."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from prefixtune.backbone.backbone import Backbone

__all__ = ["make_twin"]


def make_twin(backbone: Backbone) -> Backbone:
    """The same backbone with modules of its own; parameters and buffers are the same objects."""
    model = backbone.model
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    made = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    twins = dict(zip(model.modules(), made.modules(), strict=True))
    layer_of = {twins[module]: layer for module, layer in backbone.layout.layer_of.items()}
    layout = dataclasses.replace(backbone.layout, layer_of=layer_of)
    return dataclasses.replace(backbone, model=made, layout=layout)
