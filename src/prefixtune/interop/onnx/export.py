"""Writes a backbone as an ONNX graph whose past is an input, and a prefix as the past that it starts from.

Inputs: `input_ids` (B, T), `attention_mask` (B, S + T), `position_ids` (B, T), and per layer `past_key_values.N.key`
and `.value` (B, H, S, D); outputs: `logits` (B, T, vocabulary), `present.N.key` and `.value`. B, T and S are free. The
prefix is the first past, S = P.

Every export is run once in ONNX Runtime and compared with the backbone. examples/to_onnx.py shows the loop, which needs
no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from prefixtune.attention.layout import cache_argument, growing_cache
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.quiet import quiet_transformers
from prefixtune.data.chat import stop_ids
from prefixtune.data.encoding import format_of
from prefixtune.errors import BackboneError, ConfigError, first_line
from prefixtune.interop.export import check_exportable, check_folder, describe_origin, write_manifest
from prefixtune.prefix.prefix import Prefix
from prefixtune.utils.extras import needs_extra
from prefixtune.utils.files import atomic_files

GRAPH = "model.onnx"
"""The graph's file; large weights go into `model.onnx.data` in the same folder."""

PAST = "past.safetensors"
"""The file of the first past: one row, by the names of the inputs."""

_TOLERANCE = 1e-4
"""Largest difference from the backbone's logits, relative to the largest of these."""

MAX_BYTES_IN_GRAPH = 1_500_000_000
"""More bytes of weights go into a separate file; protobuf ends at two gigabytes."""


class _Step(nn.Module):
    """One call of the model, with the past as an argument and the present as a result."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Int[Tensor, "B _ST"],
        position_ids: Int[Tensor, "B T"],
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        cache = growing_cache(self.model)
        for number in range(len(past) // 2):
            cache.update(past[2 * number], past[2 * number + 1], number)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{cache_argument(self.model): cache},
        )
        present = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        return (output.logits, *present)


def export_onnx(prefix: Prefix, backbone: Backbone, folder: str | Path) -> dict[str, Any]:
    """Write a backbone as a graph, a prefix to start from, and how to run both.

    Args:
        prefix: Trained for a decoder-only model.
        backbone: That model, in float32.
        folder: Gets `model.onnx`, `past.safetensors`, the tokenizer and `export.json`.

    Returns:
        What `export.json` says, with the largest difference from the backbone's logits.

    Raises:
        BackboneError: The model cannot be traced, or ONNX Runtime computes something else; nothing is written.
        ConfigError: A library of the extra `export` is missing, the backbone is not in float32, the prefix is empty,
            or has a head, or the folder holds a run.
    """
    runtime = require_onnx()
    check_folder(folder, "onnx")
    check_exportable(prefix, backbone, "ONNX")
    if backbone.model.dtype != torch.float32:
        what = f"the backbone is in {backbone.model.dtype}, but a graph is written and compared in float32."
        raise ConfigError(what, hint="load it with dtype float32 (--dtype float32), and convert the graph afterwards.")
    facts = _list_facts(prefix, backbone)
    past = {
        name: tensor.detach().float().cpu()[None].contiguous()
        for name, tensor in zip(_past_names(facts), prefix.tensors(), strict=True)
    }
    with atomic_files(Path(folder)) as temporary:
        _trace(backbone, facts, temporary / GRAPH)
        facts["max_difference"] = _compare(runtime, temporary / GRAPH, prefix, backbone, past)
        facts["versions"] = {"torch": str(torch.__version__), "onnxruntime": runtime.__version__}
        save_file(past, temporary / PAST)
        with quiet_transformers():
            backbone.tokenizer.save_pretrained(temporary)
        write_manifest(temporary, facts)
    return facts


def _past_names(facts: dict[str, Any]) -> list[str]:
    """The inputs that hold the past, in order; the outputs that hold the present come in the same order."""
    return [f"past_key_values.{index}.{part}" for index in range(facts["num_layers"]) for part in ("key", "value")]


def _list_facts(prefix: Prefix, backbone: Backbone) -> dict[str, Any]:
    """What `export.json` says."""
    shapes = backbone.geometry["decoder"]
    return {
        "target": "onnx",
        "file": GRAPH,
        "prefix_file": PAST,
        **describe_origin(prefix, backbone),
        "num_layers": len(shapes),
        "num_kv_heads": shapes[0].num_kv_heads,
        "head_dim": shapes[0].key_dim,
        "end_ids": [*stop_ids(backbone, format_of(backbone, prefix)), backbone.eos_id],
        "pad_id": backbone.pad_id,
    }


def require_onnx() -> Any:
    """Import what an export needs; returns ONNX Runtime.

    Raises:
        ConfigError: A library of the extra `export` is missing.
    """
    with needs_extra("export", "an export to ONNX"):
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    return onnxruntime


def _trace(backbone: Backbone, facts: dict[str, Any], path: Path) -> None:
    """Trace one call of the model, and write its graph."""
    model, device = backbone.model, backbone.device
    # Sizes that differ from each other and from 1, so that none is traced as a constant.
    rows, tokens, past_length = 2, 3, 5
    heads, size = facts["num_kv_heads"], facts["head_dim"]
    names = _past_names(facts)
    past = [torch.zeros(rows, heads, past_length, size, device=device) for _ in names]
    ids = torch.zeros(rows, tokens, dtype=torch.long, device=device)
    mask = torch.ones(rows, past_length + tokens, dtype=torch.long, device=device)
    positions = (torch.arange(tokens, device=device) + past_length).expand(rows, -1).contiguous()
    by_token = {0: "batch", 1: "sequence"}
    shapes = {
        "input_ids": by_token,
        "attention_mask": {0: "batch", 1: "total"},
        "position_ids": by_token,
        "past": [{0: "batch", 2: "past"} for _ in past],
    }
    module = _Step(model).eval()
    try:
        with quiet_transformers(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (ids, mask, positions, past),
                dynamo=True,
                input_names=["input_ids", "attention_mask", "position_ids", *names],
                output_names=["logits", *(name.replace("past_key_values", "present") for name in names)],
                dynamic_shapes=shapes,
                verbose=False,
            )
            size_in_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
            if program is not None:
                program.save(path, external_data=size_in_bytes > MAX_BYTES_IN_GRAPH)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        what = f"torch cannot write {backbone.name!r} as a graph: {first_line(error)}"
        raise BackboneError(what, hint="use `prefixtune serve`, or another target.") from error


@torch.no_grad()
def _compare(runtime: Any, path: Path, prefix: Prefix, backbone: Backbone, past: dict[str, Tensor]) -> float:
    """The largest difference between the graph's logits and the backbone's, for two texts of unequal length.

    Six positions are read at once, the first text padded on the left, and then one more.

    Raises:
        BackboneError: It is too large to be rounding.
    """
    generator = torch.Generator().manual_seed(0)
    size = min(len(backbone.tokenizer), int(backbone.model.get_input_embeddings().weight.shape[0]))
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ids, mask = torch.randint(size, (2, 7), generator=generator), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    length, real = prefix.prefix_length, mask.bool()
    whole, positions = nn.functional.pad(mask, (length, 0), value=1), length + (mask.cumsum(1) - 1).clamp(min=0)
    state, found = {name: tensor.repeat(2, 1, 1, 1).numpy() for name, tensor in past.items()}, list[Tensor]()
    for part in (slice(0, 6), slice(6, 7)):
        inputs = (ids[:, part], whole[:, : length + part.stop], positions[:, part])
        names = ("input_ids", "attention_mask", "position_ids")
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        logits, *present = session.run(None, {**feed, **state})
        state = dict(zip(state, present, strict=True))
        found.append(torch.from_numpy(logits))
    device = backbone.device
    expected = backbone.forward(ids.to(device), mask.to(device), prefixes=prefix).logits.float().cpu()
    difference, largest = _largest(torch.cat(found, dim=1)[real] - expected[real]), _largest(expected[real])
    if not difference <= _TOLERANCE * max(largest, 1.0):
        what = f"ONNX Runtime's logits and those of {backbone.name!r} are {difference:.3g} apart, of {largest:.3g}."
        raise BackboneError(what, hint="use `prefixtune serve`, or another target.")
    return difference


def _largest(logits: Float[Tensor, "N V"]) -> float:
    return float(logits.abs().max())
