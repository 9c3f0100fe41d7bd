"""`/v1/files/{id}/preview`: what training would read of a file, before a job: examples, tokens, what would be cut.

The examples are a sample that was kept when the file was checked, so that the file is not read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi.concurrency import run_in_threadpool

from prefixtune.data.examples import Example
from prefixtune.data.registry import TASKS
from prefixtune.errors import PrefixError
from prefixtune.jobs.files import StoredFile
from prefixtune.jobs.job import new_job_id
from prefixtune.jobs.request import JobRequest, make_job
from prefixtune.server.api.endpoint import RequestContext, TrainingContext, key_router
from prefixtune.server.api.files import find_file
from prefixtune.server.api.prompting import tokenize
from prefixtune.training.config import TrainConfig

if TYPE_CHECKING:
    from prefixtune.evaluation.data_report import Measures

__all__ = ["router"]


router = key_router()
_MOST_SHOWN, _MOST_MESSAGES, _MOST_CHARS = 24, 50, 2_000
_DOCUMENT_CHARS = 100_000
"""Characters of a document that are tokenized; its other tokens are estimated."""
_MOST_WRITTEN = 50_000
"""Messages that a chat template writes while a sample is measured, for each answer all before it: some two seconds."""
_NOTHING: dict[str, Any] = {"examples": [], "sampled": 0, "parts": [], "lengths": None, "cuts": ""}


@router.get("/v1/files/{file_id}/preview")
async def preview_file(file_id: str, context: TrainingContext) -> dict[str, Any]:
    """What training would read of a file.

    Examples, one of them as the model reads it, and the tokens of a sample.
    """
    stored = await run_in_threadpool(find_file, context, file_id)
    preview = _preview_text if stored.purpose == "document" else _preview_rows
    return {"id": stored.id, "object": "file.preview", **_NOTHING, **await preview(context, stored)}


async def _preview_text(context: RequestContext, stored: StoredFile) -> dict[str, Any]:
    """The beginning of a document, and how many tokens it has."""
    if stored.facts is None:
        return {}

    def read() -> str:
        with context.training.files.open(stored.owner, stored.id) as file:
            return file.read(4 * _DOCUMENT_CHARS).decode("utf-8", "ignore")[:_DOCUMENT_CHARS]

    text = await run_in_threadpool(read)
    tokens = len(await tokenize(context, lambda: context.state.backbone.encode(text)))
    total = round(tokens * stored.facts.characters / max(len(text), 1))
    about = "about " if len(text) < stored.facts.characters else ""
    return {"examples": [{"source": text[:_MOST_CHARS]}], "cuts": f"It has {about}{total:,} tokens."}


async def _preview_rows(context: RequestContext, stored: StoredFile) -> dict[str, Any]:
    sample = await run_in_threadpool(context.training.files.sample, stored.owner, stored.id)
    count = min(len(sample), _MOST_SHOWN)
    shown = [_shown(sample[index * len(sample) // count]) for index in range(count)]
    if not any(example.targets for example in sample):
        return {"examples": shown}
    # Conversations of a sample may have hundreds of thousands of messages.
    measured = await run_in_threadpool(_measurable, sample)
    if not measured:
        return {"examples": shown, "cuts": "The conversations are too long to be measured here."}
    try:
        config = await run_in_threadpool(_usual_config, context, stored)
        measures = await tokenize(context, lambda: _measure(config, context, measured, stored))
    except PrefixError as error:
        # Such as labels of which the sample has only one.
        return {"examples": shown, "cuts": error.message}
    return {"examples": shown, **_measured(measures, len(measured))}


def _measurable(sample: Sequence[Example]) -> list[Example]:
    """The examples that are measured in little time: of very long conversations a few, or none."""
    measurable: list[Example] = []
    written = 0
    for example in sample:
        answers = sum(message.role == "assistant" for message in example.messages) + len(example.targets)
        # Half of all messages on average, and each answer with and without itself.
        cost = answers * len(example.messages)
        if written + cost <= _MOST_WRITTEN:
            measurable.append(example)
            written += cost
    return measurable


def _usual_config(context: RequestContext, stored: StoredFile) -> TrainConfig:
    """The configuration of a job with this file and no options.

    Raises:
        RequestError: There is none: the file has no targets, or several forms.
    """
    # Loads the modules that measure, outside the event loop.
    import prefixtune.evaluation.data_report  # noqa: F401

    request = JobRequest(model=context.state.config.model_id, training_file=stored)
    max_steps = context.caller.rules.max_steps
    job = make_job(request, job_id=new_job_id(), owner=context.caller.name, created=0, max_steps=max_steps)
    return TrainConfig(**{**job.config, "train": "data", "output": "run", "backbone": context.state.backbone.name})


def _measure(config: TrainConfig, context: RequestContext, sample: Sequence[Example], stored: StoredFile) -> Measures:
    from prefixtune.backbone.load import without_limits
    from prefixtune.evaluation.data_report import measure_examples

    assert stored.facts is not None
    backbone, kind = context.state.backbone, TASKS[stored.facts.task].kind
    sizes = {"max_tokenized": len(sample), "num_examples": stored.facts.examples}
    return measure_examples(config, sample, kind, backbone, without_limits(backbone), **sizes)


def _measured(measures: Measures, sampled: int) -> dict[str, Any]:
    whole, limit = measures.lengths[-1], measures.limit
    return {
        "sampled": sampled,
        "parts": [{"text": part.text[:_MOST_CHARS], "trained": part.is_label} for part in measures.example],
        "lengths": {
            "unit": "tokens",
            "counts": [count for _, _, count in whole.bins],
            "edges": [first for first, _, _ in whole.bins] + [whole.bins[-1][1] + 1],
            "median": whole.median,
            "longest": whole.longest,
        },
        "cuts": _cuts(limit.positions, limit.cut, limit.refused, sampled) if limit.positions else "",
        "steps_per_epoch": measures.steps,
    }


def _cuts(positions: int, cut: int, refused: int, sampled: int) -> str:
    """What does not fit the model, in a sentence."""
    if refused:
        return f"{refused:,} of {sampled:,} examples do not fit the model's {positions:,} tokens."
    if cut:
        return f"{cut:,} of {sampled:,} examples are cut to the model's {positions:,} tokens."
    return f"All fit the model's {positions:,} tokens."


def _shown(example: Example) -> dict[str, Any]:
    """An example for people, long texts and conversations shortened."""
    targets = [target[:_MOST_CHARS] for target in example.targets[:3]]
    if not example.messages:
        return {"source": example.source[:_MOST_CHARS], "targets": targets}
    turns: list[tuple[str, str]] = [*example.messages, *(("assistant", target) for target in targets[:1])]
    return {
        "messages": [
            {"role": role, "content": content[:_MOST_CHARS], "trained": role == "assistant"}
            for role, content in turns[:_MOST_MESSAGES]
        ]
    }
