"""How the next token is chosen, and when a text ends."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import field_validator

from prefixtune.errors import short_repr
from prefixtune.utils.config import Config, TextList, option_group

LOWEST_TEMPERATURE = 1e-5
"""Lower ones sample as this one does: the likeliest token has all the weight, and no score divided by it overflows."""


_decoding = option_group("decoding")


class SamplingConfig(Config):
    """How the next token is chosen, and when a text ends."""

    max_new_tokens: int = _decoding(100, ge=1, description="most tokens to generate")
    min_new_tokens: int = _decoding(0, ge=0, description="fewest tokens before the end token may come")
    temperature: float = _decoding(0.0, ge=0, description="0: greedy; above: sample")
    top_k: int = _decoding(0, ge=0, description="sample from the k likeliest tokens; 0: all")
    top_p: float = _decoding(1.0, gt=0, le=1, description="sample from the likeliest tokens that together reach p")
    min_p: float = _decoding(
        0.0, ge=0, le=1, description="sample no token less likely than this share of the likeliest one's probability"
    )
    seed: int | None = _decoding(None, description="of sampling; without one, it is not reproducible")
    stop: TextList = _decoding(
        (), description="ends an output, and is left out of it; several: each may end it (a line break in bash: $'\\n')"
    )
    repetition_penalty: float = _decoding(
        1.0, ge=0.01, le=10, description="above 1 discourages tokens that the prompt or the text already has"
    )
    presence_penalty: float = _decoding(
        0.0, ge=-2, le=2, description="subtracted from the score of every token that the text already has"
    )
    frequency_penalty: float = _decoding(
        0.0, ge=-2, le=2, description="subtracted from a token's score as often as the text has it"
    )

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError(f"is {short_repr(stop)}, but must be strings that are not empty")
        return stop

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """More tokens at least than at most."""
        if self.min_new_tokens > self.max_new_tokens:
            what = f"min_new_tokens is {self.min_new_tokens}, but max_new_tokens is {self.max_new_tokens}"
            yield ("min_new_tokens", "max_new_tokens"), what
