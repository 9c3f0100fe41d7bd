"""Tell backbones apart: by name and configuration before their weights are read, by a fingerprint of them after it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from prefixtune.attention.layout import setting
from prefixtune.backbone.devices import is_rounded
from prefixtune.backbone.lora import ADAPTER_CONFIG
from prefixtune.backbone.packaged import PRETRAINED
from prefixtune.errors import BackboneError
from prefixtune.prefix.fingerprint import sample_weights
from prefixtune.prefix.geometry import Geometry


def backbone_identity(name: str) -> str:
    """Identify the backbone that a name stands for; the same on every machine that has the same files.

    Of a folder or a .gguf file its own name and its configuration count, not where it lies; of an embedded backbone or
    a hub id, that. Two trainings of one architecture whose folders have the same name look alike: compare fingerprints
    once their weights are there.

    Args:
        name: As for `load_backbone`.

    Returns:
        12 hexadecimal digits.

    Raises:
        BackboneError: Its configuration cannot be read.
    """
    path = Path(name)
    facts = [name]
    try:
        if name not in PRETRAINED and path.exists():
            facts = [path.absolute().name]
            if path.is_file():
                facts.append(str(path.stat().st_size))
            for config in (path / "config.json", path / ADAPTER_CONFIG):
                if config.is_file():
                    facts.append(hashlib.sha256(config.read_bytes()).hexdigest())
    except OSError as error:
        raise BackboneError(
            f"cannot read {name!r}: {error.strerror or error}.", hint="check its permissions."
        ) from error
    return hashlib.sha256(json.dumps(facts).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def public_name(name: str, called: str = "") -> str:
    """The name of a backbone in what others get: that of a hub id or an embedded one, by which they can load it too.

    Args:
        name: As for `load_backbone`.
        called: In place of a local folder or file; empty: its own name, never its path.
    """
    if name in PRETRAINED or not Path(name).exists():
        return name
    return called or os.path.basename(os.path.abspath(name)).removesuffix(".gguf") or "backbone"


def fingerprint(model: Any, geometry: Geometry, samples: str = "") -> str:
    """Identify a model by its shape and by sampled weights, which match in every dtype.

    Args:
        model: Of transformers.
        geometry: What `probe` found.
        samples: Of the weights before they were rounded (see `sample`); empty: they were not.

    Returns:
        `HASH:SAMPLES`: a hash of model type, width, vocabulary, layers, rotary settings and window, and 256 weights
        spread over all parameters (half of them over a LoRA adapter's, whose scaling counts too), as bfloat16. Compare
        with `prefix.fingerprint.fingerprints_match`, which allows for rounding.
    """
    embeddings = model.get_input_embeddings().weight
    config = model.config.get_text_config(decoder=True)
    facts = {
        "model_type": model.config.model_type,
        # A prefix holds keys after any rotary embedding, seen through the layers' windows.
        "rope": getattr(config, "rope_parameters", None),
        "window": setting(config, "sliding_window"),
        "embeddings": list(embeddings.shape),
        "geometry": {site: [[s.num_kv_heads, s.key_dim, s.value_dim] for s in g] for site, g in geometry.items()},
    }
    # What a LoRA adapter's effect depends on besides its weights.
    if scalings := [sorted(module.scaling.values()) for module in model.modules() if hasattr(module, "lora_A")]:
        facts["adapter"] = scalings
    shape = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return f"{shape}:{samples or sample(model)}"


def sample(model: Any) -> str:
    """256 weights spread over all parameters, as a fingerprint has them."""
    named = dict(model.named_parameters())
    sizes = [(name, parameter.numel()) for name, parameter in named.items() if parameter.numel()]

    def take(name: str, place: int) -> Tensor:
        return _plain(_stored(model, name, named[name]).detach()).reshape(-1)[place]

    return sample_weights(sizes, take)


def _plain(weight: Tensor) -> Tensor:
    """A weight's numbers, also of one that torchao has rounded."""
    return weight.dequantize() if is_rounded(weight) else weight


def weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, also those that Accelerate keeps on disk or elsewhere until they are needed."""
    for name, parameter in model.named_parameters():
        yield name, _stored(model, name, parameter)


def _stored(model: Any, name: str, parameter: Tensor) -> Tensor:
    """A parameter with its numbers, read if Accelerate keeps it elsewhere."""
    if parameter.device.type != "meta":
        return parameter
    owner, _, last = name.rpartition(".")
    hook = getattr(model.get_submodule(owner), "_hf_hook", None)
    stored: Mapping[str, Tensor] | None = getattr(hook, "weights_map", None)
    if stored is None or last not in stored:
        raise BackboneError(f"the weight {name!r} cannot be found.", hint="load the model without offloading.")
    return stored[last]
