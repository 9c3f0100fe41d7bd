"""Other prefixes that stand beside the one that trains, so that it can be joined later.

Each sample sees its run's prefix alone, or with others that are drawn for it. All of them stand at the same positions,
right before the text: their order means nothing, and each is as near as it is alone. Gradients reach every part that
trains: it learns to answer, and to be silent where another answers (after Cartridges at Scale, arXiv 2606.04557). Who
stands beside is a function of the seed, the step and the sample.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.batch import Front
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data.encoding import encode_examples
from prefixtune.data.examples import Example
from prefixtune.data.tokenized import TokenizedExample, longest_text
from prefixtune.errors import CheckpointError, ConfigError
from prefixtune.prefix.compose import check_joinable, join
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix, content_hash
from prefixtune.prefix.rotation import Rotation
from prefixtune.prefix.text_format import read_text_format
from prefixtune.training.config import TrainConfig
from prefixtune.training.data import TrainData
from prefixtune.training.run_folder import PREFIX_FILE

SELF = "self"
"""The runs that train together."""

ALONE_RATE = 0.4
"""Share of the samples that see their run's prefix alone."""
ALL_RATE = 0.7
"""Of the other samples, share of those that see all others; the rest see a random number of them."""
_OWN_PER_QUESTION = 3
"""Examples of its own that a run has for each question of others, at least."""
_PER_POSITION = 8
"""Positions of a prefix, in a company of its own, that take as much memory as one of a text."""


# --- files -----------------------------------------------------------------------------------------------------------


def find_files(beside: str, output: str) -> list[Path | str]:
    """The files that `beside` names: a file, a run, hub:OWNER/NAME, or all files and runs of a folder but `output`.

    Raises:
        CheckpointError: A folder without a prefix.
    """
    folder = Path(beside)
    if not folder.is_dir() or (folder / PREFIX_FILE).is_file():
        return [beside]
    files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    runs = sorted(path for path in folder.glob(f"*/{PREFIX_FILE}") if not path.parent.name.startswith("."))
    own = Path(output).resolve()
    found: list[Path | str] = [*files, *(path for path in runs if path.parent.resolve() != own)]
    if not found:
        raise CheckpointError(
            f"there is no prefix in the folder {beside!r}.",
            hint="name a folder of .safetensors files or of runs, a file, or self (with --together).",
        )
    return found


def load_others(config: TrainConfig, backbone: Backbone) -> list[Prefix]:
    """Read the prefixes that are to stand beside, checked against the backbone, in float32 on its device.

    Raises:
        BackboneError: One was trained for another backbone, or the backbone's keys cannot be turned on.
        CheckpointError: One cannot be read, or there is none.
    """
    names = find_files(config.beside, config.output)
    others = [load_prefix(path, backbone) for path in names]
    check_joinable(others, [repr(str(path)) for path in names])
    return [prefix.to(torch.float32, backbone.device) for prefix in others]


def with_questions(data: TrainData, others: Sequence[Prefix], backbone: Backbone, seed: int) -> TrainData:
    """A run's data with questions that others were made for, each with that other beside it.

    So the own prefix learns to leave them to it. There are a third as many as own examples, at most.

    Args:
        data: The run's own.
        others: Those that stand beside; questions are in the headers of memories.
        backbone: Of all.
        seed: Which questions.
    """
    if data.has_head or not backbone.layout.packable:
        # All rows have one prefix in front.
        return data
    asked = [(number, pair) for number, prefix in enumerate(others) for pair in prefix.header.get("questions", ())]
    random.Random(f"{seed}/questions").shuffle(asked)
    examples = list(data.train.examples)
    for number, (question, answer) in asked[: len(examples) // _OWN_PER_QUESTION]:
        form, length = read_text_format(others[number].header), others[number].length()
        if form is not None:
            found = encode_examples(backbone, [Example(question, (answer,))], form, prefix_length=length)
            examples += [one.beside((number,), 0) for one in found.examples]
    return replace(data, train=replace(data.train, examples=examples))


# --- samples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beside:
    """The others of a run.

    Attributes:
        others: Each yields a prefix as it is now, in float32; gradients reach it where it trains, too.
        lengths: The lengths of each at its sites.
        rotation: How keys turn with position.
        digest: Tells these others from any.
    """

    others: Sequence[Callable[[], Prefix]]
    lengths: Sequence[Mapping[Site, int]]
    rotation: Rotation
    digest: str

    @classmethod
    def of_prefixes(cls, prefixes: Sequence[Prefix], rotation: Rotation) -> Beside:
        """Others that stay as they are."""
        digest = hashlib.sha256("".join(map(content_hash, prefixes)).encode()).hexdigest()
        lengths = [prefix.lengths for prefix in prefixes]
        return cls([lambda prefix=prefix: prefix for prefix in prefixes], lengths, rotation, digest)  # type: ignore[misc]

    def draw(self, config: TrainConfig, step: int, sample: int, needed: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Who stands beside in a sample, as `Front.company` has it: those that it needs, and perhaps more."""
        rng = random.Random(f"{config.seed}/{step}/{sample}/beside")
        most = min(config.beside_most, len(self.others))
        if not most or rng.random() < ALONE_RATE:
            return needed
        count = most if rng.random() < ALL_RATE else rng.randint(1, most)
        more = [number for number in range(len(self.others)) if number not in needed]
        return tuple(sorted({*needed, *rng.sample(more, max(count - len(needed), 0))}))

    def join(self, front: Front, own: Prefix) -> Prefix:
        """What is in front: the run's prefix, and behind it the others as they are now."""
        part = own[: front.length]
        if not front.company:
            return part
        joined = join([part, *(self.others[number]() for number in front.company)], self.rotation, shared=True)
        return Prefix(joined.layers, own.header, own.head)

    def size(self, front: Front) -> int:
        """How many positions of a text take as much memory as the others in front."""
        return sum(max(self.lengths[number].values()) for number in front.company) // _PER_POSITION


def check_beside(
    config: TrainConfig,
    backbone: Backbone,
    own: Mapping[Site, int],
    others: Sequence[Mapping[Site, int]],
    examples: Sequence[TokenizedExample],
) -> None:
    """Refuse others that do not fit beside a prefix.

    Args:
        config: The run.
        backbone: The frozen model.
        own: Lengths of the prefix that trains.
        others: Lengths of those beside it.
        examples: To train on.

    Raises:
        ConfigError: Together with the longest text they take more positions than the backbone has; or positions are to
            be hidden, but are not the same ones at an encoder-decoder's sites.
    """
    beside = sum(sorted((lengths.get("decoder", 0) for lengths in others), reverse=True)[: config.beside_most])
    text = longest_text(examples)
    length = own.get("decoder", 0)
    total, allowed = length + beside + text, backbone.max_positions_with(length)
    if backbone.kind == "decoder" and allowed is not None and total > allowed:
        raise ConfigError(
            f"a prefix of {length} positions, up to {beside} of those beside it and a text of {text} "
            f"take {total:,} positions, but {backbone.name!r} has {allowed:,}.",
            hint="lower beside_most or max_length, or choose shorter prefixes.",
        )
    hides = config.prefix_dropout > 0 or any(example.hidden for example in examples)
    if hides and backbone.kind == "encoder-decoder" and own.get("encoder", 0) != own.get("cross", 0):
        raise ConfigError(
            "beside others, positions can be hidden where the sites encoder and cross have one length.",
            hint="set prefix_dropout to 0 and start from no examples, or give both sites one length.",
        )
