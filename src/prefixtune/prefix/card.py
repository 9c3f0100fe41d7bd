"""The model card of a prefix: metadata that the Hugging Face hub reads, and a page for people.

It is made from the prefix's header and, where it was evaluated, its scores, in the hub's model-index format.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prefixtune.errors import ConfigError, describe_value, short_repr
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.header import backbone_origin
from prefixtune.results import EVALUATION_FILE, Evaluation

CARD = "README.md"
"""A card's name in a repository."""
HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Embedded backbones, by the hub's names."""

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$&#!]|:(?=\w))")
"""What Markdown would not show as it is."""
_TRAINING_FACTS = ("steps", "num_targets", "dev_loss", "learning_rate", "seed")
"""What the card repeats of a header's `training`."""
_PIPELINE_TAGS = {"classification": "text-classification", "tagging": "token-classification"}
_LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0", "gpl-3.0", "bsd-3-clause")
"""The usual ones, by the hub's identifiers; it takes others as `other` with a name."""
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_PAGE = """\
# {name}

A prefix for {model}: keys and values of virtual tokens, put in front of the text's own at every layer (Li & Liang
2021). The model itself stays unchanged.

| | |
|---|---|
{facts}

```bash
pip install prefixtune
prefixtune generate --prefix {file} "..."
```
{scores}"""


def is_repository(name: str | os.PathLike[str]) -> bool:
    """Whether a text has the form of a repository's name, `OWNER/NAME`; a path on this machine may have it too.

    >>> is_repository("me/e2e-prefix"), is_repository("./me/prefix"), is_repository("prefix")
    (True, False, False)
    """
    return _REPOSITORY.fullmatch(os.fspath(name)) is not None


def make_card(
    header: Mapping[str, Any],
    lengths: Mapping[Site, int],
    num_parameters: int,
    repo_id: str,
    evaluations: Sequence[Evaluation] = (),
) -> str:
    """The model card: metadata that the hub reads, and a page for people.

    Args:
        header: Of the prefix.
        lengths: Site -> P.
        num_parameters: How many numbers it stores.
        repo_id: `OWNER/NAME`, for the examples; a folder's name, if it is on this machine.
        evaluations: As `read_evaluations` returns them; none: it was not evaluated.

    Raises:
        ConfigError: The repository is no text.
    """
    from huggingface_hub import EvalResult, ModelCardData

    if not isinstance(repo_id, str):
        raise ConfigError(f"the repository is {describe_value(repo_id)}, not a text.", hint="write OWNER/NAME.")
    task, training, name = str(header.get("task") or ""), header.get("training") or {}, repo_id.rpartition("/")[2]
    tag = _PIPELINE_TAGS.get(str((header.get("labels") or {}).get("kind")), "text-generation")
    origin = backbone_origin(header).name
    # A folder on somebody's machine has no name on the hub.
    base_model = HUB_NAMES.get(origin, origin if is_repository(origin) and not os.path.exists(origin) else "")
    license_id = re.sub(r"[^a-z0-9.+]+", "-", str(header.get("license") or "").lower()).strip("-")
    results = [
        EvalResult(
            task_type=tag,
            dataset_type=evaluation.task,
            dataset_name=evaluation.data,
            dataset_split=evaluation.split,
            metric_type=metric,
            metric_value=round(score.score, 4),
            metric_name=f"{metric} ({score.implementation})",
        )
        for evaluation in evaluations
        for metric, score in evaluation.scores.items()
    ]
    data = ModelCardData(
        base_model=base_model or None,
        base_model_relation="adapter" if base_model else None,
        datasets=[training["dataset"]] if training.get("dataset") else None,
        library_name="prefixtune",
        license=license_id if license_id in _LICENSES else "other" if header.get("license") else None,
        license_name=None if license_id in _LICENSES else license_id or None,
        pipeline_tag=tag,
        tags=["prefix-tuning", "prefixtune", *([task] if task else [])],
        model_name=name if results else None,
        eval_results=results or None,
    )
    model = base_model or "the model that its header names"
    facts = {
        "model": model,
        "task": header.get("task"),
        "license": header.get("license"),
        "sites": ", ".join(f"{site} (P = {length})" for site, length in lengths.items()),
        "parameters": f"{num_parameters:,}",
        **{key.replace("_", " "): training.get(key) for key in _TRAINING_FACTS},
    }
    page = _PAGE.format(
        name=_cell(name),
        model=_cell(model),
        facts="\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in facts.items() if value is not None),
        file=f"hub:{repo_id}" if "/" in repo_id else repo_id,
        scores="".join(map(_table, evaluations)),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{page}"


def _table(evaluation: Evaluation) -> str:
    lines = [f"\n## Scores on {_cell(evaluation.data)} ({evaluation.num_examples:,} examples)\n\n"]
    lines.append("| metric | score | 95 % | by |\n|---|---|---|---|\n")
    for metric, one in evaluation.scores.items():
        between = f"{one.interval[0]:.4g} to {one.interval[1]:.4g}" if one.interval else ""
        lines.append(f"| {_cell(metric)} | {one.score:.4g} | {between} | {_cell(one.implementation)} |\n")
    return "".join(lines)


def _cell(value: object) -> str:
    """A text that may come from anybody, as it is, on one line of a table."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def read_evaluations(given: Any, task: str = "") -> list[Evaluation]:
    """The scores that a caller means.

    Args:
        given: None; what `evaluate` returned; `evaluation.json` of `prefixtune evaluate`, its content or its folder; or
            a list of these.
        task: Of the prefix that was evaluated.

    Raises:
        ConfigError: It cannot be read, or holds no scores.
    """
    if given is None:
        return []
    if isinstance(given, Sequence) and not isinstance(given, str):
        return [evaluation for one in given for evaluation in read_evaluations(one, task)]
    try:
        if isinstance(given, str | os.PathLike):
            path = Path(given)
            text = (path / EVALUATION_FILE if path.is_dir() else path).read_text(encoding="utf-8")
            return [Evaluation.model_validate_json(text)]
        found = Evaluation.model_validate(given)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ConfigError(
            f"the evaluation holds no scores: {short_repr(reason)}.",
            hint="give what pt.evaluate returned, or the folder that `prefixtune evaluate --output` wrote.",
        ) from error
    return [found.with_facts(task=found.task or task or "generation", data=found.data or "examples")]


def check_complete(header: Mapping[str, Any], folder: Path | None = None) -> None:
    """Refuse to publish, or to store elsewhere, a prefix that is of no use by itself.

    Args:
        header: Of the prefix.
        folder: Where it is to be stored; None: in a repository.

    Raises:
        ConfigError: It was trained with a LoRA adapter, which would not be found from there.
    """
    adapter = str(header.get("adapter") or "")
    # Any other name is that of a folder of the user's own, which is named again for each use.
    is_of_run = re.fullmatch(r"adapter(-[0-9]+)?", adapter) is not None
    if adapter and (folder is None or (is_of_run and not os.path.isdir(folder / adapter))):
        raise ConfigError(
            f"the prefix was trained together with the LoRA adapter {short_repr(adapter)}, which would not be with it.",
            hint="store it in the run's folder, next to the adapter; or upload that folder with `hf upload`.",
        )
