"""Generate texts, each with its own prefix, mixed in one running batch: greedy, sampling, or beam search."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone
from prefixtune.backbone.prefixes import PrefixLike, as_prefix, load_prefix
from prefixtune.data.chat import Source
from prefixtune.data.encoding import TextFormatLike, as_text_format, check_texts
from prefixtune.engine.base import Engine
from prefixtune.engine.engine import TorchEngine
from prefixtune.engine.request import Request, SamplingParams, SequenceOutput, Token, join_outputs
from prefixtune.errors import BackboneError, ConfigError, PrefixError, RequestError, short_repr
from prefixtune.inference.beams import search, seed_of
from prefixtune.inference.config import GenerateConfig, texts_at_once
from prefixtune.inference.prompts import Prompt, check_requests, newline_tokens, prepare_prompts
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.prefix.prefix import Prefix
from prefixtune.sampling.config import SamplingConfig
from prefixtune.sampling.detokenizer import Detokenizer
from prefixtune.sampling.grammar import compile_json_schema
from prefixtune.utils.console import show_batches

_CPU_PREFILL_TOKENS = 1024
"""Prompt tokens of a step: more than in a server, where streams wait for them; on a GPU, as many as there."""
_MOVED_BYTES = 2**30
"""Of several prefixes that go to the backbone's device at once; if they have more, each goes there with its text."""


def generate(
    backbone: BackboneLike,
    texts: Sequence[Source],
    prefix: PrefixLike | Sequence[PrefixLike | None] | None = None,
    *,
    text_format: TextFormatLike | None = None,
    config: GenerateConfig | Mapping[str, Any] | None = None,
    engine: Engine | None = None,
    on_batch: Callable[[int], None] | None = None,
    on_cut: Callable[[Sequence[int]], None] | None = None,
    on_unended: Callable[[Sequence[int]], None] | None = None,
    progress: bool = False,
    **options: Any,
) -> list[str]:
    """Continue texts, each with its own prefix.

    Args:
        backbone: The frozen model: a `Backbone`, a name or path (loaded for this call), or a (model, tokenizer) pair.
        texts: Sources, as in training (linearized, without separators); or conversations, each a list of messages with
            `role` and `content`, of which the last is the user's. With a prefix that was trained with a chat template,
            a text is one user message.
        prefix: One for all texts, one per text, or None; within a list, None leaves that text to the bare model. A
            prefix is a `Prefix`, a path, or a repository of the hub.
        text_format: The text around a source: a `TextFormat`, or a dict of its fields; None: what each prefix was
            trained with, by its header.
        config: How to decode: a `GenerateConfig`, or a dict of its fields.
        engine: An open engine of this backbone, such as `engine.llama_cpp.LlamaCppEngine`; None: torch, for this call.
        on_batch: Called with the number of texts that are done, as they are.
        on_cut: Called before the work with the indices of the truncated sources, if there are any; None: a warning
            says so.
        on_unended: Called after the work with the indices of the outputs that took all tokens they may have and did not
            end, if there are any.
        progress: Show the progress on stderr.
        **options: Fields of `GenerateConfig`, instead of `config`.

    Returns:
        One output per text, in order, stripped of outer space.

    Raises:
        RequestError: A text with its prefix does not fit the backbone's positions (before any work is done), or the
            counts differ.
        BackboneError: A prefix does not fit the backbone.
        CheckpointError: A prefix cannot be read.
        ConfigError: A wrong option, or an argument of a wrong type.
        PrefixError: The model's logits are not finite.
    """
    config = GenerateConfig.from_arguments(config, options)
    texts = check_texts(texts)
    backbone = backbone_of(engine, as_backbone(backbone))
    prefixes = _per_text(prefix, len(texts), backbone)
    prompts = prepare_prompts(backbone, texts, prefixes, config, as_text_format(text_format), on_cut=on_cut)
    results = [""] * len(texts)
    unended = []
    with show_batches("generating", len(texts), on_batch, progress) as show:
        for done, (number, output) in enumerate(complete(backbone, prompts, config, engine=engine), start=1):
            results[number] = prompts[number].text_format.extract_target(output.text)
            if output.finish_reason == "length":
                unended.append(number)
            if show is not None:
                show(done)
    if unended and on_unended is not None:
        on_unended(sorted(unended))
    return results


def generate_ids(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    prefixes: Sequence[Prefix | None],
    *,
    config: GenerateConfig,
    ends: Sequence[Sequence[int]] = (),
) -> list[list[int]]:
    """`generate` on token ids: what follows each prompt, without the end token.

    The results are in the order of the prompts. `ends` are the tokens, besides the tokenizer's end token, at which each
    text ends.
    """
    rows = zip(prompts, prefixes, ends or [()] * len(prompts), strict=True)
    made = [Prompt(list(ids), prefix, config.max_new_tokens, tuple(own)) for ids, prefix, own in rows]
    check_requests(backbone, made)
    outputs = dict(complete(backbone, made, config))
    return [[token.id for token in outputs[number].tokens] for number in range(len(made))]


def stream(
    backbone: BackboneLike,
    text: Source,
    prefix: PrefixLike | None = None,
    *,
    text_format: TextFormatLike | None = None,
    config: GenerateConfig | Mapping[str, Any] | None = None,
    engine: Engine | None = None,
    on_cut: Callable[[Sequence[int]], None] | None = None,
    **options: Any,
) -> Generator[str, None, None]:
    """Continue one text, or answer one conversation, yielding pieces as they become certain.

    Joined, they are `generate`'s output. Arguments as for `generate`; beam search cannot stream. A model that the
    engine cannot run, such as a hybrid with state-space layers, yields its output as one piece.

    Raises:
        ConfigError: The configuration uses beam search.
    """
    config = GenerateConfig.from_arguments(config, options)
    check_streams(config)
    (text,) = check_texts([text])
    backbone = backbone_of(engine, as_backbone(backbone))
    prefixes = [as_prefix(prefix, backbone)]
    (prompt,) = prepare_prompts(backbone, [text], prefixes, config, as_text_format(text_format), on_cut=on_cut)
    pieces: Iterator[str] = (output.text for _, output in write(backbone, [prompt], config, engine=engine))
    if any(prompt.text_format.target_words):
        # Words around the target can only be removed from the whole output.
        pieces = iter([prompt.text_format.extract_target("".join(pieces))])
    yield from filter(None, pieces)


def backbone_of(engine: Engine | None, backbone: Backbone) -> Backbone:
    """The backbone as an engine computes it, with no more positions than the engine has; None: torch's has them all.

    Raises:
        ConfigError: It is no open engine, or another backbone's.
    """
    if engine is None:
        return backbone
    if not isinstance(engine, Engine) or not fingerprints_match(engine.backbone.fingerprint, backbone.fingerprint):
        hint = "open one of this backbone, such as `TorchEngine(backbone)`."
        raise ConfigError(f"engine is {short_repr(engine)}, no open engine of {backbone.name!r}.", hint=hint)
    return engine.backbone


def check_streams(config: GenerateConfig) -> None:
    """Refuse a configuration that cannot stream.

    Raises:
        ConfigError: The configuration uses beam search.
    """
    if config.num_beams > 1:
        what = "beam search cannot stream: the best beam is known only at the end."
        raise ConfigError(what, hint="set num_beams to 1 (--num-beams 1).")


def complete(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    config: GenerateConfig,
    numbers: Sequence[int] | None = None,
    engine: Engine | None = None,
) -> Iterator[tuple[int, SequenceOutput]]:
    """`write`, but whole outputs, as they end."""
    parts: dict[int, list[SequenceOutput]] = {}
    for number, output in write(backbone, prompts, config, numbers, engine):
        parts.setdefault(number, []).append(output)
        if output.finish_reason is not None:
            yield number, join_outputs(parts.pop(number))


def write(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    config: GenerateConfig,
    numbers: Sequence[int] | None = None,
    engine: Engine | None = None,
) -> Iterator[tuple[int, SequenceOutput]]:
    """What follows prompts, as it is computed: the index of a prompt, and the next piece of its output.

    The engine writes. transformers' `generate` writes whole outputs where torch's engine cannot: beams, models that do
    not compute several texts in one row, and texts that may pass LongRoPE's limit.

    Args:
        backbone: The frozen model.
        prompts: Checked.
        config: How to decode. The engine draws a text by the seed and its index; transformers draws a batch
            by the seed and the batch's index among those of all prompts, whichever are wanted.
        numbers: Indices of the prompts that are wanted; None: all.
        engine: An open one, whose backbone it is (`backbone_of`); None: torch's, for this call.

    Raises:
        RequestError: Memory does not suffice for a text, which the message names; none is computed then.
        PrefixError: The logits of a text are not finite, or memory runs out in a step; the message names it.
        ConfigError: Beams are asked for of another engine, or a JSON schema where no engine can write.
    """
    wanted = range(len(prompts)) if numbers is None else numbers
    if engine is not None:
        if config.num_beams > 1:
            raise ConfigError("only the engine torch has beam search.", hint="set num_beams to 1 (--num-beams 1).")
        yield from _ask(engine, prompts, wanted, config)
        return
    mixed = [number for number in wanted if not prompts[number].passes(backbone.longrope_limit)]
    torch_engine = _torch_engine(backbone, [prompts[number] for number in mixed], config)
    apart = [number for number in wanted if not torch_engine or prompts[number].passes(backbone.longrope_limit)]
    if apart and config.response_schema:
        what = f"{backbone.name!r} writes by no JSON schema, as the engine cannot run it here."
        raise ConfigError(what, hint="leave it out.")
    if torch_engine is not None:
        with torch_engine:
            yield from _ask(torch_engine, prompts, mixed, config)
    for number, ids in search(backbone, prompts, apart, config):
        text = Detokenizer(backbone.decode, config.stop)
        pieces = []
        for token in ids:
            pieces.append(text.add(token))
            if text.stopped:
                break
        ended = text.stopped or len(ids) < prompts[number].new_tokens
        tokens, written = tuple(map(Token, ids[: len(pieces)])), "".join([*pieces, text.finish()])
        yield number, SequenceOutput(str(number), 0, tokens, written, "stop" if ended else "length")


def _torch_engine(backbone: Backbone, prompts: Sequence[Prompt], config: GenerateConfig) -> TorchEngine | None:
    """Torch's engine for these prompts; None: there is none, they ask for beams, or it cannot run the model."""
    if not prompts or config.num_beams > 1:
        return None
    lengths = [0 if prompt.prefix is None else max(prompt.prefix.lengths.values(), default=0) for prompt in prompts]
    longest = max(len(one.ids) + one.new_tokens + length for one, length in zip(prompts, lengths, strict=True))
    on_gpu = backbone.device.type != "cpu"
    num_slots = min(texts_at_once(config.batch_size, in_gpu_engine=on_gpu), len(prompts))
    prefill_tokens = 0 if on_gpu else _CPU_PREFILL_TOKENS
    try:
        return TorchEngine(backbone, num_slots=num_slots, max_length=longest, prefill_tokens=prefill_tokens)
    except BackboneError:
        return None


def _ask(
    engine: Engine, prompts: Sequence[Prompt], numbers: Sequence[int], config: GenerateConfig
) -> Iterator[tuple[int, SequenceOutput]]:
    """What an engine writes; all requests are checked before any is computed, and cancelled if nobody reads on."""
    backbone = engine.backbone
    rules = {name: getattr(config, name) for name in SamplingConfig.model_fields}
    rules["banned"] = newline_tokens(backbone) if config.ban_newlines else ()
    grammar = compile_json_schema(backbone, config.response_schema) if config.response_schema else None
    requests: dict[int, Request] = {}
    for number in numbers:
        prompt = prompts[number]
        least = min(config.min_new_tokens, prompt.new_tokens)
        own = {"max_new_tokens": prompt.new_tokens, "min_new_tokens": least, "seed": seed_of(config.seed, number)}
        sampling = SamplingParams(**{**rules, **own, "end_ids": prompt.ends})
        requests[number] = Request(tuple(prompt.ids), prompt.prefix, sampling, grammar=grammar)
        try:
            engine.check(requests[number])
        except RequestError as error:
            raise RequestError(f"text {number + 1}: {error.message}", hint=error.hint) from None
    asked = {request.id: number for number, request in requests.items()}
    outputs: SimpleQueue[SequenceOutput] = SimpleQueue()
    try:
        engine.submit_all(requests.values(), outputs.put)
        while asked:
            output = outputs.get()
            number = asked[output.request_id]
            if output.finish_reason == "error":
                hint = "use another prefix, shorten the text, or lower batch_size."
                raise PrefixError(f"text {number + 1}: {output.error}", hint=hint)
            if output.finish_reason is not None:
                del asked[output.request_id]
            yield number, output
    finally:
        for name in asked:
            engine.cancel(name)


def _per_text(
    prefix: PrefixLike | Sequence[PrefixLike | None] | None, count: int, backbone: Backbone
) -> list[Prefix | None]:
    """One prefix per text; each is read and checked once."""
    if isinstance(prefix, str) or not isinstance(prefix, Sequence):
        return [as_prefix(prefix, backbone)] * count
    if len(prefix) != count:
        what = f"{len(prefix)} prefixes for {count} texts."
        raise RequestError(what, hint="give one for all, or one (or None) per text.")

    def key(item: PrefixLike | None) -> object:
        return os.fspath(item) if isinstance(item, str | os.PathLike) else id(item)

    loaded = {name: load_prefix(item, backbone) for name, item in {key(i): i for i in prefix if i is not None}.items()}
    if sum(item.num_bytes for item in loaded.values()) <= _MOVED_BYTES:
        loaded = {name: item.to(device=backbone.device) for name, item in loaded.items()}
    return [None if item is None else loaded[key(item)] for item in prefix]
