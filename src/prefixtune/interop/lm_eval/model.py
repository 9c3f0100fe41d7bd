"""lm-eval's view of a backbone with prefixes: a class that it calls for log-likelihoods and texts.

Importing this module registers the class as `prefixtune`, so that `simple_evaluate(model="prefixtune", ...)` finds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from prefixtune.backbone.load import BackboneLike
from prefixtune.backbone.prefixes import PrefixLike
from prefixtune.data.chat import end_ids, special_stops
from prefixtune.data.encoding import encode_pairs, encode_prompts, format_of
from prefixtune.data.examples import Example
from prefixtune.errors import ConfigError, RequestError, short_repr
from prefixtune.inference.answers import digest_facts, model_facts
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from prefixtune.interop.lm_eval.likelihood import Continuation, score_continuations
from prefixtune.interop.lm_eval.loading import check_batch_size, load_fitting_backbone, load_prefixes, stored_chat
from prefixtune.interop.lm_eval.prompting import decoding_config, fill_template, keep_right
from prefixtune.interop.lm_eval.responses import Responses, request_key
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import MODEL_TEMPLATE, TextFormat, read_text_format
from prefixtune.utils.console import Console

__all__ = ["PrefixLM"]

_DEFAULT_POSITIONS = 2048
"""lm-eval's own default for models that do not say how many they have."""
_MOST_SHOWN = 5
"""Names of tasks in a message."""


@register_model("prefixtune")
class PrefixLM(TemplateLM):  # type: ignore[misc]
    """A backbone with prefixes as one of lm-eval's models.

    Without a prefix it answers as lm-eval's `hf` does with the same model. Log-likelihoods of several continuations of
    one context share its computation, and requests with different prefixes share a batch.

    Args:
        backbone: The frozen model: a `Backbone`, a name or path, or a (model, tokenizer) pair; None: the one that the
            prefix's header names.
        prefix: For all tasks: a `Prefix`, a path, or a repository of the hub; None: the bare model.
        task_prefixes: Task -> its own prefix, or None for the bare model. Groups are not resolved: name their tasks.
        prompt_format: `raw`: contexts are raw text behind the prefix, as `hf` reads them; `prefix`: a context is the
            source of the prefix's text format, and a continuation the target.
        batch_size: Requests that are computed together; `auto`: 16.
        max_batch_size: Most of them, whatever `batch_size` is.
        max_length: Positions of prefix and text together; None: as many as the backbone has.
        dtype: Of a backbone that is loaded by its name.
        device: Where that is loaded.
        allow_other_backbone: Accept a prefix that was trained for other weights of the same shapes.
        responses: A file of answers: new ones are kept there, and known ones taken from it.
        console: Shows progress.

    Raises:
        ConfigError: An option is wrong.
        BackboneError: The backbone is an encoder, or a prefix does not fit it.
        CheckpointError: A prefix cannot be read.
    """

    def __init__(
        self,
        backbone: BackboneLike | None = None,
        prefix: PrefixLike | None = None,
        *,
        task_prefixes: Mapping[str, PrefixLike | None] | None = None,
        prompt_format: str = "raw",
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        dtype: str = "auto",
        device: str = "auto",
        allow_other_backbone: bool = False,
        responses: str | Path | None = None,
        console: Console | None = None,
    ) -> None:
        super().__init__()
        if prompt_format not in ("raw", "prefix"):
            raise ConfigError(
                f"prompt_format is {short_repr(prompt_format)}, but must be 'raw' or 'prefix'.",
                hint="raw is what lm-eval's other models read.",
            )
        self.batch_size = check_batch_size(batch_size, max_batch_size)
        general, by_task, files = load_prefixes(prefix, task_prefixes or {})
        given = {id(one): one for one in (general, *by_task.values()) if one is not None}
        self.backbone, checked = load_fitting_backbone(
            backbone,
            list(given.values()),
            [files.get(key, one) for key, one in given.items()],
            dtype=dtype,
            device=device,
            allow_other_backbone=allow_other_backbone,
        )
        fitting = dict(zip(given, checked, strict=True))
        self.prefix = fitting.get(id(general))
        self.task_prefixes = {task: fitting.get(id(one)) for task, one in by_task.items()}
        known = list({id(one): one for one in (self.prefix, *self.task_prefixes.values())}.values())
        self.prompt_format = prompt_format
        self.tokenizer = self.backbone.tokenizer
        self.backend = "causal" if self.backbone.kind == "decoder" else "seq2seq"
        self._max_length = max_length
        self._device = self.backbone.device
        self._console = Console() if console is None else console
        self._responses = Responses(None if responses is None else Path(responses))
        facts = {**model_facts(self.backbone), "name": self.backbone.name, "settings": [prompt_format, max_length]}
        self._formats = {id(one): self._format_of(one) for one in known}
        self._ends = {id(one): self._ends_of(one) for one in known}
        self._digests = {id(one): digest_facts({**facts, **self._facts_of(one)}, one) for one in known}
        self._num_cut = 0
        self._seen: set[str] = set()

    # --- what lm-eval asks of the tokenizer and the model ---

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return self.backbone.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context begins with: the token of its beginning, else the end token."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def max_length(self) -> int:
        """Positions of prefix and text together."""
        config = self.backbone.model.config.get_text_config(decoder=True)
        limit = self._max_length or self.backbone.max_positions or getattr(config, "n_positions", None)
        return int(limit or _DEFAULT_POSITIONS)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer, for lm-eval's cache of requests."""
        return str(getattr(self.tokenizer, "name_or_path", "") or self.backbone.name).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, with the special tokens that lm-eval's `hf` has: none twice."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            options = {"add_special_tokens": False}
        ids: list[int] = self.tokenizer(string, verbose=False, **options)["input_ids"]
        return ids

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval's files say of the model; it asks once all tasks are done.

        Raises:
            ConfigError: A prefix is given for a name that no task had, while other tasks had no prefix of their own.
        """
        unused, others = self.task_prefixes.keys() - self._seen, sorted(self._seen - self.task_prefixes.keys())
        if unused and others:
            more = " ..." if len(others) > _MOST_SHOWN else ""
            raise ConfigError(
                f"a prefix is given for {', '.join(map(repr, sorted(unused)))}, but the tasks without one of their own "
                f"were {', '.join(map(repr, others[:_MOST_SHOWN]))}{more}.",
                hint="task_prefixes takes the names of tasks, not of groups; leave out what is not measured.",
            )
        return {
            "model_num_parameters": self.backbone.num_parameters,
            "model_dtype": self.backbone.dtype_name,
            "prefix_length": None if self.prefix is None else self.prefix.length(),
            "task_prefix_lengths": {
                task: None if one is None else one.length() for task, one in self.task_prefixes.items()
            },
            "prompt_format": self.prompt_format,
        }

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take lm-eval's own cache.

        Raises:
            ConfigError: There are several prefixes, which that cache does not tell apart.
        """
        if len(self._digests) > 1:
            raise ConfigError(
                f"lm-eval's cache does not tell prefixes apart, and here are {len(self._digests)} (or none for some "
                "tasks).",
                hint="leave use_cache out, and give PrefixLM a file of `responses`.",
            )
        super().set_cache_hook(cache_hook)

    # --- log-likelihoods ---

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """How likely each continuation is after its context, and whether greedy decoding would write it.

        Raises:
            RequestError: A continuation has more tokens than there are positions.
        """

        def compute(todo: list[int], keep: Callable[[dict[int, Any]], None]) -> None:
            asked = [self._continuation(requests[index]) for index in todo]
            # One without a token is certain.
            keep({index: (0.0, True) for index, one in zip(todo, asked, strict=True) if not one.tokens})
            scored = [(index, one) for index, one in zip(todo, asked, strict=True) if one.tokens]
            score_continuations(
                self.backbone,
                [one for _, one in scored],
                batch_size=self.batch_size,
                on_batch=lambda results: keep({scored[number][0]: result for number, result in results.items()}),
            )

        answers = self._answer("loglikelihood", requests, compute, disable_tqdm)
        return [(float(total), bool(greedy)) for total, greedy in answers]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """How likely each text is as a whole, in windows where it is longer than the model's positions."""

        def compute(todo: list[int], keep: Callable[[dict[int, Any]], None]) -> None:
            windows: list[tuple[int, Continuation]] = []
            for index in todo:
                prefix = self._prefix_of(requests[index])
                windows += [(index, one) for one in self._windows(requests[index].args[0], prefix)]
            left = Counter(index for index, _ in windows)
            sums = dict.fromkeys(todo, 0.0)
            keep({index: 0.0 for index in todo if not left[index]})

            def add(results: dict[int, tuple[float, bool]]) -> None:
                for number, (total, _) in results.items():
                    owner = windows[number][0]
                    sums[owner] += total
                    left[owner] -= 1
                done = {windows[number][0] for number in results}
                keep({index: sums[index] for index in done if not left[index]})

            score_continuations(self.backbone, [one for _, one in windows], batch_size=self.batch_size, on_batch=add)

        return [float(total) for total in self._answer("loglikelihood_rolling", requests, compute, disable_tqdm)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        asked = [self._fit(context, tokens, self.prefix) for _, context, tokens in requests]
        return score_continuations(self.backbone, asked, batch_size=self.batch_size)

    def _continuation(self, request: Any) -> Continuation:
        """A context and its continuation as token ids; a context that is too long is cut at its beginning."""
        context, continuation = request.args
        prefix = self._prefix_of(request)
        text_format = self._formats[id(prefix)]
        if text_format is not None:
            # The format has its own space before a target.
            example = Example(context, (continuation.strip(),))
            ((trained_prompt, trained_target),) = encode_pairs(self.backbone, text_format, [example])
            return self._fit(trained_prompt, trained_target, prefix, text_format, context)
        if context:
            prompt, target = self._encode_pair(context, continuation)
            return self._fit(prompt, target, prefix)
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        begins = tokens[:1] == [self.prefix_token_id]
        return self._fit(tokens[:1], tokens[1:], prefix) if begins else self._fit([], tokens, prefix)

    def _fit(
        self,
        context: Sequence[int],
        tokens: Sequence[int],
        prefix: Prefix | None,
        text_format: TextFormat | None = None,
        source: str = "",
    ) -> Continuation:
        room = self._room(prefix)
        if len(tokens) > room:
            raise RequestError(
                f"a continuation has {len(tokens):,} tokens, but {room:,} positions are there for it.",
                hint="choose a backbone with more positions, or a shorter prefix.",
            )
        # Nothing is computed at the last token.
        most = room if self.backend == "seq2seq" else room + 1 - len(tokens)
        kept = keep_right(self.backbone, text_format, source, context or [self.prefix_token_id], most)
        self._num_cut += len(kept) < len(context)
        return Continuation(kept, tuple(tokens), prefix)

    def _windows(self, text: str, prefix: Prefix | None) -> list[Continuation]:
        """A text in parts that fit the positions, each predicted once and as far as possible after the others."""
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self._room(prefix),
            context_len=1,
        )
        pairs = [make_disjoint_window(window) for window in windows]
        return [Continuation(tuple(context), tuple(tokens), prefix) for context, tokens in pairs]

    # --- texts ---

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context, up to one of its task's strings.

        Raises:
            RequestError: A task decodes in a way that is not known here, or asks for more tokens than fit.
            ConfigError: A value of its decoding is not allowed.
        """
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        configs = [decoding_config(request.args[1], end, self.batch_size) for request in requests]

        def compute(todo: list[int], keep: Callable[[dict[int, Any]], None]) -> None:
            prompts = {index: self._prompt(requests[index], configs[index]) for index in todo}
            # The longest first, so that too little memory shows at once; rows of a batch decode in one way.
            order = sorted(todo, key=lambda index: (repr(configs[index]), -len(prompts[index])))
            while order:
                config = configs[order[0]]
                batch = [index for index in order[: self.batch_size] if configs[index] == config]
                order = order[len(batch) :]
                prefixes = [self._prefix_of(requests[index]) for index in batch]
                special = special_stops(self.backbone, config.stop)
                outputs = generate_ids(
                    self.backbone,
                    [prompts[index] for index in batch],
                    prefixes,
                    config=config,
                    ends=[(*self._ends[id(prefix)], *special) for prefix in prefixes],
                )
                keep(
                    {
                        i: self._text(ids, config, prefix)
                        for i, ids, prefix in zip(batch, outputs, prefixes, strict=True)
                    }
                )

        sampled = [config.temperature > 0 for config in configs]
        return [str(text) for text in self._answer("generate_until", requests, compute, disable_tqdm, sampled)]

    def _prompt(self, request: Any, config: GenerateConfig) -> tuple[int, ...]:
        """A context as token ids, cut at its beginning where it leaves no room for the new tokens."""
        prefix = self._prefix_of(request)
        text_format = self._formats[id(prefix)]
        room = self._room(prefix) - (config.max_new_tokens if self.backend == "causal" else 0)
        if room <= 0:
            raise RequestError(
                f"the task {request.task_name!r} asks for {config.max_new_tokens:,} new tokens, but there are "
                f"{self._room(prefix):,} positions for context and new tokens.",
                hint="lower max_gen_toks, in the task's generation_kwargs.",
            )
        context = request.args[0]
        ids = (
            self.tok_encode(context)
            if text_format is None
            else encode_prompts(self.backbone, text_format, [context])[0]
        )
        kept = keep_right(self.backbone, text_format, context, ids or [self.prefix_token_id], room)
        self._num_cut += len(kept) < len(ids)
        return kept

    def _text(self, ids: list[int], config: GenerateConfig, prefix: Prefix | None) -> str:
        """The text of new tokens up to the first string that ends it."""
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        for stop in config.stop:
            text = text.split(stop)[0]
        text_format = self._formats[id(prefix)]
        return text if text_format is None else text_format.extract_target(text)

    # --- chat ---

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, by the chat template; one that refuses a system message gets none.

        Raises:
            ConfigError: The prefixes were trained with different templates.
            RequestError: The template refuses the messages.
        """
        stored, messages = self._stored_chat(), list(chat_history)
        if stored is not None and stored.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": stored.system}, *messages]
        try:
            return fill_template(self.tokenizer, stored, messages, add_generation_prompt)
        except RequestError:
            without_system = [message for message in messages if message["role"] != "system"]
            if len(without_system) == len(messages):
                raise
            return fill_template(
                self.tokenizer,
                None if stored is None else replace(stored, system=""),
                without_system,
                add_generation_prompt,
            )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the template that `apply_chat_template` fills in; None: none is asked for.

        It is the one that the prefixes were trained with, else the model's own.

        Raises:
            ConfigError: The prefixes were trained with different ones.
        """
        if not chat_template:
            return None
        stored = self._stored_chat()
        if stored is not None and stored.chat_template != MODEL_TEMPLATE:
            return stored.chat_template
        return self.tokenizer.get_chat_template() if self.tokenizer.chat_template else None

    def _stored_chat(self) -> TextFormat | None:
        return stored_chat([self.prefix, *self.task_prefixes.values()])

    # --- shared ---

    def _answer(
        self,
        kind: str,
        requests: Sequence[Any],
        compute: Callable[[list[int], Callable[[dict[int, Any]], None]], None],
        quiet: bool,
        sampled: Sequence[bool] = (),
    ) -> list[Any]:
        """One answer per request: known ones, and those that `compute` gives to its second argument, by index.

        Sampled answers are drawn anew each time, and not kept.
        """
        self._seen.update(request.task_name for request in requests)
        keys = [request_key(self._digests[id(self._prefix_of(request))], kind, request.args) for request in requests]
        kept = [not drawn for drawn in sampled] or [True] * len(keys)
        answers = {i: self._responses[key] for i, key in enumerate(keys) if kept[i] and key in self._responses}
        todo = [index for index in range(len(requests)) if index not in answers]
        self._num_cut = 0
        console = Console(quiet=True) if quiet else self._console
        with console.progress(kind.replace("_", " "), len(todo)) as bar:
            start = len(answers)

            def keep(new: dict[int, Any]) -> None:
                answers.update(new)
                self._responses.add({keys[index]: answer for index, answer in new.items() if kept[index]})
                for index, answer in new.items():
                    self.cache_hook.add_partial(kind, requests[index].args, answer)
                bar.update(len(answers) - start)

            compute(todo, keep)
        if self._num_cut:
            console.warn(
                f"{self._num_cut:,} of {len(todo):,} contexts were too long for {self.max_length:,} positions, and cut "
                "at their beginning."
            )
        return [answers[index] for index in range(len(requests))]

    def _prefix_of(self, request: Any) -> Prefix | None:
        return self.task_prefixes.get(request.task_name, self.prefix)

    def _format_of(self, prefix: Prefix | None) -> TextFormat | None:
        """The text format around a prefix's contexts; None: they are raw text."""
        raw = prefix is None or self.prompt_format == "raw"
        return None if raw else format_of(self.backbone, prefix)

    def _ends_of(self, prefix: Prefix | None) -> tuple[int, ...]:
        """The tokens that end an answer; after raw text, which may be a chat, that of the prefix's own template."""
        text_format = self._formats[id(prefix)]
        if text_format is None and prefix is not None:
            stored = read_text_format(prefix.header)
            text_format = stored if stored is not None and stored.is_chat else None
        return end_ids(self.backbone, text_format)

    def _facts_of(self, prefix: Prefix | None) -> dict[str, Any]:
        """What responses behind a prefix depend on, besides its numbers."""
        ends, usual = self._ends[id(prefix)], end_ids(self.backbone, self._formats[id(prefix)])
        return {"ends": ends} if ends != usual else {}

    def _room(self, prefix: Prefix | None) -> int:
        """Positions for text behind a prefix."""
        length = 0 if prefix is None else prefix.length()
        limit = self.backbone.max_positions_with(length)
        return min(self.max_length, limit or self.max_length) - self.backbone.prefix_positions(length)
