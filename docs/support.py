"""Write docs/models.md and the list of verified types: which model types carry prefixes (`make models`).

Every causal, encoder-decoder and masked type of the installed transformers is examined on a tiny random model: those of
tests/zoo.py as they stand there, the others by their default configuration, cut down (tests/tiny_config.py). Each has
its time and its memory; exits 1 if a model gives wrong results or a traceback.

python docs/support.py                 examine all of them, about ten minutes, and write page and list
python docs/support.py gpt2 t5 bert    examine these only, and print their table
python docs/support.py --json ...      print every check as JSON instead; writes nothing
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from prefixtune.backbone.backbone import Backbone
    from prefixtune.doctor.examine import Check

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "models.md"
LIST = DOCS.parent / "src" / "prefixtune" / "verified.py"
COMMAND = "make models"

SECONDS = 180
"""How long one model may take."""
MEMORY = 12 * 2**30
"""How much address space a process of the sweep may take, where the system can bound it."""
PARAMETERS = 20_000_000
"""How large a model may be for it to count as tiny."""

sys.path.insert(0, str(DOCS.parent / "tests"))

Verdict = Literal["works", "works, but", "refused", "wrong", "traceback", "not built", "absent"]
FAULTS = ("wrong", "traceback")

KINDS = {
    "decoder": "Decoder-only models",
    "hybrid": "Hybrids and state-space models",
    "encoder-decoder": "Encoder-decoders",
    "encoder": "Encoders",
}
"""The zoo's kinds, and the headings they stand under."""

HARMLESS = "dropout stays off in training mode"
"""A check that routers of experts fail which draw at random in training mode: frozen models are never put into it."""

INTRODUCTION = """# Models

Which types of model carry a prefix. Each row is a tiny model of that type with random weights, put through the checks
of `prefixtune doctor`: the prefix reaches every attention layer and takes a gradient there; padding, batching and
caching change no number; generation uses the prefix; the model stays bit for bit as it was.

| verdict | meaning |
|---|---|
| works | every check passes |
| works, but | every check passes; the note says what is missing or goes another way |
| refused | a prefix would not reach its attention correctly: loading stops with the message in the note |
| wrong, traceback | a check fails, or loading stops with an unexpected error: a fault of this project |
| not built | no tiny model of it could be made; the self-check decides when one is loaded |
| absent | the installed transformers has no such type |

A site is where a prefix stands: in front of the decoder's self-attention, of the encoder's, or of the decoder's
attention to the encoder (cross). Rows that are padded instead of packed, and prefixes that every decoding step puts in
front instead of finding them in the cache, cost time and change no number. A type says how a model attends, not how
well it learns. A model of your own is examined with `prefixtune doctor your/model`, which uses its real weights.

The types that work form a list in the code, for the version of transformers named below. A model of any other type, or
with another version, goes through a quick self-check when it is first loaded: cached decoding with a prefix is compared
with full recomputation, and a gradient must reach every layer's prefix. It takes about eight calls on a few tokens.
That it passed is remembered in the cache folder (`$PREFIXTUNE_HOME`) for this type, configuration, dtype, device,
attention kernel and these versions; a model that fails is refused with the reason. `PREFIXTUNE_SELF_CHECK=0` turns it
off, for those who have looked at `prefixtune doctor` and know better."""


@dataclass(frozen=True)
class Result:
    """What came of one model.

    Attributes:
        name: Its name in the zoo.
        model_type: As transformers calls it.
        kind: The zoo's kind.
        family: Well-known models of the type.
        sites: Where a prefix can stand; empty for a model that was refused.
        verdict: `works`; `works, but` with a restriction that `note` tells; `refused` when it is loaded; `wrong`: it
            fails a check; `traceback`: an unexpected error; `not built` as a tiny model; `absent` from the installed
            transformers.
        note: The restriction, the reason, or what failed; empty where there is nothing to say.
        checks: Every check that was made.
    """

    name: str
    model_type: str
    kind: str
    family: str
    sites: tuple[str, ...]
    verdict: Verdict
    note: str
    checks: tuple[Check, ...] = ()


def names_of_all() -> list[str]:
    """The zoo's names, and the other types of transformers."""
    from tiny_config import model_types
    from zoo import ZOO

    known = {entry.model_type for entry in ZOO.values()}
    return [*ZOO, *(name for name in model_types() if name not in known)]


def examine_all(names: Sequence[str] = (), *, on_result: Callable[[Result], None] | None = None) -> list[Result]:
    """Examine models as `prefixtune doctor` would, in processes of their own, two at a time.

    Args:
        names: Names of `names_of_all`; none: all.
        on_result: Told of every result as soon as it is there.
    """
    results: dict[str, Result] = {}
    waiting = list(names or names_of_all())[::-1]
    order = waiting[::-1]
    workers = [_Worker() for _ in range(min(2, len(waiting)))]
    try:
        while waiting or any(worker.name for worker in workers):
            for worker in workers:
                if not worker.name and waiting:
                    worker.begin(waiting.pop())
                result = worker.poll()
                if result is not None:
                    results[result.name] = result
                    if on_result is not None:
                        on_result(result)
    finally:
        for worker in workers:
            worker.stop()
    return [results[name] for name in order]


class _Worker:
    """A process that examines one model after the other, and is replaced where one takes too long or kills it."""

    def __init__(self) -> None:
        self.name = ""
        self._process: Any = None
        self._waited = 0.0

    def begin(self, name: str) -> None:
        """Examine a model."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        self.name, self._waited = name, 0.0
        self._pipe.send(name)

    def poll(self, seconds: float = 0.2) -> Result | None:
        """The result, once it is there."""
        if not self.name:
            return None
        reason = f"took more than {SECONDS} s"
        try:
            if self._pipe.poll(seconds):
                result: Result = self._pipe.recv()
                self.name = ""
                return result
            self._waited += seconds
            if self._waited < SECONDS:
                return None
        except (EOFError, OSError):
            reason = "the process ended"
        failed = Result(self.name, self.name, kind_of(self.name), "", (), "traceback", reason)
        self.stop()
        return failed

    def stop(self) -> None:
        """End the process."""
        self.name = ""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _work(pipe: Any) -> None:
    """What a process of the sweep does."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    import torch

    from zoo import make_tokenizer

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tokenizer = make_tokenizer()
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        pipe.send(examine_one(name, tokenizer))


def kind_of(name: str) -> str:
    """Under which heading a type stands."""
    from tiny_config import model_types
    from zoo import ZOO

    return ZOO[name].kind if name in ZOO else model_types().get(name, "decoder")


def make(name: str, tokenizer: object) -> Any:
    """A tiny random model of a type: the zoo's, or by the type's default configuration, cut down.

    Raises:
        ValueError: It is not tiny.
    """
    import torch

    from prefixtune.backbone.load import auto_class
    from tiny_config import tiny_config
    from zoo import ZOO, make_model, random_model

    if name in ZOO:
        return make_model(name, tokenizer)
    config = tiny_config(name, tokenizer)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in auto_class(config).from_config(config).parameters())
    if count > PARAMETERS:
        raise ValueError(f"{count:,} parameters are too many")
    return random_model(auto_class(config), config)


def examine_one(name: str, tokenizer: object) -> Result:
    """Make a tiny model, load it as a backbone, and run the doctor's checks on it."""
    from prefixtune.backbone.backbone import Backbone
    from prefixtune.doctor.examine import examine
    from prefixtune.errors import PrefixError
    from zoo import ZOO, exists

    model_type, kind, family = name, kind_of(name), ""
    if name in ZOO:
        model_type, family = ZOO[name].model_type, ZOO[name].family

    def result(verdict: Verdict, note: str = "", sites: tuple[str, ...] = (), checks: tuple[Check, ...] = ()) -> Result:
        return Result(name, model_type, kind, family, sites, verdict, note, checks)

    if name in ZOO and not exists(name):
        return result("absent", "not in the installed transformers")
    try:
        model = make(name, tokenizer)
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
    try:
        checks = tuple(examine(backbone))
    except Exception as error:
        return result("traceback", f"examining: {_one_line(error)}", sites)
    failed = [check for check in checks if not check.passed and check.name != HARMLESS]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        return result("wrong", f"{failed[0].name}: {failed[0].detail}{more}", sites, checks)
    notes = restrictions(backbone)
    if not all(check.passed for check in checks):
        notes.append("`.train()`, which nothing here calls, changes its numbers")
    return result("works, but" if notes else "works", "; ".join(notes), sites, checks)


def restrictions(backbone: Backbone) -> list[str]:
    """What a backbone lacks, or does another way than most of its kind."""
    layout = backbone.layout
    notes = list(layout.notes)
    if not layout.packable and layout.kind != "encoder":
        notes.append("rows are padded, not packed")
    if layout.cache_layers is None and layout.kind == "decoder":
        notes.append("generation injects the prefix")
    if not layout.forwards_kwargs:
        notes.append("no gradient checkpointing")
    return notes


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# --- the page --------------------------------------------------------------------------------------------------------


def models_page(results: Sequence[Result]) -> str:
    """The page, in Markdown."""
    import torch
    import transformers

    working = sum(result.verdict in ("works", "works, but") for result in results)
    versions = f"transformers {transformers.__version__} and torch {torch.__version__}"
    counts = ", ".join(f"{sum(r.verdict == v for r in results)} {v}" for v in ("refused", "not built", *FAULTS))
    summary = f"{working} of {len(results)} work ({counts}), with {versions}. Written by `{COMMAND}`."
    parts = [INTRODUCTION, "", summary]
    for kind, heading in KINDS.items():
        rows = [result for result in results if result.kind == kind]
        if rows:
            parts += ["", f"## {heading}", "", *table(rows)]
    return "\n".join([*parts, ""])


def table(results: Sequence[Result]) -> list[str]:
    """The rows of a table, its heading first."""
    lines = ["| model type | such as | sites | verdict | note |", "|---|---|---|---|---|"]
    for result in results:
        variant = result.name.removeprefix(result.model_type).lstrip("-")
        shown = f"`{result.model_type}`" + (f" ({variant})" if variant else "")
        cells = (shown, result.family, ", ".join(result.sites) or "-", result.verdict, result.note)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def verified(results: Sequence[Result]) -> list[str]:
    """The types of which every model works, in order."""
    works = {result.model_type for result in results if result.verdict in ("works", "works, but")}
    return sorted(works - {result.model_type for result in results if result.verdict not in ("works", "works, but")})


def verified_list(results: Sequence[Result]) -> str:
    """The list in the code, as Python."""
    import transformers

    return f'''"""The model types that carry prefixes. Written by `make models` (docs/support.py): do not edit."""

from __future__ import annotations

__all__ = ["VERIFIED", "VERIFIED_WITH"]

VERIFIED_WITH = "{transformers.__version__}"
"""The version of transformers that they were examined with."""

VERIFIED = frozenset(
    {{
{chr(10).join(f'        "{name}",' for name in verified(results))}
    }}
)
"""Types of which every tiny random model passes all checks of `prefixtune doctor`."""
'''


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine, and write or print; exits 1 if a model gives wrong results or a traceback."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Examine tiny models of many types.", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="TYPE", help="model types, or names in tests/zoo.py (default: all)")
    parser.add_argument("--json", action="store_true", help="print every check as JSON; writes no page")
    options = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    known = names_of_all()
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; choose from {', '.join(known)}")

    def show(result: Result) -> None:
        print(f"{result.name:26}{result.verdict:12}{result.note[:140]}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        # Nothing that was remembered counts here.
        os.environ["PREFIXTUNE_HOME"] = folder
        results = examine_all(options.names, on_result=show)
    if options.json:
        print(json.dumps(report(results), indent=1, ensure_ascii=False))
    elif options.names:
        print("\n".join(table(results)))
    else:
        PAGE.write_text(models_page(results), encoding="utf-8")
        LIST.write_text(verified_list(results), encoding="utf-8")
        print(f"wrote {PAGE} and {LIST}", file=sys.stderr)
    for verdict in FAULTS:
        print(f"{verdict}: {', '.join(r.name for r in results if r.verdict == verdict) or 'none'}", file=sys.stderr)
    return int(any(result.verdict in FAULTS for result in results))


def report(results: Sequence[Result]) -> dict[str, object]:
    """Every result with its checks, and the versions they hold for; to be written as JSON."""
    import torch
    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return {"command": COMMAND, **versions, "models": [asdict(result) for result in results]}


if __name__ == "__main__":
    sys.exit(main())
