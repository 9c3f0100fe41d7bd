"""Prefixes on the Hugging Face hub: find a file, here or there; and the model card that is uploaded with one.

`hub:OWNER/NAME` is downloaded; a name without `hub:` is a path on this machine. Only `prefix_file`, and
`Prefix.push_to_hub`, use the network. The card is made from the prefix's header and, where it was evaluated, its
scores, in the hub's model-index format.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from prefixtune import __version__
from prefixtune.errors import CheckpointError, ConfigError, PrefixError, describe_value, short_repr
from prefixtune.prefix.header import backbone_origin
from prefixtune.results import EVALUATION_FILE, Evaluation

if TYPE_CHECKING:
    from prefixtune.prefix.prefix import Prefix

FILE = "prefix.safetensors"
"""A prefix's name in a repository."""

HUB = "hub:"
"""Marks the name of a repository that is to be downloaded."""
LIBRARY: dict[str, Any] = {"library_name": "prefixtune", "library_version": __version__}
"""What the hub is told of who asks."""
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
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
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


# --- files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """While the block runs, errors of the hub become one line.

    Raises:
        ConfigError: The hub's library refuses a name or a card, or is switched off.
        PrefixError: The hub cannot be reached, or refuses.
    """
    from huggingface_hub import constants

    try:
        yield
    except Exception as error:  # the library's, and its HTTP client's, of many types
        is_config = isinstance(error, ValueError) or constants.HF_HUB_OFFLINE
        raise (ConfigError if is_config else PrefixError)(
            f"{what}: {textwrap.shorten(str(error), 300) or type(error).__name__}",
            hint="check the names, the connection and HF_HUB_OFFLINE; private repositories need `hf auth login`.",
        ) from error


def prefix_file(
    path: str | os.PathLike[str], *, bare: bool = False, revision: str | None = None, token: str | None = None
) -> Path:
    """The file that a path, a run's folder or `hub:OWNER/NAME[@REVISION]` names; from the hub it is downloaded.

    Args:
        path: What names it.
        bare: As in transformers, `OWNER/NAME` is a repository, too, where nothing on this machine has that name.
        revision: Of a repository: a branch, a tag or a commit; None: the main branch.
        token: Of the hub; None: the one that `hf auth login` stored.

    Raises:
        CheckpointError: There is nothing of that name, or it is a folder without a prefix.
        ConfigError: `path` is not a path, or a revision comes with a path.
        PrefixError: The hub cannot be reached, or has no such file.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        hint = "give a path, hub:OWNER/NAME or a Prefix; or a list of these, one per text."
        raise ConfigError(f"the prefix is {describe_value(path)}.", hint=hint)
    name = os.fspath(path)
    if bare and isinstance(path, str) and REPOSITORY.fullmatch(name) and not os.path.lexists(name):
        name = f"{HUB}{name}"
    if name.startswith(HUB):
        repository, _, stated = name.removeprefix(HUB).partition("@")
        if not REPOSITORY.fullmatch(repository):
            raise ConfigError(f"{name!r} is not the name of a repository.", hint="write hub:OWNER/NAME.")
        from huggingface_hub import hf_hub_download

        with hub_errors(f"cannot download {FILE!r} of {repository!r}"):
            wanted = revision or stated or None
            return Path(hf_hub_download(repository, FILE, revision=wanted, token=token, **LIBRARY))
    if revision is not None:
        what = f"revision is {revision!r}, but {name!r} is no repository of the hub."
        raise ConfigError(what, hint="leave it out, or write OWNER/NAME.")
    file = Path(path) / FILE if os.path.isdir(path) else Path(path)
    if not os.path.isfile(file):
        raise CheckpointError(
            f"there is no file {str(file)!r} that may be read.",
            hint="give a file, or the --output folder of a finished training; hub:OWNER/NAME is downloaded.",
        )
    return file


# --- the card --------------------------------------------------------------------------------------------------------


def make_card(prefix: Prefix, repo_id: str, evaluation: Any = None) -> str:
    """The model card: metadata that the hub reads, and a page for people.

    Args:
        prefix: With its header.
        repo_id: `OWNER/NAME`, for the examples; a folder's name, if it is on this machine.
        evaluation: What `read_evaluations` takes; None: it was not evaluated.

    Raises:
        ConfigError: The evaluation holds no scores.
    """
    from huggingface_hub import EvalResult, ModelCardData

    header = prefix.header
    evaluations = read_evaluations(evaluation, str(header.get("task") or ""))
    task, training, name = str(header.get("task") or ""), header.get("training") or {}, repo_id.rpartition("/")[2]
    tag = _PIPELINE_TAGS.get(str((header.get("labels") or {}).get("kind")), "text-generation")
    origin = backbone_origin(header).name
    # A folder on somebody's machine has no name on the hub.
    base_model = HUB_NAMES.get(origin, origin if REPOSITORY.fullmatch(origin) and not os.path.exists(origin) else "")
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
        "sites": ", ".join(f"{site} (P = {length})" for site, length in prefix.lengths.items()),
        "parameters": f"{prefix.num_parameters:,}",
        **{key.replace("_", " "): training.get(key) for key in _TRAINING_FACTS},
    }
    page = _PAGE.format(
        name=_cell(name),
        model=_cell(model),
        facts="\n".join(
            f"| {_cell(key)} | {_cell(value)} |" for key, value in facts.items() if value not in (None, "")
        ),
        file=shlex.quote(f"hub:{repo_id}" if "/" in repo_id else repo_id),
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
            given = json.loads((path / EVALUATION_FILE if path.is_dir() else path).read_text(encoding="utf-8"))
        found = Evaluation.model_validate(given)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ConfigError(
            f"the evaluation holds no scores: {short_repr(reason)}.",
            hint="give what pt.evaluate returned, or the folder that `prefixtune evaluate --output` wrote.",
        ) from error
    return [found.with_facts(task=found.task or task or "generation", data=found.data or "examples")]
