"""BERTScore (Zhang et al. 2020), by the authors' package bert-score.

The package is no longer kept up, so its version is pinned, and model and tokenizer are made here: its own way of making
them fails with newer versions of transformers, or gives other words. The score depends on the model, so the
implementation names it.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefixtune.evaluation.metrics.base import ItemStatistics, Unavailable, average, package_version
from prefixtune.evaluation.metrics.texts import Texts

__all__ = ["bertscore"]


_EXAMPLE = "`prefixtune score --weights bertscore=roberta-large`"
# Where the authors name no layer for a model: by its number of layers, as for BERT (roberta-large: 17 of 24).
_LAYERS = {6: 5, 12: 9, 24: 17}
# Words of a text for a model that says neither how many it was trained on nor how many its tokenizer keeps.
_MAX_TOKENS = 512
_BATCH = 32


def bertscore(texts: Texts) -> ItemStatistics:
    """BERTScore F1, up to 1, with each item's best reference; without idf weights and rescaling.

    An empty output scores 0; the package never gets one, because it fails on it.

    Raises:
        Unavailable: The package is missing or broken, or no model is named, or it cannot be loaded or used.
    """
    version = package_version("bert-score", "bertscore", extra="bertscore")
    if "bertscore" not in texts.weights:
        raise Unavailable(
            "bertscore needs the weights of a model, and none is named",
            f"name a folder, or a model of the Hugging Face Hub: {_EXAMPLE} for the usual figures",
        )
    name = texts.weights["bertscore"]
    package = _import_package()
    model, tokenizer, layer, depth = _load(name, package.model2layers)
    pairs = [
        (output, reference)
        for output, references in zip(texts.hypotheses, texts.references, strict=True)
        for reference in references
        if output
    ]
    f1 = iter(_score(package, model, tokenizer, pairs))
    scores = [
        max(next(f1) for _ in references) if output else 0.0
        for output, references in zip(texts.hypotheses, texts.references, strict=True)
    ]
    how = f"bert-score {version} (F1, {Path(name).name}, layer {layer} of {depth})"
    return average(scores, f"{how}; protocol {texts.protocol.name}")


def _score(package: Any, model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> list[float]:
    """F1 of each pair of an output and a reference.

    Raises:
        Unavailable: The model is of a kind that cannot be used.
    """
    if not pairs:
        return []
    outputs, references = (list(side) for side in zip(*pairs, strict=True))
    # Without idf weights all tokens count the same, except for those at the start and the end.
    weights: defaultdict[int, float] = defaultdict(lambda: 1.0)
    weights.update({tokenizer.cls_token_id: 0.0, tokenizer.sep_token_id: 0.0})
    try:
        scores = package.bert_cos_score_idf(
            model, references, outputs, tokenizer, weights, device=model.device, batch_size=_BATCH
        )
    except Exception as error:
        raise Unavailable(
            f"the model of bertscore cannot be used ({_first_line(error)})", f"name another one: {_EXAMPLE}"
        ) from error
    return [float(one) for one in scores[:, 2]]


def _load(name: str, known_layers: dict[str, int]) -> tuple[Any, Any, int, int]:
    """The model up to the layer that is compared, its tokenizer, the layer, and how many layers there are.

    Raises:
        Unavailable: They cannot be loaded, or the tokenizer does not fit.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    # What broken files raise is of many classes, such as safetensors' own and a plain Exception of tokenizers.
    try:
        # A download is shown.
        with _quiet_transformers() if Path(name).is_dir() else contextlib.nullcontext():
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            depth = config.num_hidden_layers
            by_name = {known.rpartition("/")[2]: layer for known, layer in known_layers.items()}
            layer = min(by_name.get(Path(name).name, _LAYERS.get(depth, depth)), depth)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            if getattr(tokenizer, "add_prefix_space", None) is False:
                # As the authors do for RoBERTa: the first word of a text is the same token as within the text. The
                # package leaves that to a keyword of `encode`, which newer versions of transformers ignore.
                tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, add_prefix_space=True)
            model, report = AutoModel.from_pretrained(
                name,
                num_hidden_layers=layer,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
        # transformers makes up weights that are missing; those of the pooler are not used.
        missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
        if missing:
            raise ValueError(f"it lacks {missing[0]}")
        model = model.get_encoder() if config.is_encoder_decoder else model
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    except Exception as error:
        raise Unavailable(
            f"the model of bertscore cannot be loaded from {name!r} ({_first_line(error)})",
            "name the folder of a transformers model with safetensors and its tokenizer, or a model of the Hugging "
            "Face Hub",
        ) from error
    _check_tokenizer(name, tokenizer, getattr(config, "vocab_size", None))
    positions = max(getattr(config, "max_position_embeddings", 0), 0) or _MAX_TOKENS + 2
    if tokenizer.model_max_length > positions:
        tokenizer.model_max_length = positions - 2  # RoBERTa counts positions from two
    return model, tokenizer, layer, depth


def _check_tokenizer(name: str, tokenizer: Any, num_rows: int | None) -> None:
    """Refuse a tokenizer that is not the model's, or cannot make batches.

    Args:
        name: The model's.
        tokenizer: As it was loaded.
        num_rows: The tokens that the model has vectors for; None: unknown.

    Raises:
        Unavailable: It has no words, no token for padding, or tokens that the model does not know.
    """
    # Without its files, transformers makes a tokenizer of special tokens, and of the mark of a word's beginning.
    if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) <= {"\u2581"}:
        raise Unavailable(
            f"the model of bertscore in {name!r} has no tokenizer: its vocabulary is empty",
            "copy the tokenizer's files into the model's folder (tokenizer.save_pretrained writes them)",
        )
    if num_rows is not None and len(tokenizer) > num_rows:
        raise Unavailable(
            f"the tokenizer of bertscore's model {name!r} has {len(tokenizer):,} tokens, but the model knows "
            f"{num_rows:,}",
            "copy the model's own tokenizer into its folder",
        )
    if tokenizer.pad_token_id is None:
        raise Unavailable(
            f"the tokenizer of bertscore's model {name!r} has no token for padding",
            f"name a model whose tokenizer has one: {_EXAMPLE}",
        )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """While the block runs, no progress bars and no reports of transformers reach the terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    """What an error says, in one line without a full stop; its class, if it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].removesuffix(".")


def _import_package() -> Any:
    """The package's functions; where it cannot be imported, it is unavailable, and that is no bug here."""
    try:
        from bert_score import utils
    except Exception as error:
        raise Unavailable(
            f"bert-score is installed but cannot be imported here ({type(error).__name__}: {error})",
            "pip install 'prefixtune[bertscore]'",
        ) from error
    return utils
