"""Which chat template writes the data of a run."""

from __future__ import annotations

from pathlib import Path

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.chat import has_chat_template
from prefixtune.data.streams import read_text
from prefixtune.errors import ConfigError
from prefixtune.prefix.chat_format import allow_template
from prefixtune.prefix.text_format import MAX_TEMPLATE_CHARS, MODEL_TEMPLATE, TextFormat
from prefixtune.training.config import TrainConfig

__all__ = ["choose_template", "read_template"]


_HINT = "give a file with a Jinja template, or 'model' or 'none'."


def read_template(config: TrainConfig) -> str:
    """The template that a configuration names: its text, `model`, or nothing.

    Raises:
        ConfigError: There is no such file.
        DataError: It cannot be read, or is too large to be stored.
    """
    if config.chat_template in ("", "none", MODEL_TEMPLATE):
        return config.chat_template.replace("none", "")
    path = Path(config.chat_template)
    if not path.exists():
        raise ConfigError(f"chat_template is {config.chat_template!r}, which is no file.", hint=_HINT)
    text = read_text(path, max_bytes=4 * MAX_TEMPLATE_CHARS, needed="a template")
    # Its length.
    TextFormat(chat_template=text)
    # Named by the user, so that what the run makes can be used at once.
    allow_template(text, remember=True)
    return text


def choose_template(
    config: TrainConfig, backbone: Backbone, *, for_labels: bool = False, has_messages: bool = False
) -> str:
    """The template of a run, as a text format stores it; empty: source and target are written plainly.

    Raises:
        ConfigError: There is no such file, the backbone cannot have the template, or there is a system message and no
            template.
        DataError: The file cannot be read, or its template is too large to be stored.
    """
    template = read_template(config)
    chats = backbone.kind == "decoder" and not for_labels
    if template and not chats:
        raise ConfigError(
            f"chat_template is {config.chat_template!r}, but only decoder-only models read chats, and for no labels.",
            hint="leave chat_template out.",
        )
    if template == MODEL_TEMPLATE and not has_chat_template(backbone):
        raise ConfigError(
            f"chat_template is 'model', but {backbone.name!r} has none.", hint="give a file with a Jinja template."
        )
    own = not (config.chat_template or config.prompt_format or config.target_format)
    if own and chats and has_messages and has_chat_template(backbone):
        template = MODEL_TEMPLATE
    if config.system and not template:
        raise ConfigError(
            "system is given, but there is no chat template that could write it.",
            hint="give one (--chat-template model, or FILE).",
        )
    return template
