"""A prefix: per site and layer, one key and one value tensor.

A `Prefix` is P virtual tokens' keys and values, as the attention of each layer sees them (after any rotary embedding).
They are put in front of the text's own: K = [P_key; K], V = [P_val; V] (Li & Liang 2021, section 4). It has its shapes
and the header of the file that it came from.

Axes: P prefix positions, L layers, H key-value heads, D head size.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.errors import BackboneError, CheckpointError, ConfigError, describe_value, short_repr
from prefixtune.prefix.file import HEADER_KEY, hash_tensors, read_table, read_verified, save_verified
from prefixtune.prefix.geometry import SITES, Geometry, LayerShape, Site, describe
from prefixtune.prefix.header import backbone_origin, check_header
from prefixtune.prefix.hub import CARD, FILE, LIBRARY, REPOSITORY, hub_errors, make_card, prefix_file
from prefixtune.utils.files import write_text

KeyValue = tuple[Float[Tensor, "_H _P _Dk"], Float[Tensor, "_H _P _Dv"]]
"""One layer's keys and values: (H, P, D), where H and D may differ between layers."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
READABLE = (*DTYPES.values(), torch.float64)
"""Types of a file's tensors; others, such as float8, cannot be computed with."""

_NAME = re.compile(r"(encoder|decoder|cross)\.(\d{1,5})\.(key|value)")
_HEAD = ("head.weight", "head.bias")
"""Names of tensors in a file."""
_AGAIN = "get the file again."


@dataclass(frozen=True, eq=False)
class Head:
    """A linear layer from a hidden state to the scores of labels, trained with a prefix and stored with it.

    Attributes:
        weight: One row per label.
        bias: One number per label.
    """

    weight: Float[Tensor, "C d"]
    bias: Float[Tensor, " C"]

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or self.bias.shape != self.weight.shape[:1]:
            raise ConfigError("a head's weight and bias do not fit.", hint="give (C, d) and (C) for C labels.")

    def __call__(self, hidden: Float[Tensor, "N d"]) -> Float[Tensor, "N C"]:
        """Each label's score, in float32."""
        weight, bias = self.weight.to(hidden.device).float(), self.bias.to(hidden.device).float()
        return torch.nn.functional.linear(hidden.float(), weight, bias)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Head:
        return Head(change(self.weight), change(self.bias))


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
        ConfigError: An unknown site, no layer, or layers of one site whose lengths differ.
    """

    layers: Mapping[Site, tuple[KeyValue, ...]]
    header: Mapping[str, Any] = field(default_factory=dict)
    head: Head | None = None

    def __post_init__(self) -> None:
        for site, layers in self.layers.items():
            pairs = site in SITES and isinstance(layers, Sequence) and all(map(_is_pair, layers))
            if not pairs or len({key.shape[1] for key, _ in layers}) != 1:
                what = f"not a prefix: its site {short_repr(site)} has no layers of (key, value) pairs of one length."
                raise ConfigError(what, hint=f"give (H, P, D) tensors of one P, at a site of {', '.join(SITES)}.")
        if not self.layers:
            raise ConfigError("not a prefix: it has no site.", hint=f"give layers of a site: {', '.join(SITES)}.")
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

    def tensors(self) -> list[Tensor]:
        """Every tensor: per site and layer, key then value."""
        return list(chain.from_iterable(pair for layers in self.layers.values() for pair in layers))

    def stored_tensors(self) -> list[Tensor]:
        """Every tensor, and the head's."""
        return list(self.named_tensors().values())

    def named_tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name in a file."""
        named = {
            f"{site}.{index}.{part}": tensor
            for site, layers in self.layers.items()
            for index, pair in enumerate(layers)
            for part, tensor in zip(("key", "value"), pair, strict=True)
        }
        return named | ({} if self.head is None else dict(zip(_HEAD, (self.head.weight, self.head.bias), strict=True)))

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
        return sum(tensor.nbytes for tensor in self.stored_tensors())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its keys and values."""
        return self.tensors()[0].dtype

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.tensors()[0].device

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Prefix:
        """The same prefix in another dtype or on another device; itself, if it is that already.

        A head keeps its own dtype: it is computed in float32, whatever the model computes in.
        """
        moved = self._mapped(lambda tensor: tensor.to(device=device, dtype=dtype), lambda tensor: tensor.to(device))
        own = zip(moved.stored_tensors(), self.stored_tensors(), strict=True)
        return self if all(new is old for new, old in own) else moved

    def detach(self) -> Prefix:
        """A copy that no longer belongs to any computation graph; each tensor is contiguous."""
        return self._mapped(lambda tensor: tensor.detach().clone(memory_format=torch.contiguous_format))

    def leaves(self) -> Prefix:
        """The same numbers, and the head's, as leaves of a new graph, where gradients gather."""
        return self._mapped(lambda tensor: tensor.detach().requires_grad_())

    def _mapped(self, change: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor] | None = None) -> Prefix:
        """Another prefix, whose tensors a function makes of these; the head's another one, if given."""
        layers = {site: tuple((change(k), change(v)) for k, v in layers) for site, layers in self.layers.items()}
        return Prefix(layers, self.header, None if self.head is None else self.head._mapped(head or change))

    def __getitem__(self, positions: slice) -> Prefix:
        """Some of its positions: `prefix[:5]` is the first five virtual tokens, at every site and layer.

        Raises:
            ConfigError: Nothing is left, or the index is no slice that goes on.
        """
        if isinstance(positions, slice) and (positions.step or 1) > 0:
            sliced = self._mapped(lambda tensor: tensor[:, positions], lambda tensor: tensor)
            if all(sliced.lengths.values()):
                return sliced
        what = f"{short_repr(positions)} names no positions, in order, of a prefix of length {self.prefix_length}."
        raise ConfigError(what, hint="write prefix[2:3] for one position.")

    def is_finite(self) -> bool:
        """Whether it holds no NaN and no infinity."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.stored_tensors())

    def equal(self, other: Prefix) -> bool:
        """Whether all tensors are bit for bit the same."""
        return content_hash(self) == content_hash(other)

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
        return read_artifact(prefix_file(name, bare=True, revision=revision, token=token))

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, evaluation: Any = None) -> Path:
        """Store `prefix.safetensors` and a model card in a folder; returns the file's path.

        An earlier prefix of that name is replaced; a README.md that is there already is left as it is.

        Args:
            save_directory: Created if it does not exist.
            evaluation: Whose scores go into the card: what `evaluate` returned, the folder of `prefixtune evaluate`,
                or a list of these.

        Raises:
            CheckpointError: The prefix holds NaN or infinity.
            ConfigError: The evaluation holds no scores.
            PrefixError: A file cannot be written.
        """
        folder = Path(save_directory)
        card = self.card(folder.resolve().name, evaluation)
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
        from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

        # Checked as a whole before anything is sent.
        if adapter := self.header.get("adapter"):
            what = f"the prefix was trained on the LoRA adapter {short_repr(adapter)}, which would not be with it."
            raise ConfigError(what, hint="upload both with `hf upload`, or merge the adapter into its model first.")
        if not isinstance(repo_id, str) or not REPOSITORY.fullmatch(repo_id):
            raise ConfigError(f"{short_repr(repo_id)} is not the name of a repository.", hint="write OWNER/NAME.")
        card = self.card(repo_id, evaluation)
        with TemporaryDirectory() as folder:
            file = save_prefix(Path(folder) / FILE, self, dtype=self.dtype)
            with hub_errors(f"cannot upload to {repo_id!r}"):
                api = HfApi(token=token, **LIBRARY)
                # A card that the hub refuses must not leave an empty repository.
                ModelCard(card).validate()
                api.create_repo(repo_id, private=private, exist_ok=True)
                files = [CommitOperationAdd(FILE, str(file)), CommitOperationAdd(CARD, card.encode())]
                message = commit_message or f"Upload {FILE}"
                return str(api.create_commit(repo_id, files, commit_message=message, revision=revision).commit_url)

    def card(self, repo_id: str, evaluation: Any = None) -> str:
        """The model card that `push_to_hub` uploads; arguments as there."""
        return make_card(self, repo_id, evaluation)

    def __repr__(self) -> str:
        return (
            f"Prefix(P={self.prefix_length}, {describe(self.geometry)}, "
            f"{self.num_parameters:,} parameters, {str(self.dtype).removeprefix('torch.')})"
        )


# --- its file ---------------------------------------------------------------------------------------------------------


def from_named(named: Mapping[str, Tensor], header: Mapping[str, Any]) -> Prefix:
    """A prefix of tensors by their names in a file: the reverse of `Prefix.named_tensors`.

    Raises:
        ConfigError: A name is another one, a tensor is missing, or some do not fit together.
    """
    parts: dict[Site, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in named.items():
        if match := _NAME.fullmatch(name):
            site, layer, part = match.groups()
            parts.setdefault(cast(Site, site), {}).setdefault(int(layer), {})[part] = tensor
        elif name not in _HEAD:
            raise ConfigError(f"{short_repr(name)} does not belong to a prefix.", hint="name it SITE.LAYER.key.")
    try:
        layers = {
            site: tuple((layers[n]["key"], layers[n]["value"]) for n in range(len(layers)))
            for site, layers in parts.items()
        }
        has_head = any(name in named for name in _HEAD)
        return Prefix(layers, header, Head(named[_HEAD[0]], named[_HEAD[1]]) if has_head else None)
    except KeyError as error:
        raise ConfigError(f"there is no {error} of a layer or of the head.", hint="give all tensors.") from error


def content_hash(prefix: Prefix) -> str:
    """`sha256:` and 64 digits of a prefix's tensors: names, types, shapes and bytes; whatever its header says."""
    return hash_tensors(prefix.named_tensors())


def describe_tensors(prefix: Prefix) -> dict[str, Any]:
    """What a header says of a prefix's tensors."""
    kind = backbone_origin(prefix.header).kind
    shifts = kind == "decoder" and prefix.sites == ("decoder",)
    position = "text starts at position P" if shifts else "text positions are not shifted"
    return {
        "sites": list(prefix.sites),
        "prefix_length": prefix.lengths,
        "positions": dict.fromkeys(prefix.sites, position),
        "geometry": {
            site: {
                "num_layers": len(shapes),
                "num_kv_heads": [s.num_kv_heads for s in shapes],
                "head_dim": [s.key_dim for s in shapes],
            }
            for site, shapes in prefix.geometry.items()
        },
        "dtype": str(prefix.dtype).removeprefix("torch."),
        **({} if prefix.head is None else {"head": {"num_labels": len(prefix.head.bias)}}),
    }


def read_artifact(path: str | Path) -> Prefix:
    """Read a prefix, checking everything except whether it fits a model.

    Raises:
        CheckpointError: The file is missing, truncated, damaged, not a prefix, of an unknown version, or holds NaN or
            infinity; or its header and its tensors disagree.
    """
    tensors, header = read_verified(
        path, HEADER_KEY, "is a safetensors file, but not a prefix", "give a file that `prefixtune train` wrote."
    )
    prefix = _assemble(tensors, header, repr(str(path)))
    if not prefix.is_finite():
        raise CheckpointError(f"{str(path)!r} holds NaN or infinity.", hint="get the file again, or train it again.")
    return prefix


def read_outline(path: Path) -> Prefix:
    """Read and check a prefix without its numbers: its tensors are on the device `meta`.

    Raises:
        CheckpointError: It is not a complete prefix; the message calls it `it`.
        OSError: It cannot be read.
    """
    return _assemble(*read_table(path, HEADER_KEY), "it")


def _assemble(tensors: Mapping[str, Tensor], header: Mapping[str, Any], what: str) -> Prefix:
    """The prefix in a file that `what` names; see `read_artifact`."""
    if foreign := {tensor.dtype for tensor in tensors.values()} - set(READABLE):
        raise CheckpointError(f"{what} holds numbers of type {foreign.pop()}.", hint=_AGAIN)
    try:
        prefix = from_named(tensors, header)
    except ConfigError as error:
        raise CheckpointError(f"{what} holds no whole prefix: {error.message}", hint=_AGAIN) from error
    if not all(prefix.lengths.values()):
        raise CheckpointError(f"{what} has a site without positions (P = 0).", hint=_AGAIN)
    _check_header(prefix, what)
    if other := [key for key, fact in describe_tensors(prefix).items() if header.get(key, fact) != fact]:
        raise CheckpointError(f"the header of {what} is of other tensors: {', '.join(other)} differ.", hint=_AGAIN)
    return prefix


def _check_header(prefix: Prefix, what: str) -> None:
    """Check a prefix's header, and that its head has a row for each label.

    Raises:
        CheckpointError: Something is wrong.
    """
    labels = check_header(prefix.header, what).labels
    rows = 0 if prefix.head is None else len(prefix.head.bias)
    if labels is not None and rows != (len(labels.names) if labels.by == "head" else 0):
        raise CheckpointError(f"{what} cannot be used: its head has not one row for each label.", hint=_AGAIN)


def save_prefix(path: str | os.PathLike[str], prefix: Prefix, *, dtype: torch.dtype | str = torch.float32) -> Path:
    """Store a prefix as one file: the tensors and its header.

    Args:
        path: Ends with `.safetensors`.
        prefix: With its header; see `make_header`.
        dtype: Of keys and values: float32, or bfloat16 for half the size; or its name. A head keeps its own.

    Raises:
        CheckpointError: The prefix holds NaN, infinity or numbers too large for the dtype, or the path has another
            ending.
        ConfigError: An argument is something else.
        PrefixError: The file cannot be written.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(prefix, Prefix):
        what = f"path is {describe_value(path)}, and prefix is {describe_value(prefix)}."
        raise ConfigError(what, hint="write save_prefix(path, prefix).")
    chosen = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(dtype)
    if chosen not in READABLE:
        raise ConfigError(f"dtype is {dtype}, which no prefix is stored in.", hint=f"use {', '.join(DTYPES)}.")
    path = Path(path)
    if path.suffix != ".safetensors":
        hint = f"write to {path.stem}.safetensors."
        raise CheckpointError(f"{str(path)!r} does not end with .safetensors.", hint=hint)
    stored = prefix.detach().to(chosen, "cpu")
    if not stored.is_finite():
        what = f"the prefix for {str(path)!r} holds NaN or infinity in {chosen}."
        raise CheckpointError(what, hint="store it as bfloat16 or float32, or train it again.")
    _check_header(stored, f"the prefix for {str(path)!r}")
    save_verified(path, stored.named_tensors(), HEADER_KEY, {**prefix.header, **describe_tensors(stored)})
    return path


# --- its layout -------------------------------------------------------------------------------------------------------


def unflatten(flat: Float[Tensor, "P S"], shapes: Sequence[LayerShape]) -> tuple[KeyValue, ...]:
    """Split one row per position into per-layer keys and values.

    A row is layer-major, key before value, head-major: the layout of PEFT's `prompt_embeddings`.

    Args:
        flat: P rows of S = sum of the layers' sizes.
        shapes: The layers.
    """
    sizes = [(shape.num_kv_heads, width) for shape in shapes for width in (shape.key_dim, shape.value_dim)]
    parts = flat.split([heads * width for heads, width in sizes], dim=1)
    tensors = [part.unflatten(1, size).transpose(0, 1) for part, size in zip(parts, sizes, strict=True)]
    return tuple(zip(tensors[::2], tensors[1::2], strict=True))


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
            what = f"the prefix has {describe(prefix.geometry)}, but {name!r} has {describe(geometry)}."
            raise BackboneError(what, hint="load its own backbone; `prefixtune inspect FILE` names it.")
