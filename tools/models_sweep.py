"""Examine tiny random models of every type of the installed transformers, each in a process with limits.

The models of tests/zoo.py are made as described there, the others from their default configuration, reduced by
tests/tiny_config.py.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from prefixtune.attention.record import add_noise, prefix_from_tokens
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.convert import auto_class
from prefixtune.doctor.examine import examine
from prefixtune.errors import PrefixError, first_line
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from tiny_config import model_types, tiny_config
from zoo import ZOO, exists, make_model, make_tokenizer, random_model

SECONDS = 180
"""Most seconds for one model."""
MEMORY = 12 * 2**30
"""Most bytes of address space of a process, where the system can limit it."""
PARAMETERS = 20_000_000
"""Most parameters of a tiny model."""

Verdict = Literal["works", "works, but", "refused", "wrong", "traceback", "not built", "absent"]
FAULTS = ("wrong", "traceback")


@dataclass(frozen=True)
class Result:
    """The outcome for one model.

    Attributes:
        name: Its name in the zoo.
        model_type: Its name in transformers.
        kind: The zoo's kind.
        family: Well-known models of the type.
        sites: The sites for prefixes; empty for a model that was refused.
        verdict: `works`; `works, but` with a restriction, named in `note`; `refused` when it is loaded; `wrong`: it
            fails a check; `traceback`: an unexpected error; `not built` as a tiny model; `absent` from the installed
            transformers.
        note: The restriction, the reason, or what failed; or empty.
    """

    name: str
    model_type: str
    kind: str
    family: str
    sites: tuple[str, ...]
    verdict: Verdict
    note: str


def names_of_all() -> list[str]:
    """The zoo's names, and the other types of transformers."""
    known = {entry.model_type for entry in ZOO.values()}
    return [*ZOO, *(name for name in model_types() if name not in known)]


def examine_all(names: Sequence[str] = ()) -> Iterator[Result]:
    """Examine models of `names_of_all`, or all, as `prefixtune doctor` would, in two processes of their own."""
    waiting, tokenizer = list(names or names_of_all()), make_tokenizer()
    while waiting:
        # Its processes end with the block: also one that takes too long.
        with multiprocessing.get_context("spawn").Pool(min(2, len(waiting)), _limit) as pool:
            for name, pending in [(name, pool.apply_async(examine_one, (name, tokenizer))) for name in waiting]:
                try:
                    result = pending.get(SECONDS)
                except multiprocessing.TimeoutError:
                    reason = f"took more than {SECONDS} s, or its process ended"
                    result = Result(name, name, kind_of(name), "", (), "traceback", reason)
                waiting = waiting[1:]
                yield result
                if result.verdict == "traceback":
                    break


def _limit() -> None:
    """Bound what a process that examines models may take."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def kind_of(name: str) -> str:
    """The heading of a type."""
    return ZOO[name].kind if name in ZOO else model_types().get(name, "decoder")


def make_tiny(name: str, tokenizer: object) -> Any:
    """A tiny random model of a type: the zoo's, or one of the type's default configuration, reduced.

    Raises:
        ValueError: It is not tiny.
    """
    if name in ZOO:
        return make_model(name, tokenizer)
    config = tiny_config(name, tokenizer)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in auto_class(config).from_config(config).parameters())
    if count > PARAMETERS:
        raise ValueError(f"{count:,} parameters are too many")
    return random_model(auto_class(config), config)


def examine_one(name: str, tokenizer: object) -> Result:
    """Make a tiny model, load it as a backbone, run the doctor's comparisons on it, and let it generate."""
    model_type, kind, family = name, kind_of(name), ""
    if name in ZOO:
        model_type, family = ZOO[name].model_type, ZOO[name].family

    def result(verdict: Verdict, note: str = "", sites: tuple[str, ...] = ()) -> Result:
        return Result(name, model_type, kind, family, sites, verdict, note)

    if name in ZOO and not exists(name):
        return result("absent", "not in the installed transformers")
    try:
        model = make_tiny(name, tokenizer)
    except Exception as error:
        return result("not built", _one_line(error)[:200])
    try:
        backbone = Backbone.from_model(model, tokenizer, f"tiny-{name}")
    except PrefixError as error:
        return result("refused", error.message)
    except Exception as error:
        return result("traceback", f"loading: {_one_line(error)}")
    sites = tuple(backbone.layout.geometry)
    if name not in ZOO:
        kind = backbone.kind
    failed = [check for check in examine(backbone.model, backbone.layout) if not check.passed]
    try:
        continues = backbone.kind == "encoder" or greedy_is_right(backbone)
    except Exception as error:
        return result("traceback", f"generating: {_one_line(error)}", sites)
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        return result("wrong", f"{failed[0]}{more}", sites)
    if not continues:
        return result("wrong", "generated tokens are not the likeliest ones", sites)
    notes = list(backbone.layout.notes)
    if not backbone.layout.packable and backbone.kind != "encoder":
        notes.append("rows are padded, not packed")
    return result("works, but" if notes else "works", "; ".join(notes), sites)


@torch.no_grad()
def greedy_is_right(backbone: Backbone) -> bool:
    """Whether each token that is generated in a batch is the likeliest one after all before it, computed in full."""
    generator = torch.Generator().manual_seed(1)
    special = set(backbone.tokenizer.all_special_ids)
    ordinary = [token for token in range(min(backbone.vocab_size, len(backbone.tokenizer))) if token not in special]

    def draw(length: int) -> list[int]:
        return [ordinary[int(place)] for place in torch.randint(len(ordinary), (length,), generator=generator)]

    prompts = [draw(length) for length in (3, 5, 6)]
    ids = [torch.tensor([draw(length)]) for length in (5, 7)]
    first, second = (add_noise(prefix_from_tokens(backbone.model, backbone.layout, one), generator) for one in ids)
    prefixes = [first, None, second]
    config = GenerateConfig(max_new_tokens=5, min_new_tokens=5, batch_size=3)
    outputs = generate_ids(backbone, prompts, prefixes, config=config)
    for prompt, tokens, prefix in zip(prompts, outputs, prefixes, strict=True):
        if backbone.kind == "encoder-decoder":
            read = {"decoder_input_ids": torch.tensor([[backbone.decoder_start_id, *tokens[:-1]]])}
            logits = backbone.forward(torch.tensor([prompt]), prefixes=prefix, **read).logits[0]
        else:
            logits = backbone.forward(torch.tensor([[*prompt, *tokens[:-1]]]), prefixes=prefix).logits[0]
        scores = logits[-len(tokens) :].float()
        # The end token is excluded, and some encoder-decoders force the first token.
        scores[:, backbone.eos_id] = -torch.inf
        chosen = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        near = scores.max(1).values - chosen <= 1e-4 * scores[scores.isfinite()].abs().max()
        if not near[int(backbone.forced_bos_id is not None) :].all():
            return False
    return True


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
