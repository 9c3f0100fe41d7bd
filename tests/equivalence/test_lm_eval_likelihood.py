"""Log-likelihoods for lm-eval, with shared contexts and mixed prefixes, against one forward pass for each request."""

import random

import pytest
import torch

from oracles import greedy_by_recomputation, outputs_of
from prefixtune.errors import DataError
from prefixtune.interop.lm_eval.likelihood import Continuation, score_continuations


@torch.no_grad()
def alone(backbone, one):
    """The log-likelihood from a row of its own, and whether each of its tokens is the likeliest."""
    logits = outputs_of(backbone, one.context, one.tokens[:-1], one.prefix)[-len(one.tokens) :]
    labels = torch.tensor(one.tokens)
    logprobs = logits.double().log_softmax(-1)[torch.arange(len(labels)), labels]
    return float(logprobs.sum()), bool((logits.argmax(-1) == labels).all())


def make_requests(random_ids, prefixes, *, count=40, seed=0):
    """Contexts that come several times, continuations of one token and of many, equal ones, all prefixes in turn."""
    rng = random.Random(seed)
    contexts = [tuple(random_ids(rng.choice([1, 2, 5, 30]), seed=n)) for n in range(8)]
    endings = [tuple(random_ids(rng.choice([1, 1, 2, 9, 40]), seed=100 + n)) for n in range(12)]
    return [Continuation(rng.choice(contexts), rng.choice(endings), rng.choice(prefixes)) for _ in range(count)]


def check(backbone, requests, batch_size):
    results = score_continuations(backbone, requests, batch_size=batch_size)
    expected = [alone(backbone, one) for one in requests]
    assert [sure for _, sure in results] == [sure for _, sure in expected]
    torch.testing.assert_close([total for total, _ in results], [total for total, _ in expected], rtol=2e-5, atol=2e-4)


def test_log_likelihoods_are_those_of_one_row_each(backbone, random_prefix, random_ids):
    prefixes = [None, random_prefix(backbone, 3, seed=1), random_prefix(backbone, 6, seed=2)]
    requests = make_requests(random_ids, prefixes, count=24)
    for one in requests[:4]:
        # Of no token where a text ends at once, which nobody asks for.
        if written := greedy_by_recomputation(backbone, one.context, one.prefix, 3):
            requests.append(Continuation(one.context, tuple(written), one.prefix))
    check(backbone, requests, batch_size=7)


@pytest.mark.parametrize("name", ["llama", "t5", "jamba"])
def test_an_empty_context_or_continuation_is_refused(tiny_backbone, random_ids, name):
    backbone = tiny_backbone(name)
    good = Continuation((5, 6), tuple(random_ids(3)), None)
    for bad in (Continuation((5, 6), (), None), Continuation((), (5,), None)):
        for asked in ([bad], [bad, good], [good, bad]):
            with pytest.raises(DataError):
                score_continuations(backbone, asked, batch_size=4)


def test_encoder_decoders_score_too(encoder_decoder, random_prefix, random_ids):
    prefixes = [None, random_prefix(encoder_decoder, 3, seed=1)]
    check(encoder_decoder, make_requests(random_ids, prefixes, count=16), batch_size=5)


@pytest.mark.parametrize("name", ["jamba", "bamba"])
def test_models_that_cannot_be_packed_get_padded_rows(tiny_backbone, random_prefix, random_ids, name):
    backbone = tiny_backbone(name)
    assert not backbone.layout.packable
    prefixes = [None, random_prefix(backbone, 3, seed=1)]
    check(backbone, make_requests(random_ids, prefixes, count=12), batch_size=4)


def test_each_batch_is_reported_once_and_equal_requests_are_computed_once(tiny_backbone, random_ids, monkeypatch):
    backbone = tiny_backbone("llama")
    context, ending = tuple(random_ids(5)), tuple(random_ids(3, seed=1))
    requests = [Continuation(context, ending, None), Continuation(context, ending[:1], None)] * 3
    seen = []
    rows = []
    forward = type(backbone).forward

    def counting(self, input_ids, *rest, **options):
        rows.append(input_ids.numel())
        return forward(self, input_ids, *rest, **options)

    assert backbone.head, "it is found out by passes of its own, once"
    monkeypatch.setattr(type(backbone), "forward", counting)
    results = score_continuations(backbone, requests, batch_size=2, on_batch=seen.append)
    assert seen[-1] == len({one.key for one in requests}) <= len(results) == 6
    # The context but its last token once, then that token before each continuation but its last token.
    assert rows == [4 + 3 + 1]


def test_many_continuations_of_a_short_context_are_not_one_wide_row(tiny_backbone, random_ids, monkeypatch):
    """Attention within a group costs the square of its positions: windows of a long text must not form one group."""
    backbone = tiny_backbone("llama", max_position_embeddings=1000)
    requests = [Continuation((1,), tuple(random_ids(300, seed=n)), None) for n in range(4)]
    groups = []
    forward = type(backbone).forward

    def watching(self, *rest, **options):
        groups.extend(group.stop - group.start for group in options["packing"].groups)
        return forward(self, *rest, **options)

    assert backbone.head, "it is found out by passes of its own, once"
    monkeypatch.setattr(type(backbone), "forward", watching)
    score_continuations(backbone, requests, batch_size=4)
    assert groups == [300] * 4
