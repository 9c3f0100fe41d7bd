"""What the middleware knows of the running vLLM server."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.interop.vllm.chat_template import PLACEHOLDERS_VARIABLE, PROMPT_VARIABLE
from prefixtune.interop.vllm.folder import PrefixFolder
from prefixtune.interop.vllm.model import geometry_of
from prefixtune.interop.vllm.settings import Settings

__all__ = ["ServerState"]


@dataclass(frozen=True)
class ServerState:
    """Known once vLLM has started.

    Attributes:
        settings: The connector's options.
        prefixes: The folder of prefixes.
        model_name: The bare model's name in the API.
        own_names: All of its names.
        tokenizer: The model's.
        placeholder_id: The token that stands for one position of a prefix.
        has_placeholders: The chat template has room for placeholders.
        has_prompt: The chat template has room for a text in place of the messages.
        has_keys: vLLM asks clients for an API key.
        max_positions: Most positions of a sequence; None: unknown.
    """

    settings: Settings
    prefixes: PrefixFolder
    model_name: str
    own_names: frozenset[str]
    tokenizer: Any
    placeholder_id: int
    has_placeholders: bool
    has_prompt: bool
    has_keys: bool
    max_positions: int | None = None

    @classmethod
    def from_app(cls, app_state: Any) -> ServerState:
        """Read it from the state of vLLM's application.

        Raises:
            ConfigError: vLLM is not set up for prefixes.
        """
        model_config = app_state.vllm_config.model_config
        settings = Settings.from_vllm(app_state.vllm_config)
        model = str(model_config.model)
        is_folder = Path(model).is_dir()
        names = tuple(app_state.args.served_model_name or [app_state.args.model])
        # vLLM's own threads use theirs, and a call that truncates makes others that run beside it truncate, too.
        tokenizer = copy.deepcopy(app_state.engine_client.get_tokenizer())
        placeholder_id = _choose_placeholder(tokenizer)
        template = str(getattr(app_state.online_renderer, "chat_template", None) or "")
        return cls(
            settings,
            PrefixFolder(settings, geometry_of(model_config), names[0], hub_id="" if is_folder else model),
            names[0],
            frozenset(names),
            tokenizer,
            placeholder_id,
            has_placeholders=PLACEHOLDERS_VARIABLE in template and _survives_text(tokenizer, placeholder_id),
            has_prompt=PROMPT_VARIABLE in template,
            has_keys=bool(app_state.args.api_key or os.environ.get("VLLM_API_KEY")),
            max_positions=getattr(model_config, "max_model_len", None),
        )

    @property
    def placeholder_text(self) -> str:
        """The placeholder in a text."""
        return str(self.tokenizer.convert_ids_to_tokens(self.placeholder_id))

    @property
    def separator(self) -> str:
        """What `{separator}` stands for where a text format names none."""
        return str(self.tokenizer.bos_token or self.tokenizer.eos_token)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """A text's token ids."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return ids


def _choose_placeholder(tokenizer: Any) -> int:
    """A special token other than the end token: it is never computed, but repetition penalties count it."""
    eos_id = tokenizer.eos_token_id
    ids = [tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    return int(next((token_id for token_id in ids if token_id is not None and token_id != eos_id), eos_id or 0))


def _survives_text(tokenizer: Any, placeholder_id: int) -> bool:
    """Whether placeholders that are written as text are read as the same tokens: in a chat they are text first."""
    text = tokenizer.convert_ids_to_tokens(placeholder_id) * 3
    return bool(tokenizer(text, add_special_tokens=False)["input_ids"] == [placeholder_id] * 3)
