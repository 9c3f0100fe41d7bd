"""Slow and plain ways to what the tests compare with: padded rows, decoding without a cache, caches filled by hand."""

import torch
from torch.nn import functional as F

from prefixtune.attention.layout import cache_argument
from prefixtune.backbone.loss import batch_loss


def pad_rows(rows, side, pad_id):
    """Ids, mask, and where each row's text begins."""
    width = max(map(len, rows))
    firsts = [width - len(row) if side == "left" else 0 for row in rows]
    ids, mask = torch.full((len(rows), width), pad_id), torch.zeros(len(rows), width, dtype=torch.long)
    for number, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        ids[number, first : first + len(row)], mask[number, first : first + len(row)] = torch.tensor(row), 1
    return ids, mask, firsts


def outputs_of(backbone, prompt, written, prefix):
    """Logits, or an encoder's states, from a row of its own without a mask, with the prefix injected.

    At all tokens; of an encoder-decoder, at those that its decoder reads.
    """
    if backbone.kind == "encoder-decoder":
        read = torch.tensor([[backbone.decoder_start_id, *written]])
        output = backbone.forward(torch.tensor([list(prompt)]), decoder_input_ids=read, prefixes=prefix)
    else:
        output = backbone.forward(torch.tensor([[*prompt, *written]]), prefixes=prefix)
    return output[0][0]


def outputs_together(backbone, prompts, written, prefixes, *, side="right", padding=None):
    """The same of several texts in one padded batch: the outputs of each row where it is no padding."""
    padding = backbone.pad_id if padding is None else padding
    if backbone.kind == "encoder-decoder":
        ids, mask, _ = pad_rows(prompts, side, padding)
        read, real, _ = pad_rows([[backbone.decoder_start_id, *one] for one in written], side, padding)
        more = {"decoder_input_ids": read, "decoder_attention_mask": real}
    else:
        ids, mask, _ = pad_rows([[*one, *other] for one, other in zip(prompts, written, strict=True)], side, padding)
        real, more = mask, {}
    outputs = backbone.forward(ids, mask, prefixes=prefixes, **more)[0]
    return [row[seen.bool()] for row, seen in zip(outputs, real, strict=True)]


def losses_one_by_one(backbone, prefix, examples):
    """The losses of all targets' tokens, each pair of a source and a target in a row of its own without a mask."""
    return torch.cat(
        [
            F.cross_entropy(
                outputs_of(backbone, example.prompt, target[:-1], prefix)[-len(target) :],
                torch.tensor(target),
                reduction="none",
            )
            for example in examples
            for target in example.targets
        ]
    )


def losses_and_gradients(backbone, prefix, batch, fronts):
    """The losses of a batch, and their gradients at the prefix that `fronts` are parts of."""
    losses = batch_loss(backbone, fronts[0] if len(fronts) == 1 else list(fronts), batch)
    return [losses, *torch.autograd.grad(losses.square().sum(), prefix.tensors())]


def summed(parts):
    """The losses one after the other, and the sum of the gradients."""
    gradients = [torch.stack(same).sum(0) for same in zip(*(part[1:] for part in parts), strict=True)]
    return [torch.cat([part[0] for part in parts]), *gradients]


@torch.no_grad()
def greedy_by_recomputation(backbone, prompt, prefix, count):
    """The likeliest token again and again, each time running everything anew."""
    written = []
    while len(written) < count:
        token = int(outputs_of(backbone, prompt, written, prefix)[-1].argmax())
        if token == backbone.eos_id:
            break
        written.append(token)
    return written


def beams_by_recomputation(backbone, prompt, prefix, patch, **options):
    """transformers' beam search over a forward that has no cache and takes the prefix by injection."""
    model, original, widths = backbone.model, backbone.model.forward, []
    ids, reads_apart = torch.tensor([prompt]), backbone.kind == "encoder-decoder"

    def recompute(input_ids=None, attention_mask=None, decoder_input_ids=None, **_):
        read = decoder_input_ids if reads_apart else input_ids
        widths.append(read.shape[1])
        with patch.context() as inner:
            inner.setattr(model, "forward", original)
            if reads_apart:
                return backbone.forward(ids.expand(len(read), -1), decoder_input_ids=read, prefixes=prefix)
            return backbone.forward(read, prefixes=prefix)

    begun = {"decoder_start_token_id": backbone.decoder_start_id} if reads_apart else {}
    with patch.context() as outer, torch.no_grad():
        outer.setattr(model, "forward", recompute)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            use_cache=False,
            do_sample=False,
            pad_token_id=backbone.pad_id,
            eos_token_id=backbone.eos_id,
            **begun,
            **options,
        )
    first = 1 if reads_apart else len(prompt)
    assert widths == list(range(first, first + len(widths))), "the oracle must have seen everything at every step"
    written = output[0, first:].tolist()
    return written[: written.index(backbone.eos_id)] if backbone.eos_id in written else written


def make_end_likely(backbone):
    """An end token that is now and then likely lets beams end at different lengths."""
    with torch.no_grad():
        head = backbone.model.get_output_embeddings().weight
        head[backbone.eos_id] += 0.5 * head.norm(dim=1).mean() * head.mean(0) / head.mean(0).norm()


def cache_of(prefix, kept=None, rows=1):
    """transformers' own cache, filled with a prefix, or with some of its positions."""
    from transformers import DynamicCache

    cache, seen = DynamicCache(), range(prefix.length("decoder")) if kept is None else kept
    for number, layer in enumerate(prefix.layers["decoder"]):
        cache.update(*(part[None, :, list(seen)].expand(rows, -1, -1, -1) for part in layer), number)
    return cache


def behind_cache(model, cache, ids, start, **options):
    """What an untouched model makes of a text behind a cache, at positions from `start` on."""
    positions = torch.arange(start, start + ids.shape[1])[None]
    return model(input_ids=ids, position_ids=positions, **{cache_argument(model): cache}, **options)
