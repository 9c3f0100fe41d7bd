"""The configuration of `prefixtune distill`: what is learned, and from whom; the rest is that of a training run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from prefixtune.training.config import TrainConfig
from prefixtune.utils.config import CommaList, option_group

QuestionKind = Literal["fact", "paraphrase", "list", "summary", "continuation"]
"""What a question that is made from a document asks for."""
KINDS: tuple[QuestionKind, ...] = ("fact", "paraphrase", "list", "summary", "continuation")
SELF = "self"
"""In place of a file of questions: they are made from the document."""

_teaching, _prefix, _training = option_group("teaching"), option_group("prefix"), option_group("training")
_output = option_group("output")


class DistillConfig(TrainConfig):
    """What is put into a prefix, and how it is trained.

    Raises:
        ConfigError: One or more values are not allowed; all faults are listed at once.
    """

    hint: ClassVar[str] = "`prefixtune distill --help` explains every option."
    file_name: ClassVar[str] = "distill.toml"
    unused: ClassVar[frozenset[str]] = frozenset(
        {"method", "method_size", "train", "dev", "dev_limit", "patience", "classifier", "label_words", "shard"}
        | {"init_examples", "hold_out", "chat_template", "system", "epochs"}
    )
    """Fields of `TrainConfig` that mean nothing here."""

    document: str = _teaching("", description="text to remember: a file, or a folder with a file for each memory")
    questions: str = _teaching(
        "",
        description="of the document: a file (or folder) with question and perhaps answer; or self: made by the model",
    )
    prompt: str = _teaching("", description="file with a long system prompt, to be replaced by the prefix")
    teacher: str = _teaching(
        "", description="a run, prefix, LoRA folder or model; empty: the backbone with the document or prompt in view"
    )
    data: str = _teaching(
        "", description="inputs of a prompt or teacher, read as --task, --source and --target say; targets may lack"
    )
    test: str = _teaching("", description="held-out questions or inputs for the report, in the form of the others")
    ask: Literal["auto", "plain", "chat"] = _teaching(
        "auto",
        description="text around a question: plain, the backbone's chat template, or auto: what suits the teacher",
    )
    num_questions: int = _teaching(256, ge=5, le=20_000, description="with --questions self: questions to make")
    kinds: CommaList[QuestionKind] = _teaching(
        KINDS, min_length=1, description="with --questions self: what the questions ask for, in equal shares"
    )
    chunk_length: int = _teaching(0, ge=0, description="tokens of a document in view at once; 0: as many as fit")
    answer_length: int = _teaching(64, ge=1, le=4096, description="most tokens of an answer that the teacher writes")

    prefix_length: int = _prefix(64, ge=0, description="P, the positions of the memory; 0: those of init_prefix")
    initialization: Literal["words", "text", "random", "prefix"] = _prefix(
        "text",
        description="text: the document's own keys and values, compacted to P; words (of init_text); random; prefix",
    )
    max_steps: int = _training(150, ge=0, description="optimizer steps; 0: the start alone, in seconds")
    output: str = _output("runs/memory", description="folder of the run; of several documents: one folder in it each")
    eval_every: int = _output(100, ge=0, description="store the prefix every N steps; 0: only at the end")

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Also: what has to be learned, and what goes with it."""
        yield from super().conflicts()
        ignored = {"limit"} if self.questions == SELF else {"num_questions", "kinds"}
        ignored |= {"init_text"} if self.initialization == "text" and self.subject != "teacher" else set()
        where = f" with questions {self.questions!r} and initialization {self.initialization!r}"
        for name in sorted((self.unused | ignored) & self.model_fields_set):
            if getattr(self, name) != self.default(name):
                yield (name,), f"{name} is {getattr(self, name)!r}, but is not used here{where * (name in ignored)}"
        if self.document and self.prompt:
            yield ("document", "prompt"), "document and prompt are both given, but one prefix learns one of them"
        if not (self.document or self.prompt or self.teacher):
            yield ("document", "prompt", "teacher"), "there is nothing to learn: document, prompt and teacher are empty"
        if self.document and not self.questions:
            yield ("document", "questions"), "document is given, but no questions (a file, or self)"
        name, partner = ("data", "prompt or teacher") if self.document else ("questions", "document")
        if getattr(self, name):
            yield (name, "document"), f"{name} is {getattr(self, name)!r}, which goes with {partner}"
        if not self.document and (self.prompt or self.teacher) and not self.data:
            yield ("data", "prompt", "teacher"), "data is empty, but a prompt or a teacher needs inputs to answer"
        if self.prefix_length == 0 and self.initialization == "text":
            message = "prefix_length is 0, but must be at least 1: a memory is to be shorter than its text"
            yield ("prefix_length", "initialization"), message
        if "paraphrase" in self.kinds and "fact" not in self.kinds:
            yield ("kinds",), "kinds has paraphrase without fact, whose questions it asks in other words"

    @property
    def subject(self) -> Literal["document", "prompt", "teacher"]:
        """What is put into the prefix."""
        return "document" if self.document else "prompt" if self.prompt else "teacher"

    @property
    def training(self) -> TrainConfig:
        """The training run of each memory, but for its folder, the text that it starts from, and its formats."""
        values = {name: getattr(self, name) for name in TrainConfig.model_fields if name not in self.unused}
        # The examples are made: each is a question with an answer, whatever the rows were.
        return TrainConfig(**{**values, "limit": 0, "form": "", "epochs": 1.0 if self.max_steps else 0.0})
