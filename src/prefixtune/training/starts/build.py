"""Build the encoder of a run at its start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.loss import hidden_states_at
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data.batching import collate
from prefixtune.data.encoding import TokenizedExample
from prefixtune.data.labels import labels_of
from prefixtune.errors import ConfigError
from prefixtune.prefix.encoder import PrefixEncoder, fit
from prefixtune.prefix.geometry import Site, spell_lengths
from prefixtune.prefix.prefix import Prefix, content_hash
from prefixtune.training.config import TrainConfig
from prefixtune.training.starts import words
from prefixtune.training.starts.examples import ExamplePlan, start_from_plan
from prefixtune.training.starts.words import Start, from_words

VALUE_SCALE = 4.0
"""How much larger a step of the values is than one of the keys, with reparameterization `scaled`."""
_WORDS = 10
"""Positions of the words that the steps of a random start are as large as."""
_SAMPLE, _SAMPLE_BATCH = 64, 16
"""Examples whose hidden states standardize a head, and how many are computed together."""


def resolve_site_lengths(
    config: TrainConfig, backbone: Backbone, stored_start: Mapping[str, Any] | None = None
) -> dict[Site, int]:
    """The prefix length at each site of a run.

    Args:
        config: The run.
        backbone: The frozen model.
        stored_start: How the run that is resumed describes its start; None: it begins.

    Raises:
        BackboneError: The prefix to start from, whose length the run has, does not fit the backbone.
        CheckpointError: It cannot be read.
        ConfigError: The backbone has no such site, the text to start from has no token or fewer than P, or the model
            reads fewer words than the prefix has positions.
        DataError: The text to start from cannot be read.
    """
    lengths = config.site_lengths or dict.fromkeys(backbone.geometry, config.prefix_length)
    if config.initialization == "text":
        stored = (stored_start or {}).get("tokens")
        tokens = stored if isinstance(stored, int) and stored > 0 else len(words.text_ids(config, backbone))
        lengths = {site: length or tokens for site, length in lengths.items()}
    if config.initialization == "prefix" and not all(lengths.values()):
        known = (stored_start or {}).get("lengths") or load_prefix(config.init_prefix, backbone).lengths
        lengths = {site: length or known.get(site, 0) for site, length in lengths.items()}
    missing = [site for site in lengths if site not in backbone.geometry]
    if missing:
        notes = "".join(f" ({note})" for note in backbone.layout.notes)
        raise ConfigError(
            f"{backbone.name!r} has no site {', '.join(missing)}{notes}.",
            hint=f"choose from {', '.join(backbone.geometry)}.",
        )
    if config.initialization in ("words", "text"):
        words.check_words_fit(backbone, lengths)
    return lengths


@torch.random.fork_rng(devices=[])
def build_encoder(
    config: TrainConfig,
    backbone: Backbone,
    *,
    head_labels: Sequence[str] = (),
    examples: Sequence[TokenizedExample] = (),
    questions: Sequence[TokenizedExample] = (),
    plan: ExamplePlan | None = None,
    stored_start: Mapping[str, Any] | None = None,
) -> tuple[PrefixEncoder, Start]:
    """The trainable prefix of a run, at its start, and that start.

    Args:
        config: The run.
        backbone: The frozen model.
        head_labels: The labels of a head to train with it, in order; empty: no head. A start from a prefix with a head
            for the same labels goes on from that head, too.
        examples: With a head: what it is standardized by.
        questions: About the text that the run starts from, with their answers.
        plan: The examples to start from, where the run starts from some.
        stored_start: How the run that is resumed describes its start, which is in its state and is not computed again;
            None: it begins.

    Raises:
        BackboneError: The prefix to start from does not fit the backbone.
        CheckpointError: The prefix to start from cannot be read.
        ConfigError: The backbone has no such site, or the start does not fit the run.
    """
    torch.manual_seed(config.seed)
    lengths = resolve_site_lengths(config, backbone, stored_start) if plan is None else plan.site_lengths
    if stored_start is not None:
        start = Start(None, dict(stored_start))
    elif plan is not None:
        start = start_from_plan(config, backbone, plan)
    else:
        start = _start(config, backbone, lengths, questions)
    like = None
    if config.reparameterization == "scaled" and start.prefix is None:
        # A random start moves in steps of the size of some words' keys and values.
        like = from_words(backbone, TrainConfig.default("init_text"), dict.fromkeys(lengths, _WORDS))
    encoder = PrefixEncoder(
        config.reparameterization,
        {site: backbone.geometry[site] for site in lengths},
        lengths,
        embedding_size=backbone.hidden_size,
        bottleneck_size=config.bottleneck_size,
        start=start.prefix,
        head=(len(head_labels), backbone.head_size) if head_labels else None,
        value_scale=VALUE_SCALE,
        like=like,
        sinks=_sinks(backbone, plan) if plan is not None and stored_start is None else {},
    )
    if config.reparameterization == "mlp" and start.prefix is not None:
        start = replace(start, description={**start.description, "relative_fit_error": fit(encoder, start.prefix)})
    encoder.to(backbone.device)
    if encoder.head is not None:
        encoder.head.standardize(_sample_hidden(backbone, encoder.bake(), examples))
    if start.prefix is not None and start.prefix.head is not None:
        stored = labels_of(start.prefix)
        goes_on = encoder.head is not None and stored is not None and list(stored.names) == list(head_labels)
        if goes_on and encoder.head is not None:
            encoder.head.start_from(start.prefix.head)
        start = replace(start, description={**start.description, "head": "continued" if goes_on else "left out"})
    return encoder, start


def _start(
    config: TrainConfig, backbone: Backbone, lengths: Mapping[Site, int], questions: Sequence[TokenizedExample]
) -> Start:
    """The start of a prefix by the run's `initialization`."""
    kind = config.initialization
    if kind == "examples":
        raise ConfigError("initialization is 'examples', but there are none here.", hint="start from words.")
    if kind == "words":
        text, description = words.read_init_text(config.init_text)
        return Start(from_words(backbone, text, lengths), {"kind": kind, **description})
    if kind == "text":
        return words.from_text(config, backbone, lengths, questions)
    if kind == "prefix":
        given = load_prefix(config.init_prefix, backbone)
        if (own := given.lengths) != lengths:
            raise ConfigError(
                f"the prefix to start from has length {spell_lengths(own)}, but the run has {spell_lengths(lengths)}.",
                hint="set prefix_length, or sites, to its length.",
            )
        facts = {"file": Path(config.init_prefix).name, "hash": content_hash(given), "lengths": own}
        return Start(given.to(torch.float32), {"kind": kind, **facts})
    return Start(None, {"kind": kind})


def _sinks(backbone: Backbone, plan: ExamplePlan) -> dict[Site, list[int]]:
    """By site: the positions at which the examples begin, each of which was computed alone."""
    firsts = [first for first, _ in plan.blocks.values()]
    # An encoder-decoder's decoder starts from words.
    return {site: firsts for site in backbone.geometry if backbone.kind == "decoder" or site != "decoder"}


@torch.no_grad()
def _sample_hidden(backbone: Backbone, prefix: Prefix, examples: Sequence[TokenizedExample]) -> Float[Tensor, "N d"]:
    """Hidden states at the labels of the first examples."""
    firsts = range(0, min(len(examples), _SAMPLE), _SAMPLE_BATCH)
    chunks = [collate(backbone, examples[first : first + _SAMPLE_BATCH]) for first in firsts]
    return torch.cat([hidden_states_at(backbone, prefix, batch) for batch in chunks])
