"""Prefixes on the Hugging Face hub: `push` uploads a prefix with a model card, `pull` downloads one.

A repository holds `prefix.safetensors` and `README.md`: a card made from the prefix's header and, where it was
evaluated, the scores in the hub's model-index format. Only these two functions use the network, and names such as
`hub:OWNER/NAME` (see `prefixtune.prefix.hub`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefixtune import __version__
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.errors import CheckpointError, ConfigError
from prefixtune.prefix.hub import FILE, download, hub_errors, prefix_file
from prefixtune.prefix.prefix import Prefix
from prefixtune.utils.files import atomic_path
from prefixtune.utils.writable import check_writable

__all__ = ["FILE", "make_card", "pull", "push", "read_evaluation"]


_LOCAL_PATH_STARTS = ("/", ".", "~")
_TRAINING_FACTS = ("steps", "num_targets", "learning_rate", "seed")
"""What the card repeats of a header's `training`."""


def push(
    path: str | Path,
    repo_id: str,
    *,
    evaluation: str | Path | None = None,
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
    message: str = "",
) -> str:
    """Upload a prefix with its card; creates the repository where it does not exist.

    Args:
        path: The artifact, or the folder of its run.
        repo_id: `OWNER/NAME`.
        evaluation: `evaluation.json` of `prefixtune evaluate`, or its folder: its scores go into the card.
        private: Only its owner can see a new repository.
        revision: A branch; None: the main branch.
        token: The hub's token; None: the one that `hf auth login` stored.
        message: The commit message; empty: one with the file's name.

    Returns:
        The address of the upload.

    Raises:
        CheckpointError: The file is not a prefix.
        ConfigError: The evaluation cannot be read, or the repository's name is not valid.
        PrefixError: The hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    # Read and checked as a whole before anything is sent.
    path = prefix_file(path)
    prefix = load_prefix(path)
    card = make_card(prefix, repo_id, read_evaluation(evaluation))
    with hub_errors(f"cannot upload to {repo_id!r}"):
        api = HfApi(token=token, library_name="prefixtune", library_version=__version__)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [
                CommitOperationAdd(FILE, str(path)),
                CommitOperationAdd("README.md", card.encode()),
            ],
            commit_message=message or f"Upload {Path(path).name}",
            revision=revision,
        )
    return str(commit.commit_url)


def pull(
    repo_id: str, output: str | Path, *, revision: str | None = None, token: str | None = None, name: str = FILE
) -> Prefix:
    """Download a prefix, check it, and store it in a file.

    Args:
        repo_id: `OWNER/NAME`.
        output: Ends with `.safetensors`. An existing file is replaced only by a valid prefix.
        revision: A branch, a tag or a commit; None: the main branch.
        token: The hub's token; None: the one that `hf auth login` stored.
        name: The file in the repository.

    Raises:
        CheckpointError: The download is not a prefix, or the output has another ending.
        PrefixError: The hub cannot be reached, or has no such file.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise CheckpointError(f"{str(output)!r} does not end with .safetensors.", hint="choose such a name.")
    check_writable(output)
    downloaded = download(repo_id, name, revision=revision, token=token)
    prefix = load_prefix(downloaded)
    with atomic_path(output) as temporary:
        shutil.copyfile(downloaded, temporary)
    return prefix


def make_card(prefix: Prefix, repo_id: str, evaluation: Mapping[str, Any] | None = None) -> str:
    """The model card: metadata that the hub reads, and a page for people.

    Args:
        prefix: With its header.
        repo_id: `OWNER/NAME`, for the examples.
        evaluation: What `prefixtune evaluate` wrote; None: it was not evaluated.
    """
    from huggingface_hub import ModelCardData

    header, base_model = prefix.header, _find_base_model(prefix)
    task = str(header.get("task", ""))
    results = None if evaluation is None else _make_results(evaluation)
    data = ModelCardData(
        base_model=base_model or None,
        library_name="prefixtune",
        license=str(header["license"]) if header.get("license") else None,
        pipeline_tag="text-generation",
        tags=["prefix-tuning", "prefixtune", *([task] if task else [])],
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_make_page(prefix, repo_id, base_model, task, evaluation)}"


def _find_base_model(prefix: Prefix) -> str:
    """The backbone's name where it may be one of the hub; a folder on somebody's machine is nobody else's model."""
    origin = prefix.header.get("backbone")
    name = str(origin.get("name", "")) if isinstance(origin, Mapping) else ""
    is_on_hub = name.count("/") <= 1 and not name.startswith(_LOCAL_PATH_STARTS) and "\\" not in name
    return name if is_on_hub else ""


def _make_results(evaluation: Mapping[str, Any]) -> list[Any]:
    """The scores in the hub's model-index format."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=str(evaluation["task"]),
            dataset_name=str(evaluation["data"]),
            dataset_split=str(evaluation["split"]),
            metric_type=metric,
            metric_value=round(float(score["score"]), 4),
            metric_name=f"{metric} ({score['implementation']})",
        )
        for metric, score in evaluation["scores"].items()
    ]


def _make_page(prefix: Prefix, repo_id: str, base_model: str, task: str, evaluation: Mapping[str, Any] | None) -> str:
    name = repo_id.rpartition("/")[2]
    model = base_model or "the model that its header names"
    lines = [
        f"# {name}",
        "",
        f"A prefix for {model}: keys and values of virtual tokens, put in front of the text's own at every layer "
        "(Li & Liang 2021). The model itself stays unchanged.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _list_facts(prefix, model, task).items()),
        "",
        "```bash",
        "pip install prefixtune",
        f"prefixtune pull {repo_id} {name}.safetensors",
        f'prefixtune generate --prefix {name}.safetensors "..."',
        "```",
    ]
    if evaluation is not None:
        lines += [
            "",
            f"## Scores on {evaluation['data']}, {evaluation['split']} ({evaluation['num_examples']:,} examples)",
            "",
            "| metric | score | 95 % | by |",
            "|---|---|---|---|",
            *(f"| {metric} | {_format_score(score)} |" for metric, score in evaluation["scores"].items()),
        ]
    return "\n".join(lines) + "\n"


def _list_facts(prefix: Prefix, model: str, task: str) -> dict[str, Any]:
    training = prefix.header.get("training")
    stored = training if isinstance(training, Mapping) else {}
    return {
        "model": model,
        "task": task or "unknown",
        "sites": ", ".join(f"{site} (P = {prefix.length(site)})" for site in prefix.sites),
        "parameters": f"{prefix.num_parameters:,}",
        **{key.replace("_", " "): stored[key] for key in _TRAINING_FACTS if key in stored},
    }


def _format_score(score: Mapping[str, Any]) -> str:
    interval = score.get("interval")
    between = f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""
    return f"{score['score']:.4g} | {between} | {score['implementation']}"


def read_evaluation(path: str | Path | None) -> dict[str, Any] | None:
    """What `prefixtune evaluate` wrote, from its file or folder; None: nothing.

    Raises:
        ConfigError: It cannot be read, or holds no scores.
    """
    if path is None:
        return None
    path = Path(path) / "evaluation.json" if Path(path).is_dir() else Path(path)
    try:
        evaluation: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if evaluation["kind"] != "evaluation" or not isinstance(evaluation["scores"], dict):
            raise ValueError("it is not an evaluation")
        for score in evaluation["scores"].values():
            float(score["score"])
            str(score["implementation"])
        {name: evaluation[name] for name in ("task", "data", "split", "num_examples")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{str(path)!r} holds no scores: {error}.",
            hint="give the folder that `prefixtune evaluate --output` wrote.",
        ) from error
    return evaluation
