"""A backbone for an engine of another program: without its weights, and with layers that the program computes alike."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from prefixtune.attention.rotation import find_rotation
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.checkpoint import checkpoint_folder, find_checkpoint, read_tokenizer, reading, weight_files
from prefixtune.backbone.convert import auto_class
from prefixtune.backbone.identity import fingerprint
from prefixtune.backbone.load import check_end_token
from prefixtune.backbone.lora import is_adapter
from prefixtune.errors import BackboneError
from prefixtune.prefix.fingerprint import sample_weights
from prefixtune.prefix.geometry import Geometry
from prefixtune.prefix.rotation import length_dependent_turn

_SMALL = 64
"""Vocabulary and inner size of the model of one layer that is run."""


def load_shapes(name: str) -> Backbone:
    """Load a decoder-only backbone's tokenizer, shapes, rotation and fingerprint, not its weights.

    What its layers are is seen by running a model of one layer with random weights, so all must attend alike. It
    computes nothing.

    Args:
        name: A folder with safetensors weights, a `.gguf` file, an embedded backbone, or a hub id.

    Raises:
        BackboneError: There is no such model, it is no decoder, its layers differ, or it has an adapter.
    """
    if is_adapter(Path(name)):
        raise BackboneError(f"{name!r} is an adapter.", hint="use the engine torch, or merge it into the model.")
    source, options = find_checkpoint(name)
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
    shapes, stored = {one: w.shape for one, w in model.named_parameters()}, StoredWeights(checkpoint_folder(name))
    sizes = [(one, shape.numel()) for one, shape in shapes.items()]
    samples = sample_weights(sizes, lambda one, place: stored.number(one, shapes[one], place))
    backbone = Backbone(model, tokenizer, name, layout, fingerprint(model, geometry, samples))
    # Found where it can be computed.
    turn = find_rotation(one.model, one.layout, backbone.max_positions)
    rotation = replace(turn, layers={site: turns * layers for site, turns in turn.layers.items()})
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
        for path in weight_files(folder):
            file: Any = safe_open(path, "pt")
            self._files.update(dict.fromkeys(file.keys(), file))
        if not self._files:
            raise BackboneError(f"{str(folder)!r} has no safetensors weights.", hint="get the whole checkpoint.")

    def row(self, name: str, index: int) -> Tensor:
        """A row of a matrix, or a whole vector.

        Raises:
            BackboneError: There is no such weight.
        """
        part = self._part(name)
        row: Tensor = part[index] if len(part.get_shape()) > 1 else part[:]
        return row

    def _part(self, name: str) -> Any:
        # Some checkpoints name the inner model alone.
        for key in (name, name.partition(".")[2]):
            if key in self._files:
                return self._files[key].get_slice(key)
        raise BackboneError(f"the checkpoint has no weight {name!r}.", hint="use the engine torch.")

    def number(self, name: str, shape: torch.Size, place: int) -> Tensor:
        """One number of a weight of this shape, by its place in the flattened one.

        Raises:
            BackboneError: There is no such weight, or it has another shape.
        """
        part = self._part(name)
        if list(shape) != (stored := part.get_shape()):
            what = f"the checkpoint's weight {name!r} is {stored} instead of {list(shape)}."
            raise BackboneError(what, hint="use the engine torch.")
        number: Tensor = part[tuple(map(int, np.unravel_index(place, shape)))]
        return number


def check_plain_layers(backbone: Backbone, target: str, length: int | None = None) -> None:
    """Refuse a decoder whose layers another runtime would compute differently with a prefix in its cache.

    Args:
        backbone: A decoder-only model.
        target: What the runtime is called.
        length: Most positions of a text there; None: as many as the backbone has.

    Raises:
        BackboneError: Not all layers keep keys and values of one shape, turned alike in every text, or see the whole
            text.
    """
    shapes, config = backbone.geometry["decoder"], backbone.model.config.get_text_config(decoder=True)
    window, positions = _find_window(config), length or backbone.max_positions
    turn = length_dependent_turn(config)
    faults = {
        "its layers differ in KV heads or head sizes": len(set(shapes)) > 1 or shapes[0].key_dim != shapes[0].value_dim,
        # One that holds every position never takes effect.
        f"it has a window of {window or 'some'} positions, which the prefix would leave": window is not None
        and (positions is None or window < positions),
        f"its keys turn by other frequencies in a longer text (rope_type {turn!r})": turn is not None,
        "its cache does not hold every layer's own keys and values": backbone.layout.cache_layers
        != tuple(range(len(shapes)))
        or config.num_hidden_layers != len(shapes),
    }
    if reasons := [fault for fault, applies in faults.items() if applies]:
        what = f"{target} would not compute {backbone.name!r} with a prefix as here: {'; '.join(reasons)}."
        raise BackboneError(what, hint="use `prefixtune generate` or `prefixtune serve` for it.")


def _find_window(config: Any) -> int | None:
    """The window of layers that do not see the whole text (0: unknown size); None: all layers see it."""
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if layer_types is not None:
        return int(window or 0) if {"sliding_attention", "chunked_attention"} & set(layer_types) else None
    return None if window is None else int(window)
