"""The model card of a prefix: metadata that the Hugging Face hub reads, and a page for people.

It is made from the prefix's header and, where it was evaluated, its scores, in the hub's model-index format.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.errors import ConfigError, describe_value, short_repr
from prefixtune.prefix.composition import content_hash
from prefixtune.prefix.header import backbone_origin
from prefixtune.prefix.hub import is_repository
from prefixtune.prefix.prefix import Prefix
from prefixtune.utils.console import format_figure
from prefixtune.utils.markdown import escape_markdown

__all__ = ["CARD", "HUB_NAMES", "check_complete", "find_evaluations", "make_card", "read_evaluations"]


CARD = "README.md"
"""A card's name in a repository."""

_EVALUATION = "evaluation.json"
_MOST_BYTES, _MOST_FOLDERS = 2**24, 1000
_TRAINING_FACTS = ("steps", "num_targets", "dev_loss", "learning_rate", "seed")
"""What the card repeats of a header's `training`."""
HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Embedded backbones, by the hub's names."""
_LICENSES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear",
    "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0",
    "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0",
    "cdla-sharing-1.0", "creativeml-openrail-m", "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0",
    "etalab-2.0", "eupl-1.1", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "intel-research", "isc", "lgpl",
    "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "lppl-1.3c",
    "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "openrail", "openrail++", "osl-3.0", "other",
    "pddl", "postgresql", "unknown", "unlicense", "wtfpl", "zlib",
}  # fmt: skip
"""What the hub takes as `license`, by its documentation of repositories."""
_PIPELINE_TAGS = {"classification": "text-classification", "tagging": "token-classification"}
_FACTS = ("task", "data", "split", "num_examples")


def make_card(prefix: Prefix, repo_id: str, evaluations: Sequence[Mapping[str, Any]] = ()) -> str:
    """The model card: metadata that the hub reads, and a page for people.

    Args:
        prefix: With its header.
        repo_id: `OWNER/NAME`, for the examples; a folder's name, if it is on this machine.
        evaluations: As `read_evaluations` returns them; none: it was not evaluated.

    Raises:
        ConfigError: The repository is no text.
    """
    from huggingface_hub import ModelCardData

    if not isinstance(repo_id, str):
        raise ConfigError(f"the repository is {describe_value(repo_id)}, not a text.", hint="write OWNER/NAME.")

    header = prefix.header
    task = str(header.get("task", ""))
    base_model = _find_base_model(prefix)
    license_id, license_name = _find_license(str(header.get("license") or ""))
    results = [result for evaluation in evaluations for result in _list_results(evaluation, _pipeline_tag(prefix))]
    data = ModelCardData(
        base_model=base_model or None,
        base_model_relation="adapter" if base_model else None,
        datasets=_find_datasets(prefix) or None,
        library_name="prefixtune",
        license=license_id,
        license_name=license_name,
        pipeline_tag=_pipeline_tag(prefix),
        tags=["prefix-tuning", "prefixtune", *([task] if task else [])],
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_make_page(prefix, repo_id, base_model, task, evaluations)}"


def _pipeline_tag(prefix: Prefix) -> str:
    labels = prefix.header.get("labels")
    kind = str(labels.get("kind")) if isinstance(labels, Mapping) else ""
    return _PIPELINE_TAGS.get(kind, "text-generation")


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


def _backbone_name(prefix: Prefix) -> str:
    return backbone_origin(prefix.header).name


def _find_license(name: str) -> tuple[str | None, str | None]:
    """A license's identifier on the hub, which refuses a card with any other, and its name where it has none there.

    >>> _find_license("Apache 2.0"), _find_license("ACME Model License"), _find_license("")
    (('apache-2.0', None), ('other', 'acme-model-license'), (None, None))
    """
    identifier = re.sub(r"[^a-z0-9.+]+", "-", name.lower()).strip("-")
    if identifier in _LICENSES:
        return identifier, None
    return ("other", identifier or None) if name else (None, None)


def _find_base_model(prefix: Prefix) -> str:
    """The backbone's name on the hub; empty: it has none there, as a folder on somebody's machine."""
    name = _backbone_name(prefix)
    is_on_hub = is_repository(name) and not os.path.exists(name)
    return HUB_NAMES.get(name, name if is_on_hub else "")


def _find_datasets(prefix: Prefix) -> list[str]:
    """The hub's data sets that it was trained on, by its header."""
    training = prefix.header.get("training")
    name = training.get("dataset") if isinstance(training, Mapping) else None
    return [name] if isinstance(name, str) and name else []


def _list_results(evaluation: Mapping[str, Any], task_type: str) -> list[Any]:
    """The scores in the hub's model-index format."""
    from huggingface_hub import EvalResult

    split = evaluation["split"]
    return [
        EvalResult(
            task_type=task_type,
            dataset_type=str(evaluation["task"]),
            dataset_name=str(evaluation["data"]),
            dataset_split=None if split is None else str(split),
            metric_type=metric,
            metric_value=round(float(score["score"]), 4),
            metric_name=f"{metric} ({score['implementation']})",
        )
        for metric, score in evaluation["scores"].items()
    ]


def _make_page(
    prefix: Prefix, repo_id: str, base_model: str, task: str, evaluations: Sequence[Mapping[str, Any]]
) -> str:
    name = repo_id.rpartition("/")[2]
    model = base_model or "the model that its header names"
    lines = [
        f"# {_cell(name)}",
        "",
        f"A prefix for {_cell(model)}: keys and values of virtual tokens, put in front of the text's own at every "
        "layer (Li & Liang 2021). The model itself stays unchanged.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {_cell(key)} | {_cell(value)} |" for key, value in _list_facts(prefix, model, task).items()),
        "",
        *_list_usage(prefix, repo_id),
    ]
    for evaluation in evaluations:
        split = "" if evaluation["split"] is None else f", {evaluation['split']}"
        lines += [
            "",
            f"## Scores on {_cell(evaluation['data'])}{_cell(split)} ({evaluation['num_examples']:,} examples)",
            "",
            "| metric | score | 95 % | by |",
            "|---|---|---|---|",
            *(f"| {_cell(metric)} | {_format_score(score)} |" for metric, score in evaluation["scores"].items()),
        ]
    return "\n".join(lines) + "\n"


def _list_usage(prefix: Prefix, repo_id: str) -> list[str]:
    """How to use it: in Python, and on the command line."""
    kind = _pipeline_tag(prefix)
    text_format = prefix.header.get("text_format")
    chats = isinstance(text_format, Mapping) and bool(text_format.get("chat_template"))
    use = {
        "text-generation": f'print(model.{"chat" if chats else "generate"}("..."))',
        "text-classification": 'print(model.classify("...").label)',
    }.get(kind)
    # A folder's name, or a repository's.
    here = "/" not in repo_id
    place = repo_id if here else f"hub:{repo_id}"
    python = ["```python", "import prefixtune as pt", "", f'model = pt.load(prefix="{place}")', use or "", "```", ""]
    file = f"{repo_id.rpartition('/')[2]}.safetensors"
    return [
        *(python if use else []),
        "```bash",
        "pip install prefixtune",
        *([] if here else [f"prefixtune pull {repo_id} {file}"]),
        f'prefixtune generate --prefix {repo_id if here else file} "..."',
        "```",
    ]


def _list_facts(prefix: Prefix, model: str, task: str) -> dict[str, Any]:
    training = prefix.header.get("training")
    stored = training if isinstance(training, Mapping) else {}
    known = _backbone_name(prefix)
    return {
        "model": model + (f" ({known} of prefixtune)" if known in HUB_NAMES else ""),
        "task": task or "unknown",
        **({"license": prefix.header["license"]} if prefix.header.get("license") else {}),
        "sites": ", ".join(f"{site} (P = {prefix.length(site)})" for site in prefix.sites),
        "parameters": f"{prefix.num_parameters:,}",
        **{key.replace("_", " "): _figure(stored[key]) for key in _TRAINING_FACTS if stored.get(key) is not None},
    }


def _figure(value: object) -> object:
    return format_figure(value) if isinstance(value, float) else value


def _format_score(score: Mapping[str, Any]) -> str:
    interval = score.get("interval")
    between = f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""
    return f"{score['score']:.4g} | {between} | {_cell(score['implementation'])}"


def _cell(value: object) -> str:
    """A text that may come from anybody, as it is, on one line of a table."""
    return escape_markdown(str(value))


# --- scores -----------------------------------------------------------------------------------------------------------


def read_evaluations(given: Any, prefix: Prefix | None = None) -> list[dict[str, Any]]:
    """The scores that a caller means, each with its task, data, split and number of examples.

    Args:
        given: None; what `evaluate` returned; `evaluation.json` of `prefixtune evaluate`, its content or its folder; a
            run's folder that holds evaluations of this prefix; or a list of these.
        prefix: The one that was evaluated.

    Raises:
        ConfigError: It cannot be read, or holds no scores.
    """
    if given is None:
        return []
    if isinstance(given, Mapping):
        return [_check(given, describe_value(given))]
    if isinstance(given, str | os.PathLike):
        return _read(Path(given), prefix)
    if isinstance(given, Sequence):
        return [evaluation for one in given for evaluation in read_evaluations(one, prefix)]
    scores = getattr(given, "scores", None)
    if not isinstance(scores, Mapping):
        raise ConfigError(
            f"the evaluation is {describe_value(given)}, which holds no scores.",
            hint="give what pt.evaluate returned, or the folder that `prefixtune evaluate --output` wrote.",
        )
    facts = {
        "kind": "evaluation",
        "task": "generation" if prefix is None else prefix.header.get("task") or "records",
        "data": "examples",
        "split": None,
        "num_examples": len(getattr(given, "outputs", ())),
        "scores": {name: score.to_dict() for name, score in scores.items()},
    }
    return [_check(facts, "the evaluation")]


def find_evaluations(folder: Path, prefix: Prefix) -> list[dict[str, Any]]:
    """What `prefixtune evaluate` wrote of this very prefix in a folder and the folders in it, in order of their names.

    Other evaluations are ignored: of an earlier prefix, say, or by a version that did not record what it evaluated.
    """
    digest = content_hash(prefix)
    found = []
    for path in _evaluation_files(folder):
        try:
            evaluation = _check(_read_json(path), repr(str(path)))
        except (ConfigError, OSError, ValueError):
            continue
        if evaluation.get("prefix_hash") == digest:
            found.append(evaluation)
    return found


def _evaluation_files(folder: Path) -> Iterator[Path]:
    try:
        inner = sorted(itertools.islice((path for path in folder.iterdir() if path.is_dir()), _MOST_FOLDERS))
        yield from (path for path in (one / _EVALUATION for one in [folder, *inner]) if path.is_file())
    except OSError:
        return


def _read(path: Path, prefix: Prefix | None) -> list[dict[str, Any]]:
    hint = "give the folder that `prefixtune evaluate --output` wrote."
    if path.is_dir() and not (path / _EVALUATION).is_file() and prefix is not None:
        found = find_evaluations(path, prefix)
        if not found:
            raise ConfigError(f"{str(path)!r} holds no scores of this prefix.", hint=hint)
        return found
    path = path / _EVALUATION if path.is_dir() else path
    try:
        return [_check(_read_json(path), repr(str(path)))]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} holds no scores: {error}.", hint=hint) from error


def _read_json(path: Path) -> Any:
    """A file's content.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too long, too deep or no JSON.
    """
    with open(path, encoding="utf-8") as handle:
        text = handle.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES:,} characters")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def _check(evaluation: Any, what: str) -> dict[str, Any]:
    """Check that it holds scores, and what they were measured on.

    Raises:
        ConfigError: It does not.
    """
    try:
        if evaluation["kind"] != "evaluation" or not isinstance(evaluation["scores"], Mapping):
            raise ValueError("it is not an evaluation")
        facts = {name: evaluation[name] for name in _FACTS}
        facts["num_examples"] = int(facts["num_examples"])
        scores = {str(name): _check_score(score) for name, score in evaluation["scores"].items()}
    except (LookupError, ArithmeticError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{what} holds no scores: {short_repr(str(error))}.",
            hint="give the folder that `prefixtune evaluate --output` wrote.",
        ) from error
    return {**evaluation, **facts, "scores": scores}


def _check_score(score: Any) -> dict[str, Any]:
    interval = score.get("interval")
    if interval is not None:
        low, high = interval
        interval = [float(low), float(high)]
    figures = {"score": float(score["score"]), "implementation": str(score["implementation"]), "interval": interval}
    return {**score, **figures}
