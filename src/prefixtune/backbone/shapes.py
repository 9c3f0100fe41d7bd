"""A backbone without its weights, for an engine that has them in a file of its own."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from prefixtune.attention.rotation import find_rotation
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.checkpoint import auto_class, checkpoint_folder, find_checkpoint, read_tokenizer, reading
from prefixtune.backbone.identity import fingerprint
from prefixtune.backbone.load import check_end_token
from prefixtune.backbone.lora import is_adapter
from prefixtune.errors import BackboneError
from prefixtune.prefix.fingerprint import sample_weights
from prefixtune.prefix.geometry import Geometry
from prefixtune.prefix.rotation import Rotation

__all__ = ["StoredWeights", "load_shapes"]


_SMALL = 64
"""Vocabulary and inner size of the model of one layer that is run."""


def load_shapes(name: str) -> Backbone:
    """Load a decoder-only backbone's tokenizer, shapes, rotation and fingerprint, not its weights.

    What its layers are is seen by running a model of one layer with random weights, so all must attend alike. It
    computes nothing.

    Args:
        name: A folder with safetensors weights, an embedded backbone, or a hub id.

    Raises:
        BackboneError: There is no such model, it is no decoder, its layers differ, or it has an adapter.
    """
    if is_adapter(Path(name)):
        raise BackboneError(f"{name!r} is an adapter.", hint="use the engine torch, or merge it into the model.")
    source, options = find_checkpoint(name)
    if "gguf_file" in options:
        raise BackboneError(f"{name!r} is a GGUF file.", hint="give the model's folder or hub id, and --gguf.")
    config, tokenizer = read_tokenizer(name, source, options)
    auto = auto_class(config)
    with reading(name), torch.random.fork_rng(devices=[]):
        one = Backbone.from_model(auto.from_config(_one_layer(config)), tokenizer, name, self_check=False)
        with torch.device("meta"):
            model = auto.from_config(config)
    if one.kind != "decoder":
        raise BackboneError(f"{name!r} is no decoder, but of kind {one.kind!r}.", hint="use the engine torch.")
    layers = int(config.num_hidden_layers)
    _check_alike(model, layers, name)
    geometry: Geometry = {"decoder": one.geometry["decoder"] * layers}
    caches = tuple(range(layers)) if one.layout.cache_layers == (0,) else None
    layout = replace(one.layout, geometry=geometry, layer_of={}, cache_layers=caches)
    shapes, stored = (
        {one: weight.shape for one, weight in model.named_parameters()},
        StoredWeights(checkpoint_folder(name)),
    )
    sizes = [(one, shape.numel()) for one, shape in shapes.items()]
    samples = sample_weights(sizes, lambda one, place: stored.number(one, shapes[one], place))
    backbone = Backbone(model, tokenizer, name, layout, fingerprint(model, geometry, samples))
    # Found where it can be computed.
    turn = find_rotation(one.model, one.layout, backbone.max_positions)
    rotation = Rotation(
        turn.positions, {site: turns * layers for site, turns in turn.layers.items()}, turn.max_positions
    )
    return check_end_token(replace(backbone, known_rotation=rotation))


def _one_layer(config: Any) -> Any:
    """The configuration of a model of one such layer, without what has no part in attention."""
    small = copy.deepcopy(config)
    sizes = {"num_hidden_layers": 1, "n_layer": 1, "vocab_size": _SMALL, "intermediate_size": _SMALL, "n_inner": _SMALL}
    for name in sizes.keys() & vars(small).keys():
        setattr(small, name, sizes[name])
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, name, None)
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    return small


def _check_alike(model: Any, layers: int, name: str) -> None:
    """Refuse a model whose layers attend in different ways, such as within a window or without turning keys.

    Raises:
        BackboneError: It is one.
    """
    stacks = [stack for stack in model.modules() if isinstance(stack, torch.nn.ModuleList) and len(stack) == layers]
    if any(len(set(map(_attention_facts, stack))) > 1 for stack in stacks):
        raise BackboneError(f"not all layers of {name!r} attend alike.", hint="use the engine torch.")


def _attention_facts(layer: torch.nn.Module) -> frozenset[tuple[str, str]]:
    """What a layer's attention is, but for its number: settings and shapes of weights."""
    facts = set[tuple[str, str]]()
    for path, module in layer.named_modules():
        if "att" in path:
            settings = {
                key: one for key, one in vars(module).items() if isinstance(one, bool | int | float | str | None)
            }
            facts |= {(f"{path}.{key}", repr(one)) for key, one in settings.items() if "idx" not in key}
            facts |= {(f"{path}.{key}", str(one.shape)) for key, one in module.named_parameters(recurse=False)}
    return frozenset(facts)


class StoredWeights:
    """The weights in a folder's safetensors files, read one number or row at a time.

    Args:
        folder: Of the checkpoint.

    Raises:
        BackboneError: It has no such file.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file: Any = safe_open(path, "pt")
            self._files.update(dict.fromkeys(file.keys(), file))
        if not self._files:
            raise BackboneError(f"{str(folder)!r} has no safetensors weights.", hint="get the whole checkpoint.")

    def row(self, name: str, index: int) -> Tensor:
        """A row of a matrix, or a whole vector.

        Raises:
            BackboneError: There is no such weight.
        """
        # Some checkpoints name the inner model alone.
        for key in (name, name.partition(".")[2]):
            if key in self._files:
                part = self._files[key].get_slice(key)
                row: Tensor = part[index] if len(part.get_shape()) > 1 else part[:]
                return row
        raise BackboneError(f"the checkpoint has no weight {name!r}.", hint="use the engine torch.")

    def number(self, name: str, shape: torch.Size, place: int) -> Tensor:
        """One number of a weight, by its place in the flattened one."""
        width = shape[-1]
        return self.row(name, place // width).reshape(-1)[place % width]
