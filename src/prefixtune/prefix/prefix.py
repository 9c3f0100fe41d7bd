"""A prefix: per site and layer, one key and one value tensor.

A `Prefix` is P virtual tokens' keys and values, as the attention of each layer sees them (after any rotary embedding),
to be put in front of the text's own: K = [P_key; K], V = [P_val; V] (Li & Liang 2021, section 4). It has its shapes and
the header of the file that it came from.

Axes: P prefix positions, L layers, H key-value heads, D head size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.errors import BackboneError, ConfigError, short_repr
from prefixtune.prefix.geometry import SITES, Geometry, LayerShape, Site, describe

KeyValue = tuple[Float[Tensor, "_H _P _Dk"], Float[Tensor, "_H _P _Dv"]]
"""One layer's keys and values: (H, P, D), where H and D may differ between layers."""


@dataclass(frozen=True, eq=False)
class Head:
    """A linear layer from a hidden state to the scores of labels, trained with a prefix and stored with it.

    Attributes:
        weight: One row per label.
        bias: One number per label.
    """

    weight: Float[Tensor, "C d"]
    bias: Float[Tensor, " C"]

    def __call__(self, hidden: Float[Tensor, "N d"]) -> Float[Tensor, "N C"]:
        """Each label's score, in float32."""
        weight, bias = self.weight.to(hidden.device).float(), self.bias.to(hidden.device).float()
        return torch.nn.functional.linear(hidden.float(), weight, bias)

    def to(self, device: torch.device | str | None) -> Head:
        """The same head on another device."""
        return Head(self.weight.to(device=device), self.bias.to(device=device))

    def detach(self) -> Head:
        """A copy that no longer belongs to any computation graph."""
        return Head(self.weight.detach().clone(), self.bias.detach().clone())


def _is_forward_slice(value: object) -> bool:
    """Whether it is a slice by whole numbers that does not go backwards."""
    if not isinstance(value, slice):
        return False
    bounds = [bound for bound in (value.start, value.stop, value.step) if bound is not None]
    return all(hasattr(bound, "__index__") for bound in bounds) and (value.step is None or value.step > 0)


def _is_pair(value: object) -> bool:
    """Whether it is a key and a value of the same heads and positions."""
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(isinstance(part, Tensor) for part in value):
        return False
    key, other = value
    return bool(key.dim() == other.dim() == 3 and key.shape[:2] == other.shape[:2])


@dataclass(frozen=True, eq=False)
class Prefix:
    """Per site and layer, keys and values of P virtual tokens: P_key and P_val (Li & Liang 2021, section 4, eq. 3).

    Attributes:
        layers: Site -> one (key, value) pair per layer, each of shape (H, P, D).
        header: Where it comes from (backbone, task, text format, training), as in the artifact; may be empty.
        head: For classification or tagging through hidden states; None: the model's own tokens are the output.

    Raises:
        ConfigError: An unknown site, no layer, or layers of one site whose lengths differ or whose shapes do not match.
    """

    layers: Mapping[Site, tuple[KeyValue, ...]]
    header: Mapping[str, Any] = field(default_factory=dict)
    head: Head | None = None

    def __post_init__(self) -> None:
        faults = ["it has no site"] if not self.layers else []
        for site, layers in self.layers.items():
            pairs = isinstance(layers, Sequence) and all(_is_pair(pair) for pair in layers)
            if site not in SITES:
                faults.append(f"unknown site {site!r} (allowed: {', '.join(SITES)})")
            elif not pairs or not layers:
                faults.append(f"site {site!r} has no layers of (key, value) pairs of (heads, positions, head size)")
            elif len(lengths := {key.shape[1] for key, _ in layers}) > 1:
                faults.append(f"the layers of site {site!r} have different lengths {sorted(lengths)}")
        if faults:
            raise ConfigError(f"not a prefix: {'; '.join(faults)}.", hint="give (H, P, D) tensors of one P per site.")
        # Always in one order of sites.
        object.__setattr__(self, "layers", {site: self.layers[site] for site in SITES if site in self.layers})

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that it has keys and values for."""
        return tuple(self.layers)

    @property
    def prefix_length(self) -> int:
        """P, in positions; of the longest site where sites differ."""
        return max(self.length(site) for site in self.layers)

    def length(self, site: Site = "decoder") -> int:
        """P at one site; 0 where there is no prefix."""
        return int(self.layers[site][0][0].shape[1]) if site in self.layers else 0

    @property
    def lengths(self) -> dict[Site, int]:
        """P at each of its sites."""
        return {site: self.length(site) for site in self.layers}

    @property
    def geometry(self) -> dict[Site, tuple[LayerShape, ...]]:
        """The layers' shapes, without the length."""
        return {
            site: tuple(LayerShape(int(k.shape[0]), int(k.shape[2]), int(v.shape[2])) for k, v in layers)
            for site, layers in self.layers.items()
        }

    def keys(self, site: Site = "decoder") -> Float[Tensor, "L H P D"]:
        """All keys of a site in one tensor; for sites whose layers share one shape."""
        return torch.stack([key for key, _ in self.layers[site]])

    def values(self, site: Site = "decoder") -> Float[Tensor, "L H P D"]:
        """All values of a site in one tensor; for sites whose layers share one shape."""
        return torch.stack([value for _, value in self.layers[site]])

    def tensors(self) -> list[Tensor]:
        """Every tensor: per site and layer, key then value."""
        return list(chain.from_iterable(pair for layers in self.layers.values() for pair in layers))

    def stored_tensors(self) -> list[Tensor]:
        """Every tensor, and the head's."""
        return self.tensors() + ([] if self.head is None else [self.head.weight, self.head.bias])

    @property
    def num_parameters(self) -> int:
        """How many numbers are stored, the head's included.

        >>> layer = (torch.zeros(16, 10, 64), torch.zeros(16, 10, 64))
        >>> Prefix({"decoder": (layer,) * 24}).num_parameters  # GPT-2 Medium at P = 10
        491520
        """
        return sum(tensor.numel() for tensor in self.stored_tensors())

    @property
    def num_bytes(self) -> int:
        """The tensors' size in bytes, in their current dtype."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.stored_tensors())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its keys and values."""
        return self.tensors()[0].dtype

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.tensors()[0].device

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Prefix:
        """The same prefix in another dtype or on another device.

        A head keeps its own dtype: it is computed in float32, whatever the model computes in.
        """
        head = None if self.head is None else self.head.to(device)
        return self._mapped(lambda tensor: tensor.to(device=device, dtype=dtype), head)

    def detach(self) -> Prefix:
        """A copy that no longer belongs to any computation graph; each tensor is contiguous."""
        head = None if self.head is None else self.head.detach()
        return self._mapped(lambda tensor: tensor.detach().clone(memory_format=torch.contiguous_format), head)

    def leaves(self) -> Prefix:
        """The same numbers, and the head's, as leaves of a new graph, where gradients gather."""
        head = self.head
        leaf = None if head is None else Head(*(t.detach().requires_grad_() for t in (head.weight, head.bias)))
        return self._mapped(lambda tensor: tensor.detach().requires_grad_(), leaf)

    def _mapped(self, change: Callable[[Tensor], Tensor], head: Head | None) -> Prefix:
        """Another prefix, whose keys and values a function makes of these."""
        layers = {site: tuple((change(k), change(v)) for k, v in layers) for site, layers in self.layers.items()}
        return Prefix(layers, self.header, head)

    def __getitem__(self, positions: slice) -> Prefix:
        """Some of its positions: `prefix[:5]` is the first five virtual tokens, at every site and layer.

        Raises:
            ConfigError: Nothing is left, or the index is no slice of whole numbers that goes on.
        """
        if not _is_forward_slice(positions):
            raise ConfigError(
                f"a prefix is sliced by positions, in order, but got {short_repr(positions)}.",
                hint="write prefix[2:3] for one position.",
            )
        sliced = self._mapped(lambda tensor: tensor[:, positions], self.head)
        if min(sliced.length(site) for site in sliced.sites) == 0:
            raise ConfigError(
                f"slice {positions} of a prefix of length {self.prefix_length} is empty.",
                hint="keep at least one position.",
            )
        return sliced

    def is_finite(self) -> bool:
        """Whether it holds no NaN and no infinity."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.stored_tensors())

    def equal(self, other: Prefix) -> bool:
        """Whether all tensors are bit for bit the same."""
        mine, theirs = self.stored_tensors(), other.stored_tensors()
        return (
            self.sites == other.sites
            and len(mine) == len(theirs)
            and all(a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu()) for a, b in zip(mine, theirs, strict=True))
        )

    # --- as in transformers ------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
    ) -> Prefix:
        """Read a prefix from this machine or from the Hugging Face hub, checking all of it.

        Args:
            name: A file, the folder of a run or of `save_pretrained`; or, where there is none of that name, the hub's
                repository `OWNER/NAME` (or `hub:OWNER/NAME`), which is downloaded into the hub's cache.
            revision: Of a repository: a branch, a tag or a commit; None: the main branch.
            token: Of the hub; None: the one that `hf auth login` stored.

        Raises:
            CheckpointError: There is no such file, or it is not a prefix.
            ConfigError: A revision comes with a path, or the hub is switched off.
            PrefixError: The hub cannot be reached, or has no such file.
        """
        from prefixtune.prefix.artifact import read_artifact
        from prefixtune.prefix.hub import find_pretrained

        return read_artifact(find_pretrained(name, revision=revision, token=token))

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, evaluation: Any = None) -> Path:
        """Store `prefix.safetensors` and a model card in a folder; returns the file's path.

        An earlier prefix of that name is replaced; a README.md that is there already is left as it is.

        Args:
            save_directory: Created if it does not exist.
            evaluation: Whose scores go into the card: what `evaluate` returned, the folder of `prefixtune evaluate`,
                or a list of these.

        Raises:
            CheckpointError: The prefix holds NaN or infinity.
            ConfigError: The evaluation holds no scores, or the prefix needs a LoRA adapter, which is not in the folder.
            PrefixError: A file cannot be written.
        """
        from prefixtune.prefix.artifact import save_prefix
        from prefixtune.prefix.card import CARD, check_complete, make_card, read_evaluations
        from prefixtune.prefix.hub import FILE
        from prefixtune.utils.files import write_text

        folder = Path(save_directory)
        check_complete(self, folder)
        card = make_card(self, folder.resolve().name, read_evaluations(evaluation, self))
        path = save_prefix(folder / FILE, self, dtype=self.dtype)
        if not (folder / CARD).exists():
            write_text(folder / CARD, card)
        return path

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        evaluation: Any = None,
        commit_message: str = "",
        revision: str | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the prefix with a model card to the Hugging Face hub; returns the address of the commit.

        Args:
            repo_id: `OWNER/NAME`; the repository is created where it does not exist.
            private: Only its owner can see a new repository.
            evaluation: As in `save_pretrained`.
            commit_message: Empty: one with the file's name.
            revision: A branch; None: the main branch.
            token: Of the hub; None: the one that `hf auth login` stored.

        Raises:
            CheckpointError: The prefix holds NaN or infinity.
            ConfigError: The evaluation holds no scores, the name is not valid, the prefix needs a LoRA adapter, or the
                hub is switched off.
            PrefixError: The hub cannot be reached, or refuses.
        """
        from tempfile import TemporaryDirectory

        from prefixtune.prefix.artifact import save_prefix
        from prefixtune.prefix.card import check_complete, make_card, read_evaluations
        from prefixtune.prefix.hub import FILE, upload

        check_complete(self)
        card = make_card(self, repo_id, read_evaluations(evaluation, self))
        with TemporaryDirectory() as folder:
            file = save_prefix(Path(folder) / FILE, self, dtype=self.dtype)
            return upload(file, card, repo_id, private=private, revision=revision, token=token, message=commit_message)

    def __repr__(self) -> str:
        return (
            f"Prefix(P={self.prefix_length}, {describe(self.geometry)}, "
            f"{self.num_parameters:,} parameters, {str(self.dtype).removeprefix('torch.')})"
        )


def unflatten(flat: Float[Tensor, "P S"], shapes: Sequence[LayerShape]) -> tuple[KeyValue, ...]:
    """Split one row per position into per-layer keys and values.

    A row is layer-major, key before value, head-major: the layout of PEFT's `prompt_embeddings`.

    Args:
        flat: P rows of S = sum of the layers' sizes.
        shapes: The layers.
    """
    sizes = list(chain.from_iterable((s.num_kv_heads * s.key_dim, s.num_kv_heads * s.value_dim) for s in shapes))
    parts = flat.split(sizes, dim=1)
    pairs = zip(parts[::2], parts[1::2], shapes, strict=True)
    return tuple(
        (
            key.unflatten(1, (shape.num_kv_heads, shape.key_dim)).transpose(0, 1),
            value.unflatten(1, (shape.num_kv_heads, shape.value_dim)).transpose(0, 1),
        )
        for key, value, shape in pairs
    )


def flatten(layers: Sequence[KeyValue]) -> Float[Tensor, "P S"]:
    """The reverse of `unflatten`."""
    return torch.cat([part.transpose(0, 1).flatten(1) for part in chain.from_iterable(layers)], dim=1)


def check_fits(prefix: Prefix, geometry: Geometry, name: str) -> None:
    """Refuse a prefix whose shapes are not the backbone's.

    Raises:
        BackboneError: Sites, layers, KV heads or head sizes differ; the message has those of both.
    """
    for site, shapes in prefix.geometry.items():
        if geometry.get(site) != shapes:
            raise BackboneError(
                f"the prefix has {describe(prefix.geometry)}, but {name!r} has {describe(geometry)}.",
                hint="load the backbone that the prefix was trained for; `prefixtune inspect FILE` names it.",
            )
