"""A few rows with prefixes, computed in each of a model's ways, and how far these are from each row alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefixtune.attention.forward import forward_with_prefixes
from prefixtune.attention.injection import batch_prefixes, injecting
from prefixtune.attention.layout import Layout, cache_argument, main_device
from prefixtune.attention.masks import positions_from_mask
from prefixtune.attention.packing import Group, Packing
from prefixtune.attention.record import add_noise, prefix_from_tokens
from prefixtune.prefix.prefix import Prefix

_PREFIX_LENGTHS = (2, 4)
_SOURCE_LENGTHS, _TARGET_LENGTHS = (4, 9, 6, 5), (3, 5, 4, 2, 4)


class Rows:
    """A few rows of random tokens and prefixes, which a model computes in each of its ways.

    Two rows share a source and a prefix, one has no prefix, and lengths differ; with several sites, one row's prefix
    has sites of unequal length. An encoder reads the sources alone; an encoder-decoder's decoder reads the targets, a
    decoder-only model each source with its target.
    """

    def __init__(self, model: Any, layout: Layout) -> None:
        self.model, self.layout, self.device = model, layout, main_device(model)
        generator = torch.Generator().manual_seed(0)
        config = model.config.get_text_config(decoder=True)
        # Some models end a text by any of several tokens.
        given = [value for name, value in vars(config).items() if name.endswith("_token_id")]
        special = {token for value in given for token in (value if isinstance(value, list | tuple) else [value])}
        size = model.get_input_embeddings().weight.shape[0]

        def draw(length: int) -> list[int]:
            ids: list[int] = []
            while len(ids) < length:
                token = int(torch.randint(size, (1,), generator=generator))
                ids.extend([token] if token not in special else [])
            return ids

        made = [
            add_noise(prefix_from_tokens(model, layout, torch.tensor([draw(n)], device=self.device)), generator)
            for n in _PREFIX_LENGTHS
        ]
        first, second = (prefix.to(device=self.device).leaves() for prefix in made)
        self.leaves = [first, second]
        sources = [draw(n) for n in _SOURCE_LENGTHS]
        self.prefixes: list[Prefix | None] = [first, None, second, first]
        self.sources = [*sources[:3], sources[0]]
        if len(first.sites) > 1:
            self.prefixes.append(Prefix({**first.layers, first.sites[0]: second.layers[first.sites[0]]}))
            self.sources.append(sources[3])
        self.targets = [draw(n) for n in _TARGET_LENGTHS[: len(self.sources)]]
        self.groups = [[0, 3], *([n] for n in range(1, len(self.sources)) if n != 3)]
        """Rows that share a source."""

    @functools.cached_property
    def alone(self) -> list[Tensor]:
        """Every row's outputs, (T, V) or an encoder's (T, E), computed in full, one row at a time."""
        outputs = []
        for source, target, prefix in zip(self.sources, self.targets, self.prefixes, strict=True):
            read = [*source, *target] if self.layout.kind == "decoder" else source
            given = {"decoder_input_ids": self._ids([target])} if self.layout.kind == "encoder-decoder" else {}
            outputs.append(self._run(self._ids([read]), prefixes=[prefix], **given)[0])
        return outputs

    def without_gradient(self) -> float:
        """The share of key and value slots of all layers that no gradient reaches: padded, and packed."""
        tensors = [tensor for leaf in self.leaves for tensor in leaf.tensors()]
        shares = []
        for way in (self._pad, self._pack) if self.layout.packable else (self._pad,):
            with torch.enable_grad():
                outputs = torch.cat([row.float().flatten() for row in way()])
                if not outputs.requires_grad:
                    return 1.0
                # A plain sum of normed numbers may hardly depend on them.
                weights = torch.linspace(-1, 1, outputs.numel(), device=outputs.device)
                gradients = torch.autograd.grad((outputs * weights).sum(), tensors, materialize_grads=True)
            slots = torch.cat([gradient.float().abs().amax(dim=(0, 2)) for gradient in gradients])
            shares.append(1 - float(((slots > 0) & slots.isfinite()).float().mean()))
        return max(shares)

    def padded(self) -> float:
        """A padded batch; texts of decoder-only models are also padded in front."""
        sides = ("right", "left") if self.layout.kind == "decoder" else ("right",)
        return max(_apart(self._pad(side), self.alone) for side in sides)

    def packed(self) -> float:
        """A packed row."""
        return _apart(self._pack(), self.alone)

    def cached(self) -> float:
        """Steps with a cache in a padded batch, along the targets, against everything computed again."""
        pairs = zip(self.alone, self.targets, strict=True)
        return _apart(self._stepped(), [row[-len(target) :] for row, target in pairs])

    def _pad(self, side: str = "right") -> list[Tensor]:
        decoder = self.layout.kind == "decoder"
        read = [[*s, *t] for s, t in zip(self.sources, self.targets, strict=True)] if decoder else self.sources
        ids, mask = self._padded(read, side)
        given, real = {}, mask
        if self.layout.kind == "encoder-decoder":
            given["decoder_input_ids"], real = self._padded(self.targets, "right")
            given["decoder_attention_mask"] = real
        outputs = self._run(ids, mask, prefixes=self.prefixes, **given)
        return [row[shown.bool()] for row, shown in zip(outputs, real, strict=True)]

    def _pack(self) -> list[Tensor]:
        decoder = self.layout.kind == "decoder"
        ids: list[int] = []
        groups: list[Group] = []
        own: dict[int, list[int]] = {}
        for rows in self.groups:
            start, source = len(ids), self.sources[rows[0]] if decoder else []
            ids += source
            for row in rows:
                own[row] = [*range(start, start + len(source)), *range(len(ids), len(ids) + len(self.targets[row]))]
                ids += self.targets[row]
            groups.append(Group(start, len(source), tuple(len(self.targets[row]) for row in rows)))
        sources = [self.sources[rows[0]] for rows in self.groups]
        lengths = None if decoder else tuple(map(len, sources))
        packing = Packing(tuple(groups), lengths, tuple(range(len(groups))))
        given = {} if decoder else {"decoder_input_ids": self._ids([ids])}
        read = self._ids([ids if decoder else [token for source in sources for token in source]])
        prefixes = [self.prefixes[rows[0]] for rows in self.groups]
        output = self._run(read, prefixes=prefixes, packing=packing, **given)[0]
        return [output[own[row]] for row in range(len(self.sources))]

    def _stepped(self) -> list[Tensor]:
        """Every row's outputs for its target, token by token, with the prefixes in front as in generation."""
        model, new = self.model, self._padded(self.targets, "right")[0]
        name, steps = cache_argument(model), []
        with injecting(batch_prefixes(self.prefixes, self.layout, model.dtype, self.device)):
            if self.layout.kind == "encoder-decoder":
                from transformers import DynamicCache, EncoderDecoderCache

                ids, mask = self._padded(self.sources, "right")
                cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
                # What an encoder makes of its text is computed once, as generation does.
                encoded = model.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)
                given = {"encoder_outputs": encoded, "attention_mask": mask, "use_cache": True}
                for token in new.split(1, dim=1):
                    output = model(**given, decoder_input_ids=token, **{name: cache})
                    cache = output[name]
                    steps.append(output.logits)
            else:
                ids, mask = self._padded(self.sources, "left")
                shift = torch.tensor([[0 if one is None else one.length()] for one in self.prefixes], device=ids.device)
                positions = positions_from_mask(mask) + shift
                output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
                for token in new.split(1, dim=1):
                    mask, positions = torch.cat([mask, torch.ones_like(token)], dim=1), positions[:, -1:] + 1
                    given = {name: output[name], "attention_mask": mask, "position_ids": positions, "use_cache": True}
                    output = model(input_ids=token, **given)
                    steps.append(output.logits)
        return [row[: len(target)] for row, target in zip(torch.cat(steps, dim=1), self.targets, strict=True)]

    def _run(self, ids: Tensor, mask: Tensor | None = None, **given: Any) -> Tensor:
        """Logits, or an encoder's hidden states."""
        encodes = self.layout.kind == "encoder"
        model = self.model.base_model if encodes else self.model
        output = forward_with_prefixes(model, self.layout, ids, mask, **given)
        outputs: Tensor = output[0] if encodes else output.logits
        return outputs

    def _ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(rows, device=self.device)

    def _padded(self, rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
        """Ids and mask; padding repeats the first id, so that a model that sees padding gives other outputs."""
        longest = max(map(len, rows))
        ids = torch.tensor([[row[0]] * longest for row in rows])
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            real = slice(longest - len(row), None) if side == "left" else slice(len(row))
            ids[number, real], mask[number, real] = torch.tensor(row), 1
        return ids.to(self.device), mask.to(self.device)


def _apart(rows: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """The largest difference of a row from its reference, relative to that.

    Raises:
        ValueError: A number is not finite, or a row has another shape.
    """
    worst = 0.0
    for one, reference in zip(rows, references, strict=True):
        one, reference = one.float(), reference.float()
        if one.shape != reference.shape:
            raise ValueError(f"an output has the shape {tuple(one.shape)}, not {tuple(reference.shape)}.")
        if not bool(one.isfinite().all() and reference.isfinite().all()):
            raise ValueError("the model's outputs are not finite.")
        worst = max(worst, float((one - reference).norm() / reference.norm().clamp(min=1e-30)))
    return worst
