"""Options of decoding, and the configuration made from them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from prefixtune.cli.options import Conflicts, OutputOptions, option
from prefixtune.inference.config import ClassifyConfig, GenerateConfig
from prefixtune.utils.config import DTypeName

_backbone, _engine = functools.partial(option, group="backbone"), functools.partial(option, group="engine")

_ENGINES = {
    **dict.fromkeys(("device", "quantize", "adapter"), ("torch",)),
    **dict.fromkeys(("gguf", "threads"), ("llama.cpp",)),
    "dtype": ("torch", "vllm"),
    "vllm_python": ("vllm",),
}
"""Options that not all engines have."""


class BackboneOptions(OutputOptions):
    """The options of loading a backbone for prefixes."""

    backbone: str | None = _backbone(None, "default: the one in the prefix's header")
    dtype: DTypeName = _backbone("auto", "dtype of the frozen weights")
    device: str = _backbone("auto", "cpu, cuda, cuda:0, mps or auto")
    quantize: Literal["", "int8", "int4"] = _backbone("", "quantize the frozen weights (torchao)")
    adapter: str | None = _backbone(None, "folder of a LoRA adapter (PEFT); default: the one of the prefix")
    allow_other_backbone: bool = _backbone(False, "accept other weights of the same shapes")
    chat_template: str = _backbone(
        "", "run the prefix's own chat template: a file with its text, or own: the one it has"
    )


class EngineOptions(BackboneOptions):
    """The options of what computes."""

    engine: Literal["torch", "llama.cpp", "vllm"] = _engine("torch", "what computes; llama.cpp needs the extra llama")
    gguf: str = _engine("", "for llama.cpp: the backbone's weights; default: those of the embedded one", metavar="FILE")
    threads: int = _engine(0, "for llama.cpp: threads; 0: one per core", ge=0)
    vllm_python: str = _engine("", "for vllm: the Python of the environment with vLLM; default: this one")

    @property
    def without_lacks(self) -> dict[str, Any]:
        """Decoding by default without what the engine lacks, whatever the task's settings are."""
        return {"torch": {}, "vllm": {"num_beams": 1}, "llama.cpp": {"num_beams": 1, "min_new_tokens": 0}}[self.engine]

    def conflicts(self) -> Conflicts:
        """Also: options of one engine with another."""
        yield from super().conflicts()
        for name, engines in _ENGINES.items():
            if name in self.model_fields_set and self.engine not in engines:
                yield (name,), f"{self.flag(name)} is for --engine {' or '.join(engines)}"


class DecodingOptions(EngineOptions, GenerateConfig):
    """The options of decoding and of the backbone; those of decoding that are left out are the task's."""

    defaults_elsewhere: ClassVar[frozenset[str]] = frozenset(GenerateConfig.model_fields)

    print_config: bool = option(False, "print the final settings of decoding as TOML, and do nothing else")

    @property
    def of_writing(self) -> list[str]:
        """The given options that only texts which are written have."""
        only = GenerateConfig.model_fields.keys() - ClassifyConfig.model_fields.keys()
        return [self.flag(name) for name in sorted(only & self.model_fields_set)]

    def conflicts(self) -> Conflicts:
        """Those among options that were given; the others are checked together with the task's settings."""
        for names, message in super().conflicts():
            if self.model_fields_set.issuperset(names):
                yield names, message
        yield from self.only_with("temperature", "top_k", "top_p", "min_p")
        for name, value in self.without_lacks.items():
            if name in self.model_fields_set and getattr(self, name) != value:
                yield (name, "engine"), f"{self.flag(name)} is not for --engine {self.engine}"

    def configuration(self, headers: Sequence[Mapping[str, Any]], task: str = "") -> GenerateConfig:
        """The settings of the task, or of that of the first header, replaced by those of the options.

        Raises:
            ConfigError: A setting is wrong.
        """
        given = {**self.without_lacks, **self.given(GenerateConfig)}
        return task_decoding(task or headers[0].get("task"), headers, given)


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
    from prefixtune.data.registry import default_decoding

    values: dict[str, Any] = {"max_new_tokens": least} if least else {}
    values |= default_decoding(task, headers)
    if task == "records":
        values["max_new_tokens"] = max(values["max_new_tokens"], least)
    if given.get("temperature", 0) > 0 and "num_beams" not in given:
        # --temperature asks for sampling, so the task's beam search is dropped.
        values.pop("num_beams", None)
    values |= given
    if "min_new_tokens" not in given:
        values["min_new_tokens"] = min(values.get("min_new_tokens", 0), values.get("max_new_tokens", 1_000_000))
    return GenerateConfig(**values)
