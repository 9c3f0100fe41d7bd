"""`load`: a frozen backbone with a prefix in front, as one object that generates, chats, streams and classifies.

It is called `Model`, as in transformers and vLLM: what answers. The backbone alone is a `Backbone`; what trains inside
transformers' `Trainer` is a `PrefixModel`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, overload

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone, load_backbone
from prefixtune.backbone.prefixes import PrefixLike, as_prefix, load_prefix, named_backbone, trained_adapter
from prefixtune.data.chat import has_chat_template
from prefixtune.data.encoding import as_text_format, check_texts
from prefixtune.errors import PrefixWarning, RequestError, describe_value
from prefixtune.inference.classify import Prediction, classify
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import backbone_of, generate, stream
from prefixtune.inference.prompts import fit_new_tokens
from prefixtune.prefix.chat_format import allow_named
from prefixtune.prefix.compose import concatenate
from prefixtune.prefix.hub import prefix_file
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import read_text_format

Messages = Sequence[Mapping[str, str]]
"""A conversation: dicts with `role` and `content`, as chat templates read them."""

_ANSWER_TOKENS = 512
"""Most tokens of an answer in a chat, unless the caller says otherwise."""


def load(
    model: BackboneLike | None = None,
    prefix: PrefixLike | Sequence[PrefixLike] | None = None,
    *,
    allow_other_backbone: bool = False,
    chat_template: str | os.PathLike[str] = "",
    **options: Any,
) -> Model:
    """Load a frozen model with a prefix in front.

    Args:
        model: A `Backbone`, a name or path, or transformers' (model, tokenizer); None: the one that the prefix was
            trained for, or without a prefix the embedded one.
        prefix: A `Prefix`, a path, the folder of a run, or `hub:OWNER/NAME`; a list of these is joined, one after the
            other; None: the bare model.
        allow_other_backbone: Take a prefix that was trained for other weights.
        chat_template: Run the chat template in a prefix's file: a file with its text, or `own`: as it is there. One
            that was a run's of your own, or that was named before, needs no name.
        **options: Of `load_backbone`, for a name or path: `dtype` (`auto` here: bfloat16 where the hardware is fast at
            it), `device`, `quantize`, `adapter`, ...

    Raises:
        BackboneError: There is no such model, or a prefix was trained for another one.
        CheckpointError: A prefix cannot be read.
        ConfigError: An argument is of a wrong type, or the prefixes cannot be joined.
        PrefixError: The hub cannot be reached, or has no such file.
    """
    given = _as_list(prefix)
    # Read first: a wrong file is reported at once, before the model loads.
    files = [one if isinstance(one, Prefix) else prefix_file(one) for one in given]
    read = [load_prefix(file) for file in files]
    allow_named(os.fspath(chat_template), [one.header for one in read])
    if model is None:
        model = named_backbone(read)
    if isinstance(model, str | os.PathLike):
        adapter = options.pop("adapter", None) or trained_adapter(read)
        backbone = load_backbone(model, **{"dtype": "auto", "adapter": adapter, **options})
    else:
        backbone = load_backbone(model, **options) if options else as_backbone(model)
    checked = [load_prefix(one, backbone, allow_other_backbone=allow_other_backbone) for one in read]
    if len(checked) < 2:
        return Model(backbone, as_prefix(checked[0] if checked else None, backbone))
    names = ["" if isinstance(one, Prefix) else os.fspath(one) for one in given]
    joined = concatenate(checked, backbone.rotation, names=names if all(names) else ())
    return Model(backbone, as_prefix(joined, backbone))


@dataclass(frozen=True, eq=False)
class Model:
    """A frozen backbone with a prefix in front.

    One text gives one answer, a list of texts a list. A text is what the prefix was trained on, formatted as in
    training; a conversation, a list of messages with `role` and `content`, goes through the chat template. A prefix
    that was trained on single texts reads the last message alone.

    Attributes:
        backbone: The model and its tokenizer.
        prefix: In front of every text; None: the bare model.
    """

    backbone: Backbone
    prefix: Prefix | None = None

    @property
    def tokenizer(self) -> Any:
        """The backbone's, of transformers."""
        return self.backbone.tokenizer

    @overload
    def generate(self, texts: str | Messages, **options: Any) -> str: ...

    @overload
    def generate(self, texts: Sequence[str] | Sequence[Messages], **options: Any) -> list[str]: ...

    def generate(self, texts: Any, **options: Any) -> str | list[str]:
        """Continue texts, or answer conversations.

        Args:
            texts: One text or conversation, or a list of them.
            **options: As for `prefixtune.generate`: `max_new_tokens`, `temperature`, `num_beams`, ..., or `config`.

        Raises:
            RequestError: A text does not fit, or it is something else.
            ConfigError: An option is wrong.
        """
        if isinstance(texts, str) or _is_conversation(texts):
            return str(self.generate([texts], **options)[0])
        if isinstance(texts, Sequence):
            texts = [row if isinstance(row, str) else self._source(row) for row in texts]
        return generate(self.backbone, texts, self.prefix, **options)

    def chat(self, messages: str | Messages, **options: Any) -> str:
        """The answer to a conversation, or to one message; nothing is remembered.

        Args:
            messages: With `role` and `content`; a text is a user's message.
            **options: As for `generate`; `max_new_tokens` is 512 here, or as many as fit, unless `config` is given.

        Raises:
            RequestError: It does not fit, or the model has no chat template.
            ConfigError: An option is wrong.
        """
        source = self._source([{"role": "user", "content": messages}] if isinstance(messages, str) else messages)
        return generate(self.backbone, [source], self.prefix, **self._answer_options(source, options))[0]

    def stream(self, text: str | Messages, **options: Any) -> Generator[str, None, None]:
        """Continue a text, or answer a conversation, in pieces as they are generated; joined, they are `generate`'s.

        Args:
            text: A text, or messages.
            **options: As for `generate`; beam search cannot stream.

        Raises:
            RequestError: It does not fit.
            ConfigError: An option is wrong.
        """
        if not isinstance(text, str):
            text = self._source(text)
            options = self._answer_options(text, options)
        return stream(self.backbone, text, self.prefix, **options)

    @overload
    def classify(self, texts: str, **options: Any) -> Prediction: ...

    @overload
    def classify(self, texts: Sequence[str], **options: Any) -> list[Prediction]: ...

    def classify(self, texts: str | Sequence[str], **options: Any) -> Prediction | list[Prediction]:
        """The label of each text, and how likely every label is.

        Args:
            texts: One text, or a list of them.
            **options: As for `prefixtune.inference.classify.classify`: `labels` for the bare model, `batch_size`, ...

        Raises:
            RequestError: A text does not fit.
            ConfigError: The prefix is for something else, there are no labels, or an option is wrong.
        """
        if isinstance(texts, str):
            return self.classify([texts], **options)[0]
        return classify(self.backbone, texts, self.prefix, **options)

    # --- conversations -----------------------------------------------------------------------------------------------

    def _source(self, messages: Any) -> Any:
        """What `generate` reads of a conversation: all of it, or the last message in the prefix's own text format.

        Raises:
            RequestError: The model has no chat template.
        """
        if not _is_conversation(messages):
            what = f"the messages are {describe_value(messages)}, not a list of dicts."
            raise RequestError(what, hint='write [{"role": "user", "content": "..."}].')
        (messages,) = check_texts([messages])
        text_format = None if self.prefix is None else read_text_format(self.prefix.header)
        if text_format is None:
            if not has_chat_template(self.backbone):
                what = f"{self.backbone.name!r} has no chat template: it was not trained for conversations."
                raise RequestError(what, hint="give a text instead of messages, or load another model.")
        elif not text_format.is_chat:
            if len(messages) > 1:
                what = "the prefix was trained on single texts: it reads the last message only, not those before it"
                warnings.warn(what, PrefixWarning, stacklevel=3)
            return messages[-1].content
        return messages

    def _answer_options(self, source: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of an answer, which has as many tokens as fit where the caller names no number."""
        if options.get("config") is not None or "max_new_tokens" in options:
            return dict(options)
        fields = {name: value for name, value in options.items() if name in GenerateConfig.model_fields}
        config = GenerateConfig(**{"max_new_tokens": _ANSWER_TOKENS, **fields})
        text_format = as_text_format(options.get("text_format"))
        backbone = backbone_of(options.get("engine"), self.backbone)
        fitting = fit_new_tokens(backbone, source, self.prefix, config, text_format)
        return {**options, **{name: getattr(fitting, name) for name in ("max_new_tokens", "min_new_tokens")}}

    def __repr__(self) -> str:
        return f"Model({self.backbone!r}, {self.prefix!r})"


# --- arguments --------------------------------------------------------------------------------------------------------


def _as_list(prefix: PrefixLike | Sequence[PrefixLike] | None) -> list[PrefixLike]:
    if prefix is None:
        return []
    several = isinstance(prefix, Sequence) and not isinstance(prefix, str)
    return list(cast(Sequence[PrefixLike], prefix)) if several else [cast(PrefixLike, prefix)]


def _is_conversation(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and isinstance(value[0], Mapping)
