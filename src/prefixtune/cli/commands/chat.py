"""`prefixtune chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prefixtune.cli.conversation import Conversation
from prefixtune.cli.decoding import EngineOptions, task_decoding
from prefixtune.cli.loading import load_trained, read_trained, short_name, started_engine
from prefixtune.cli.options import PREFIX, Conflicts, command, option
from prefixtune.cli.show import for_stdout, print_json
from prefixtune.errors import ConfigError, PrefixError, RequestError, did_you_mean
from prefixtune.sampling.config import SamplingConfig
from prefixtune.utils.config import TextList
from prefixtune.utils.folders import expand_home

if TYPE_CHECKING:
    from prefixtune.inference.config import GenerateConfig
    from prefixtune.prefix.prefix import Prefix

_COMMANDS = {
    "/prefix": "NAME: answer with this prefix from now on; none: with none; without a name: list them",
    "/reset": "forget the messages so far",
    "/save": "FILE: write the messages as JSON lines",
    "/help": "this list; a message that begins with / is written with a space before it",
    "/exit": "end the conversation; so does Ctrl-D, and Ctrl-C stops an answer",
}
_NO_PREFIX = "none"


class ChatOptions(EngineOptions, SamplingConfig):
    """The options of `prefixtune chat`."""

    prefix: TextList = option((), f"{PREFIX}; with several, /prefix NAME switches; none: bare model", metavar="FILE")
    max_new_tokens: int = option(
        512,
        "most tokens of an answer; with a prefix: as its task has it, for records at least 512",
        ge=1,
        group="decoding",
    )

    def conflicts(self) -> Conflicts:
        """Also: what is for sampling, without it."""
        yield from super().conflicts()
        yield from self.only_with("temperature", "top_k", "top_p", "min_p")

    def decoding(self, prefix: Prefix | None) -> GenerateConfig:
        """The settings of the prefix's task, replaced by those of the options; beam search cannot stream."""
        header = {} if prefix is None else prefix.header
        given = {**self.without_lacks, **self.given(SamplingConfig), "num_beams": 1}
        return task_decoding(header.get("task"), [header], given, least=self.max_new_tokens)


@command
def chat(options: ChatOptions) -> None:
    r"""Talk with a model and its prefixes in the terminal.

    The model reads the whole conversation in its own chat template, or in the one that the prefix was trained with. A
    prefix that was trained on single texts reads the last message alone, in its own text format, with the decoding of
    its task. Ctrl-C stops an answer, Ctrl-D ends.
    /help lists the commands of a conversation. Without a terminal, each line of stdin is a message.

    For example:
        prefixtune chat
        prefixtune chat --prefix runs/e2e/prefix.safetensors --prefix runs/news/prefix.safetensors
        prefixtune chat --prefix runs/manual+runs/style
        prefixtune chat --temperature 0.7 --seed 1
        prefixtune chat --engine llama.cpp
        printf 'Hello\nWho are you?\n' | prefixtune chat --json
    """
    options.decoding(None)
    trained = read_trained(options, options.prefix)

    from prefixtune.data.chat import has_chat_template
    from prefixtune.data.labels import labels_in

    if any(map(labels_in, trained.headers)):
        raise ConfigError("a prefix that gives labels has no answers.", hint="use `prefixtune generate`.")
    backbone, prefixes, _ = load_trained(options, trained)

    if not has_chat_template(backbone) and not any(prefix.header.get("text_format") for prefix in prefixes):
        raise ConfigError(
            f"{backbone.name!r} has no chat template: it was not trained for conversations.",
            hint="use `prefixtune generate`, or name another model with --backbone.",
        )
    on_device = [prefix.to(device=backbone.device) for prefix in prefixes]
    named = dict(zip(_names(options.prefix), on_device, strict=True))
    with started_engine(options, backbone, num_texts=1) as engine:
        conversation = Conversation(backbone, named, options.decoding, next(iter(named), ""), engine)
        _Terminal(conversation, options).run()


def _names(files: Sequence[str]) -> list[str]:
    """Short names of prefixes; where two would be equal, what was written.

    >>> _names(["runs/e2e/prefix.safetensors", "news.safetensors", "hub:me/poems"])
    ['e2e', 'news', 'poems']
    >>> _names(["a/x.safetensors", "b/x.safetensors"])
    ['a/x.safetensors', 'b/x.safetensors']
    """
    short = [_NO_PREFIX, *map(short_name, files)]
    return [name if short.count(name) == 1 else file for name, file in zip(short[1:], files, strict=True)]


class _Terminal:
    """Reads messages and commands, and shows answers."""

    def __init__(self, conversation: Conversation, options: ChatOptions) -> None:
        self._conversation, self._console, self._as_json = conversation, options.console, options.as_json
        self._interactive = sys.stdin is not None and sys.stdin.isatty() and not options.as_json
        self._said_one_message = False

    def run(self) -> None:
        """Answer until the input ends."""
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - `input` uses it: the arrow keys edit a line, and bring back earlier ones
            self._console.info("/help lists the commands; Ctrl-D ends.")
        for line in self._lines():
            text = line.strip()
            name, _, argument = text.partition(" ")
            is_command = line.startswith("/")
            if is_command and name == "/exit":
                return
            try:
                if is_command:
                    self._obey(name, argument.strip())
                elif text:
                    self._answer(text)
            except PrefixError as error:
                # The conversation goes on.
                if self._as_json:
                    print_json({"text": text, "error": error.message, "hint": error.hint})
                else:
                    self._console.error(error.message, error.hint)

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                if self._interactive:
                    yield input(f"{self._conversation.name or 'bare'}> ")
                elif line := sys.stdin.readline() if sys.stdin else "":
                    yield line.rstrip("\r\n")
                else:
                    return
            except EOFError:
                print()
                return
            except UnicodeDecodeError as error:
                raise ConfigError(f"stdin is not UTF-8 text: {error}.", hint="convert it to UTF-8.") from error
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                print()

    def _answer(self, text: str) -> None:
        if any("\ud800" <= character <= "\udfff" for character in text):
            # Half characters, as bytes become that are no UTF-8.
            raise RequestError("the message is not UTF-8 text.", hint="convert it to UTF-8.")
        conversation = self._conversation
        if conversation.reads_one_message and conversation.messages and not self._said_one_message:
            self._said_one_message = True
            self._console.info(f"the prefix {conversation.name!r} reads your last message only, not those before it")
        on_piece = (lambda _: None) if self._as_json else lambda piece: print(for_stdout(piece), end="", flush=True)
        answer = conversation.ask(text, on_piece, lambda _: self._console.info("your message was truncated to fit"))
        if self._as_json:
            row = {"text": text, "output": answer.text, "prefix": conversation.name or None}
            print_json({**row, "stopped": answer.stopped, "room": answer.room})
        else:
            print(" (stopped)" * answer.stopped)

    def _obey(self, name: str, argument: str) -> None:
        conversation = self._conversation
        if name == "/reset":
            conversation.messages.clear()
        elif name == "/prefix":
            self._switch(argument)
        elif name == "/save" and argument:
            conversation.save(expand_home(argument))
            self._console.info(f"{len(conversation.messages)} messages are in {argument}")
        elif name == "/help":
            for known, text in _COMMANDS.items():
                self._console.info(f"{known} {text}")
        elif name == "/save":
            raise RequestError("/save needs the name of a file.", hint="as in /save chat.jsonl.")
        else:
            raise RequestError(f"there is no command {name[:80]!r}.", hint=did_you_mean(name, _COMMANDS))

    def _switch(self, name: str) -> None:
        """Answer with another prefix, or list them."""
        conversation = self._conversation
        known = [*conversation.prefixes, _NO_PREFIX]
        if not name:
            for prefix in known:
                self._console.info(f"{'*' if prefix == (conversation.name or _NO_PREFIX) else ' '} {prefix}")
        elif name in known:
            conversation.name = "" if name == _NO_PREFIX else name
        else:
            raise RequestError(f"there is no prefix {name[:80]!r}.", hint=did_you_mean(name, known))
