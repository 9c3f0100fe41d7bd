"""Other prefixes that stand beside the one that trains, so that it can be joined later.

In a share of the steps, some others stand before and after it, at random and in random order. Each part's keys are
turned on by the lengths before it, as `prefix.compose.concatenate` joins files; gradients reach the own part alone.
Who stands where is a function of the seed and the step.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data.tokenized import TokenizedExample, longest_text
from prefixtune.errors import CheckpointError, ConfigError
from prefixtune.prefix.compose import check_joinable, join
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.rotation import Rotation
from prefixtune.training.config import TrainConfig
from prefixtune.training.run_folder import PREFIX_FILE

SELF = "self"
"""The runs that train together."""

BESIDE_RATE = 0.5
"""Share of the steps in which others stand beside."""


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
    return [Prefix(prefix.layers).to(torch.float32, backbone.device) for prefix in others]


# --- steps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Neighbours:
    """Who stands beside in a step: indices of others, in order, before and after the own prefix."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Beside:
    """The others of a run.

    Attributes:
        others: Each yields a prefix as it is now, in float32 and without gradients.
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
        digest = hashlib.sha256()
        for prefix in prefixes:
            for tensor in prefix.tensors():
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
            digest.update(b"|")
        return cls(
            [lambda prefix=prefix: prefix for prefix in prefixes],  # type: ignore[misc]
            [prefix.lengths for prefix in prefixes],
            rotation,
            digest.hexdigest(),
        )

    def draw(self, config: TrainConfig, step: int) -> Neighbours:
        """Who stands beside in a step, counted from 1: nobody, or one to `beside_most` of the others."""
        rng = random.Random(f"{config.seed}/{step}/beside")
        if not self.others or rng.random() >= BESIDE_RATE:
            return Neighbours()
        chosen = rng.sample(range(len(self.others)), rng.randint(1, min(config.beside_most, len(self.others))))
        place = rng.randint(0, len(chosen))
        return Neighbours(tuple(chosen[:place]), tuple(chosen[place:]))

    def shift(self, neighbours: Neighbours, site: Site) -> int:
        """Positions before the own prefix at a site."""
        return sum(self.lengths[index].get(site, 0) for index in neighbours.before)

    def join(self, neighbours: Neighbours, own: Sequence[Prefix]) -> list[Prefix]:
        """The own prefix, in each of some forms, with its neighbours before and after it."""
        if neighbours == Neighbours():
            return list(own)
        before = [self.others[index]() for index in neighbours.before]
        after = [self.others[index]() for index in neighbours.after]
        joined = [join([*before, form, *after], self.rotation) for form in own]
        return [Prefix(whole.layers, form.header, form.head) for whole, form in zip(joined, own, strict=True)]


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
    if hides and backbone.kind == "encoder-decoder":
        uneven = [lengths for lengths in (own, *others) if lengths.get("encoder", 0) != lengths.get("cross", 0)]
        if uneven:
            raise ConfigError(
                f"beside moves a prefix by {uneven[0].get('encoder', 0)} positions at the site encoder and by "
                f"{uneven[0].get('cross', 0)} at cross, so that its positions cannot be hidden.",
                hint="set prefix_dropout to 0 and start from no examples, or give both sites one length.",
            )


def move_hidden(examples: Sequence[TokenizedExample], own_length: int, shift: int) -> list[TokenizedExample]:
    """The examples with their hidden positions where the own prefix stands in a joined one.

    Args:
        examples: Their positions count from the start of the own prefix.
        own_length: P of the own prefix.
        shift: Positions before it.
    """
    moved = []
    for example in examples:
        length = own_length if example.visible_length is None else min(own_length, example.visible_length)
        hidden = tuple(position + shift for position in example.hidden if position < length)
        moved.append(replace(example, hidden=hidden))
    return moved
