"""The bodies of requests, as models: what all bodies share, and what requests for texts share.

An unknown field is refused. Null is the same as no field.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prefixtune.engine.request import SamplingParams
from prefixtune.server.responses import bad_request
from prefixtune.server.settings import ServeConfig

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True)]
Ids = Annotated[list[int], Field(min_length=1, fail_fast=True)]
_StopString = Annotated[str, Field(min_length=1, max_length=256)]
_MOST_UNKNOWN = 100
_LIMITED = ("max_tokens", "max_completion_tokens", "min_tokens")
_AS_THEY_ARE = ("temperature", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
_SMALLEST_TOP_P = 1e-9
"""What a `top_p` of 0 means: the likeliest token alone reaches it."""


class Part(BaseModel):
    """An object within a body: null is the same as no field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None or name not in cls.model_fields}


class Body(Part):
    """What all bodies share: they can be written as JSON again."""

    @model_validator(mode="before")
    @classmethod
    def _check_text(cls, body: Any) -> Any:
        if isinstance(body, dict):
            if cls.model_config.get("extra") == "forbid" and len(body.keys() - cls.model_fields.keys()) > _MOST_UNKNOWN:
                # pydantic would collect them all.
                raise bad_request("the body has very many unknown fields.", code="unknown_field")
            try:
                json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8")
            except (ValueError, RecursionError):
                # JSON may have half a surrogate pair, which no tokenizer takes, and Python reads NaN and 1e999.
                raise ValueError("the body has invalid text, numbers that are not finite, or too deep lists") from None
        return body

    def check(self, config: ServeConfig) -> None:
        """Refuse fields that do not go together, or ask for more than the server gives.

        Raises:
            ApiError: 400.
        """
        for name in _LIMITED:
            value = getattr(self, name, None)
            if value is not None and value > config.max_tokens:
                raise bad_request(f"{name} is {value}, but {config.max_tokens} are the most.", name)


class GenerationRequest(Body):
    """What all requests for texts share."""

    max_tokens: int | None = Field(None, ge=1, description="Most new tokens; by default the task's or the server's.")
    min_tokens: int = Field(0, ge=0, description="Fewest new tokens; at most max_tokens.")
    temperature: float = Field(1.0, ge=0, le=2, description="0: the likeliest token each time.")
    top_p: float = Field(1.0, ge=0, le=1, description="0: the likeliest token each time.")
    top_k: int = Field(0, ge=-1, le=1_000_000, description="0 or -1: all tokens.")
    min_p: float = Field(
        0.0, ge=0, le=1, description="No token less likely than this share of the likeliest one's probability."
    )
    # Scores divided by much less would overflow.
    repetition_penalty: float = Field(1.0, ge=0.01, le=10, description="Of tokens in the prompt and in the text.")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Of tokens that were generated.")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="Of tokens, as often as they were generated.")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: _StopString | Annotated[list[_StopString], Field(max_length=16)] | None = Field(
        None, description="Strings that end a text; they are not part of it.", examples=[["\n\n"]]
    )
    stream: bool = Field(False, description="Send pieces as they are generated.")

    @property
    def length(self) -> int | None:
        """Most new tokens, if the body says so."""
        return self.max_tokens

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """The JSON schema that texts follow; None: they follow none."""
        return None

    def sampling(self, config: ServeConfig, **more: Any) -> SamplingParams:
        """How tokens are chosen; the number of new tokens counts only if there is a `length`."""
        return SamplingParams(
            max_new_tokens=config.max_tokens if self.length is None else self.length,
            min_new_tokens=self.min_tokens,
            top_p=self.top_p or _SMALLEST_TOP_P,
            top_k=max(0, self.top_k),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            **{name: getattr(self, name) for name in _AS_THEY_ARE},
            **more,
        )

    def check(self, config: ServeConfig) -> None:
        """As `Body.check`."""
        super().check(config)
        if self.length is not None and self.min_tokens > self.length:
            raise bad_request(
                f"min_tokens is {self.min_tokens}, but at most {self.length} are asked for.", "min_tokens"
            )
