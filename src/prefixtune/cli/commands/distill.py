"""`prefixtune distill`: put a document, a long prompt or a teacher into a prefix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from prefixtune.cli.options import ConfigOptions, OutputOptions, command, json_option
from prefixtune.cli.show import Table, print_event, show
from prefixtune.distillation.config import DistillConfig
from prefixtune.pages.format import fixed
from prefixtune.utils.config import Layer
from prefixtune.utils.console import Console, format_seconds

if TYPE_CHECKING:
    from prefixtune.distillation.distill import DistillResult

__all__ = ["distill"]


class DistillOptions(ConfigOptions, OutputOptions, DistillConfig):
    """The options of `prefixtune distill`."""

    resume: bool = Field(False, description="go on with the distillation in --output, from where it was stopped")
    as_json: bool = json_option("every event of the training and the report, one a line,")

    @classmethod
    def layers(cls, given: Mapping[str, Any]) -> Iterable[Layer]:
        """The file of --config, or the configuration of the distillation to resume."""
        if not given.get("resume") or "config" in given:
            return list(super().layers(given))
        from prefixtune.distillation.distill import stored_distillation

        path = stored_distillation(given.get("output", cls.default("output")))
        return [Layer.from_file(path, DistillConfig.model_fields)]


@command
def distill(options: DistillOptions) -> int:
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

    console = Console(quiet=options.quiet)
    results = run(
        config,
        resume=options.resume,
        progress=not (options.quiet or options.as_json),
        on_event=print_event if options.as_json else None,
    )
    for result in results:
        show({"event": "result", **result.report}, *_parts(result), as_json=options.as_json)
    if not options.as_json and results:
        console.info(f'try it: prefixtune generate --prefix {results[0].path} "..."')
    return 0


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
        if name == "loss" and share > 1:
            yield f"the memory is better than the {subject} in view, which the model reads badly"
        else:
            what = "KL from the teacher" if name == "kl" else f"loss between bare and {subject} in view"
            yield f"recovered of the {what}: {share:.0%}"
    text = ""
    if "text_bytes" in figures:
        text = f"{figures['text_positions']:,} positions, {figures['text_bytes']:,} bytes"
        text = f"; the {subject}'s own keys and values: {text}"
    yield f"{Path(figures['memory'])}: {figures['positions']} positions, {figures['bytes']:,} bytes{text}"
    yield "time: " + ", ".join(f"{name} {format_seconds(value)}" for name, value in figures["seconds"].items())


def _figure(reading: Mapping[str, Any], key: str, questions: int) -> str | None:
    if key not in reading:
        return None
    return f"{reading[key]} of {questions}" if key == "exact" else fixed(reading[key], 3)
