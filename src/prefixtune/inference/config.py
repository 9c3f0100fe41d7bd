"""How to decode."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefixtune.errors import ConfigError
from prefixtune.prefix.text_format import POLICIES
from prefixtune.utils.options import check_names, fit_types

__all__ = ["GenerateConfig", "check_tagging_lengths"]


_HINT = "`prefixtune generate --help` explains the options."
_STOPPING = "`stop` takes strings that end an output; the end token always does."
_NARROWING = "top_k and top_p narrow what is sampled from."
_ELSEWHERE = {
    "do_sample": "set temperature above 0 to sample; 0 (the default) is greedy.",
    "max_length": "max_new_tokens counts what is generated; max_total_length says when a source is too long.",
    "max_tokens": "it is called max_new_tokens here.",
    "min_length": "min_new_tokens counts what is generated, without the text before it.",
    "num_return_sequences": "give a text several times, as in [text] * 3, with a temperature above 0.",
    "n": "give a text several times, as in [text] * 3, with a temperature above 0.",
    "early_stopping": "beam search ends when its beams do; length_penalty favours longer or shorter outputs.",
    "no_repeat_ngram_size": "repetition_penalty above 1 discourages repeating.",
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), "repetition_penalty above 1 discourages repeating."),
    **dict.fromkeys(("stop_strings", "eos_token_id", "stopping_criteria"), _STOPPING),
    **dict.fromkeys(("typical_p", "min_p", "epsilon_cutoff", "eta_cutoff"), _NARROWING),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens"), "ban_newlines=True bans line breaks."),
    "cache_implementation": "cache is 'dynamic' or 'static'.",
    "prompt_lookup_num_tokens": "it is called prompt_lookup here.",
    "assistant_model": "give assistant=load_backbone(...).",
    "streamer": "`prefixtune.inference.streaming.stream` yields pieces as they come.",
    "generation_config": "give config=GenerateConfig(...), or the options themselves.",
    **dict.fromkeys(("pad_token_id", "use_cache", "tokenizer"), "leave it out: it comes from the backbone."),
}
"""Names of transformers (and of OpenAI's interface) for decoding, and what to write here instead."""


@dataclass(frozen=True)
class GenerateConfig:
    """How to decode.

    Attributes:
        max_new_tokens: Most tokens to generate.
        min_new_tokens: Fewest tokens before the end token may come.
        num_beams: Beams; 1: no beam search.
        length_penalty: Of beam search; above 0 favours longer outputs.
        temperature: 0: greedy; above: sample.
        top_k: Sample from the k likeliest; 0: all.
        top_p: Sample from the likeliest that together reach p.
        seed: Of sampling; None: not reproducible.
        stop: One string or several that end an output, and are left out of it; stored as a tuple.
        ban_newlines: Never generate a token with a line break.
        repetition_penalty: Above 1 discourages repeating.
        batch_size: Texts per batch.
        cache: `dynamic` grows with the text; `static` is one preallocated buffer.
        compile: Compile the decoding step with torch.compile; needs the static cache.
        prompt_lookup: Guess up to this many tokens from earlier parts of the text, and check them in one pass; 0: no
            guessing. Texts are generated one at a time.
        max_total_length: Positions of source and target together (of each, for an encoder-decoder); 0: as in training.
        on_too_long: `cut` (truncate) a source that is too long, or raise an `error`; empty: as in training.

    Raises:
        ConfigError: Values that are not allowed; all faults at once.
    """

    max_new_tokens: int = 100
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ban_newlines: bool = False
    repetition_penalty: float = 1.0
    batch_size: int = 16
    cache: str = "dynamic"
    compile: bool = False
    prompt_lookup: int = 0
    max_total_length: int = 0
    on_too_long: str = ""

    def __new__(cls, *_: Any, **values: Any) -> GenerateConfig:
        """Refuse unknown names, with the nearest known one."""
        check_names(cls, values, "there is no such generation option", _HINT, _ELSEWHERE)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str | Sequence):
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        wrong = list(fit_types(self).values())
        if isinstance(self.stop, tuple) and not all(isinstance(s, str) for s in self.stop):
            wrong.append(f"stop is {self.stop!r}, but must be a string or several")
        if wrong:
            raise ConfigError("; ".join(wrong) + ".", hint=_HINT)
        rules = [
            (self.max_new_tokens >= 1, "max_new_tokens", "at least 1"),
            (
                0 <= self.min_new_tokens <= self.max_new_tokens,
                "min_new_tokens",
                "between 0 and max_new_tokens",
            ),
            (self.num_beams >= 1, "num_beams", "at least 1"),
            (math.isfinite(self.length_penalty), "length_penalty", "a finite number"),
            (self.temperature >= 0 and math.isfinite(self.temperature), "temperature", "0 (greedy) or above"),
            (self.top_k >= 0, "top_k", "0 (all) or above"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (not any(s == "" for s in self.stop), "stop", "strings that are not empty"),
            (self.repetition_penalty > 0, "repetition_penalty", "above 0"),
            (self.batch_size >= 1, "batch_size", "at least 1"),
            (self.cache in ("dynamic", "static"), "cache", "dynamic or static"),
            (not self.compile or self.cache == "static", "compile", "False unless cache is 'static'"),
            (self.prompt_lookup >= 0, "prompt_lookup", "0 (none) or above"),
            (self.max_total_length >= 0, "max_total_length", "0 (as in training) or above"),
            (self.on_too_long in ("", *POLICIES), "on_too_long", "cut or error"),
        ]
        faults = [
            f"{name} is {getattr(self, name)!r}, but must be {allowed}" for good, name, allowed in rules if not good
        ]
        if self.min_new_tokens > self.max_new_tokens:
            faults.append(f"max_new_tokens is {self.max_new_tokens}")
        if self.num_beams > 1 and self.temperature > 0:
            faults.append("beam search and sampling exclude each other here: set temperature to 0 or num_beams to 1")
        if self.prompt_lookup and (self.num_beams > 1 or self.cache != "dynamic"):
            faults.append("prompt look-up needs num_beams = 1 and the dynamic cache")
        if faults:
            raise ConfigError("; ".join(faults) + ".", hint=_HINT)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> GenerateConfig:
        """From keys and values.

        Raises:
            ConfigError: An unknown key, with the nearest known one.
        """
        check_names(cls, values, "there is no such generation option", _HINT, _ELSEWHERE)
        return cls(**values)


def check_tagging_lengths(config: GenerateConfig) -> None:
    """Refuse to truncate texts that are tagged: every token gets its tag.

    Raises:
        ConfigError: The configuration limits or truncates texts.
    """
    if config.max_total_length or config.on_too_long == "cut":
        raise ConfigError(
            "texts to be tagged are never cut: every token gets its tag.", hint="leave max_length and on_too_long out."
        )
