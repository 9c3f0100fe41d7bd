"""`prefixtune distill`: put a document, a long prompt or a teacher into a prefix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune.cli.options import RunOptions, command
from prefixtune.cli.show import Table
from prefixtune.distillation.config import DistillConfig
from prefixtune.pages.format import fixed
from prefixtune.utils.console import format_seconds

if TYPE_CHECKING:
    from prefixtune.distillation.distill import DistillResult


class DistillOptions(RunOptions, DistillConfig):
    """The options of `prefixtune distill`."""


@command
def distill(options: DistillOptions) -> None:
    """Put a document, a long prompt or a teacher into a prefix.

    A document is learned from questions about it: with answers, without (the model answers with the document in view),
    or made by the model itself. A prompt is learned from inputs that the model answers with the prompt in view, a
    teacher from what it would write.

    For example:
        prefixtune distill --document manual.txt --questions questions.jsonl --test held-out.jsonl
        prefixtune distill --document manuals/ --questions self --prefix-length 32 --output runs/manuals
        prefixtune distill --prompt system.txt --data inputs.jsonl --prefix-length 32
        prefixtune distill --teacher runs/lora --task e2e --data trainset.csv
        prefixtune distill --resume --output runs/memory
    """
    config = options.part(DistillConfig)
    from prefixtune.distillation.distill import distill as run

    results = run(config, **options.reporting)
    for result in results:
        options.show({"event": "result", **result.report}, *_parts(result))
    if results:
        options.console.info(f'try it: prefixtune generate --prefix {results[0].path} "..."')


def _parts(result: DistillResult) -> Iterator[Table | str]:
    """What a memory knows, for people."""
    figures, held_out, subject = result.report, result.report["held_out"], result.report["subject"]
    titles = {"bare": "bare model", "in_view": f"{subject} in view", "teacher": "teacher", "memory": "memory"}
    read = {title: held_out[name] for name, title in titles.items() if name in held_out}
    columns = {"loss": "loss per token", "exact": "exact answers", "kl": "KL per token"}
    used = [key for key in columns if any(key in one for one in read.values())]
    rows = [[title, *(_figure(one, key, held_out["questions"]) for key in used)] for title, one in read.items()]
    if rows:
        names = ["held-out questions", *(columns[key] for key in used)]
        yield Table(figures.get("name", ""), names, rows)
    if held_out["also_trained_on"]:
        asked = held_out["questions"] or held_out["teacher_answers"]
        yield f"{held_out['also_trained_on']} of {asked} held-out questions are also trained on, in the same words"
    yield f"teacher: {figures['teacher']}; labels: {figures['labels']} ({figures['questions']:,} questions)"
    if subject == "teacher":
        yield f"asked as: {figures['prompt_format']!r}"
    for name, share in figures.get("recovered", {}).items():
        what = "KL from the teacher" if name == "kl" else f"loss between bare and {subject} in view"
        yield f"recovered of the {what}: {share:.0%}"
    if "general" in figures:
        general = figures["general"]
        kept = f"{general['unchanged']} of {general['requests']} texts unchanged"
        yield f"requests about other things: {kept}, KL from the bare model {general['kl']:.3f} per token"
    text = ""
    if "text_bytes" in figures:
        text = f"; the {subject}'s own: {figures['text_positions']:,} positions, {figures['text_bytes']:,} bytes"
    yield f"{Path(figures['memory'])}: {figures['positions']} positions, {figures['bytes']:,} bytes{text}"
    yield "time: " + ", ".join(f"{name} {format_seconds(value)}" for name, value in figures["seconds"].items())


def _figure(reading: Mapping[str, Any], key: str, questions: int) -> str | None:
    if key not in reading:
        return None
    return f"{reading[key]} of {questions}" if key == "exact" else fixed(reading[key], 3)
