"""What is trained: a table or an MLP that computes the prefix; `bake()` keeps the prefix alone.

`mlp` is the paper's reparameterization (Li & Liang 2021, section 4.3): Embedding(P, d) -> Linear(d, m) -> tanh ->
Linear(m, S), where S is one position's keys and values over all layers of a site. `none` trains the prefix itself.
`scaled` adds one trained number per stored number to a fixed start, each layer's keys and values in steps of the size
that its own start has: start + rms * delta. From a random start, steps have the size of the model's own keys and values
of some words. Nothing is trained that is not stored.

They run once per step, not once per row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prefixtune.prefix.geometry import Geometry, LayerShape, Site
from prefixtune.prefix.prefix import Head, KeyValue, Prefix, flatten, unflatten

RANDOM_STD = 0.02
"""Standard deviation of a random start of a directly trained prefix."""
_NEARLY_ZERO = 1e-6
"""Keys or values that are smaller, relative to those of the layer where they are largest, tell no size of a step."""


class SiteEncoder(nn.Module):
    """The trainable parameters of one site, which compute a flat (P, S) matrix.

    Args:
        kind: `mlp`, `none` or `scaled`.
        size: S, the numbers of one position over all layers.
        prefix_length: P.
        embedding_size: d, the width of the MLP's embedding (the paper: the model's width).
        bottleneck_size: m, the MLP's hidden width (the paper: 512, 800 for summarization).
        start: What the prefix is at the first step, exactly, but for `mlp` (see `fit`). None: random.
        scale: For `scaled`: the size of a step of each of the S numbers, the same at all positions; None: 1.
    """

    start: Tensor
    scale: Tensor

    def __init__(
        self,
        kind: str,
        size: int,
        prefix_length: int,
        embedding_size: int,
        bottleneck_size: int,
        start: Float[Tensor, "P S"] | None = None,
        scale: Float[Tensor, " S"] | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        if kind == "mlp":
            self.embedding = nn.Embedding(prefix_length, embedding_size)
            self.hidden = nn.Linear(embedding_size, bottleneck_size)
            self.output = nn.Linear(bottleneck_size, size)
            return
        rows = torch.randn(prefix_length, size) * RANDOM_STD if start is None else start.detach().clone().float()
        if kind == "none":
            self.table = nn.Parameter(rows)
            return
        self.register_buffer("start", rows)
        self.register_buffer("scale", torch.ones(size) if scale is None else scale.detach().clone().float())
        self.delta = nn.Parameter(torch.zeros_like(rows))

    def forward(self) -> Float[Tensor, "P S"]:
        """The prefix as it is now, one row per position."""
        if self.kind == "none":
            return self.table
        if self.kind == "scaled":
            return self.start + self.scale * self.delta
        out: Tensor = self.output(torch.tanh(self.hidden(self.embedding.weight)))
        return out


class HeadEncoder(nn.Module):
    """The trainable parameters of a linear head.

    Hidden states of a language model have a large common part, and the part that differs between texts is small. So the
    head sees standardized hidden states. Center and spread are constants, folded into the weights that are stored.

    Args:
        num_labels: C.
        hidden_size: d.
    """

    center: Tensor
    spread: Tensor

    def __init__(self, num_labels: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_labels, hidden_size) * RANDOM_STD)
        self.bias = nn.Parameter(torch.zeros(num_labels))
        self.register_buffer("center", torch.zeros(hidden_size))
        self.register_buffer("spread", torch.ones(hidden_size))

    def standardize(self, hidden: Float[Tensor, "N d"]) -> None:
        """Set center and spread from some hidden states."""
        hidden = hidden.float()
        self.center.copy_(hidden.mean(0))
        self.spread.copy_(hidden.std(0, correction=0).clamp(min=1e-6 + 1e-3 * float(hidden.std())))

    def start_from(self, head: Head) -> None:
        """Take a head's numbers, as it is for hidden states as they are."""
        weight = head.weight.to(self.weight).float()
        with torch.no_grad():
            self.weight.copy_(weight * self.spread)
            self.bias.copy_(head.bias.to(self.bias) + weight @ self.center)

    def forward(self) -> Head:
        """The head as it is now, for hidden states as they are."""
        weight = self.weight / self.spread
        return Head(weight, self.bias - weight @ self.center)


class PrefixEncoder(nn.Module):
    """The trainable prefix: one `SiteEncoder` per site, and the shapes to split their rows by.

    Args:
        kind: `mlp`, `none` or `scaled`.
        geometry: The sites to train, and their layers' shapes.
        prefix_length: P; or P by site.
        embedding_size: d of the MLP.
        bottleneck_size: m of the MLP.
        start: A prefix to start from, with the sites of `geometry`; None: random.
        head: Labels and width of the hidden states of a linear head to train with it; None: no head.
        value_scale: For `scaled`: how much larger a step of the values is than one of the keys, relative to their
            sizes.
        like: For `scaled` from a random start: a prefix whose keys and values have the size of the model's own.
        sinks: For `scaled`: by site, the positions of the start (or of `like`) at which a text begins; a site that is
            not named: 0.
    """

    head: HeadEncoder | None

    def __init__(
        self,
        kind: str,
        geometry: Geometry,
        prefix_length: int | Mapping[Site, int],
        *,
        embedding_size: int,
        bottleneck_size: int = 512,
        start: Prefix | None = None,
        head: tuple[int, int] | None = None,
        value_scale: float = 1.0,
        like: Prefix | None = None,
        sinks: Mapping[Site, Collection[int]] | None = None,
    ) -> None:
        super().__init__()
        lengths = dict.fromkeys(geometry, prefix_length) if isinstance(prefix_length, int) else dict(prefix_length)
        like = like if start is None else start
        self.geometry: dict[Site, tuple[LayerShape, ...]] = dict(geometry)
        self.sites = nn.ModuleDict()
        for site, shapes in self.geometry.items():
            rows = None if start is None else flatten(start.layers[site])
            seen = None if like is None else like.layers[site]
            scale = step_sizes(shapes, seen, value_scale, (sinks or {}).get(site, (0,)))
            size = sum(shape.size for shape in shapes)
            self.sites[site] = SiteEncoder(kind, size, lengths[site], embedding_size, bottleneck_size, rows, scale)
        self.head = None if head is None else HeadEncoder(*head)

    def forward(self) -> Prefix:
        """The prefix as it is now, in float32, attached to the graph of its parameters."""
        layers = {site: unflatten(self.sites[site](), shapes) for site, shapes in self.geometry.items()}
        return Prefix(layers, head=None if self.head is None else self.head())

    @torch.no_grad()
    def bake(self) -> Prefix:
        """The prefix alone, without the MLP, in float32 on the CPU."""
        prefix: Prefix = self()
        return prefix.to(device="cpu").detach()


def step_sizes(
    shapes: Sequence[LayerShape], like: Sequence[KeyValue] | None, value_scale: float, sinks: Collection[int] = (0,)
) -> Float[Tensor, " S"]:
    """The step of each number of a position: the root mean square of its layer's keys or values in some prefix.

    Positions at which a text begins are left out where there are others: they take the attention that nothing else
    wants, and their numbers are far from all others'. Where a layer's keys or values are all (nearly) zero, which says
    nothing of the size that they should have, their step is the median of the other layers'.

    Args:
        shapes: The layers.
        like: The prefix; None: nothing is known, and steps are as small as random starts are.
        value_scale: Times this for values.
        sinks: The positions to leave out.
    """
    by_part: list[Tensor] = []
    for part in (0, 1):
        if like is None:
            by_part.append(torch.full((len(shapes),), RANDOM_STD))
            continue
        kept = [position for position in range(like[0][0].shape[1]) if position not in sinks]
        numbers = [layer[part].detach().float() for layer in like]
        sizes = torch.stack([(n[:, kept] if kept else n).square().mean().sqrt() for n in numbers]).cpu()
        known = sizes > _NEARLY_ZERO * sizes.max()
        usual = sizes[known].median() if known.any() else torch.tensor(RANDOM_STD)
        by_part.append(torch.where(known, sizes, usual))
    return torch.cat(
        [
            (factor * by_part[part][index]).expand(shape.num_kv_heads * width)
            for index, shape in enumerate(shapes)
            for part, width, factor in ((0, shape.key_dim, 1.0), (1, shape.value_dim, value_scale))
        ]
    )


def fit(module: PrefixEncoder, target: Prefix, *, steps: int = 500, learning_rate: float = 1e-4) -> dict[str, float]:
    """Fit an MLP to a given prefix by mean squared error, so that training starts near it.

    The authors' way of starting the MLP from real words' activations: 500 Adam steps at 1e-4.

    Args:
        module: A `PrefixEncoder`; moved in place.
        target: What it should compute, of the same sites and shapes.
        steps: Adam steps.
        learning_rate: Adam's step size.

    Returns:
        Site -> the fit's relative error: mean squared error divided by the target's mean square.
    """
    targets = {site: flatten(target.layers[site]).float() for site in module.geometry}
    optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            losses = [nn.functional.mse_loss(module.sites[site](), rows) for site, rows in targets.items()]
            torch.stack(losses).sum().backward()
            optimizer.step()
    with torch.no_grad():
        return {
            site: float((module.sites[site]() - rows).square().mean() / rows.square().mean())
            for site, rows in targets.items()
        }
