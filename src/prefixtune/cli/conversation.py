"""A conversation with a backbone and its prefixes: the messages so far, and the stream of the next answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prefixtune.errors import RequestError

if TYPE_CHECKING:
    from prefixtune.backbone.backbone import Backbone
    from prefixtune.engine.base import Engine
    from prefixtune.inference.config import GenerateConfig
    from prefixtune.prefix.prefix import Prefix


class Answer(NamedTuple):
    """An answer: its text, whether Ctrl-C stopped it, and its most tokens; None: as many as the settings say."""

    text: str
    stopped: bool
    room: int | None


@dataclass
class Conversation:
    """The messages of both sides, and the prefix in use.

    Attributes:
        backbone: The frozen model.
        prefixes: Name -> prefix.
        decoding: The decoding settings with a prefix, or with none.
        name: The name of the prefix in use; empty: none.
        engine: What computes; None: torch.
        messages: With `role` and `content`, as chat templates read them.
    """

    backbone: Backbone
    prefixes: Mapping[str, Prefix]
    decoding: Callable[[Prefix | None], GenerateConfig]
    name: str = ""
    engine: Engine | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def reads_one_message(self) -> bool:
        """Whether the prefix in use was trained with a text format of its own, which has room for one text."""
        from prefixtune.prefix.text_format import read_text_format

        prefix = self.prefixes.get(self.name)
        stored = None if prefix is None else read_text_format(prefix.header)
        return stored is not None and not stored.is_chat

    def ask(
        self, text: str, on_piece: Callable[[str], object], on_cut: Callable[[Sequence[int]], None] | None = None
    ) -> Answer:
        """Answer a message; it is kept with its answer, also if Ctrl-C stops that.

        Args:
            text: The user's message.
            on_piece: Called with every piece of the answer as it comes.
            on_cut: Called if the message was truncated to fit.

        Raises:
            PrefixError: The message cannot be answered; it is not kept.
        """
        pieces: list[str] = []
        stopped = False
        room, stream = self._begin(text, on_cut)
        with closing(stream):
            try:
                for piece in stream:
                    pieces.append(piece)
                    on_piece(piece)
            except KeyboardInterrupt:
                stopped = True
            except RequestError as error:
                if pieces or self.reads_one_message or not self._answered:
                    raise
                raise RequestError(error.message, hint=f"{error.hint} /reset forgets the earlier messages.") from error
        answer = "".join(pieces)
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer.strip()}]
        return Answer(answer, stopped, room)

    def save(self, path: Path) -> None:
        """Write the messages as JSON lines, atomically.

        Raises:
            PrefixError: The file cannot be written.
        """
        from prefixtune.utils.files import check_writable, write_text

        check_writable(path)
        write_text(path, "".join(f"{json.dumps(message, ensure_ascii=False)}\n" for message in self.messages))

    def _begin(
        self, text: str, on_cut: Callable[[Sequence[int]], None] | None
    ) -> tuple[int | None, Generator[str, None, None]]:
        """The room of the next answer, as in `Answer`, and its stream."""
        from prefixtune.inference.generate import backbone_of, stream
        from prefixtune.inference.prompts import fit_new_tokens

        prefix = self.prefixes.get(self.name)
        wanted = self.decoding(prefix)
        source = text if self.reads_one_message else [*self._answered, {"role": "user", "content": text}]
        backbone = backbone_of(self.engine, self.backbone)
        config = fit_new_tokens(backbone, source, prefix, wanted, None)
        answer = stream(backbone, source, prefix, config=config, engine=self.engine, on_cut=on_cut)
        return (config.max_new_tokens if config.max_new_tokens < wanted.max_new_tokens else None), answer

    @property
    def _answered(self) -> list[dict[str, str]]:
        """The messages, without those whose answer is empty: no template is made for empty turns."""
        pairs = zip(self.messages[::2], self.messages[1::2], strict=True)
        return [message for pair in pairs if pair[1]["content"] for message in pair]
