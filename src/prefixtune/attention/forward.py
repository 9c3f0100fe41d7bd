"""Put prefixes in front of a frozen model's attention: the only place that touches transformers' internals.

Two routes, which must agree (see `tests/equivalence`):

- *injected*: one attention function in transformers' registry takes the prefix as an argument of the call, puts each
  row's own keys and values in front and widens the mask. Gradients flow through it, under checkpointing too.
- *prefilled*: for generation with decoder-only models, the prefix is a cache that is already filled, so that a decode
  step costs no more.

DeBERTa's attention is outside that registry; hooks, for the length of a call, give it the prefix (see `disentangled`).

The model stays untouched: no class is swapped, no forward copied, nothing cached on a module; two prefixes can be used
at once. Knows nothing of tokenizers, files, artifacts or training.

Positions: a decoder-only model's text starts at position P of its row's prefix; in encoders and encoder-decoders the
text's positions are not shifted, and the prefix carries no relative position bias. Sliding windows count text positions
only: the prefix stays visible to every token.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prefixtune.attention.injection import AttentionBackend, Injection, batch_prefixes, injecting
from prefixtune.attention.layout import Layout, main_device
from prefixtune.attention.packing import Packing
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.prefix.prefix import Prefix, check_fits

__all__ = ["forward_with_backend", "forward_with_prefixes", "gradient_checkpointing", "run_encoder"]

overridden_positions: contextvars.ContextVar[Mapping[str, Tensor]] = contextvars.ContextVar("overridden_positions")


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
    **kwargs: Any,
) -> Any:
    """Run the model with prefixes in front; gradients reach the prefixes.

    Args:
        model: The frozen model, probed before.
        layout: What `probe` found.
        input_ids: A batch, padded on either side; or one packed row. For an encoder-decoder, the sources.
        attention_mask: (B, T), nonzero where a token is real; None: all are. Not with `packing`.
        prefixes: One for all rows, or one per row, of any lengths; None: no prefix (in a list: for that row).
        packing: The structure of a packed row (B = 1). Where it names owners, `prefixes` has one for each of them.
        decoder_input_ids: Encoder-decoder only: what the decoder reads.
        decoder_attention_mask: (R, Td), nonzero where one is real.
        source_rows: Which source each of the decoder's rows looks at, where several share one (then with one prefix for
            all); None: each has its own.
        **kwargs: For the model, such as `logits_to_keep`.

    Returns:
        The model's output; its logits are (B, T, vocabulary), the prefix has none.

    Raises:
        ConfigError: The counts of rows and prefixes differ, a packed row comes with a mask or several prefixes, or
            `decoder_input_ids` are missing or given to a model without a decoder of its own.
        BackboneError: A prefix does not fit the model.
    """
    rows = [prefixes] if prefixes is None or isinstance(prefixes, Prefix) else list(prefixes)
    batch = input_ids.shape[0]
    has_prefix_index = packing is not None and packing.prefix_index is not None
    if packing is not None and has_prefix_index:
        last = max(packing.prefix_index or (0,))
        if last >= len(rows):
            raise ConfigError(
                f"{len(rows)} prefixes, but a group's owner is {last}.",
                hint="give one prefix for each owner, counted from 0.",
            )
    elif len(rows) not in (1, batch) or (source_rows is not None and len(rows) > 1):
        raise ConfigError(
            f"{len(rows)} prefixes for {batch} rows.", hint="give one for all rows, or one (or None) per row."
        )
    if packing is not None and (attention_mask is not None or (len(rows) > 1 and not has_prefix_index) or batch > 1):
        raise ConfigError(
            "a packed row stands alone, without a mask, with one prefix, or with owners of its groups.",
            hint="use a padded batch.",
        )
    if (decoder_input_ids is None) == (layout.kind == "encoder-decoder"):
        raise ConfigError(
            f"{type(model).__name__} is of kind {layout.kind!r}: decoder_input_ids go with an encoder-decoder only.",
            hint="give them to an encoder-decoder, and to no other model.",
        )
    if decoder_input_ids is None and (decoder_attention_mask is not None or source_rows is not None):
        raise ConfigError(
            "decoder_attention_mask and source_rows go with decoder_input_ids.", hint="leave them out for this model."
        )
    if packing is not None and layout.kind != "decoder" and not layout.packable:
        raise ConfigError(f"{type(model).__name__} takes no packed rows.", hint="use `collate`, which pads them.")
    for prefix in rows:
        if prefix is not None:
            check_fits(prefix, layout.geometry, type(model).__name__)
    infix = any(prefix is not None and prefix.placement == "infix" for prefix in rows)
    if infix and has_prefix_index:
        raise ConfigError("an infix stands in a row by itself.", hint="run it without other prefixes.")
    if infix and (packing is None or layout.kind != "decoder"):
        raise ConfigError(
            "an infix stands between source and target, which only a packed row tells apart.",
            hint="use `collate` with a decoder-only model.",
        )
    # In float32 until a layer casts it: so the gradients of a row's groups gather in float32 too.
    place = layout.geometry, torch.float32, main_device(model)
    if has_prefix_index:
        several = [batch_prefixes([row], *place).layers for row in rows]
        injection = Injection(layout.layer_of, packing=packing, several=several, infix=infix)
    else:
        made = batch_prefixes(rows, *place)
        injection = Injection(layout.layer_of, made.layers, made.visible, packing, infix=infix)
    call: dict[str, Any] = {**kwargs, "prefix_injection": injection}
    if layout.kind != "encoder":
        call["use_cache"] = False
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if packing is not None:
        # A ready-made 4-D mask stops transformers from building one; the attention function goes by the packing.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    if layout.kind == "decoder":
        lengths = [0 if prefix is None else prefix.length() for prefix in rows]
        if packing is not None:
            shift = packing.shifts(lengths) * (packing.in_targets() if infix else 1)
            call["position_ids"] = (packing.positions() + shift).to(input_ids.device)
        else:
            shift = torch.tensor(lengths, device=input_ids.device)[:, None]
            call["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0) + shift
    elif packing is None:
        _set_positions(call, model, mask, decoder_attention_mask)
    beside = contextlib.nullcontext() if layout.forwards_kwargs else injecting(injection)
    packed = {}
    if packing is not None and layout.kind == "encoder-decoder":
        packed = {site: packing.positions(site)[0] for site in ("encoder", "decoder")}
    with beside, _override_positions(model, layout, packed):
        if layout.kind != "encoder-decoder":
            return model(input_ids=input_ids, attention_mask=mask, **call)
        call["decoder_input_ids"] = decoder_input_ids
        call["decoder_attention_mask"] = mask if packing is not None else decoder_attention_mask
        if source_rows is not None:
            encoder = model.get_encoder()
            encoded = encoder(input_ids=input_ids, attention_mask=mask, prefix_injection=injection, return_dict=True)
            encoded.last_hidden_state = encoded.last_hidden_state[source_rows]
            return model(encoder_outputs=encoded, attention_mask=mask[source_rows], **call)
        return model(input_ids=input_ids, attention_mask=mask, **call)


def forward_with_backend(
    model: Any,
    layout: Layout,
    input_ids: Int[Tensor, "1 T"],
    position_ids: Int[Tensor, "1 T"],
    serving: AttentionBackend,
    logits_to_keep: Int[Tensor, " N"] | None,
    encoded: Float[Tensor, "1 S E"] | None = None,
) -> Float[Tensor, "1 _N V"]:
    """Run a model that writes on the next tokens of many texts, which stand side by side in one row.

    Args:
        model: The frozen model, probed before; its rows can be packed.
        layout: What `probe` found.
        input_ids: The tokens; those of the decoder.
        position_ids: Where each stands in its text, counted from where the backbone's positions start: from the
            prefix's start in a decoder-only model.
        serving: Keeps the texts' keys and values.
        logits_to_keep: At which places of the row logits are wanted; None: at all.
        encoded: Encoder-decoder only: encoded sources (see `run_encoder`), side by side, whose keys and values are to
            be kept; where there are none, any single position.
    """
    injection = Injection(layout.layer_of, serving=serving)
    # A ready-made 4-D mask stops transformers from building one.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    call: dict[str, Any] = {"attention_mask": mask, "use_cache": False, "prefix_injection": injection}
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
    beside = contextlib.nullcontext() if layout.forwards_kwargs else injecting(injection)
    with beside, _override_positions(model, layout, {"decoder": position_ids[0]}):
        logits: Tensor = model(**call).logits
    return logits


def run_encoder(
    model: Any, layout: Layout, input_ids: Int[Tensor, "1 S"], prefix: Prefix | None
) -> Float[Tensor, "1 S E"]:
    """What an encoder-decoder's encoder makes of a source, with the prefix in front at the site `encoder`."""
    made = batch_prefixes([prefix], layout.geometry, model.dtype, main_device(model))
    injection = Injection(layout.layer_of, made.layers, made.visible)
    with contextlib.nullcontext() if layout.forwards_kwargs else injecting(injection):
        output = model.get_encoder()(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            prefix_injection=injection,
            return_dict=True,
        )
    encoded: Tensor = output.last_hidden_state
    return encoded


def _set_positions(call: dict[str, Any], model: Any, mask: Tensor, decoder_mask: Tensor | None) -> None:
    """Count positions from a row's first real token on, in models that rotate by position.

    A prefix does not move with a row's padding, as the keys of the text do. Tables of positions are left to the models,
    which count in ways of their own.
    """
    taken = inspect.signature(type(model).forward).parameters
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if "position_ids" in taken and table is None:
        call["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    if "decoder_position_ids" in taken and decoder_mask is not None:
        call["decoder_position_ids"] = (decoder_mask.long().cumsum(-1) - 1).clamp(min=0)


@contextlib.contextmanager
def _override_positions(model: Any, layout: Layout, positions: Mapping[str, Int[Tensor, " T"]]) -> Iterator[None]:
    """While the block runs, an encoder-decoder's position embeddings are told where the tokens of a row stand, by site.

    Such models take no `position_ids`, but their position embeddings do. Models with a relative bias have none of
    these. Only calls of this context are told; another thread may use the model meanwhile.
    """
    if not positions or layout.kind != "encoder-decoder":
        yield
        return
    device = main_device(model)
    token = overridden_positions.set({site: places.to(device) for site, places in positions.items()})
    handles = []
    for site, part in (("encoder", model.get_encoder()), ("decoder", model.get_decoder())):
        embedding = getattr(part, "embed_positions", None)
        if embedding is not None:

            def tell(module: nn.Module, args: Any, given: dict[str, Any] | None = None, *, site: str = site) -> Any:
                told = overridden_positions.get({})
                # While torch registers or removes a hook, another thread's call meets it without keyword arguments.
                return None if given is None or site not in told else (args, {**given, "position_ids": told[site]})

            handles.append(embedding.register_forward_pre_hook(tell, with_kwargs=True))
    try:
        yield
    finally:
        overridden_positions.reset(token)
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def gradient_checkpointing(model: Any, enabled: bool = True) -> Iterator[None]:
    """Recompute layers in the backward pass instead of keeping their activations, while the block runs.

    transformers recomputes only layers that are marked as training, so the layers (not what is inside them) are
    marked; with the dropout silenced at load this changes no number.

    Raises:
        BackboneError: The model does not support it.
    """
    if not enabled:
        yield
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise BackboneError(
            f"{type(model).__name__} does not support gradient checkpointing.", hint="train without it."
        )
    # transformers 5.24 renamed the switch.
    names = ("activation_checkpointing", "gradient_checkpointing")
    name = next(name for name in names if hasattr(model, f"{name}_enable"))
    getattr(model, f"{name}_enable")({"use_reentrant": False})
    # It also hooks the embeddings so that their output takes gradients, and forgets the hooks: not needed here.
    model.disable_input_require_grads()
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()
        model.eval()
