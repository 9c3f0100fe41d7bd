"""Run a frozen model with prefixes in front of its attention.

The attention function in transformers' registry finds the prefixes in a context variable, puts each row's own keys and
values in front and widens the mask. Gradients flow through it, under checkpointing too.

Positions: a decoder-only model's text starts at position P of its row's prefix; in encoders and encoder-decoders the
text's positions are not shifted, and the prefix has no relative position bias. Sliding windows count text positions
only: the prefix stays visible to every token.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prefixtune.attention.injection import AttentionBackend, Injection, batch_prefixes, current_injection, injecting
from prefixtune.attention.layout import Layout, main_device, using
from prefixtune.attention.masks import positions_from_mask
from prefixtune.attention.packing import Packing
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.prefix.prefix import Prefix, check_fits
from prefixtune.prefix.rotation import longrope_limit

overridden_positions: contextvars.ContextVar[Mapping[str, Tensor]] = contextvars.ContextVar("overridden_positions")


def takes_logits_to_keep(model: Any) -> bool:
    """Whether the model can compute logits at chosen positions alone."""
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters


def forward_with_prefixes(
    model: Any,
    layout: Layout,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Tensor | None = None,
    *,
    prefixes: Prefix | Sequence[Prefix | None] | None = None,
    packing: Packing | None = None,
    decoder_input_ids: Int[Tensor, "R Td"] | None = None,
    decoder_attention_mask: Tensor | None = None,
    source_rows: Int[Tensor, " R"] | None = None,
    hidden: Sequence[Sequence[int]] | None = None,
    **kwargs: Any,
) -> Any:
    """Run the model with prefixes in front; gradients reach the prefixes.

    Args:
        model: The frozen model, probed before.
        layout: What `probe` found.
        input_ids: A batch, padded on either side; or one packed row. For an encoder-decoder, the sources.
        attention_mask: (B, T), nonzero where a token is real; None: all are. Not with `packing`.
        prefixes: One for all rows, or one per row, of any lengths; None: no prefix (in a list: for that row).
        packing: The structure of a packed row (B = 1). Where it has a `prefix_index`, that counts through `prefixes`.
        decoder_input_ids: Encoder-decoder only: what the decoder reads.
        decoder_attention_mask: (R, Td), nonzero where a token is real.
        source_rows: Which source each of the decoder's rows attends to, where several share one (then with one prefix
            for all); None: each has its own.
        hidden: Positions of the prefix that each row of `input_ids` does not see, with one prefix for all: of the sites
            `encoder` and `cross` of an encoder-decoder, else of the only site; None: every row sees all. In a packed
            row, the groups say it.
        **kwargs: For the model, such as `logits_to_keep`.

    Returns:
        The model's output; its logits are (B, T, vocabulary), the prefix has none.

    Raises:
        ConfigError: The numbers of rows and prefixes differ, a packed row comes with a mask or several prefixes,
            `decoder_input_ids` are missing or given to a model without a decoder of its own, or texts are on both sides
            of the model's original length (LongRoPE).
        BackboneError: A prefix does not fit the model.
    """
    rows = [prefixes] if prefixes is None or isinstance(prefixes, Prefix) else list(prefixes)
    if (decoder_input_ids is None) == (layout.kind == "encoder-decoder"):
        raise ConfigError(
            f"{type(model).__name__} is of kind {layout.kind!r}: decoder_input_ids go with an encoder-decoder only.",
            hint="give them to an encoder-decoder, and to no other model.",
        )
    for prefix in rows:
        if prefix is not None:
            check_fits(prefix, layout.geometry, type(model).__name__)
    # In float32 until a layer casts them: so the gradients of a row's groups add up in float32 too.
    exact = torch.float32, main_device(model)
    if packing is None:
        if len(rows) not in (1, len(input_ids)) or (source_rows is not None and len(rows) > 1):
            raise ConfigError(f"{len(rows)} prefixes for {len(input_ids)} rows.", hint="give one, or one for each.")
        injection = batch_prefixes(rows, layout, *exact)
    else:
        _check_packed(model, layout, packing, len(rows), len(input_ids), attention_mask)
        by_prefix = [batch_prefixes([prefix], layout, *exact).layers for prefix in rows]
        injection = Injection(layout.layer_of, packing=packing, layers_by_prefix=by_prefix)
    if hidden is not None:
        injection = _hide(injection, layout, hidden, source_rows)
    call: dict[str, Any] = dict(kwargs)
    if layout.kind != "encoder":
        call["use_cache"] = False
    if packing is None:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        call |= _positions_of_batch(model, layout, mask, rows, decoder_attention_mask)
    else:
        # A ready-made 4-D mask stops transformers from building one; the attention function goes by the packing.
        mask = decoder_attention_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
        if layout.kind == "decoder":
            shifts = packing.shifts([0 if prefix is None else prefix.length() for prefix in rows])
            call["position_ids"] = (packing.positions() + shifts).to(input_ids.device)
    overrides: dict[str, Tensor] = {}
    if decoder_input_ids is not None:
        call |= {"decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask}
        if packing is not None:
            overrides = {"encoder": packing.positions("encoder")[0], "decoder": packing.positions("decoder")[0]}
    _check_lengths(model, call.get("position_ids"), packing)
    with injecting(injection), _override_positions(model, layout, overrides):
        if source_rows is None:
            return model(input_ids=input_ids, attention_mask=mask, **call)
        encoder = model.get_encoder()
        encoded = encoder(input_ids=input_ids, attention_mask=mask, return_dict=True)
        encoded.last_hidden_state = encoded.last_hidden_state[source_rows]
        return model(encoder_outputs=encoded, attention_mask=mask[source_rows], **call)


def _check_packed(
    model: Any, layout: Layout, packing: Packing, num_prefixes: int, batch: int, mask: Tensor | None
) -> None:
    counted = num_prefixes == 1 if packing.prefix_index is None else num_prefixes > max(packing.prefix_index)
    if mask is not None or batch > 1 or not counted or not (layout.packable or layout.kind == "decoder"):
        raise ConfigError(
            f"{type(model).__name__} takes no such row: a packed one is a batch of its own, without a mask, with as "
            "many prefixes as its packing counts.",
            hint="use `collate`, which pads them.",
        )


def _hide(
    injection: Injection, layout: Layout, hidden: Sequence[Sequence[int]], source_rows: Tensor | None
) -> Injection:
    """One prefix for all rows, of which each row sees a part.

    Raises:
        ConfigError: The rows are packed, or have prefixes of their own.
    """
    if injection.packing is not None or any(mask is not None for mask in injection.prefix_mask.values()):
        raise ConfigError("hidden positions go with padded rows and one prefix.", hint="use `Group.hidden`, or none.")
    masks = dict(injection.prefix_mask)
    for site, layers in injection.layers.items():
        if site != "decoder" or layout.kind == "decoder":
            length = layers[0][0].shape[2]
            rows = [[place not in positions for place in range(length)] for positions in map(set, hidden)]
            mask = torch.tensor(rows, device=layers[0][0].device)
            masks[site] = mask[source_rows] if site == "cross" and source_rows is not None else mask
    return replace(injection, prefix_mask=masks)


def _positions_of_batch(
    model: Any, layout: Layout, mask: Tensor, prefixes: Sequence[Prefix | None], decoder_mask: Tensor | None
) -> dict[str, Tensor]:
    """Positions of padded rows, as arguments of the model: counted from a row's first real token.

    In models with an encoder, only where they rotate by position: so a prefix does not move with a row's padding, as
    the keys of the text do. Those with a table of positions count in ways of their own.
    """
    if layout.kind == "decoder":
        lengths = [0 if prefix is None else prefix.length() for prefix in prefixes]
        return {"position_ids": positions_from_mask(mask) + torch.tensor(lengths, device=mask.device)[:, None]}
    parameters = inspect.signature(type(model).forward).parameters
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    positions = {}
    if "position_ids" in parameters and table is None:
        positions["position_ids"] = positions_from_mask(mask)
    if "decoder_position_ids" in parameters and decoder_mask is not None:
        positions["decoder_position_ids"] = positions_from_mask(decoder_mask)
    return positions


def forward_with_backend(
    model: Any,
    layout: Layout,
    input_ids: Int[Tensor, "1 T"],
    position_ids: Int[Tensor, "1 T"],
    backend: AttentionBackend,
    logits_to_keep: Int[Tensor, " N"] | None,
    encoded: Float[Tensor, "1 S E"] | None = None,
) -> Float[Tensor, "1 _N V"]:
    """Run a model on the next tokens of many texts in one row, with a backend that keeps their keys and values.

    Args:
        model: The frozen model, probed before; its rows can be packed.
        layout: What `probe` found.
        input_ids: The tokens; those of the decoder.
        position_ids: Each token's position in its text, counted from where the backbone's positions start: from the
            prefix's start in a decoder-only model.
        backend: Keeps the texts' keys and values, and attends to them.
        logits_to_keep: At which indices of the row logits are wanted; None: at all.
        encoded: Encoder-decoder only: encoded sources (see `run_encoder`), one after the other, whose keys and values
            are to be kept; without new sources, any single position.
    """
    injection = Injection(layout.layer_of, backend=backend)
    # A ready-made 4-D mask stops transformers from building one.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    call: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
    if logits_to_keep is not None:
        call["logits_to_keep"] = logits_to_keep
    if layout.kind == "encoder-decoder":
        from transformers.modeling_outputs import BaseModelOutput

        call |= {"decoder_input_ids": input_ids, "decoder_attention_mask": mask}
        call["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded)
        # Mixtures of experts look for it.
        call["encoder_outputs"].router_logits = None
    else:
        call |= {"input_ids": input_ids, "position_ids": position_ids}
    with injecting(injection), _override_positions(model, layout, {"decoder": position_ids[0]}):
        logits: Tensor = model(**call).logits
    return logits


def run_encoder(
    model: Any, layout: Layout, input_ids: Int[Tensor, "1 S"], prefix: Prefix | None
) -> Float[Tensor, "1 S E"]:
    """The hidden states of a source in an encoder-decoder's encoder, with the prefix in front at the site `encoder`."""
    injection = batch_prefixes([prefix], layout, model.dtype, main_device(model))
    with injecting(injection):
        mask = torch.ones_like(input_ids)
        output = model.get_encoder()(input_ids=input_ids, attention_mask=mask, return_dict=True)
    encoded: Tensor = output.last_hidden_state
    return encoded


@contextlib.contextmanager
def _override_positions(model: Any, layout: Layout, positions: Mapping[str, Int[Tensor, " T"]]) -> Iterator[None]:
    """While the block runs, an encoder-decoder's position embeddings use these positions, by site.

    Such models take no `position_ids`, but their position embeddings do. Models with a relative bias have none of
    these. Only calls of this context are concerned; another thread may use the model meanwhile.
    """
    if not positions or layout.kind != "encoder-decoder":
        yield
        return
    given = {site: position.to(main_device(model)) for site, position in positions.items()}

    def override(site: str, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        current = overridden_positions.get({})
        # While torch registers or removes a hook, another thread's call meets it without keyword arguments.
        return None if kwargs is None or site not in current else (args, {**kwargs, "position_ids": current[site]})

    with contextlib.ExitStack() as stack:
        stack.enter_context(using(overridden_positions, given))
        for site, part in (("encoder", model.get_encoder()), ("decoder", model.get_decoder())):
            embedding = getattr(part, "embed_positions", None)
            if embedding is not None:
                hook = functools.partial(override, site)
                stack.callback(embedding.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _check_lengths(model: Any, position_ids: Int[Tensor, "B T"] | None, packing: Packing | None) -> None:
    """Refuse texts on both sides of LongRoPE's limit: the longest one of a call turns the keys of all."""
    limit = longrope_limit(model.config.get_text_config(decoder=True))
    if limit is None or position_ids is None:
        return
    texts = position_ids if packing is None else position_ids[0].split([g.stop - g.start for g in packing.groups])
    if len({bool((text >= limit).any()) for text in texts}) > 1:
        raise ConfigError(
            f"texts of one batch are on both sides of the model's original length of {limit} positions (LongRoPE).",
            hint="compute them apart, with a batch size of 1.",
        )


@contextlib.contextmanager
def gradient_checkpointing(model: Any, enabled: bool = True) -> Iterator[None]:
    """Recompute layers in the backward pass instead of keeping their activations, while the block runs.

    transformers recomputes only layers that are marked as training, so the layers (not what is inside them) are
    marked; as dropout is silenced at load, this changes no number.

    Raises:
        BackboneError: The model does not support it.
    """
    if not enabled:
        yield
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise BackboneError(f"{type(model).__name__} cannot checkpoint gradients.", hint="train without it.")
    # transformers 5.24 renamed the switch.
    names = ("activation_checkpointing", "gradient_checkpointing")
    name = next(name for name in names if hasattr(model, f"{name}_enable"))
    getattr(model, f"{name}_enable")({"use_reentrant": False, "context_fn": _recompute_with_prefixes})
    # It also hooks the embeddings so that their output takes gradients, and forgets the hooks: not needed here.
    model.disable_input_require_grads()
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()
        model.eval()


def _recompute_with_prefixes() -> tuple[
    contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]
]:
    """A layer's forward pass, as it is; and its repetition in the backward pass, with the prefixes that it had."""
    injection = current_injection.get()
    return contextlib.nullcontext(), contextlib.nullcontext() if injection is None else injecting(injection)
