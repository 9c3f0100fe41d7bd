"""The model card of a prefix: metadata that the Hugging Face hub reads, and a page for people.

It is made from the prefix's header and, where it was evaluated, its scores, in the hub's model-index format.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.errors import ConfigError, describe_value, short_repr
from prefixtune.prefix.header import backbone_origin
from prefixtune.prefix.hub import is_repository
from prefixtune.prefix.prefix import Prefix
from prefixtune.utils.markdown import escape_markdown

CARD = "README.md"
"""A card's name in a repository."""

_EVALUATION = "evaluation.json"
_TRAINING_FACTS = ("steps", "num_targets", "dev_loss", "learning_rate", "seed")
"""What the card repeats of a header's `training`."""
HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Embedded backbones, by the hub's names."""
_PIPELINE_TAGS = {"classification": "text-classification", "tagging": "token-classification"}
_LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0", "gpl-3.0", "bsd-3-clause")
"""The usual ones, by the hub's identifiers; it takes others as `other` with a name."""
_PAGE = """\
# {name}

A prefix for {model}: keys and values of virtual tokens, put in front of the text's own at every layer (Li & Liang
2021). The model itself stays unchanged.

| | |
|---|---|
{facts}

```bash
pip install prefixtune
{pull}prefixtune generate --prefix {file} "..."
```
{scores}"""


def make_card(prefix: Prefix, repo_id: str, evaluations: Sequence[Mapping[str, Any]] = ()) -> str:
    """The model card: metadata that the hub reads, and a page for people.

    Args:
        prefix: With its header.
        repo_id: `OWNER/NAME`, for the examples; a folder's name, if it is on this machine.
        evaluations: As `read_evaluations` returns them; none: it was not evaluated.

    Raises:
        ConfigError: The repository is no text.
    """
    from huggingface_hub import EvalResult, ModelCardData

    if not isinstance(repo_id, str):
        raise ConfigError(f"the repository is {describe_value(repo_id)}, not a text.", hint="write OWNER/NAME.")
    header = prefix.header
    task, labels, training = str(header.get("task") or ""), header.get("labels") or {}, header.get("training") or {}
    tag = _PIPELINE_TAGS.get(str(labels.get("kind")), "text-generation")
    base_model = _find_base_model(backbone_origin(header).name)
    license_id = re.sub(r"[^a-z0-9.+]+", "-", str(header.get("license") or "").lower()).strip("-")
    results = [
        EvalResult(
            task_type=tag,
            dataset_type=str(evaluation["task"]),
            dataset_name=str(evaluation["data"]),
            dataset_split=evaluation["split"],
            metric_type=metric,
            metric_value=round(score["score"], 4),
            metric_name=f"{metric} ({score['implementation']})",
        )
        for evaluation in evaluations
        for metric, score in evaluation["scores"].items()
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
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_make_page(prefix, repo_id, base_model, evaluations)}"


_OF_RUN = re.compile(r"adapter(-[0-9]+)?")
"""An adapter that was trained with the prefix, in its run's folder."""


def check_complete(prefix: Prefix, folder: Path | None = None) -> None:
    """Refuse to publish, or to store elsewhere, a prefix that is of no use by itself.

    Args:
        prefix: With its header.
        folder: Where it is to be stored; None: in a repository.

    Raises:
        ConfigError: It was trained with a LoRA adapter, which would not be found from there.
    """
    adapter = str(prefix.header.get("adapter") or "")
    if not adapter:
        return
    if folder is None:
        raise ConfigError(
            "the prefix was trained together with a LoRA adapter, and a repository would hold the prefix alone.",
            hint="upload the run's folder with `hf upload`, and use it from where `hf download` puts it.",
        )
    # Any other name is that of a folder of the user's own, which is named again for each use.
    if _OF_RUN.fullmatch(adapter) and not os.path.isdir(folder / adapter):
        raise ConfigError(
            f"the prefix was trained together with the LoRA adapter {short_repr(adapter)}, which is not in "
            f"{str(folder)!r}.",
            hint="store it in the run's folder, next to the adapter; or copy the adapter there first.",
        )


def _find_base_model(name: str) -> str:
    """The backbone's name on the hub; empty: it has none there, as a folder on somebody's machine."""
    is_on_hub = is_repository(name) and not os.path.exists(name)
    return HUB_NAMES.get(name, name if is_on_hub else "")


def _make_page(prefix: Prefix, repo_id: str, base_model: str, evaluations: Sequence[Mapping[str, Any]]) -> str:
    name, model = repo_id.rpartition("/")[2], base_model or "the model that its header names"
    training = prefix.header.get("training") or {}
    facts = {
        "model": model,
        "task": prefix.header.get("task"),
        "license": prefix.header.get("license"),
        "sites": ", ".join(f"{site} (P = {prefix.length(site)})" for site in prefix.sites),
        "parameters": f"{prefix.num_parameters:,}",
        **{key.replace("_", " "): training.get(key) for key in _TRAINING_FACTS},
    }
    scores = [
        f"\n## Scores on {_cell(evaluation['data'])} ({evaluation['num_examples']:,} examples)\n\n"
        "| metric | score | 95 % | by |\n|---|---|---|---|\n"
        + "".join(f"| {_cell(metric)} | {_format_score(score)} |\n" for metric, score in evaluation["scores"].items())
        for evaluation in evaluations
    ]
    # A folder's name, or a repository's.
    here, file = "/" not in repo_id, f"{name}.safetensors"
    return _PAGE.format(
        name=_cell(name),
        model=_cell(model),
        facts="\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in facts.items() if value is not None),
        pull="" if here else f"prefixtune pull {repo_id} {file}\n",
        file=repo_id if here else file,
        scores="".join(scores),
    )


def _format_score(score: Mapping[str, Any]) -> str:
    interval = score["interval"]
    between = f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""
    return f"{score['score']:.4g} | {between} | {_cell(score['implementation'])}"


def _cell(value: object) -> str:
    """A text that may come from anybody, as it is, on one line of a table."""
    return escape_markdown(f"{value:.6g}" if isinstance(value, float) else str(value))


# --- scores -----------------------------------------------------------------------------------------------------------


def read_evaluations(given: Any, prefix: Prefix | None = None) -> list[dict[str, Any]]:
    """The scores that a caller means, each with its task, data, split and number of examples.

    Args:
        given: None; what `evaluate` returned; `evaluation.json` of `prefixtune evaluate`, its content or its folder; or
            a list of these.
        prefix: The one that was evaluated.

    Raises:
        ConfigError: It cannot be read, or holds no scores.
    """
    if given is None:
        return []
    if isinstance(given, Sequence) and not isinstance(given, str):
        return [evaluation for one in given for evaluation in read_evaluations(one, prefix)]
    try:
        if isinstance(given, str | os.PathLike):
            path = Path(given)
            given = json.loads((path / _EVALUATION if path.is_dir() else path).read_text(encoding="utf-8"))
        elif not isinstance(given, Mapping):
            given = {
                "kind": "evaluation",
                "task": (prefix.header.get("task") if prefix else None) or "generation",
                "data": "examples",
                "split": None,
                "num_examples": len(given.outputs),
                "scores": {name: score.to_dict() for name, score in given.scores.items()},
            }
        if given["kind"] != "evaluation":
            raise ValueError("it is not an evaluation")
        facts = {name: given[name] for name in ("task", "data", "split")}
        scores = {str(name): _read_score(score) for name, score in given["scores"].items()}
        return [{**facts, "num_examples": int(given["num_examples"]), "scores": scores}]
    except (OSError, LookupError, ArithmeticError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"the evaluation holds no scores: {short_repr(str(error))}.",
            hint="give what pt.evaluate returned, or the folder that `prefixtune evaluate --output` wrote.",
        ) from error


def _read_score(score: Mapping[str, Any]) -> dict[str, Any]:
    interval = score.get("interval")
    if interval is not None:
        low, high = interval
        interval = [float(low), float(high)]
    return {"score": float(score["score"]), "implementation": str(score["implementation"]), "interval": interval}
