"""PEFT's training forward as an oracle: the same tensors give the same loss and the same gradients."""

import peft
import pytest
import torch
from torch.nn import functional as F

from prefixtune.prefix.prefix import Prefix, flatten, unflatten

# PEFT warns of an argument that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

P = 6


def test_the_same_tensors_train_the_same(tiny_models, tiny_backbone, random_prefix, random_ids, assert_same):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=False)
    theirs = peft.get_peft_model(tiny_models("llama"), config).eval()
    backbone = tiny_backbone("llama")
    prefix = random_prefix(backbone, P)
    table = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        table.copy_(flatten(prefix.layers["decoder"]))

    texts = [random_ids(9, 1), random_ids(6, 2), random_ids(9, 3)]
    ids, mask = torch.full((3, 9), backbone.pad_id), torch.zeros(3, 9, dtype=torch.long)
    for number, text in enumerate(texts):
        ids[number, : len(text)], mask[number, : len(text)] = torch.tensor(text), 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100

    expected = theirs(input_ids=ids, attention_mask=mask, labels=labels)
    (flat,) = torch.autograd.grad(expected.loss, [table])
    wanted = Prefix({"decoder": unflatten(flat, backbone.geometry["decoder"])}).tensors()

    logits = backbone.forward(ids, mask, prefixes=prefix).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_same(logits[mask.bool()], expected.logits[mask.bool()])
    assert_same(loss, expected.loss)
    assert_same(torch.autograd.grad(loss, prefix.tensors()), wanted)
