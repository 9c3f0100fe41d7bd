"""Read GGUF files: de-quantize one, once, into a folder of transformers, and keep that in the cache.

The weights are converted tensor by tensor, so memory holds one of them in float32 and one shard of the folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune.backbone.quiet import quiet_transformers
from prefixtune.errors import BackboneError, first_line
from prefixtune.utils.files import atomic_files, reporting_write_errors
from prefixtune.utils.folders import cache_folder
from prefixtune.utils.locks import file_lock

if TYPE_CHECKING:
    import torch

_SHARD = 2**28
"""Bytes after which a file of weights ends, with its layer."""
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")
"""Pre-tokenizers of GGUF that split numbers, which transformers' conversion leaves out."""


def gguf_folder(path: Path, *, to_load: bool = False) -> Path:
    """The folder of transformers made of a GGUF file, in bfloat16; made when the file is new or has changed.

    Args:
        path: Of the file.
        to_load: All the weights are to be read: refuse a model larger than memory before it is converted.

    Raises:
        BackboneError: The file is cut, of an unknown architecture, or its weights do not fit in memory.
        PrefixError: The cache cannot be written.
    """
    from prefixtune.backbone.devices import check_memory

    path, stat = path.resolve(), path.stat()
    place = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    final = cache_folder() / "gguf" / f"{place}-{stat.st_size:x}-{stat.st_mtime_ns:x}"
    if final.is_dir():
        return final
    with reporting_write_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(final.parent / f".{place}.lock", timeout=-1.0):
            if not final.is_dir():
                if to_load:
                    sizes = [int(tensor.n_elements) for tensor in read_gguf(path).tensors]
                    check_memory(str(path), 2 * sum(sizes))
                for old in final.parent.glob(f"{place}-*"):
                    shutil.rmtree(old)
                with atomic_files(final) as made:
                    convert_gguf(path.stem, path, made, "bfloat16")
    return final


def convert_gguf(name: str, gguf: Path, target: Path, dtype: str = "float32") -> None:
    """De-quantize `gguf` and write model, tokenizer and generation settings to `target`; the model has this name.

    Raises:
        BackboneError: It is no whole GGUF file, or its keys turn in a way that is not read from it.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer

    reader = read_gguf(gguf)
    scaling = [key for key, field in reader.fields.items() if key.endswith(".rope.scaling.type")]
    scaling = [key for key in scaling if reader.fields[key].contents() != "none"]
    scaling += [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
    if scaling:
        what = f"{gguf.name!r} scales its rotary positions ({scaling[0]}), which is not read from a GGUF file."
        raise BackboneError(what, hint="give the model's folder or hub id.")
    kind = str(reader.fields["general.architecture"].contents())
    pre = reader.fields.get("tokenizer.ggml.pre")
    pre_tokenizer = "" if pre is None else str(pre.contents())
    # The vocabulary takes several hundred bytes a token here.
    reader.fields.clear()
    with quiet_transformers():
        options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
        config = AutoConfig.from_pretrained(gguf.parent, **options)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
        _mend_tokenizer(tokenizer, pre_tokenizer)
        tokenizer.model_max_length = config.max_position_embeddings
        for leftover in ("is_local", "local_files_only", "gguf_file", "name_or_path"):
            tokenizer.init_kwargs.pop(leftover, None)
        tokenizer.save_pretrained(target)
        with torch.device("meta"):
            model = auto_class(config).from_config(config, dtype=getattr(torch, dtype))
        vars(config).pop("_model_name_or_path", None)
        config.name_or_path, config.architectures, config.dtype = name, [type(model).__name__], getattr(torch, dtype)
        config.save_pretrained(target)
        if model.can_generate():
            model.generation_config.save_pretrained(target)
        _write_weights(reader.tensors, kind, model, target, getattr(torch, dtype))


def _write_weights(tensors: Any, kind: str, model: Any, target: Path, dtype: torch.dtype) -> None:
    """Write the tensors of a file of this architecture as the model has them; unknown ones under their own names."""
    import numpy as np
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(kind, TensorProcessor)(config=model.config.to_dict())
    names: Mapping[str, str] = get_gguf_hf_weights_map(model, processor)
    files: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(files.values())) + 1:05}.safetensors"
        stored = {one: weight.to(dtype).contiguous() for one, weight in shard.items()}
        save_file(stored, target / file, {"format": "pt"})
        files.update(dict.fromkeys(shard, file))
        shard.clear()

    def layer_of(tensor: Any) -> list[str]:
        return str(tensor.name).split(".")[:2]

    # A processor may put several tensors of a layer together.
    ordered, layer = sorted(tensors, key=layer_of), [""]
    for tensor in ordered:
        if layer_of(tensor) != layer and sum(weight.nbytes for weight in shard.values()) >= _SHARD:
            flush()
        layer = layer_of(tensor)
        made = processor.process(
            weights=dequantize(tensor.data, tensor.tensor_type),
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters={"tensors": shard},
        )
        if made.name:
            weight = torch.from_numpy(np.ascontiguousarray(made.weights)).to(dtype)
            shard[names.get(made.name, made.name)] = weight
        del made
    flush()
    index = {"metadata": {}, "weight_map": files}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_gguf(path: Path | str) -> Any:
    """A GGUF file by `gguf.GGUFReader`, through a plain array: numpy takes pieces of a mapped one slowly.

    Raises:
        BackboneError: It is no whole GGUF file.
    """
    import numpy as np
    from gguf.gguf_reader import GGUFReader

    class Reader(GGUFReader):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    try:
        reader = Reader(path)
        if "general.architecture" in reader.fields and reader.tensors:
            return reader
        said = "it holds no model"
    except (OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        said = first_line(error)
    hint = "fetch it again; `ls -l` shows its size."
    raise BackboneError(f"{str(path)!r} is cut or no GGUF file of a language model: {said}", hint=hint)


def _mend_tokenizer(tokenizer: Any, pre_tokenizer: str) -> None:
    """Put back the rules that transformers' conversion leaves out: single digits, and Qwen's composed characters."""
    from tokenizers import normalizers

    backend = tokenizer.backend_tokenizer
    if pre_tokenizer == "qwen2" and backend.normalizer is None:
        backend.normalizer = normalizers.NFC()
    if pre_tokenizer in _SINGLE_DIGITS:
        description = json.loads(backend.to_str())
        digits = {"type": "Digits", "individual_digits": True}
        description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, description["pre_tokenizer"]]}
        backend.pre_tokenizer = type(backend).from_str(json.dumps(description)).pre_tokenizer


def auto_class(config: Any) -> Any:
    """Which of transformers' classes loads a model: with the head that generates, or a bare encoder."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as SEQ2SEQ

    if config.is_encoder_decoder or config.model_type in SEQ2SEQ.keys() - CAUSAL.keys():
        # Some decoders with an audio encoder (Voxtral) are listed among the encoder-decoders.
        return transformers.AutoModelForSeq2SeqLM
    masked = config.model_type in MASKED and not getattr(config, "is_decoder", False)
    if masked or config.model_type not in CAUSAL:
        # Some encoders (BERT) can be built as decoders too, but were not trained as such.
        return transformers.AutoModel
    return transformers.AutoModelForCausalLM
