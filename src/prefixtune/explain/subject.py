"""What is explained: a prefix on its backbone, with rows and controls; and a view: what a look at it found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.encoding import TokenizedDataset, TokenizedExample, format_of
from prefixtune.data.examples import Example
from prefixtune.data.labels import Labels, check_labels, encode_rows, labels_of, with_label_words
from prefixtune.errors import DataError
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat

TITLES = {
    "attention": "Attention to the prefix",
    "loss": "Loss with parts left out",
    "nearest": "Nearest real text",
    "description": "The model's own description",
    "general": "Requests about other things",
}
"""The views, in the order in which they are made."""
SHOWS = {
    "attention": "It shows where attention goes while the targets are predicted, not what comes from there: a position "
    "with much attention may give next to nothing, as attention sinks do.",
    "loss": "It shows what the rest cannot make up for on these rows, each part alone: parts that do the same work "
    "each look as if they did none. Intervals are not corrected for the number of parts.",
    "nearest": "It shows which tokens' values point in a similar direction. What is nearest need not be near, and need "
    "not say what the prefix does.",
    "description": "It shows what the model says of its prefix, and how much of the prefix's gain the words bring in "
    "its place. A small model's words may be wrong, or right by the examples in the question.",
    "general": "It shows how many of the bare model's texts stay as they are with the prefix, on requests that are not "
    "its task, in the prefix's own format. A prefix that changes texts need not make them worse.",
}
"""What each view can and cannot show."""


@dataclass(frozen=True)
class View:
    """One look at a prefix.

    Attributes:
        name: Of `TITLES`.
        numbers: What was found, as JSON; see docs/explain.md.
        left_out: Why there is nothing; empty: there is.
    """

    name: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    left_out: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON: its numbers, or why there are none."""
        return {"left_out": self.left_out} if self.left_out else {**self.numbers, "shows": SHOWS[self.name]}


@dataclass(frozen=True, eq=False)
class Subject:
    """A prefix, and what it is looked at with.

    Attributes:
        backbone: The frozen model.
        prefix: In float32, on the CPU.
        text_format: The text around source and target.
        examples: The rows, each with one target.
        tokenized: The same as tokens; a long text in several windows.
        labels: Where the prefix classifies or tags; None: it generates.
        controls: Name -> a prefix to compare with: `random`, `shuffled`, `other`.
        batch_size: Examples per call of the model.
        seed: Of the controls and of the intervals.
        origins: The example of each row of tokens, where some have several; empty: one each.
    """

    backbone: Backbone
    prefix: Prefix
    text_format: TextFormat
    examples: tuple[Example, ...]
    tokenized: Sequence[TokenizedExample]
    labels: Labels | None
    controls: Mapping[str, Prefix]
    batch_size: int = 8
    seed: int = 0
    origins: Sequence[int] = ()

    @property
    def longest(self) -> int:
        """Positions of the longest of the prefix and its controls."""
        return max(each.prefix_length for each in (self.prefix, *self.controls.values()))

    def tokenize(self, rows: Sequence[Example], text_format: TextFormat, prefix_length: int) -> TokenizedDataset:
        """Rows as tokens, as long as in training, and no longer than the backbone has room for.

        Args:
            rows: With one target each; where the header has no text format, those that are too long are cut.
            text_format: The text around source and target.
            prefix_length: Positions that the backbone has no more for the rows.
        """
        lengths: dict[str, Any] = {
            "prefix_length": prefix_length,
            "max_length": text_format.max_length,
            "on_too_long": text_format.on_too_long if self.prefix.header.get("text_format") is not None else "cut",
        }
        return encode_rows(self.backbone, rows, self.labels, text_format, turns="last", **lengths)


def make_subject(
    backbone: Backbone,
    prefix: Prefix,
    examples: Sequence[Example],
    *,
    against: Prefix | None = None,
    rows: int = 32,
    batch_size: int = 8,
    seed: int = 0,
) -> Subject:
    """The first rows as tokens, as in training, and the controls.

    Args:
        backbone: The frozen model.
        prefix: What is explained.
        examples: Those without a target are left out.
        against: A prefix of another task on the same backbone, as a control.
        rows: Most examples, each with its first target; of texts alone, most windows.
        batch_size: Examples per call of the model.
        seed: Of the controls and of the intervals.

    Raises:
        DataError: No example has a target; or one is wrong, too long, or has a label that the prefix does not know.
        CheckpointError: The text format in the prefix's header cannot be used.
    """
    labels, text_format = labels_of(prefix), format_of(backbone, prefix)
    solved = [replace(example, targets=example.targets[:1]) for example in examples if example.targets][:rows]
    if not solved:
        raise DataError("no example has a target.", hint="name the column with --target.")
    if labels is not None:
        check_labels(solved, labels.names, labels.kind)
        solved = list(with_label_words(solved, labels)) if labels.by == "words" else solved
    whole = prefix.detach().to(torch.float32, "cpu")
    controls = {"random": random_like(whole, seed)}
    if (moved := shuffled(whole, seed)) is not None:
        controls["shuffled"] = moved
    if against is not None:
        other = against.to(torch.float32, "cpu")
        controls["other"] = Prefix(other.layers, other.header, whole.head)
    subject = Subject(backbone, whole, text_format, tuple(solved), (), labels, controls, batch_size, seed)
    dataset = subject.tokenize(solved, text_format, subject.longest)
    origins = dataset.origins[:rows]
    kept = subject.examples[: origins[-1] + 1] if origins else subject.examples
    return replace(subject, examples=kept, tokenized=dataset.examples[:rows], origins=origins)


# --- controls: what a view shows of these is no sign of training ------------------------------------------------------


def with_layers(prefix: Prefix, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Prefix:
    """The same prefix with each layer's keys and values, both (H, P, D), as `change` returns them."""
    layers = {site: tuple(change(key, value) for key, value in pairs) for site, pairs in prefix.layers.items()}
    return Prefix(layers, prefix.header, prefix.head)


def random_like(prefix: Prefix, seed: int) -> Prefix:
    """Random directions, each head's vector at each layer and position as long as the prefix's own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        direction = torch.nn.functional.normalize(torch.randn(tensor.shape, generator=generator), dim=-1)
        return direction.mul(torch.linalg.vector_norm(tensor, dim=-1, keepdim=True))

    return with_layers(prefix, lambda key, value: (draw(key), draw(value)))


def shuffled(prefix: Prefix, seed: int) -> Prefix | None:
    """The prefix's own keys, with the values of other positions, in each layer by another permutation.

    To move keys and values together would change nothing: attention sums over positions. None: P is 1 everywhere.
    """
    if prefix.prefix_length < 2:
        return None
    generator = torch.Generator().manual_seed(seed)

    def move(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        # Around a random circle by one: no position keeps its own value.
        circle = torch.randperm(value.shape[1], generator=generator)
        permuted = torch.empty_like(value)
        permuted[:, circle] = value[:, circle.roll(1)]
        return key, permuted

    return with_layers(prefix, move)
