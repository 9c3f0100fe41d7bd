"""Prefixes on the Hugging Face hub: `push` uploads a prefix with a model card, `pull` brings one here.

A repository holds `prefix.safetensors` and `README.md`: a card made from the prefix's header and, where it was
evaluated, the scores in the hub's model-index form. Nothing goes over the network but on these two calls, and where a
prefix is given as `hub:OWNER/NAME` (see `prefixtune.prefix.hub`). Knows nothing of backbones.
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


_LOCAL = ("/", ".", "~")


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
    """Upload a prefix with its card; the repository is made where there is none.

    Args:
        path: The artifact, or the folder of its run.
        repo_id: `OWNER/NAME`.
        evaluation: `evaluation.json` of `prefixtune evaluate`, or its folder: its scores go into the card.
        private: A new repository can be seen by its owner alone.
        revision: A branch; None: the main one.
        token: Of the hub; None: the one that `hf auth login` stored.
        message: Of the commit; empty: one that names the file.

    Returns:
        Where the upload can be looked at.

    Raises:
        CheckpointError: The file is no prefix.
        ConfigError: The evaluation cannot be read, or the name is none.
        PrefixError: The hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    # Wholly read and checked before any of it leaves.
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
    """Download a prefix, check it, and put it in a file.

    Args:
        repo_id: `OWNER/NAME`.
        output: Ends with `.safetensors`. A file that is there is replaced only by a prefix that is good.
        revision: A branch, a tag or a commit; None: the main branch.
        token: Of the hub; None: the one that `hf auth login` stored.
        name: The file in the repository.

    Raises:
        CheckpointError: What came is no prefix, or the output has another ending.
        PrefixError: The hub cannot be reached, or has no such file.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise CheckpointError(f"{str(output)!r} does not end with .safetensors.", hint="name such a file.")
    check_writable(output)
    found = download(repo_id, name, revision=revision, token=token)
    prefix = load_prefix(found)
    with atomic_path(output) as temporary:
        shutil.copyfile(found, temporary)
    return prefix


def make_card(prefix: Prefix, repo_id: str, evaluation: Mapping[str, Any] | None = None) -> str:
    """The model card: front matter that the hub reads, and a page for people.

    Args:
        prefix: With its header.
        repo_id: `OWNER/NAME`, for the examples.
        evaluation: What `prefixtune evaluate` wrote; None: it was not evaluated.
    """
    from huggingface_hub import EvalResult, ModelCardData

    header = prefix.header
    origin = header.get("backbone") if isinstance(header.get("backbone"), Mapping) else {}
    base, task = str((origin or {}).get("name", "")), str(header.get("task", ""))
    # A folder of somebody's machine is nobody else's model.
    on_hub = base.count("/") <= 1 and not base.startswith(_LOCAL) and "\\" not in base
    results = None
    if evaluation is not None:
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=str(evaluation["task"]),
                dataset_name=str(evaluation["data"]),
                dataset_split=str(evaluation["split"]),
                metric_type=name,
                metric_value=round(float(found["score"]), 4),
                metric_name=f"{name} ({found['implementation']})",
            )
            for name, found in evaluation["scores"].items()
        ]
    data = ModelCardData(
        base_model=base if on_hub and base else None,
        library_name="prefixtune",
        license=str(header["license"]) if header.get("license") else None,
        pipeline_tag="text-generation",
        tags=["prefix-tuning", "prefixtune", *([task] if task else [])],
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_page(prefix, repo_id, base if on_hub else '', task, evaluation)}"


def _page(prefix: Prefix, repo_id: str, base: str, task: str, evaluation: Mapping[str, Any] | None) -> str:
    name = repo_id.rpartition("/")[2]
    sites = ", ".join(f"{site} (P = {prefix.length(site)})" for site in prefix.sites)
    model = base or "the model that its header names"
    stored = prefix.header.get("training")
    training = stored if isinstance(stored, Mapping) else {}
    facts = {
        "model": model,
        "task": task or "not told",
        "sites": sites,
        "parameters": f"{prefix.num_parameters:,}",
        **{
            key.replace("_", " "): training[key]
            for key in ("steps", "num_targets", "learning_rate", "seed")
            if key in training
        },
    }
    lines = [
        f"# {name}",
        "",
        f"A prefix for {model}: keys and values of virtual tokens, put in front of the text's own at every layer "
        "(Li & Liang 2021). The model itself stays as it is.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in facts.items()),
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
            *(f"| {metric} | {_score(found)} |" for metric, found in evaluation["scores"].items()),
        ]
    return "\n".join(lines) + "\n"


def _score(found: Mapping[str, Any]) -> str:
    interval = found.get("interval")
    between = f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""
    return f"{found['score']:.4g} | {between} | {found['implementation']}"


def read_evaluation(given: str | Path | None) -> dict[str, Any] | None:
    """What `prefixtune evaluate` wrote, by its file or folder; None where none is given.

    Raises:
        ConfigError: It cannot be read, or holds no scores.
    """
    if given is None:
        return None
    path = Path(given) / "evaluation.json" if Path(given).is_dir() else Path(given)
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        if read["kind"] != "evaluation" or not isinstance(read["scores"], dict):
            raise ValueError("it is no evaluation")
        for found in read["scores"].values():
            float(found["score"])
            str(found["implementation"])
        {name: read[name] for name in ("task", "data", "split", "num_examples")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{str(path)!r} holds no scores: {error}.",
            hint="give the folder that `prefixtune evaluate --output` wrote.",
        ) from error
    evaluation: dict[str, Any] = read
    return evaluation
