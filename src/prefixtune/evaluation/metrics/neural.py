"""BERTScore, MoverScore and BLEURT: scores by another model, through their authors' or others' packages.

They need weights, which are never downloaded here: a folder must be named. The score depends on package and weights, so
the implementation names both.
"""

from __future__ import annotations

import importlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib import metadata
from math import log
from pathlib import Path
from typing import Any

import numpy as np

from prefixtune.evaluation.metrics.base import ItemStatistics, Unavailable, average
from prefixtune.evaluation.metrics.texts import Texts

__all__ = ["bertscore", "bleurt", "moverscore"]


# The layer that the authors of BERTScore chose for a model, by its number of layers (roberta-large: 17 of 24).
_LAYERS = {6: 5, 12: 9, 24: 17}
_BATCH = 32


def bertscore(texts: Texts) -> ItemStatistics:
    """BERTScore F1, 0 to 1, with each item's best reference; without idf weights and rescaling."""
    version, folder = _package("bert-score", texts, "bertscore", "roberta-large for the usual figures")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        depth = int(config.get("num_hidden_layers") or config.get("n_layers") or 0)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise Unavailable(
            f"the weights of bertscore in {str(folder)!r} have no config.json that can be read ({error})",
            "name the folder of a transformers model",
        ) from error
    layer = _LAYERS.get(depth, depth)
    package = _load("bert_score")
    # An empty text scores 0, as the package intends; with newer versions of transformers it fails on one.
    full = [text or "." for text in texts.hypotheses]
    _, _, f1 = package.score(
        full, texts.references, model_type=str(folder), num_layers=layer, batch_size=_BATCH, verbose=False
    )
    scores = [one if text else 0.0 for one, text in zip(f1.tolist(), texts.hypotheses, strict=True)]
    return average(
        scores, f"bert-score {version} (F1, {folder.name}, layer {layer} of {depth}); protocol {texts.protocol.name}"
    )


def moverscore(texts: Texts) -> ItemStatistics:
    """MoverScore of single words with idf weights, up to 1, with each item's best reference."""
    version, folder = _package("moverscore", texts, "moverscore", "the authors' MNLI_BERT.zip, unpacked beside the zip")
    if not (folder / "MNLI_BERT.zip").is_file():
        # The package would download it during its import.
        raise Unavailable(
            f"moverscore needs MNLI_BERT.zip in {str(folder)!r}", "put the authors' file there, unpacked beside it"
        )
    os.environ["MOVERSCORE"] = str(folder)  # read by the package when it is imported; it takes no argument
    package = _load("moverscore")
    flat = [reference for item in texts.references for reference in item]
    again = [text for text, item in zip(texts.hypotheses, texts.references, strict=True) for _ in item]
    rare = _document_weights(package, flat), _document_weights(package, texts.hypotheses)
    pairs = iter(package.word_mover_score(flat, again, *rare, stop_words=[], n_gram=1, remove_subwords=True))
    scores = [max(float(next(pairs)) for _ in item) for item in texts.references]
    settings = f"moverscore {version} (unigrams, idf, {folder.name})"
    return average(scores, f"{settings}; protocol {texts.protocol.name}", independent=False)


def bleurt(texts: Texts) -> ItemStatistics:
    """BLEURT, about 0 to 1: for each item the mean over its references, as in DART's evaluation."""
    version, folder = _package("bleurt-pytorch", texts, "bleurt", "a BLEURT checkpoint in the package's format")
    import torch

    package = _load("bleurt_pytorch")
    tokenizer = package.BleurtTokenizer.from_pretrained(str(folder))
    model = package.BleurtForSequenceClassification.from_pretrained(str(folder)).eval()
    pairs = [
        (reference, hypothesis)
        for hypothesis, item in zip(texts.hypotheses, texts.references, strict=True)
        for reference in item
    ]
    scores_of_pairs: list[float] = []
    with torch.no_grad():
        for start in range(0, len(pairs), _BATCH):
            first, second = (list(side) for side in zip(*pairs[start : start + _BATCH], strict=True))
            inputs = tokenizer(first, second, padding="longest", truncation=True, return_tensors="pt")
            scores_of_pairs += model(**inputs).logits.flatten().tolist()
    rest = iter(scores_of_pairs)
    scores = [float(np.mean([next(rest) for _ in item])) for item in texts.references]
    return average(
        scores, f"bleurt-pytorch {version} ({folder.name}, mean over references); protocol {texts.protocol.name}"
    )


def _document_weights(package: Any, texts: Sequence[str]) -> defaultdict[int, float]:
    """How rare each token is; the package's own function starts processes, which is not needed here."""
    counts = Counter(token for text in texts for token in package.process(text))
    weights: defaultdict[int, float] = defaultdict(lambda: log(len(texts) + 1))
    weights.update({token: log((len(texts) + 1) / (count + 1)) for token, count in counts.items()})
    return weights


def _package(name: str, texts: Texts, metric: str, which: str) -> tuple[str, Path]:
    """An installed package's version, and the folder of weights."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError as error:
        raise Unavailable(
            f"{name} is not installed, and {metric} needs it",
            f"pip install {name}, and name a folder of model weights ({which}) with `prefixtune score --weights "
            f"{metric}=FOLDER`: none are downloaded",
        ) from error
    if metric not in texts.weights:
        raise Unavailable(
            f"{metric} needs model weights, which are not downloaded",
            f"name their folder ({which}) with `prefixtune score --weights {metric}=FOLDER`",
        )
    folder = Path(texts.weights[metric])
    if not folder.is_dir():
        raise Unavailable(f"the weights of {metric} are not in {str(folder)!r}", f"name their folder ({which})")
    return version, folder


def _load(module: str) -> Any:
    """Import a package; a broken one, such as one for an older transformers, is unavailable, not a bug here."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise Unavailable(
            f"{module} is installed but cannot be imported here ({type(error).__name__}: {error})",
            "install the versions that it was made for, in an environment of its own",
        ) from error
