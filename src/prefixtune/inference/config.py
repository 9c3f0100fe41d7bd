"""How to decode, and how to classify."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import field_validator

from prefixtune.errors import PrefixError
from prefixtune.sampling.config import SamplingConfig
from prefixtune.utils.config import Config, option_group

_decoding = option_group("decoding")


class ClassifyConfig(Config):
    """How texts are put into batches, and which are too long: of labels, and of generation."""

    hint: ClassVar[str] = "`prefixtune generate --help` explains the options."

    batch_size: int = _decoding(
        0, ge=0, description="texts that are computed at once; 0: 16, or 128 where a GPU's engine generates"
    )
    max_total_length: int = option_group("decoding", flag="max-length")(
        0, ge=0, description="positions of source and target together (encoder-decoder: of each); 0: as in training"
    )
    on_too_long: Literal["", "cut", "error"] = _decoding(
        "",
        description="cut a source that is too long (counted), or refuse it; empty: as in training (bare model: error)",
    )


def texts_at_once(batch_size: int, *, in_gpu_engine: bool = False) -> int:
    """What a `batch_size` of 0 stands for; in an engine, memory bounds it besides."""
    return batch_size or (128 if in_gpu_engine else 16)


class GenerateConfig(ClassifyConfig, SamplingConfig):
    """How to decode.

    Raises:
        ConfigError: Values that are not allowed; all faults at once.
    """

    num_beams: int = _decoding(1, ge=1, description="beams; 1: no beam search")
    length_penalty: float = _decoding(1.0, ge=-99, le=99, description="of beam search; above 0 favours longer outputs")
    ban_newlines: bool = _decoding(False, description="never generate a token with a line break")
    response_schema: str = option_group("decoding", flag="schema", metavar="FILE")(
        "",
        description="a file with a JSON schema, or the schema itself, that outputs follow; needs the extra json",
    )

    @field_validator("response_schema")
    @classmethod
    def _read_schema(cls, value: str) -> str:
        """Reads a file, so that a fault in it is found before the model loads."""
        if not value:
            return value
        from prefixtune.sampling.grammar import import_llguidance, read_json_schema

        try:
            schema = read_json_schema(value)
            import_llguidance()
        except PrefixError as error:
            raise ValueError(f"cannot be used: {error.message.rstrip('.')}; {error.hint.rstrip('.')}") from None
        return schema

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Also: ways of decoding that exclude each other."""
        yield from super().conflicts()
        if self.response_schema and (self.num_beams > 1 or self.min_new_tokens):
            what = "a JSON schema needs num_beams = 1 and no min_new_tokens"
            yield ("response_schema", "num_beams", "min_new_tokens"), what
        if self.num_beams > 1 and self.temperature > 0:
            what = "beam search and sampling exclude each other here: set temperature to 0 or num_beams to 1"
            yield ("num_beams", "temperature"), what
