"""Random requests to a server, and what their texts should be."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from live_server import MODEL
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data import TASKS
from prefixtune.data.encoding import encode_prompts
from prefixtune.engine.engine import Engine
from prefixtune.engine.request import Request, SamplingParams
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.decoding import newline_tokens
from prefixtune.inference.generate import generate, generate_ids
from prefixtune.prefix.text_format import read_text_format
from prefixtune.sampling.detokenizer import text_until_stop

DEFAULT_LENGTH, LONGEST = 12, 24
"""Of the server's configuration: most new tokens by default, and at all."""
TENANTS = ("alice", "bob", "carol")
FORMAT = {"prompt": " {source} {separator}", "target": " {target} "}
PREFIXES: dict[str, dict[str, Any]] = {
    "pubs": {"length": 3, "task": "e2e", "text_format": FORMAT},
    "facts": {"length": 17, "task": "webnlg", "text_format": FORMAT},
    "mine": {"length": 1, "task": "records", "text_format": {**FORMAT, "source": "{name}: {food}"}},
    "worded": {"length": 8, "task": "records", "text_format": {"prompt": "{source}{separator}", "target": "a{target}"}},
    # Of one whose file stores no text format, prompts and chats go as they do to the bare backbone.
    "plain": {"length": 5},
}  # fmt: skip
RAW = ("plain", MODEL)
ROUTES = {"completion": "/v1/completions", "chat": "/v1/chat/completions", "task": "/v1/tasks/{name}"}
LETTERS = "abcdefghijklmnopqrstuvwxyz     ABC.,:;!?0123456789éß€\n\t中\U0001f686"


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        endpoint: `completion`, `chat` or `task`.
        model: A prefix or the bare backbone.
        sources: Of a completion perhaps several; of a chat the contents of its messages.
        as_ids: Whether the sources are sent as token ids, which are used as they are.
        options: Of the body, as the interface names them.
        n: Texts for each source.
        stream: Whether the text comes in pieces.
        leaves: The client disconnects after that many events of a stream, or some hundredths of a second of a
            whole response; None: it stays.
        tenant: Whose key it has.
    """

    endpoint: str
    model: str
    sources: tuple[str, ...]
    as_ids: bool
    options: tuple[tuple[str, Any], ...]
    n: int
    stream: bool
    leaves: int | None
    tenant: str

    @property
    def formatted(self) -> bool:
        """Whether the sources are put into the prefix's text format."""
        return self.model not in RAW and not self.as_ids

    @property
    def prompts(self) -> tuple[str, ...]:
        """What is continued: the sources, or a chat as one."""
        return self.sources if self.endpoint != "chat" else self.sources[:1]

    @property
    def path(self) -> str:
        return ROUTES[self.endpoint].format(name=self.model)

    def rules(self) -> dict[str, Any]:
        """The options in the words of `generate`, with the defaults of the server and of the prefix's task."""
        options = dict(self.options)
        task = TASKS[PREFIXES[self.model]["task"]].decoding if self.formatted else {}
        length = options.get("max_tokens", min(task.get("max_new_tokens", DEFAULT_LENGTH), LONGEST))
        return {
            "max_new_tokens": length,
            "min_new_tokens": options.get("min_tokens", min(task.get("min_new_tokens", 0), length)),
            "ban_newlines": bool(task.get("ban_newlines")),
            "stop": tuple(options.get("stop", ())),
            "repetition_penalty": options.get("repetition_penalty", 1.0),
        }

    def drawing(self) -> dict[str, Any]:
        """The options of sampling; empty: every text is the likeliest one."""
        options = dict(self.options)
        if options["temperature"] == 0 or options.get("top_k") == 1:
            return {}
        return {name: options[name] for name in ("temperature", "top_k", "top_p", "seed") if name in options}


# --- requests at random -----------------------------------------------------------------------------------------------


def draw_source(draw: random.Random) -> str:
    length = draw.choice((1, 3, 10, 30, 60, 120, 200))
    return "x" + "".join(draw.choices(LETTERS, k=draw.randint(0, length)))


def draw_case(draw: random.Random, sources: list[str]) -> Case:
    endpoint = draw.choice(("completion", "completion", "chat", "task"))
    model = draw.choice([name for name in (*PREFIXES, MODEL) if endpoint != "task" or name not in RAW])
    count = draw.choice((1, 1, 1, 2, 3)) if endpoint == "completion" or (endpoint, model) in WITH_TEMPLATE else 1
    options: dict[str, Any] = {"temperature": draw.choice((0.0, 0.0, 0.0, 0.7, 1.0, 1.5))}
    if draw.random() < 0.9:
        options["max_tokens"] = draw.choice((1, 2, 5, 9, 16, LONGEST))
    if draw.random() < 0.2:
        options["min_tokens"] = min(draw.choice((1, 4, 8)), options.get("max_tokens", DEFAULT_LENGTH))
    if draw.random() < 0.2:
        options["repetition_penalty"] = draw.choice((0.8, 1.3))
    if options["temperature"]:
        # With the likeliest token alone to choose from, sampling is what `generate` does without it.
        options |= draw.choice(({"top_k": 1}, {"top_k": 1, "seed": 3}, {"seed": draw.randint(-9, 9)}))
        options |= draw.choice(({}, {"top_p": 0.9}, {"top_k": options.get("top_k", 20)}))
    return Case(
        endpoint=endpoint,
        model=model,
        sources=tuple(draw.choices(sources, k=count)),
        as_ids=endpoint == "completion" and draw.random() < 0.2,
        options=tuple(sorted(options.items())),
        n=1 if endpoint == "task" else draw.choice((1, 1, 1, 2, 4)),
        stream=draw.random() < 0.5,
        leaves=draw.choice((0, 1, 2, 5)) if draw.random() < 0.15 else None,
        tenant=draw.choice(TENANTS),
    )


WITH_TEMPLATE = {("chat", model) for model in RAW}
"""Chats in the backbone's own template: they may have several messages."""


def body_of(case: Case, backbone: Any) -> dict[str, Any]:
    body: dict[str, Any] = {**dict(case.options)}
    if case.stream:
        body["stream"] = True
    if case.endpoint == "task":
        return {**body, "source": case.sources[0]}
    if case.n > 1:
        body["n"] = case.n
    if case.stream and len(case.sources[0]) % 2:
        body["stream_options"] = {"include_usage": True}
    if case.endpoint == "chat":
        return {**body, "model": case.model, "messages": chat_messages(case)}
    prompts: list[Any] = [backbone.encode(source) if case.as_ids else source for source in case.sources]
    return {**body, "model": case.model, "prompt": prompts[0] if len(prompts) == 1 else prompts}


# --- what the texts should be -----------------------------------------------------------------------------------------


class Reference:
    """The texts by `generate`, and those drawn from a seed by an engine that has nothing else to do."""

    def __init__(self, backbone: Any, folder: Path) -> None:
        self.backbone = backbone
        self.prefixes: dict[str, Any] = {
            name: load_prefix(folder / f"{name}.safetensors", backbone) for name in PREFIXES
        }
        self.prefixes[MODEL] = None

    def prompts(self, case: Case) -> list[list[int]]:
        """Token ids of each text's prompt."""
        if case.formatted:
            text_format = read_text_format(self.prefixes[case.model].header)
            return encode_prompts(self.backbone, text_format, case.sources)
        if case.endpoint == "chat":
            messages = chat_messages(case)
            text = "".join(f"[{message['role']}]{message['content']}</s>" for message in messages)
            return [self.backbone.encode(f"{text}[assistant]")]
        return [self.backbone.encode(source) for source in case.sources]

    def texts(self, cases: Sequence[Case]) -> list[list[str]]:
        """The texts of every case, in order; texts with the same rules in one call of `generate`."""
        texts: dict[int, list[str]] = {}
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, case in enumerate(cases):
            if case.drawing():
                texts[index] = [text for prompt in self.prompts(case) for text in self._drawn(case, prompt)]
            else:
                groups.setdefault((case.formatted, *case.rules().items()), []).append(index)
        for indices in groups.values():
            written = iter(self._greedy([cases[index] for index in indices]))
            for index in indices:
                texts[index] = [text for _ in cases[index].prompts for text in [next(written)] * cases[index].n]
        return [texts[index] for index in range(len(cases))]

    def _greedy(self, cases: Sequence[Case]) -> list[str]:
        """The text of every prompt of cases with the same rules."""
        rules = cases[0].rules()
        prefixes = [self.prefixes[case.model] for case in cases for _ in case.prompts]
        if cases[0].formatted:
            return generate(self.backbone, [source for case in cases for source in case.sources], prefixes, **rules)
        prompts = [prompt for case in cases for prompt in self.prompts(case)]
        outputs = generate_ids(self.backbone, prompts, prefixes, config=GenerateConfig(**rules))
        return [text_until_stop(self.backbone.decode, ids, rules["stop"]) for ids in outputs]

    def _drawn(self, case: Case, prompt: list[int]) -> list[str]:
        """The texts that are sampled from the case's seed after one prompt."""
        prefix, rules = self.prefixes[case.model], case.rules()
        banned = tuple(newline_tokens(self.backbone)) if rules.pop("ban_newlines") else ()
        sampling = SamplingParams(**rules, **case.drawing(), banned=banned)
        request = Request(tuple(prompt), prefix, sampling, n=case.n, verbatim=not case.formatted)
        (outputs,) = Engine(self.backbone).run([request])
        if not case.formatted:
            return [output.text for output in outputs]
        return [read_text_format(prefix.header).extract_target(output.text) for output in outputs]


def with_stop(case: Case, texts: list[str], draw: random.Random) -> Case:
    """The case with stop strings, of which one is in its text."""
    text = draw.choice(texts)
    if len(text) < 4:
        return case
    start = draw.randrange(1, len(text) - 1)
    stops = ["nowhere in any text", text[start : start + draw.choice((1, 2, 3))]]
    # What may be half a character is no string that a client sends.
    if "\ufffd" in stops[1]:
        return case
    return replace(case, options=(*case.options, ("stop", stops[draw.randrange(2) :])))


def chat_messages(case: Case) -> list[dict[str, str]]:
    """A chat that ends with the user's message."""
    roles = (("user",), ("system", "user"), ("user", "assistant", "user"))[len(case.sources) - 1]
    return [{"role": role, "content": source} for role, source in zip(roles, case.sources, strict=True)]
