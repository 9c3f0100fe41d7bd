"""Options of decoding, and the configuration made from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from prefixtune.cli.options import CommandOptions
from prefixtune.inference.config import GenerateConfig
from prefixtune.sampling.config import SamplingConfig
from prefixtune.utils.config import DTypeName, option_group
from prefixtune.utils.console import Console

__all__ = ["BackboneOptions", "DecodingOptions", "EngineOptions", "generate_config", "note_unused", "task_decoding"]

_backbone, _engine = option_group("backbone"), option_group("engine")


_ENGINES = {
    **dict.fromkeys(("device", "quantize", "adapter"), ("torch",)),
    **dict.fromkeys(("gguf", "threads"), ("llama.cpp",)),
    "dtype": ("torch", "vllm"),
    "vllm_python": ("vllm",),
}
"""Options that not all engines have."""


class BackboneOptions(CommandOptions):
    """The options of loading a backbone for prefixes."""

    backbone: str | None = _backbone(None, description="default: the one in the prefix's header")
    dtype: DTypeName = _backbone("auto", description="dtype of the frozen weights")
    device: str = _backbone("auto", description="cpu, cuda, cuda:0, mps or auto")
    quantize: Literal["", "int8", "int4"] = _backbone("", description="quantize the frozen weights (torchao)")
    adapter: str | None = _backbone(None, description="folder of a LoRA adapter (PEFT); default: the one of the prefix")
    allow_other_backbone: bool = _backbone(False, description="accept other weights of the same shapes")
    chat_template: str = _backbone(
        "", description="run the prefix's own chat template: a file with its text, or own: as its file has it"
    )


class EngineOptions(BackboneOptions):
    """The options of what computes."""

    engine: Literal["torch", "llama.cpp", "vllm"] = _engine(
        "torch", description="what computes: torch; llama.cpp, which needs the extra llama; or vLLM"
    )
    gguf: str = _engine(
        "",
        description="for llama.cpp: the backbone's weights, quantized or not; default: those of the embedded backbone",
        json_schema_extra={"metavar": "FILE"},
    )
    threads: int = _engine(
        0, ge=0, description="for llama.cpp: threads; 0: one per core; fewer are faster beside other programs"
    )

    vllm_python: str = _engine("", description="for vllm: the Python of the environment with vLLM; default: this one")

    @property
    def without_lacks(self) -> dict[str, Any]:
        """Decoding by default without what the engine lacks, whatever the task's settings are."""
        return {"torch": {}, "vllm": {"num_beams": 1}, "llama.cpp": {"num_beams": 1, "min_new_tokens": 0}}[self.engine]

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Also: options of one engine with another."""
        yield from super().conflicts()
        for name, engines in _ENGINES.items():
            if name in self.model_fields_set and self.engine not in engines:
                yield (name,), f"--{name.replace('_', '-')} is for --engine {' or '.join(engines)}"


class DecodingOptions(EngineOptions, GenerateConfig):
    """The options of decoding and of the backbone; those of decoding that are left out are the task's."""

    defaults_elsewhere: ClassVar[frozenset[str]] = frozenset(GenerateConfig.model_fields)

    print_config: bool = Field(False, description="print the final settings of decoding as TOML, and do nothing else")

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Those among options that were given; the others are checked together with the task's settings."""
        for names, message in super().conflicts():
            if self.model_fields_set.issuperset(names):
                yield names, message


def note_unused(console: Console, options: SamplingConfig, config: GenerateConfig) -> None:
    """Say which of the options that were given do nothing with the final settings."""
    names = type(options).model_fields
    for parts, is_used, needed in (
        (("top_k", "top_p", "min_p", "seed"), config.temperature > 0, "--temperature above 0, as nothing is sampled"),
        (("length_penalty",), config.num_beams > 1, "--num-beams above 1"),
    ):
        given = [f"--{name.replace('_', '-')}" for name in parts if name in names and name in options.model_fields_set]
        if given and not is_used:
            console.info(f"{' and '.join(given)} {'do' if len(given) > 1 else 'does'} nothing without {needed}")


def generate_config(
    options: DecodingOptions, headers: Sequence[Mapping[str, Any]], task: str | None = None
) -> GenerateConfig:
    """The decoding settings of the task, replaced by those of the options.

    Args:
        options: The options of the command.
        headers: Of the prefixes or the trained weights; the first one names the task, if `task` does not.
        task: The name of the task.

    Raises:
        ConfigError: A setting is wrong.
    """
    name = task or (headers[0].get("task") if headers else None)
    return task_decoding(name, headers, {**options.without_lacks, **options.given(GenerateConfig)})


def task_decoding(
    task: object, headers: Sequence[Mapping[str, Any]], given: Mapping[str, Any], *, least: int = 0
) -> GenerateConfig:
    """The decoding settings of a task, replaced by those that are given.

    Args:
        task: Its name; of something else, the defaults are used.
        headers: Of the prefixes or the trained weights: their longest target counts in records.
        given: Fields of `GenerateConfig`.
        least: Tokens of records, at least, and of what is no task; 0: as many as the defaults say.

    Raises:
        ConfigError: A setting is wrong.
    """
    from prefixtune.data import TASKS
    from prefixtune.prefix.text_format import read_text_format

    values: dict[str, Any] = {"max_new_tokens": least} if least else {}
    if isinstance(task, str) and task in TASKS:
        values |= TASKS[task].decoding
    if task == "records":
        # Texts have no targets.
        stored = [read_text_format(header) for header in headers if header.get("form") != "text"]
        longest = [form.longest_target for form in stored if form is not None]
        values["max_new_tokens"] = max(values["max_new_tokens"], least, *longest)
    if given.get("temperature", 0) > 0 and "num_beams" not in given:
        # --temperature asks for sampling, so the task's beam search is dropped.
        values.pop("num_beams", None)
    values |= given
    if "min_new_tokens" not in given:
        values["min_new_tokens"] = min(values.get("min_new_tokens", 0), values.get("max_new_tokens", 1_000_000))
    return GenerateConfig(**values)
