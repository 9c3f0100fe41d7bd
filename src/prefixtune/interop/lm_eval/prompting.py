"""lm-eval's texts -> token ids before and after, in the text format of a prefix or as lm-eval's own models read them.

By default a context is raw text, as lm-eval's model `hf` reads it, behind the prefix; so a model without a prefix gives
the figures of `hf`. With the prefix's own text format, the context is the source and the continuation the target, as in
training: the format's text stands around both, and the end token counts as part of the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.truncation import template_lengths
from prefixtune.errors import RequestError
from prefixtune.inference.config import GenerateConfig
from prefixtune.prefix.chat_format import render_chat
from prefixtune.prefix.text_format import MODEL_TEMPLATE, TextFormat

__all__ = ["decoding_config", "fill_template", "keep_right"]

_SUPPORTED = ("top_k", "top_p", "num_beams", "repetition_penalty", "length_penalty", "min_new_tokens")
_WITHOUT_EFFECT = ("do_sample", "use_cache", "early_stopping", "temperature")
_DEFAULT_NEW_TOKENS = 256
"""As lm-eval's models have it."""


def keep_right(
    backbone: Backbone, text_format: TextFormat | None, source: str, prompt: Sequence[int], room: int
) -> tuple[int, ...]:
    """A prompt's last tokens, as many as there is room for; of one in a text format, the text around the source stays.

    lm-eval's question is at the end, behind the solved examples; so a context is cut at its beginning.
    """
    if len(prompt) <= room:
        return tuple(prompt)
    before = 0 if text_format is None else template_lengths(backbone, text_format, source)[0]
    kept = room - before
    return (*prompt[:before], *prompt[len(prompt) - kept :]) if kept > 0 else tuple(prompt[len(prompt) - room :])


def fill_template(
    tokenizer: Any, stored: TextFormat | None, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
) -> str:
    """A conversation as text, by the template of a prefix's text format, or by the tokenizer's own.

    Args:
        tokenizer: Of transformers.
        stored: The text format of a prefix that was trained on conversations; None: there is none.
        messages: Each with `role` and `content`.
        add_generation_prompt: Write what opens the assistant's answer; else the last message is left open.

    Raises:
        RequestError: The template refuses the messages.
    """
    from jinja2 import TemplateError

    if stored is None or stored.chat_template == MODEL_TEMPLATE:
        try:
            return str(
                tokenizer.apply_chat_template(
                    list(messages),
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )
        except TemplateError as error:
            raise RequestError(
                f"the model's chat template refuses the messages: {error}.", hint="leave --apply-chat-template out."
            ) from None
    text = render_chat(tokenizer, stored, messages, add_generation_prompt=add_generation_prompt)
    last = messages[-1]["content"].strip()
    return text if add_generation_prompt else text[: text.rindex(last) + len(last)] if last in text else text


def decoding_config(arguments: dict[str, Any], end: str, batch_size: int) -> GenerateConfig:
    """The decoding that a task asks for: greedy, unless it says `do_sample`.

    Args:
        arguments: The task's `generation_kwargs`, in lm-eval's and transformers' words.
        end: The text of the end token, which lm-eval counts among the strings that end a text.
        batch_size: Texts at a time.

    Raises:
        RequestError: It asks for something that cannot be done here.
        ConfigError: A value is not allowed.
    """
    given = dict(normalize_gen_kwargs(arguments, _DEFAULT_NEW_TOKENS))
    stop = [text for text in handle_stop_sequences(given.pop("until", None), end) if text]
    most = given.pop("max_gen_toks")
    samples = bool(given.get("do_sample"))
    unknown = sorted(set(given) - {*_SUPPORTED, *_WITHOUT_EFFECT})
    if unknown:
        raise RequestError(
            f"a task decodes with {', '.join(map(repr, unknown))}, which is not known here.",
            hint=f"known: {', '.join(('until', 'max_gen_toks', 'do_sample', 'temperature', *_SUPPORTED))}.",
        )
    values = {name: given[name] for name in _SUPPORTED if given.get(name) is not None}
    if samples:
        values["temperature"] = float(given.get("temperature") or 1.0)
    return GenerateConfig(**values, stop=tuple(stop), max_new_tokens=most, batch_size=batch_size)
